"""Systems that find weight masks, behind one protocol, and the stages around them."""

from dwm_fast.methods.base import FoundMask, Method, SourceTask
from dwm_fast.methods.binary import Binary
from dwm_fast.methods.budget import SourceBudget
from dwm_fast.methods.cpg import CPG
from dwm_fast.methods.dwm_sequence import BinarySequence
from dwm_fast.methods.edit import EditMask
from dwm_fast.methods.fggm import FGGM
from dwm_fast.methods.fine_tuning import FineTuning
from dwm_fast.methods.hat import HAT
from dwm_fast.methods.ksm import KSM
from dwm_fast.methods.learned import LearnedMask
from dwm_fast.methods.learner import SequenceLearner, norm_names, seeded, train_task
from dwm_fast.methods.lottery import LotteryTicket
from dwm_fast.methods.low_rank import LowRank
from dwm_fast.methods.naive import Naive
from dwm_fast.methods.none import NoMask
from dwm_fast.methods.one_shot import Magnitude, Wanda
from dwm_fast.methods.packnet import PackNet
from dwm_fast.methods.piggyback import Piggyback
from dwm_fast.methods.pruning import LEAP, MaskLLM, MaskTraining, meet_density, pruning_methods, start_from
from dwm_fast.methods.registry import load_method, pair_methods, presets, register_method, sequential_methods
from dwm_fast.methods.sequence import Learner, SequentialMethod, Task
from dwm_fast.methods.spg import SPG
from dwm_fast.methods.top_scores import TopScores
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
    "CPG",
    "FGGM",
    "HAT",
    "INITS",
    "KSM",
    "LEAP",
    "SPG",
    "Binary",
    "BinarySequence",
    "EditMask",
    "FineTuning",
    "FoundMask",
    "LearnedMask",
    "Learner",
    "LotteryTicket",
    "LowRank",
    "Magnitude",
    "MaskLLM",
    "MaskTraining",
    "Method",
    "Naive",
    "NoMask",
    "PackNet",
    "Piggyback",
    "SequenceLearner",
    "SequentialMethod",
    "SourceBudget",
    "SourceTask",
    "Task",
    "TopScores",
    "TrainOptions",
    "Wanda",
    "load_method",
    "masked_view",
    "meet_density",
    "norm_names",
    "pair_methods",
    "presets",
    "pruning_methods",
    "register_method",
    "reinitialise",
    "seeded",
    "sequential_methods",
    "source_view",
    "start_from",
    "train",
    "train_task",
]
