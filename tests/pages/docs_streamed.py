import torch

import dwm_fast as dwm

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
loader = [(torch.randn(6, 8), torch.randint(4, (6,)))] * 2
