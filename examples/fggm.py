"""FGGM, a method of your own for pairs and sequences: the next domain trains the rows of weights that it needs most."""

from dataclasses import dataclass, field

import torch

from dwm_fast.methods import FoundMask, SequenceLearner, TrainOptions, seeded, train_task
from dwm_fast.nn import maskable_weights


@dataclass(frozen=True)
class FGGM:
    quantile: float = 0.7
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="frozen"))
    name, sees_target = "fggm-own", True

    def find(self, model, task):
        return FoundMask(self.frozen(model, maskable_weights(model), task.target))

    def learner(self, network, head):
        return Learner(network, head, self)

    def frozen(self, network, layers, task):
        fisher, weights = dict.fromkeys(layers, 0.0), [layer.weight for layer in layers.values()]
        for image, label in zip(*next(task.batches(0)), strict=True):
            loss = torch.nn.functional.cross_entropy(network.eval()(image[None]), label[None])
            for name, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                fisher[name] = fisher[name] + gradient.square()
        rows = {name: f.sum(tuple(range(1, f.dim())), keepdim=True) for name, f in fisher.items()}
        return {name: (r <= r.quantile(self.quantile)).expand_as(fisher[name]).clone() for name, r in rows.items()}


class Learner(SequenceLearner):
    def learn(self, task):
        with seeded(task):
            network = self.fresh(task)
            keep = self.method.frozen(network, self.maskable(network), task)
            self.add_task(task, train_task(network, task, self.method.options, keep=keep))
        self.set_shared(network)
        return {"fraction_frozen": FoundMask(keep).fraction_kept}
