"""What the learners of every sequential method share: tensors of backbone and tasks, state, bits and bank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.bank import MaskBank
from dwm_fast.errors import InputError
from dwm_fast.methods.base import SourceTask
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen, train
from dwm_fast.nn import maskable_weights
from dwm_fast.nn.model import NORM_LAYERS
from dwm_fast.nn.select import MaskableWeight, literal

Tensors = dict[str, Tensor]


class SequenceLearner:
    """A backbone, what each task has for itself, and a network made of both: the base of every method's learner.

    A subclass says in `learn` how one more task is learned, most often so: make a network (`fresh`), train it
    (`train_task`), write down what the task has for itself (`add_task`) and what all share (`set_shared`). Networks,
    bits, state, and a mask bank come with that. It may fill `task_masks` and `memory` too, and say in `network_tensors`
    what a task's network holds where that is more than the shared tensors and the task's own.

    Args:
        network: number of classes -> a fresh network on its device.
        head: name of the network's last Linear, of which every task has its own.
        method: the options that the learner was made with.

    Attributes:
        shared: tensors of the one network by state dict name, the heads' left out.
        own: task name -> the tensors that replace shared ones for it, its head among them.
        task_masks: task name -> kind (of `MASKS`) -> layer name -> bool mask.
        memory: group (of `MEMORY`) -> tensors by name that learning goes on from and that no network shows.
        classes: task name -> number of classes, in the order in which the tasks were learned.
    """

    views: tuple[str, ...] = ("shared",)
    MASKS: ClassVar[tuple[str, ...]] = ("keep",)
    """Names of the bool masks that a task has, each a mapping from layer name to mask."""

    MEMORY: ClassVar[tuple[str, ...]] = ()
    """Names of the groups of `memory`."""

    def __init__(self, network: Callable[[int], nn.Module], head: str, method: Any = None) -> None:
        self.make = network
        self.head = head
        self.method = method
        self.classes: dict[str, int] = {}
        self.shared: Tensors = {}
        self.own: dict[str, Tensors] = {}
        self.task_masks: dict[str, dict[str, Tensors]] = {}
        self.memory: dict[str, Tensors] = {group: {} for group in self.MEMORY}

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the trained network as it is; figures as of `learn`."""
        self.start(task, network)
        return {}

    def learn(self, task: Task) -> dict[str, Any]:
        """Learn one more task; plain figures of how it went, such as {"fraction_kept": 0.31}."""
        raise NotImplementedError(f"{type(self).__name__} has no learn(task)")

    def masks(self, name: str) -> Any:
        """The task's bool masks by layer name."""
        return self.keep_masks(name)

    def network(self, name: str, view: str = "shared") -> nn.Module:
        """The network of a task seen so far, in eval mode, with the task's own head."""
        if view not in self.views:
            raise InputError(f"view is '{view}'; expected one of {', '.join(self.views)}")
        if name not in self.classes:
            raise InputError(f"task '{name}' was not learned; learned so far: {', '.join(self.classes) or 'none'}")
        network = self.empty(self.classes[name])
        network.load_state_dict(self.network_tensors(name, view))
        return network.eval()

    def bits(self, name: str) -> int:
        """Bits of the task's masks and of its own tensors, the head left out."""
        own = sum(8 * t.element_size() * t.numel() for key, t in self.own[name].items() if not self.of_head(key))
        masks = self.task_masks.get(name, {}).values()
        return own + sum(mask.numel() for layers in masks for mask in layers.values())

    def bank(self) -> MaskBank:
        """The tasks as domains of a mask bank over a copy of the shared weights: what is stored, and nothing else.

        Where there is a view "masked", the domains are that view.
        """
        first = next(iter(self.classes))
        backbone = self.empty(self.classes[first])
        backbone.load_state_dict({**self.shared, **self.own[first]})
        bank = MaskBank(backbone.eval())
        for name in self.classes:
            form, values = self.form(name)
            masks = {f"{layer}.weight": mask for layer, mask in self.keep_masks(name).items()}
            values = {f"{layer}.weight": value for layer, value in values.items()}
            bank.add(name, masks, state=self.own[name], values=values, form=form, method=type(self).__name__)
        return bank

    def keep_masks(self, name: str) -> Tensors:
        """layer name -> the task's bool mask."""
        return self.task_masks.get(name, {}).get("keep", {})

    def form(self, name: str) -> tuple[str, Tensors]:
        """Form and values of the task's domain in a bank, values by layer name."""
        return "binary", {}

    def state(self) -> Tensors:
        """Everything, as named tensors on the CPU; bool masks packed to one bit a weight."""
        found: Tensors = {f"shared/{key}": tensor for key, tensor in self.shared.items()}
        for i, (name, classes) in enumerate(self.classes.items()):
            found[f"task/{i}/{name}"] = torch.tensor(classes)
            found |= {f"own/{i}/{key}": tensor for key, tensor in self.own[name].items()}
            for kind, layers in self.task_masks.get(name, {}).items():
                found |= {f"{kind}/{i}/{layer}": ops.pack([mask]) for layer, mask in layers.items()}
        for group, tensors in self.memory.items():
            found |= {f"{group}/{key}": tensor for key, tensor in tensors.items()}
        return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; the network of every task is then bit-identical."""
        tasks = sorted((k.split("/", 2)[1:] for k in state if k.startswith("task/")), key=lambda entry: int(entry[0]))
        if not tasks:
            raise InputError("the state holds no task; expected what state() of the same method gave")
        self.classes = {name: int(state[f"task/{i}/{name}"]) for i, name in tasks}
        example = self.empty(next(iter(self.classes.values())))
        device = next(example.parameters()).device
        self.shared = part(state, "shared/", device)
        self.own = {name: part(state, f"own/{i}/", device) for i, name in tasks}
        self.memory = {group: part(state, f"{group}/", device) for group in self.MEMORY}
        shapes = {name: there.weight.shape for name, there in self.maskable(example).items()}
        self.task_masks = {}
        for i, name in tasks:
            packed = {kind: part(state, f"{kind}/{i}/", device) for kind in self.MASKS}
            self.task_masks[name] = {
                kind: {layer: self._unpack(bits, layer, shapes[layer]) for layer, bits in layers.items()}
                for kind, layers in packed.items()
                if layers
            }

    def _unpack(self, bits: Tensor, layer: str, weight: torch.Size) -> Tensor:
        shape = self.mask_shape(weight)
        return ops.unpack(bits, [shape.numel()])[0].view(shape)

    def mask_shape(self, weight: torch.Size) -> torch.Size:
        """Shape of the mask of a weight."""
        return weight

    def network_tensors(self, name: str, view: str) -> Tensors:
        """The whole state dict of a task's network."""
        return {**self.shared, **self.own[name]}

    def start(self, task: Task, network: nn.Module) -> None:
        """Take the trained network's tensors as the backbone, its head as the first task's."""
        if self.classes:
            raise InputError(f"begin was called after {', '.join(self.classes)}; begin a learner once, then learn")
        head = dict(network.named_modules()).get(self.head)
        if not isinstance(head, nn.Linear):
            linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
            raise InputError(f"head '{self.head}' is no Linear of the network; expected one of {', '.join(linears)}")
        self.set_shared(network)
        self.add_task(task, network)

    def add_task(self, task: Task, network: nn.Module, own: Callable[[str], bool] = lambda _: False) -> None:
        """Write down a task with its head and the network's tensors whose names `own` picks."""
        if task.name in self.classes:
            raise InputError(f"task '{task.name}' was learned before; give every task of a sequence a name of its own")
        self.classes[task.name] = task.classes
        picked = {k: v for k, v in network.state_dict().items() if self.of_head(k) or own(k)}
        self.own[task.name] = cloned(picked)

    def set_shared(self, network: nn.Module) -> None:
        self.shared = cloned({k: v for k, v in network.state_dict().items() if not self.of_head(k)})

    def fresh(self, task: Task) -> nn.Module:
        """A network with the shared tensors and a fresh head, drawn on the CPU: a seed means the same anywhere."""
        if not self.classes:
            raise InputError(f"task '{task.name}': learn was called before begin; begin with the first task's network")
        network = self.empty(task.classes)
        network.load_state_dict(self.shared, strict=False)
        head = network.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        drawn = nn.Linear(head.in_features, head.out_features, head.bias is not None)
        head.load_state_dict(drawn.state_dict())
        return network

    def empty(self, classes: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return self.make(classes)

    def of_head(self, key: str) -> bool:
        return key.startswith(f"{self.head}.")

    def maskable(self, network: nn.Module) -> dict[str, MaskableWeight]:
        """Every layer that can have a mask, the head left out; InputError for masks on parameters of other names."""
        found = maskable_weights(network, exclude=literal(self.head))
        others = [name for name, there in found.items() if there.attribute != "weight"]
        if others:
            raise InputError(
                f"{', '.join(others)}: a sequence masks layers with one `weight` each; learn masks of attention, "
                "recurrent layers and experts with dwm_fast.mask_model, and keep them in a MaskBank"
            )
        return found


def train_task(
    network: nn.Module,
    task: Task,
    options: TrainOptions,
    *,
    keep: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
    epochs_before: int = 0,
) -> nn.Module:
    """`train` on a task's batches, its first `epochs_before` epochs left out; `keep` and `fixed` as there."""
    check_frozen(options)
    return train(
        network,
        lambda epoch: task.batches(epoch + epochs_before),
        task.steps_per_epoch,
        options,
        keep=keep,
        fixed=fixed,
        progress=task.progress,
        autocast=task.autocast,
    )


@contextlib.contextmanager
def seeded(task: Task) -> Iterator[None]:
    """torch's generators seeded by the task inside, and afterwards as they were."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(task.seed)
        yield


def cloned(tensors: Mapping[str, Tensor]) -> Tensors:
    """Detached copies."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def part(state: Mapping[str, Tensor], prefix: str, device: torch.device) -> Tensors:
    """The entries whose name begins with `prefix`, by the rest of their name, copied to `device`."""
    return {k.removeprefix(prefix): v.to(device, copy=True) for k, v in state.items() if k.startswith(prefix)}


def norm_names(network: nn.Module) -> Callable[[str], bool]:
    """Whether a state dict name belongs to a norm layer and matters in eval mode."""
    norms = {name for name, module in network.named_modules() if isinstance(module, NORM_LAYERS)}
    return lambda key: key.rpartition(".")[0] in norms and not key.endswith("num_batches_tracked")


def as_source(task: Task, epochs_before: int = 0) -> SourceTask:
    """The task as a method of the two-domain study sees it, its first `epochs_before` epochs left out."""

    def batches(epoch: int) -> Any:
        return task.batches(epoch + epochs_before)

    return SourceTask(
        batches=batches,
        steps_per_epoch=task.steps_per_epoch,
        loss=task.loss,
        seed=task.seed,
        progress=task.progress,
        autocast=task.autocast,
    )
