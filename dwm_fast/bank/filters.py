"""The filters of one domain in mixed batches on a CPU: plain, or laid out once in the order of oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.ops.filters import Blocked, Filters, How, Plain, fit, fit_blocked

_IN_A_ROW = 2
"""Calls in a row that want another form before it takes the place of the one that is held."""


class DomainFilters:
    """A convolution's weight under one domain, in one form at a time; the output has the bits of torch's convolution.

    weight: the backbone's. bits: of one domain, packed.

    Attributes:
        nbytes: of the plain weight; no form takes more.
    """

    def __init__(self, weight: Tensor, bits: Tensor) -> None:
        self._weight, self._bits = weight, bits
        self._form: Plain | Filters | Blocked = self._plain()
        self._strays = 0
        self._too_large: set[type[Plain | Filters | Blocked]] = set()
        self.nbytes = weight.numel() * weight.element_size()

    def conv2d(self, x: Tensor, bias: Tensor | None, how: How) -> Tensor:
        """The convolution of x, in the weight's dtype."""
        form, wanted = self._form, self._wanted(x, bias, how)
        if type(form) is wanted and not (isinstance(form, Blocked) and form.how != how):
            self._strays = 0
        else:
            self._strays += 1
            if self._strays >= _IN_A_ROW:
                form, self._strays = self._exchanged(wanted, x, how), 0
            elif not isinstance(form, Plain):
                form = self._plain()
        return form.conv2d(x) if isinstance(form, Blocked) else form.conv2d(x, bias, how)

    def _wanted(self, x: Tensor, bias: Tensor | None, how: How) -> type[Plain | Filters | Blocked]:
        laid, fits = (Blocked, fit_blocked) if x.is_contiguous() else (Filters, fit)
        return laid if laid not in self._too_large and fits(x, self._weight, bias, how) else Plain

    def _plain(self) -> Plain:
        return Plain(ops.apply(self._bits, [self._weight])[0])

    def _exchanged(self, wanted: type[Plain | Filters | Blocked], x: Tensor, how: How) -> Plain | Filters | Blocked:
        """The form that takes the place of the old one; the plain one where the other would take more bytes."""
        # Under inference mode it would be of tensors that no later call can take a gradient through.
        with torch.inference_mode(False), torch.no_grad():
            plain = self._form if isinstance(self._form, Plain) else self._plain()
            made = plain if wanted is Plain else wanted(plain.weight, x, how)  # type: ignore[call-arg]
        if not isinstance(made, Plain) and made.nbytes > self.nbytes:
            self._too_large.add(wanted)
            made = plain
        self._form = made
        return made  # another thread may want another form meanwhile
