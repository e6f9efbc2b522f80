"""The filters of one domain in mixed batches on a CPU: plain, or laid out once in the order of oneDNN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast import ops
from dwm_fast.ops.filters import Blocked, How, fit_blocked

_IN_A_ROW = 2
"""Calls in a row that want the other form before it takes the place of the one that is held."""


class DomainFilters:
    """A convolution's weight under one domain, in one form at a time; the output has the bits of torch's convolution.

    weight: the backbone's. bits: of one domain, packed.
    """

    def __init__(self, weight: Tensor, bits: Tensor) -> None:
        self._weight, self._bits = weight, bits
        self._form: Tensor | Blocked = self._plain()
        self._strays = 0
        self.nbytes = weight.numel() * weight.element_size()

    def conv2d(self, x: Tensor, bias: Tensor | None, how: How) -> Tensor:
        """The convolution of x, in the weight's dtype."""
        form, laid = self._form, fit_blocked(x, self._weight, bias, how)
        if isinstance(form, Blocked) == laid and not (isinstance(form, Blocked) and form.how != how):
            self._strays = 0
        else:
            self._strays += 1
            if self._strays >= _IN_A_ROW:
                self._strays, form = 0, self._exchanged(x if laid else None, how)
        if isinstance(form, Tensor):
            return F.conv2d(x, form, bias, *how)
        return form.conv2d(x) if laid and form.how == how else F.conv2d(x, self._plain(), bias, *how)

    def _plain(self) -> Tensor:
        return ops.apply(self._bits, [self._weight])[0]

    def _exchanged(self, x: Tensor | None, how: How) -> Tensor | Blocked:
        # Under inference mode it would be of tensors that no later call can take a gradient through.
        with torch.inference_mode(False), torch.no_grad():
            plain = self._plain()
            self._form = plain if x is None else Blocked(plain, x, how)
        return self._form
