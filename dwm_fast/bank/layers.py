"""Layers that serve several domains in one batch: samples sorted by domain, each part under its own values.

On the CPU every layer works part by part with the very calls that a single domain would make, so the results
are equal bit for bit. On other devices the parts are found on the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast.ops.backends import forced_backend
from dwm_fast.ops.bank import bank_conv2d, bank_linear, is_large, multiplies_bits
from dwm_fast.ops.blocks import bias_of
from dwm_fast.ops.conv2d import padded
from dwm_fast.ops.transforms import transformed

if TYPE_CHECKING:
    from dwm_fast.bank.filters import DomainFilters
    from dwm_fast.bank.stores import Store

Layer = Callable[[Tensor], Tensor]

_CACHED_BYTES = 2 << 20
"""Masked copies of a weight that are made together, before the first is multiplied."""


@dataclass(frozen=True)
class Batch:
    """How the running batch is sorted.

    offsets: int64 (D + 1,), on the device; domain d has samples offsets[d] : offsets[d + 1]. rows: int64
    (B,), the domain of each sample. samples: B. bounds: the offsets as numbers, known on the CPU only.
    """

    offsets: Tensor
    rows: Tensor
    samples: int
    bounds: tuple[int, ...]

    def parts(self, size: int) -> Iterator[tuple[int, slice]]:
        """(domain, its rows) for each domain that has samples, in a dimension of `size` rows."""
        self.check(size)
        for domain, (start, stop) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if start < stop:
                yield domain, slice(start, stop)

    def check(self, size: int) -> None:
        """NotByLayer unless a layer's first dimension is the batch."""
        if size != self.samples:
            raise NotByLayer(f"a layer got {size} rows for a batch of {self.samples} samples")


class NotByLayer(Exception):
    """The network folds other dimensions into the batch: its domains have to run one after the other."""


current_batch: ContextVar[Batch] = ContextVar("dwm_fast_bank_batch")


def by_part(x: Tensor, layer: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Run `layer(domain, rows)` on every part of dim 0 and join; where dim 1 differs, fill up with -inf."""
    results = [layer(domain, x[part]) for domain, part in current_batch.get().parts(x.shape[0])]
    if len(results) == 1:
        return results[0]
    width = max(result.shape[1] for result in results)
    return torch.cat([_widened(result, width) for result in results])


def _widened(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), -torch.inf)], dim=1)


class BankLinear:
    """A Linear whose weight is shared and masked per domain: bits (D, nbytes); bias (N,), (D, N) or None.

    plain: the domains that have no mask for it; their bits are all ones. store: kept weights for few rows, if any.
    """

    def __init__(
        self, weight: Tensor, bits: Tensor, bias: Tensor | None, plain: Container[int], store: Store | None = None
    ) -> None:
        self.weight, self.bits, self.bias, self.plain, self.store = weight, bits, bias, plain, store
        self.large = is_large(weight)

    def __call__(self, input: Tensor) -> Tensor:
        batch = current_batch.get()
        batch.check(input.shape[0])
        x = input.to(_compute_dtype(input))
        bias = _cast(self.bias, x)
        straight = self.large and multiplies_bits(self.weight) and not transformed()
        if x.device.type == "cpu" and not straight:
            return self._part_by_part(x, bias, batch)
        return self._in_one(x, bias, batch)

    def _in_one(self, x: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
        """All domains in one operation, from kept weights or from bits."""
        y = None if self.store is None else self.store.product(x, self.weight, self.bits, bias, batch)
        if y is not None:
            return y
        y = bank_linear(x, self.weight, self.bits, bias, batch.offsets, batch.samples)
        if x.device.type == "cpu":
            for domain, part in batch.parts(x.shape[0]):
                if domain in self.plain:
                    y[part] = self._product(domain, x[part], self.weight, bias)
        return y

    def _part_by_part(self, x: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
        """The rows of each domain as a network under that domain alone computes them."""
        masked = self._masked([domain for domain, _ in batch.parts(x.shape[0]) if domain not in self.plain])

        def product(domain: int, part: Tensor) -> Tensor:
            return self._product(domain, part, self.weight if domain in self.plain else next(masked), bias)

        return by_part(x, product)

    def _masked(self, domains: list[int]) -> Iterator[Tensor]:
        """The weight under each domain; one call masks as many as stay in a cache together."""
        step = max(1, _CACHED_BYTES // max(1, self.weight.numel() * self.weight.element_size()))
        for start in range(0, len(domains), step):
            some = domains[start : start + step]
            # dwm_fast.ops.bits.apply without its check: these rows are buffers of this weight by construction
            yield from torch.ops.dwm_fast.apply(self.bits[some].reshape(-1), [self.weight] * len(some))

    @staticmethod
    def _product(domain: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias[domain] if bias is not None and bias.dim() == 2 else bias)


class BankConv2d:
    """A Conv2d whose weight is shared and masked per domain; geometry and padding mode are those of `conv`.

    filters: on a CPU, the weight under each domain where that is kept; None where every call makes it from the bits.
    """

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, bits: Tensor, bias: Tensor | None, filters: list[DomainFilters] | None
    ) -> None:
        self.conv, self.weight, self.bits, self.bias, self.filters = conv, weight, bits, bias, filters

    def __call__(self, input: Tensor) -> Tensor:
        batch = current_batch.get()
        batch.check(input.shape[0])
        x, padding = padded(input.to(_compute_dtype(input)), self.conv)
        bias, filters = _cast(self.bias, x), self.filters
        if filters is not None and x.dtype == self.weight.dtype and forced_backend() is None:
            how = (self.conv.stride, padding, self.conv.dilation, self.conv.groups)
            return by_part(x, lambda domain, part: filters[domain].conv2d(part, bias_of(bias, domain), how))
        return bank_conv2d(
            x,
            self.weight,
            self.bits,
            bias,
            batch.offsets,
            batch.samples,
            stride=self.conv.stride,
            padding=padding,
            dilation=self.conv.dilation,
            groups=self.conv.groups,
        )


class OwnLinear:
    """A Linear of which every domain has its own weight (N_d, K) and bias; N_d may differ (a head).

    Classes that a domain lacks come out as -inf, so arg max and softmax do not see them.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.weights, self.biases = list(weights), list(biases)
        width = max(weight.shape[0] for weight in weights)
        pairs = list(zip(weights, biases, strict=True))
        self.stacked = torch.stack([F.pad(w, (0, 0, 0, width - w.shape[0])) for w in weights])
        self.offset = torch.stack([_filled(b, w, width) for w, b in pairs])

    def __call__(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu":
            return by_part(input, self._part).movedim(1, -1)
        batch = current_batch.get()
        batch.check(input.shape[0])
        x = input.to(_compute_dtype(input)).reshape(batch.samples, -1, input.shape[-1])
        weight, offset = self.stacked.to(x.dtype)[batch.rows], self.offset.to(x.dtype)[batch.rows]
        y = torch.baddbmm(offset.unsqueeze(1), x, weight.transpose(1, 2))
        return y.reshape(*input.shape[:-1], y.shape[-1])

    def _part(self, domain: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[domain], self.biases[domain]).movedim(-1, 1)


def _filled(bias: Tensor | None, weight: Tensor, width: int) -> Tensor:
    """A domain's bias, -inf where it has no class."""
    own = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return F.pad(own, (0, width - weight.shape[0]), value=-torch.inf)


class SameLayer:
    """A layer that all domains share, run part by part: what a sample gets does not depend on its batch."""

    def __init__(self, forward: Layer) -> None:
        self.forward = forward

    def __call__(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.shape[0] != current_batch.get().samples:
            return self.forward(input)
        return by_part(input, lambda _, x: self.forward(x))


class BankNorm:
    """Batch norm in eval mode with values per domain: mean, var, weight, bias, each (D, C); the last two or None."""

    def __init__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.mean, self.var, self.weight, self.bias, self.eps = mean, var, weight, bias, eps

    def __call__(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu":
            return by_part(input, self._part)
        batch = current_batch.get()
        factor = torch.rsqrt(self.var.float() + self.eps)
        factor = factor if self.weight is None else factor * self.weight
        shift = -self.mean * factor
        shift = shift if self.bias is None else shift + self.bias
        batch.check(input.shape[0])
        shape = (input.shape[0], -1, *([1] * (input.dim() - 2)))
        factor, shift = factor[batch.rows].view(shape), shift[batch.rows].view(shape)
        return torch.addcmul(shift, input, factor).to(input.dtype)

    def _part(self, domain: int, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight[domain]
        bias = None if self.bias is None else self.bias[domain]
        return F.batch_norm(x, self.mean[domain], self.var[domain], weight, bias, False, 0.0, self.eps)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a layer computes in: autocast's where it is on, else the input's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
