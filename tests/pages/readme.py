import torch

photo = sketch = [(torch.randn(4, 3, 32, 32), torch.randint(7, (4,)))]
