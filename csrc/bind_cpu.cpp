// The CPU operations' library, in one translation unit: torch's headers take most of the time of a build.
#include <string>

#include "bind_bits.h"
#include "bind_coded_adam.h"
#include "bind_kept.h"
#include "bind_linear.h"
#include "bind_sample.h"
#include "bind_soft.h"
#include "bind_union.h"
#include "bind_update.h"

namespace {

std::string instruction_set() { return dwm::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(dwm_fast_cpu, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
