import torch
import torchvision

import dwm_fast as dwm

_net = torchvision.models.resnet18(num_classes=7)
masked = dwm.mask_model(_net, dwm.GumbelSigmoid())
keep_bits = torch.rand(64, 64, 3, 3) > 0.5
x = torch.randn(3, 3, 32, 32)
