"""Systems that find weight masks, behind one protocol, and the stages around them."""

from dwm_fast.methods.base import FoundMask, Method, SourceTask
from dwm_fast.methods.binary import Binary
from dwm_fast.methods.budget import SourceBudget
from dwm_fast.methods.edit import EditMask
from dwm_fast.methods.learned import LearnedMask
from dwm_fast.methods.naive import Naive
from dwm_fast.methods.none import NoMask
from dwm_fast.methods.transfer import (
    BATCH_NORM_POLICIES,
    INITS,
    TrainOptions,
    masked_view,
    reinitialise,
    source_view,
    train,
)

__all__ = [
    "BATCH_NORM_POLICIES",
    "INITS",
    "Binary",
    "EditMask",
    "FoundMask",
    "LearnedMask",
    "Method",
    "Naive",
    "NoMask",
    "SourceBudget",
    "SourceTask",
    "TrainOptions",
    "masked_view",
    "reinitialise",
    "source_view",
    "train",
]
