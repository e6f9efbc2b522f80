"""The gate: every test of kernels and operations can make its area red, and what cannot be run here cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwm_fast._bench.dev import gate
from dwm_fast._bench.dev.checkout import TREE
from dwm_fast._bench.dev.gate import Verdict, areas, belongs, planned, red_areas, verdict_of
from dwm_fast._bench.dev.source import find_source

GREEN = Verdict(passed=3, red=False)


def _suite(tmp_path: Path, **files: str) -> Path:
    tests = tmp_path / "tests"
    for name, text in files.items():
        path = tests / "kernels" / f"test_{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tests


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins of this environment take seconds in every process and no part in what is shown here."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def _run(tests: Path, seconds: float = 200.0, jobs: int = 2) -> dict[str, tuple[Verdict, str]]:
    plan = [(path.relative_to(tests).as_posix(), list[str]()) for path in sorted(tests.glob("*/*.py"))]
    return {name: (verdict, text) for name, verdict, text in gate.run(plan, tests, jobs, seconds)}


def test_all_tests_of_kernels_and_operations_are_run_and_the_marked_ones_of_other_folders() -> None:
    parts = dict(planned(TREE / "tests"))
    plan = {name.partition("#")[0]: [] if "#" in name else more for name, more in parts.items()}
    whole = {
        p.relative_to(TREE / "tests").as_posix()
        for f in ("kernels", "ops")
        for p in (TREE / "tests" / f).glob("test_*.py")
    }
    assert all(Path(name).name.startswith("test_compile") for name in whole - plan.keys())
    assert not any(plan[name] for name in whole & plan.keys())
    assert plan["csrc/test_extension_gpu.py"] == ["-m", "gpu"]
    assert set(list(plan)[: len(whole & plan.keys())]) == whole & plan.keys()
    assert "test_hub" not in " ".join(plan)


@pytest.mark.parametrize(
    "area", ["sample", "update", "bits", "linear", "philox", "conv2d", "bank", "products_gpu", "gpu"]
)
def test_a_failure_in_any_file_of_an_area_makes_it_red(tmp_path: Path, area: str) -> None:
    names = [name for name, _ in planned(TREE / "tests")]
    own = [name for name in names if belongs(name, area)]
    assert own
    for name in own:
        files = {n: vars(GREEN) for n in names} | {name: vars(Verdict(failed=1, reason="1 failed: test_x"))}
        (tmp_path / "gate.json").write_text(json.dumps({"commit": "abc", "files": files}))
        assert red_areas(tmp_path / "gate.json", "abc")[area] == f"{name}: 1 failed: test_x"


def test_a_green_gate_has_no_red_area_and_every_area_of_a_gpu_has_a_file(tmp_path: Path) -> None:
    files = {name: vars(GREEN) for name, _ in planned(TREE / "tests")}
    (tmp_path / "gate.json").write_text(json.dumps({"commit": "abc", "files": files}))
    red = red_areas(tmp_path / "gate.json", "abc")
    assert not red.keys() & areas()


def test_an_area_of_which_nothing_passed_is_red(tmp_path: Path) -> None:
    files = {name: vars(GREEN) for name, _ in planned(TREE / "tests") if not belongs(name, "linear")}
    files["ops/test_linear.py"] = vars(Verdict(skipped=4, red=False))
    (tmp_path / "gate.json").write_text(json.dumps({"commit": "abc", "files": files}))
    assert red_areas(tmp_path / "gate.json", "abc")["linear"] == "no test of it was run and passed"


def test_a_file_whose_name_goes_on_after_an_areas_belongs_to_it() -> None:
    assert belongs("kernels/test_sample_tails.py", "sample")
    assert not belongs("kernels/test_sampled.py", "sample")
    assert not belongs("kernels/test_kernel_soft.py", "soft")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"commit": "abc"}'])
def test_a_report_that_is_missing_or_broken_makes_everything_red(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "gate.json"
    if content is not None:
        path.write_text(content)
    assert red_areas(path, "abc").keys() == areas(("cpu", "cuda"))


def test_a_green_report_of_another_tree_makes_everything_red(tmp_path: Path) -> None:
    files = {name: vars(GREEN) for name, _ in planned(TREE / "tests")}
    (tmp_path / "gate.json").write_text(json.dumps({"commit": "other", "files": files}))
    red = red_areas(tmp_path / "gate.json", "abc")
    assert red.keys() == areas(("cpu", "cuda"))
    assert set(red.values()) == {"the gate was run on other, not on abc"}


def test_files_are_run_apart_and_each_has_its_own_verdict(tmp_path: Path) -> None:
    tests = _suite(
        tmp_path,
        good="import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n",
        bad="import pytest\n@pytest.mark.parametrize('i', [1, 2])\ndef test_it(i): assert i == 2, 'one is not two'\n",
        dies="import os\ndef test_a(): os._exit(7)\n",
        broken="import nothing_of_that_name\n",
        lacks="raise ModuleNotFoundError(\"No module named 'constriction.stream'\")\n",
    )
    found = _run(tests)
    verdicts = {Path(name).stem.removeprefix("test_"): verdict for name, (verdict, _) in found.items()}
    good = verdicts["good"]
    assert (good.passed, good.skipped, good.failed, good.red, good.reason) == (1, 1, 0, False, "")
    assert (verdicts["bad"].failed, verdicts["bad"].reason) == (1, "1 failed: test_it")
    assert "one is not two" in found["kernels/test_bad.py"][1]
    assert verdicts["dies"].reason == "pytest ended with status 7 and no report"
    assert verdicts["broken"].red
    assert (verdicts["lacks"].red, verdicts["lacks"].reason) == (False, "left out: constriction is not installed")


def test_what_is_not_done_in_time_is_stopped_and_red(tmp_path: Path) -> None:
    tests = _suite(tmp_path, a_slow="import time\ndef test_a(): time.sleep(600)\n", b_next="def test_a(): pass\n")
    found = {name: verdict for name, (verdict, _) in _run(tests, seconds=0.5, jobs=1).items()}
    assert found["kernels/test_a_slow.py"].reason == "it was not done in time"
    assert found["kernels/test_b_next.py"].reason == "there was no time to run it"
    assert all(verdict.red for verdict in found.values())


def test_a_gate_that_is_stopped_leaves_a_report_in_which_what_is_not_done_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [("ops/test_bits.py", []), ("kernels/test_bits.py", []), ("ops/test_sample.py", [])]

    def stopped(*_: object) -> Iterator[tuple[str, Verdict, str]]:
        yield "ops/test_bits.py", GREEN, ""
        yield "ops/test_sample.py", GREEN, ""
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "planned", lambda tests: plan)
    monkeypatch.setattr(gate, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        gate.main(["--out", str(tmp_path)])
    red = red_areas(tmp_path / "gate.json", find_source(TREE).commit)
    assert red["bits"] == "kernels/test_bits.py: the gate was stopped before it was done"
    assert "sample" not in red


def test_a_report_that_breaks_off_is_red(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text("<testsuites><testsuite><testcase name='test_a'/>")
    assert verdict_of(path, 0, 1.0).red
    assert verdict_of(tmp_path / "none.xml", 0, 1.0).red


def test_without_hypothesis_its_tests_are_left_out_and_the_rest_of_their_files_is_run(tmp_path: Path) -> None:
    """The real files, in a process that cannot import hypothesis nor pytest-timeout."""
    (tmp_path / "blocked.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('hypothesis', '_hypothesis_pytestplugin', 'pytest_timeout'):\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    files = [f"tests/{name}" for name in ("kernels/test_linear.py", "kernels/test_conv2d.py", "ops/test_bits.py")]
    plugins = ["-p", "blocked", "-p", "benchmarks", "-p", "benchmarks.dev.without", "-p", "no:cacheprovider"]
    # Collection only: what is left out shows as a mark, and nothing has to be computed.
    (tmp_path / "marks.py").write_text(
        "def pytest_collection_modifyitems(items):\n"
        "    why = [str([m.kwargs.get('reason') for m in item.iter_markers('skip')]) for item in items]\n"
        "    left = [text for text in why if 'hypothesis' in text]\n"
        "    print(f'LEFT OUT {len(left)} RUN {len(items) - len(left)}')\n"
    )
    options = [*plugins, "-p", "marks", "--collect-only", "-q", "-s"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "tests/kernels/test_bank.py"],
        cwd=TREE,
        env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{TREE}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = next(line for line in done.stdout.splitlines() if line.startswith("LEFT OUT")).split()
    assert (int(words[2]), int(words[4])) > (4, 40)
