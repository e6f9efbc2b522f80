// Which instruction set the CPU operations run with.
#include <string>

#include "bind_cpu.h"

namespace {

std::string instruction_set() { return dwm::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(dwm_fast_cpu, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dwm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
