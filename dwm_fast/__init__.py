"""Learn, store and serve one-bit weight masks over a shared backbone.

Importing touches no device and no Triton; backends load when an operation first needs them.
"""

from dwm_fast import graphs, methods, optim
from dwm_fast.bank import MaskAdapter, MaskBank
from dwm_fast.errors import BackendUnavailable, DataError, DwmError, InputError, MaskFileError
from dwm_fast.nn import (
    Edit,
    GumbelSigmoid,
    KernelSoft,
    LinearSchedule,
    MaskedConv2d,
    MaskedLinear,
    MaskedModel,
    MaskKind,
    PackedConv2d,
    PackedLinear,
    SemiStructured,
    TauSchedule,
    Threshold,
    explain,
    load_masked,
    mask_model,
    merge,
    pack,
    save_masked,
)
from dwm_fast.ops import use_backend, use_way

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DataError",
    "DwmError",
    "Edit",
    "GumbelSigmoid",
    "InputError",
    "KernelSoft",
    "LinearSchedule",
    "MaskAdapter",
    "MaskBank",
    "MaskFileError",
    "MaskKind",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedModel",
    "PackedConv2d",
    "PackedLinear",
    "SemiStructured",
    "TauSchedule",
    "Threshold",
    "explain",
    "graphs",
    "load_masked",
    "mask_model",
    "merge",
    "methods",
    "optim",
    "pack",
    "save_masked",
    "use_backend",
    "use_way",
]
