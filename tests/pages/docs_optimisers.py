import copy

import torch

import dwm_fast as dwm

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
masked = dwm.mask_model(model, dwm.GumbelSigmoid())
loader = [(torch.randn(6, 8), torch.randint(4, (6,)))] * 2
x, y = loader[0]
scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))
