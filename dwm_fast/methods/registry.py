"""Every sequential method by the name that tables and the command line use."""

from __future__ import annotations

from dwm_fast.methods.dwm_sequence import BinarySequence
from dwm_fast.methods.fine_tuning import FineTuning
from dwm_fast.methods.ksm import KSM, KSM_PAPER
from dwm_fast.methods.packnet import PACKNET_PAPER, PackNet
from dwm_fast.methods.piggyback import PIGGYBACK_PAPER, Piggyback
from dwm_fast.methods.sequence import SequentialMethod
from dwm_fast.methods.spg import SPG, SPG_PAPER


def sequential_methods() -> dict[str, SequentialMethod]:
    """Name -> method with our defaults, for a few epochs a task at batches of 32."""
    methods: list[SequentialMethod] = [FineTuning(), Piggyback(), KSM(), SPG(), PackNet(), BinarySequence()]
    return {method.name: method for method in methods}


def presets() -> dict[str, SequentialMethod]:
    """Preset name -> method with the authors' constants."""
    return {
        "piggyback-paper": PIGGYBACK_PAPER,
        "ksm-paper": KSM_PAPER,
        "spg-paper": SPG_PAPER,
        "packnet-paper": PACKNET_PAPER,
    }
