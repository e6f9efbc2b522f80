import torch

import dwm_fast as dwm

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
).eval()
x = torch.randn(2, 3, 8, 8)
