"""Optimisers: FrozenAdamW and FrozenSGD leave kept weights alone; MaskAdam and StreamedAdam learn masks."""

from dwm_fast.optim.frozen import FrozenAdamW, FrozenSGD
from dwm_fast.optim.mask_adam import MaskAdam
from dwm_fast.optim.record import DrawRecorder, MaskRecord, MaskSource
from dwm_fast.optim.streamed import StreamedAdam

__all__ = ["DrawRecorder", "FrozenAdamW", "FrozenSGD", "MaskAdam", "MaskRecord", "MaskSource", "StreamedAdam"]
