import torch

keep_bits = torch.rand(64, 64, 3, 3) > 0.5
x = torch.randn(3, 3, 32, 32)
