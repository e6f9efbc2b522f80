import torch

from dwm_fast.methods import registry
from dwm_fast.nn import kinds

monkeypatch.setattr(registry, "_registered", {})
monkeypatch.setitem(kinds.KINDS, "sigmoid", None)  # so that it is taken away again
del kinds.KINDS["sigmoid"]
model, images = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(4, 6)
