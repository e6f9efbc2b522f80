import tempfile

import torch.distributed as dist

device_type = "cpu"


class _Group:
    """A group of one process, from the first block that needs one to the end of the page."""

    def __init__(self, monkeypatch):
        folder = tempfile.mkdtemp()
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        monkeypatch.setattr(dist, "_page_group", self, raising=False)

    def __del__(self):
        if dist.is_initialized():
            dist.destroy_process_group()


monkeypatch.delenv("RANK", raising=False)
_Group(monkeypatch)
