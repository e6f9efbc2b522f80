"""Operations: one file each, the only door to any kernel. Schemas, fakes and references need torch alone."""

from dwm_fast.ops.backends import BACKENDS, use_backend
from dwm_fast.ops.bank import bank_conv2d, bank_linear
from dwm_fast.ops.bits import (
    apply,
    combine,
    count,
    jaccard,
    overlap,
    pack,
    unpack,
)
from dwm_fast.ops.coded_adam import coded_adam
from dwm_fast.ops.conv2d import conv2d, conv2d_packed, padded
from dwm_fast.ops.draw import SCALED_SOFT, Mode
from dwm_fast.ops.kept import PADDING, expand_values, is_faster_kept, keep_values, linear_kept
from dwm_fast.ops.kernel_soft import kernel_soft
from dwm_fast.ops.linear import linear, linear_packed
from dwm_fast.ops.packing import packed_nbytes, packed_offsets
from dwm_fast.ops.patterns import pattern_mask
from dwm_fast.ops.philox import advance, random_words, uniform
from dwm_fast.ops.sample import penalty, sample
from dwm_fast.ops.soft_mask import raise_importance, soft_masked_sgd
from dwm_fast.ops.union import bank_linear_union, keep_union
from dwm_fast.ops.update import frozen_adamw, frozen_sgd, mask_adam
from dwm_fast.ops.ways import WAYS, use_way

__all__ = [
    "BACKENDS",
    "PADDING",
    "SCALED_SOFT",
    "WAYS",
    "Mode",
    "advance",
    "apply",
    "bank_conv2d",
    "bank_linear",
    "bank_linear_union",
    "coded_adam",
    "combine",
    "conv2d",
    "conv2d_packed",
    "count",
    "expand_values",
    "frozen_adamw",
    "frozen_sgd",
    "is_faster_kept",
    "jaccard",
    "keep_union",
    "keep_values",
    "kernel_soft",
    "linear",
    "linear_kept",
    "linear_packed",
    "mask_adam",
    "overlap",
    "pack",
    "packed_nbytes",
    "packed_offsets",
    "padded",
    "pattern_mask",
    "penalty",
    "raise_importance",
    "random_words",
    "sample",
    "soft_masked_sgd",
    "uniform",
    "unpack",
    "use_backend",
    "use_way",
]
