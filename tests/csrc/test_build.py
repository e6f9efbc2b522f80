"""The build cannot hurt: every way in which it may go wrong ends in one clear line or in a sound binary.

A small script stands in for the compiler: it counts its calls and hands out a real, tiny shared library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dwm_fast.errors import BackendUnavailable
from dwm_fast.ops import _build, _toolchain


@pytest.fixture(scope="module")
def tiny_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cpp").write_text("int dwm_fast_tiny = 1;\n")
    compiler = _toolchain.find_compiler()
    assert compiler is not None, "the tests need a C++ compiler: apt install g++"
    subprocess.run([compiler, "-shared", "-fPIC", "tiny.cpp", "-o", "tiny.so"], cwd=folder, check=True)
    return folder / "tiny.so"


class Workshop:
    """A fresh cache and a compiler that keeps a diary."""

    def __init__(self, folder: Path, product: Path) -> None:
        self.folder, self.product, self.cache = folder, product, folder / "cache"
        self.diary = folder / "diary"
        self.compiler = folder / "c++"
        self.write_compiler(f'cp "{product}" "$out"')

    def write_compiler(self, link: str) -> None:
        self.compiler.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            out=""; link=0; previous=""
            for word in "$@"; do
                [ "$previous" = "-o" ] && out="$word"
                [ "$word" = "-shared" ] && link=1
                previous="$word"
            done
            if [ $link = 1 ]; then echo link >> "{self.diary}"; {link}; else : > "$out"; fi
            """)
        )
        self.compiler.chmod(0o755)

    @property
    def builds(self) -> int:
        return len(self.diary.read_text().splitlines()) if self.diary.exists() else 0

    @property
    def binary(self) -> Path:
        (path,) = self.cache.glob("dwm_fast_cpu-*.so")
        return path


@pytest.fixture
def workshop(tmp_path: Path, tiny_library: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop(tmp_path, tiny_library)
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setenv("DWM_FAST_EXT_DIR", str(made.cache))
    monkeypatch.delenv("DWM_FAST_EXT", raising=False)
    new_process(monkeypatch)
    monkeypatch.setattr(_build, "_load_library", lambda path: ctypes.CDLL(str(path)))
    return made


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has loaded or refused."""
    monkeypatch.setattr(_build, "_loaded", {})
    monkeypatch.setattr(_build, "_refused", {})


def refusal(kind: str = "cpu") -> str:
    with pytest.raises(BackendUnavailable) as caught:
        _build.load(kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_first_need_builds_once_and_the_cache_serves_later_processes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _build.load("cpu")
    assert "building the C++ extension" in capfd.readouterr().err
    new_process(monkeypatch)
    _build.load("cpu")
    assert workshop.builds == 1
    assert not list(workshop.cache.glob("build-*"))


def test_without_ninja_the_compiler_is_called_directly(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_ninja", lambda: None)
    _build.load("cpu")
    assert workshop.builds == 1


def test_cache_is_used_where_the_compiler_is_gone(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    _build.load("cpu")
    new_process(monkeypatch)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    _build.load("cpu")
    assert workshop.builds == 1


def test_no_compiler_is_one_line_that_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler is on PATH; install one" in refusal()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "no checksum"])
def test_damaged_binary_is_replaced(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    _build.load("cpu")
    path = workshop.binary
    sound = path.read_bytes()
    if damage == "no checksum":
        path.with_name(path.name + ".sha256").unlink()
    else:
        path.unlink()  # another file, as after a broken copy: this process still maps the old one
        path.write_bytes({"truncated": sound[:5000], "garbage": os.urandom(5000), "empty": b""}[damage])
    new_process(monkeypatch)
    _build.load("cpu")
    assert workshop.builds == 2
    assert path.read_bytes() == sound


def other_architecture(binary: bytes) -> bytes:
    """The same ELF file, said to be for a machine that this one is not."""
    machine = 8 if int.from_bytes(binary[18:20], "little") != 8 else 62  # MIPS, x86-64
    return binary[:18] + machine.to_bytes(2, "little") + binary[20:]


def put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(content).hexdigest())


def test_binary_of_another_architecture_is_replaced(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _build.build(cuda=False)
    sound = path.read_bytes()
    put(path, other_architecture(sound))
    _build.load("cpu")
    assert workshop.builds == 2
    assert path.read_bytes() == sound


def test_binary_that_never_loads_is_built_twice_at_most_and_refused_in_one_line(workshop: Workshop) -> None:
    foreign = workshop.folder / "foreign.so"
    foreign.write_bytes(other_architecture(workshop.product.read_bytes()))
    workshop.write_compiler(f'cp "{foreign}" "$out"')
    assert "does not load" in refusal()
    assert "does not load" in refusal()
    assert workshop.builds == 2


def test_failing_compiler_is_asked_once_and_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.write_compiler("echo no such instruction >&2; exit 1")
    assert "could not build the extension" in refusal()
    (log,) = workshop.cache.glob("*.log")
    assert "no such instruction" in log.read_text()
    new_process(monkeypatch)
    assert "could not build the extension" in refusal()
    assert workshop.builds == 1
    new_process(monkeypatch)
    workshop.write_compiler(f'cp "{workshop.product}" "$out"')
    os.utime(workshop.compiler, ns=(1, 1))  # another compiler: try again
    _build.load("cpu")
    assert workshop.builds == 2


def test_force_builds_again(workshop: Workshop) -> None:
    assert _build.build(cuda=False) == _build.build(force=True, cuda=False) == workshop.binary
    assert workshop.builds == 2


def test_turned_off_by_the_environment(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWM_FAST_EXT", "0")
    assert "turned off by DWM_FAST_EXT" in refusal()
    assert workshop.builds == 0
    assert _build.status()["enabled"] is False


def test_folder_that_cannot_be_written_is_one_line(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "file").write_text("")
    monkeypatch.setenv("DWM_FAST_EXT_DIR", str(workshop.folder / "file" / "below"))
    assert "set DWM_FAST_EXT_DIR to a writable" in refusal()


def test_read_only_home_falls_back_to_a_private_folder(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "file").write_text("")
    (workshop.folder / "temp").mkdir()
    monkeypatch.delenv("DWM_FAST_EXT_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "file"))
    monkeypatch.setattr(_build.tempfile, "tempdir", str(workshop.folder / "temp"))
    _build.load("cpu")
    (private,) = (workshop.folder / "temp").iterdir()
    assert private.stat().st_mode & 0o077 == 0
    new_process(monkeypatch)
    _build.load("cpu")
    assert workshop.builds == 1


def test_private_folder_of_somebody_else_is_not_trusted(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.folder / "file").write_text("")
    private = workshop.folder / "temp" / f"dwm_fast-{os.getuid()}"
    private.mkdir(parents=True)
    private.chmod(0o777)  # anybody could put a library there
    monkeypatch.delenv("DWM_FAST_EXT_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "file"))
    monkeypatch.setattr(_build.tempfile, "tempdir", str(workshop.folder / "temp"))
    assert "set DWM_FAST_EXT_DIR to a writable" in refusal()


def _plant(workshop: Workshop, folder: Path) -> Path:
    """A library with the right name and checksum that `folder`'s other writers could have put there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _build._file_name("cpu")
    shutil.copy(workshop.product, path)
    _build._checksum_file(path).write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o775], ids=oct)
@pytest.mark.parametrize("way", ["DWM_FAST_EXT_DIR", "XDG_CACHE_HOME"])
def test_a_library_in_a_folder_that_others_may_write_to_is_not_loaded(
    way: str, mode: int, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DWM_FAST_EXT_DIR")
    monkeypatch.setattr(_build.tempfile, "tempdir", str(workshop.folder / "temp"))
    (workshop.folder / "temp").mkdir()
    monkeypatch.setenv(way, str(workshop.folder / "shared"))
    folder = workshop.folder / "shared" / ("dwm_fast" if way == "XDG_CACHE_HOME" else "")
    planted = _plant(workshop, folder)
    folder.chmod(mode)
    assert _build._existing("cpu") is None
    if way == "DWM_FAST_EXT_DIR":
        assert f"others may write to {folder}" in refusal()
    else:
        _build.load("cpu")
        assert _build._loaded["cpu"].parent.parent == workshop.folder / "temp"
        assert workshop.builds == 1
    assert planted.exists()


@pytest.mark.parametrize("what", ["folder", "library", "checksum"])
def test_a_library_of_another_user_is_not_loaded(
    what: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = _plant(workshop, workshop.cache)
    assert _build._existing("cpu") == planted
    if os.getuid() == 0:
        given = {"folder": workshop.cache, "library": planted, "checksum": _build._checksum_file(planted)}[what]
        os.chown(given, 1234, -1)
    else:  # only root gives a file away: it is looked at by another user instead
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
    assert _build._existing("cpu") is None


@pytest.mark.parametrize("what", ["folder", "library"])
def test_a_link_to_a_library_is_not_followed(what: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = _plant(workshop, workshop.folder / "elsewhere")
    if what == "folder":
        (workshop.folder / "link").symlink_to(planted.parent)
        monkeypatch.setenv("DWM_FAST_EXT_DIR", str(workshop.folder / "link"))
    else:
        workshop.cache.mkdir(exist_ok=True)
        shutil.copy(_build._checksum_file(planted), workshop.cache)
        (workshop.cache / planted.name).symlink_to(planted)
    assert _build._existing("cpu") is None


def test_a_link_at_the_place_of_the_log_or_lock_is_not_written_through(workshop: Workshop) -> None:
    mine = workshop.folder / "mine"
    mine.write_text("mine")
    workshop.cache.mkdir(exist_ok=True)
    library = workshop.cache / _build._file_name("cpu")
    library.with_suffix(".log").symlink_to(mine)
    workshop.write_compiler("exit 1")
    assert "could not build" in refusal()
    assert mine.read_text() == "mine"
    library.with_suffix(".lock").unlink()
    library.with_suffix(".lock").symlink_to(mine)
    with pytest.raises(BackendUnavailable, match="cannot be kept in"):
        _build.build()
    assert mine.read_text() == "mine"


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DWM_FAST_EXT_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert _build._candidates()[0] == Path.home() / ".cache" / "dwm_fast"


def test_what_a_killed_build_left_is_swept(workshop: Workshop) -> None:
    stem = Path(_build._file_name("cpu")).stem
    for name in (f"build-{stem}-abc", "build-fresh"):
        (workshop.cache / name).mkdir(parents=True)
        (workshop.cache / name / "x.o").write_text("")
    (workshop.cache / f"build-{stem}-link").symlink_to(workshop.folder)
    _build.load("cpu")
    left = {path.name for path in workshop.cache.glob("build-*")}
    assert left == {"build-fresh", f"build-{stem}-link"}
    assert workshop.diary.exists()


def test_two_concurrent_first_uses_build_once(workshop: Workshop) -> None:
    workshop.write_compiler(f'sleep 2; cp "{workshop.product}" "$out"')
    program = "from dwm_fast.ops import _build; _build.load('cpu'); print(_build.status()['cpu']['loaded'])"
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate()[0].strip() for child in children] == ["True", "True"]
    assert workshop.builds == 1


def test_library_works_without_compiler_and_says_so_once(tmp_path: Path) -> None:
    program = textwrap.dedent("""\
        import warnings, torch
        import dwm_fast.ops as ops
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bits = ops.pack([torch.ones(5, dtype=torch.bool)])
            print(ops.count(bits, [5]).tolist(), len(ops.unpack(bits, [5])))
        print(sum("no C++ compiler" in str(w.message) for w in caught))
        try:
            with ops.use_backend("cpp"):
                ops.pack([torch.ones(5)])
        except Exception as error:
            print(type(error).__name__, "install one" in str(error))
        """)
    environment = {**os.environ, "PATH": "", "CXX": "", "DWM_FAST_EXT_DIR": str(tmp_path), "DWM_FAST_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[5] 1", "1", "BackendUnavailable True"], done.stderr


def test_nvcc_behind_a_wrapper_is_found_and_cuda_home_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(path: Path, line: str) -> Path:
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    real = script(tmp_path / "toolkit" / "bin" / "nvcc", "exit 0")
    wrapper = script(tmp_path / "wrapper" / "nvcc", f"echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2")
    chosen = script(tmp_path / "chosen" / "bin" / "nvcc", "exit 0")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert _toolchain.find_nvcc() == str(real)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "chosen"))
    assert _toolchain.find_nvcc() == str(chosen)


def test_no_nvcc_is_one_line(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    assert "nvcc is not on PATH" in refusal("cuda")
    assert _build.build() == workshop.binary


def test_cuda_architectures_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DWM_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert _toolchain.gencode(_toolchain.cuda_archs())[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert _toolchain.gencode(_toolchain.cuda_archs()) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("DWM_FAST_CUDA_ARCHS", "10.0")
    assert _toolchain.gencode(_toolchain.cuda_archs()) == ["-gencode=arch=compute_100,code=sm_100"]


def test_cuda_part_compiles_with_nvcc_and_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = _toolchain.find_nvcc()
    if nvcc is None:
        assert shutil.which("nvcc") is None
        return
    monkeypatch.setenv("DWM_FAST_CUDA_ARCHS", "9.0")
    for step in _toolchain.cuda_steps(nvcc, "bits.so"):
        done = subprocess.run(step.command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
    assert (tmp_path / "bits.so").stat().st_size > 0
