"""What compute-sanitizer is run over is called as it is defined; the kernels themselves need a GPU."""

from __future__ import annotations

import pytest
import torch

from dwm_fast._bench.dev import sanitize


@pytest.mark.parametrize("part", ["sampling", "bits", "updates", "network", "products"])
def test_a_part_runs_on_a_cpu(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    sanitize.run([part], torch.device("cpu"))
    assert capsys.readouterr().out == f"sanitize: {part} done\n"


def test_every_part_is_run_by_default_and_one_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in sanitize.PARTS:
        monkeypatch.setitem(sanitize.PARTS, name, lambda device, name=name: ran.append(name))
    sanitize.run([], torch.device("cpu"))
    assert ran == ["sampling", "bits", "updates", "network", "products", "one_pass"]
    with pytest.raises(KeyError):
        sanitize.run(["other"], torch.device("cpu"))
