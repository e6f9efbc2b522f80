"""Optimisers: FrozenAdamW and FrozenSGD leave kept weights alone; MaskAdam learns masks in one pass."""

from dwm_fast.optim.frozen import FrozenAdamW, FrozenSGD
from dwm_fast.optim.mask_adam import MaskAdam
from dwm_fast.optim.record import DrawRecorder, MaskRecord, MaskSource

__all__ = ["DrawRecorder", "FrozenAdamW", "FrozenSGD", "MaskAdam", "MaskRecord", "MaskSource"]
