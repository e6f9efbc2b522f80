import torch

import dwm_fast
from dwm_fast import ops

logits, weights = [torch.zeros(4, 8), torch.zeros(2, 4)], [torch.randn(4, 8), torch.randn(2, 4)]
reals = [torch.full((4, 8), 1e-2), torch.full((2, 4), 1e-2)]
rng_state, tau = torch.tensor([7, 0]), torch.tensor(1.0)
gradients, gammas = [torch.randn(4, 8), torch.randn(2, 4)], [torch.rand(4, 8), torch.rand(2, 4)]
lr = torch.tensor(0.1, dtype=torch.float64)
codes, gradient, steps = torch.zeros(4, 8, dtype=torch.int16), torch.randn(4, 8), torch.ones(1)
exp_avg, exp_avg_sq = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 8, dtype=torch.uint8)
scale, scale_sq = torch.zeros(1), torch.zeros(1)
masks = mask_a, mask_b = torch.rand(4, 8) > 0.5, torch.rand(2, 4) > 0.5
weight_a, weight_b = weights
n_a, n_b = 32, 8
other = ops.pack([mask_b.repeat(4, 1)[:4].repeat(1, 2), mask_a[:2, :4]])
model = dwm_fast.mask_model(torch.nn.Linear(8, 4), dwm_fast.GumbelSigmoid())
x, weight, weight_logits, bias = torch.randn(3, 8), torch.randn(4, 8), torch.zeros(4, 8), None
images, filters, filter_logits = torch.randn(3, 8, 5, 5), torch.randn(4, 8, 3, 3), torch.zeros(4, 8, 3, 3)
weight_bits, filter_bits = ops.pack([weight > 0]), ops.pack([filters > 0])
bits_of_domains, filter_bits_of_domains = weight_bits.repeat(2, 1), filter_bits.repeat(2, 1)
offsets, samples = torch.tensor([0, 1, 3]), 3
