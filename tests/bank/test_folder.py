"""Folders of domains: lazy, shared by many processes, and never torn.

DWM_FAST_KILLS sets how often a saving process is killed (default 6; a full campaign uses 200).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.bank import MaskBank, MaskFile, make_domain, read_rows, write_mask_file
from dwm_fast.bank.atomic import JOURNAL, current_path, locked
from dwm_fast.bank.folder import check_folder, load_domain
from dwm_fast.errors import InputError, MaskFileError

from . import nets, writer

KILLS = int(os.environ.get("DWM_FAST_KILLS", "6"))
X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(9))


def _bank(count: int = 3, p: float = 0.6) -> MaskBank:
    net = nets.small_net()
    bank = MaskBank(net)
    for i in range(count):
        bank.add(f"d{i}", nets.masks_for(net, i, p), state=nets.state_for(net, i, 4 + i), classes=["x"] * (4 + i))
    return bank


def _same(a: MaskBank, b: MaskBank) -> bool:
    def equal(name: str) -> bool:
        x, y = a.record(name), b.record(name)
        own = all(torch.equal(x.state[n], y.state[n]) for n in x.state)
        return torch.equal(x.bits, y.bits) and own and x.info == y.info

    return set(a.domains) == set(b.domains) and all(equal(name) for name in a.domains)


@pytest.mark.parametrize(("coding", "reference"), [(None, None), ("raw", None), ("coded", None), ("coded", "d1")])
def test_a_saved_bank_loads_to_the_same_bank(coding: str | None, reference: str | None, tmp_path: Path) -> None:
    bank = _bank()
    bank.save(tmp_path / "domains", coding=coding, reference=reference)
    names = {p.name for p in (tmp_path / "domains").iterdir()}
    assert names == {"d0.safetensors", "d1.safetensors", "d2.safetensors", "index.json", ".lock", ".queue"}
    loaded = MaskBank.load(tmp_path / "domains", nets.small_net())
    assert _same(loaded, bank)
    assert check_folder(tmp_path / "domains") == {}
    domains = ["d0", "d2", "d1", "d0", "d0", "d2"]
    assert torch.equal(loaded(X, domains=domains), bank(X, domains=domains))


def test_loading_reads_nothing_but_the_index(tmp_path: Path) -> None:
    _bank().save(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"broken")
    bank = MaskBank.load(tmp_path, nets.small_net())
    assert bank.domains == ["d0", "d1", "d2"]
    with pytest.raises(MaskFileError, match=r"d1.safetensors: header length"):
        bank.activate("d1")
    assert bank.active is None


def test_domains_for_another_backbone_are_refused_when_used(tmp_path: Path) -> None:
    _bank().save(tmp_path)
    other = nets.small_net(seed=1)
    with pytest.raises(MaskFileError, match=r"d0: backbone: the masks of 'd0' were made for other weights"):
        MaskBank.load(tmp_path, other).activate("d0")
    bank = MaskBank.load(tmp_path, other, allow_other_backbone=True)
    bank.activate("d0")
    assert bank(X).shape == (6, 4)


def test_saving_again_writes_only_what_changed(tmp_path: Path) -> None:
    _bank().save(tmp_path)
    bank = MaskBank.load(tmp_path, nets.small_net())
    before = {p.name: p.stat().st_ino for p in tmp_path.glob("*.safetensors")}
    bank.rename("d2", "new")
    bank.remove("d1")
    bank.save(tmp_path)
    after = {p.name: p.stat().st_ino for p in tmp_path.glob("*.safetensors")}
    assert set(after) == {"d0.safetensors", "new.safetensors"}
    assert after["d0.safetensors"] == before["d0.safetensors"]
    assert MaskBank.load(tmp_path, nets.small_net()).domains == ["d0", "new"]


def test_domains_stored_against_one_that_changes_are_stored_anew(tmp_path: Path) -> None:
    bank = _bank()
    bank.save(tmp_path, coding="coded", reference="d0")
    net = nets.small_net()
    again = MaskBank.load(tmp_path, net)
    expected = again.record("d1")
    again.remove("d0")
    again.add("d0", nets.masks_for(net, 77))
    again.save(tmp_path)
    assert check_folder(tmp_path) == {}
    assert torch.equal(load_domain(tmp_path, "d1").bits, expected.bits)
    again.remove("d0")
    again.save(tmp_path)
    assert check_folder(tmp_path) == {}


def test_a_reference_that_others_need_cannot_be_taken_from_under_them(tmp_path: Path) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    base = nets.masks_for(net, 0, 0.5)
    bank.add("d0", base)
    bank.add("d1", {name: mask ^ (torch.rand(mask.shape) < 0.01) for name, mask in base.items()})
    bank.save(tmp_path, coding="coded", reference="d0")
    assert read_rows(tmp_path)["d1"].reference == "d0"
    stranger = MaskBank(net)
    stranger.add("d0", nets.masks_for(net, 5))
    with pytest.raises(MaskFileError, match="'d1' is stored against 'd0', which changes"):
        stranger.save(tmp_path)
    assert check_folder(tmp_path) == {}


def test_two_banks_that_save_to_one_folder_do_not_lose_each_others_domains(tmp_path: Path) -> None:
    _bank(1).save(tmp_path)
    net = nets.small_net()
    first, second = MaskBank.load(tmp_path, net), MaskBank.load(tmp_path, net)
    first.add("one", nets.masks_for(net, 11))
    second.add("two", nets.masks_for(net, 12))
    first.save(tmp_path)
    second.save(tmp_path)
    assert MaskBank.load(tmp_path, net).domains == ["d0", "one", "two"]


def test_a_folder_without_an_index_is_read_file_by_file(tmp_path: Path) -> None:
    bank = _bank(2)
    bank.save(tmp_path)
    (tmp_path / "index.json").unlink()
    assert _same(MaskBank.load(tmp_path, nets.small_net()), bank)
    (tmp_path / "d0.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(MaskFileError, match=r"the file holds domain 'd0'; name it d0.safetensors"):
        MaskBank.load(tmp_path, nets.small_net())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index: not valid JSON"),
        ('{"format": "x"}', "version: expected format"),
        ('{"format": "dwm-fast-bank", "version": 1, "domains": []}', "domains: expected an object"),
        ('{"format": "dwm-fast-bank", "version": 1, "domains": {"../a": {}}}', "cannot name a file"),
        ('{"format": "dwm-fast-bank", "version": 1, "domains": {"a": {}}}', "domains.a: expected exactly nbytes"),
    ],
)
def test_a_broken_index_is_named(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(MaskFileError, match=message):
        MaskBank.load(tmp_path, nets.small_net())
    with pytest.raises(MaskFileError, match="no such folder"):
        MaskBank.load(tmp_path / "missing", nets.small_net())


def test_references_that_go_in_a_circle_are_refused(tmp_path: Path) -> None:
    base = {"w": torch.rand(40, 40) < 0.5}
    near = {"w": base["w"] ^ (torch.rand(40, 40) < 0.02)}
    a, b = make_domain("a", base), make_domain("b", near)
    write_mask_file(tmp_path / "a.safetensors", a, "coded", b)
    write_mask_file(tmp_path / "b.safetensors", b, "coded", a)
    with pytest.raises(MaskFileError, match="goes in a circle: a -> b -> a"):
        load_domain(tmp_path, "a")


def test_an_unfinished_commit_is_seen_as_done_and_finished_by_the_next_save(tmp_path: Path) -> None:
    _bank(2).save(tmp_path)
    net = nets.small_net()
    changed = MaskBank(net)
    changed.add("d0", nets.masks_for(net, 50))
    (tmp_path / "aside").mkdir()
    changed.save(tmp_path / "aside")
    part = tmp_path / ".d0.safetensors.0.part"
    (tmp_path / "aside" / "d0.safetensors").rename(part)
    (tmp_path / JOURNAL).write_text(json.dumps({"replace": {"d0.safetensors": part.name}, "delete": []}))
    assert torch.equal(load_domain(tmp_path, "d0").bits, changed.record("d0").bits)
    assert current_path(tmp_path, "d0.safetensors") == part
    MaskBank(net).save(tmp_path)
    assert not part.exists()
    assert not (tmp_path / JOURNAL).exists()
    assert torch.equal(MaskFile(tmp_path / "d0.safetensors").load().bits, changed.record("d0").bits)
    (tmp_path / JOURNAL).write_text(json.dumps({"replace": {"../x": "y"}, "delete": []}))
    with pytest.raises(MaskFileError, match="names a file outside its folder"):
        load_domain(tmp_path, "d0")


def test_what_cannot_be_written_is_one_clear_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = _bank(2)
    bank.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    net = nets.small_net()
    other = MaskBank(net)
    other.add("d0", nets.masks_for(net, 9))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaskFileError, match="cannot be written: No space left on device; nothing was changed"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="one of the bank's domains"):
        bank.save(tmp_path, coding="coded", reference="zoo")


def _versions(folder: Path, who: str) -> set[int]:
    """Versions of a writer's two domains as a fresh reader finds them; both belong to one save."""
    bank = MaskBank.load(folder, writer.backbone())
    return {writer.version_of(bank.masks(name)) for name in bank.domains if name.startswith(who)}


def _await_end(pid: int) -> None:
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until, f"process {pid} was killed and is still there"
        time.sleep(0.001)


class Nursery:
    """A process that has torch loaded and forks writers at once; its lines are what they report."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.bank.writer"]
        root = Path(__file__).parents[2]
        pipe = subprocess.PIPE
        plain = {**os.environ, "DWM_FAST_BACKEND": "reference", "OMP_NUM_THREADS": "1"}  # one thread: safe to fork
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=root, env=plain, start_new_session=True
        )

    def start(self, folder: Path, who: str, version: int) -> int:
        """Fork a writer and return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {who} {version}\n")
        self.process.stdin.flush()
        while (line := self.line())[0] != "pid":
            pass
        return line[1]

    def end(self) -> None:
        """Kill it and every writer that lives."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def line(self) -> tuple[str, int]:
        """The next report: ("pid", process id) or ("saved", version)."""
        assert self.process.stdout is not None
        what, number = self.process.stdout.readline().split()
        return what, int(number)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    if made.process.returncode is None:
        made.end()


def test_a_save_that_is_killed_leaves_the_old_or_the_new_state(tmp_path: Path, nursery: Nursery) -> None:
    rng = random.Random(0)
    done = 0
    for _ in range(KILLS):
        before = done
        pid = nursery.start(tmp_path, "w", before)
        while done < before + rng.randrange(1, 4):
            what, number = nursery.line()
            done = max(done, number if what == "saved" else 0)
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        _await_end(pid)
        found = _versions(tmp_path, "w")
        assert len(found) == 1
        assert min(found) >= done
        done = min(found)
    writer.save(tmp_path, "w", done + 1)
    assert check_folder(tmp_path) == {}
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"w-a.safetensors", "w-b.safetensors", "index.json", ".lock", ".queue"}


def test_two_writers_and_ten_readers_never_see_half_a_save(tmp_path: Path, nursery: Nursery) -> None:
    for who in ("v", "w"):
        writer.save(tmp_path, who, 1)
    for who in ("v", "w"):
        nursery.start(tmp_path, who, 1)
    seen: dict[str, set[int]] = {"v": set(), "w": set()}
    wrong: list[str] = []
    names = [f"{who}-{letter}" for who in seen for letter in "ab"]
    stop = time.monotonic() + 120

    def enough() -> bool:
        return bool(wrong) or time.monotonic() > stop or all(len(versions) > 3 for versions in seen.values())

    def read() -> None:
        for name in itertools.cycle(names):
            if enough():
                return
            try:
                seen[name[0]].add(writer.version_of(load_domain(tmp_path, name).masks()))
            except Exception as error:
                wrong.append(repr(error))

    readers = [threading.Thread(target=read, daemon=True) for _ in range(10)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=max(0.0, stop + 60 - time.monotonic()))
    assert not any(reader.is_alive() for reader in readers), "a reader waits for a lock that nobody gives up"
    nursery.end()
    assert wrong == []
    assert min(len(versions) for versions in seen.values()) > 3, seen
    assert len(_versions(tmp_path, "v")) == len(_versions(tmp_path, "w")) == 1


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_reading_makes_no_file_and_changes_none(tmp_path: Path) -> None:
    _bank(2).save(tmp_path)
    for locks in (True, False):
        if not locks:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".queue").unlink()
        before = _tree(tmp_path)
        bank = MaskBank.load(tmp_path, nets.small_net())
        assert bank.masks("d0")
        assert check_folder(tmp_path) == {}
        assert MaskFile(tmp_path / "d1.safetensors").load()
        assert _tree(tmp_path) == before


def test_a_reader_that_may_only_read_the_lock_waits_for_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bank(1).save(tmp_path)
    opened = os.open

    def read_only(path: Any, flags: int, *rest: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    with locked(tmp_path):
        started, found = threading.Event(), []

        def read() -> None:
            started.set()
            found.append(read_rows(tmp_path))

        monkeypatch.setattr(os, "open", read_only)
        reader = threading.Thread(target=read)
        reader.start()
        started.wait()
        time.sleep(0.2)
        assert not found
        monkeypatch.undo()
    reader.join(timeout=30)
    assert list(found[0]) == ["d0"]


def test_a_file_system_without_locks_can_be_read_and_a_writer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = _bank(1)
    bank.save(tmp_path)

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert list(read_rows(tmp_path)) == ["d0"]
    assert load_domain(tmp_path, "d0").info.domain == "d0"
    with pytest.raises(MaskFileError, match="No locks available; nothing was changed"):
        bank.save(tmp_path)


def test_readers_without_a_lock_see_whole_saves_too(tmp_path: Path, nursery: Nursery, monkeypatch: Any) -> None:
    writer.save(tmp_path, "w", 1)
    nursery.start(tmp_path, "w", 1)
    flock, seen = fcntl.flock, set()
    monkeypatch.setattr(
        fcntl, "flock", lambda handle, mode: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available"))
    )
    stop = time.monotonic() + 60
    while len(seen) < 5 and time.monotonic() < stop:
        assert set(read_rows(tmp_path)) == {"w-a", "w-b"}
        seen.add(writer.version_of(load_domain(tmp_path, "w-b").masks()))
    monkeypatch.setattr(fcntl, "flock", flock)
    nursery.end()
    assert len(seen) >= 5


def test_a_process_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    _bank(1).save(tmp_path)
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        taken = threading.Thread(target=lambda: locked(tmp_path).__enter__(), daemon=True)
        taken.start()
        taken.join(timeout=20)
        assert not taken.is_alive(), "the child still holds the lock"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_mask_file_written_into_a_folder_under_saves_is_never_lost(tmp_path: Path) -> None:
    bank, record = _bank(1), make_domain("other", {"w": torch.rand(40, 40) < 0.5})
    bank.save(tmp_path)
    stop, wrong = time.monotonic() + 5, []

    def save() -> None:
        while time.monotonic() < stop:
            bank.save(tmp_path, coding="raw")

    def write() -> None:
        while time.monotonic() < stop:
            try:
                write_mask_file(tmp_path / "other.safetensors", record)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work) for work in (save, save, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("key", "value", "lie"),
    [
        ("seal", "0" * 64, "another file than"),
        ("bits", "0" * 32, "another masks than"),
        ("nbytes", 7, "another size than"),
        ("coding", "raw", "another coding than"),
        ("reference", "d1", "another reference than"),
        ("reference_bits", "0" * 32, "another reference than"),
    ],
)
def test_an_index_that_lies_is_found_out(key: str, value: Any, lie: str, tmp_path: Path) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    masks = nets.masks_for(net, 0, 0.05)
    bank.add("d0", masks)
    bank.add("d1", masks)
    bank.add("d2", {name: mask ^ (torch.rand(mask.shape) < 0.01) for name, mask in masks.items()})
    bank.save(tmp_path, coding="coded", reference="d0")
    assert check_folder(tmp_path) == {}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["domains"]["d2"]["reference"] == "d0"
    index["domains"]["d2"][key] = value
    (tmp_path / "index.json").write_text(json.dumps(index))
    wrong = check_folder(tmp_path)
    assert list(wrong) == ["d2.safetensors"]
    assert lie in wrong["d2.safetensors"]


def test_a_failure_after_the_commit_says_that_the_change_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bank(1).save(tmp_path)
    net = nets.small_net()
    other = MaskBank(net)
    other.add("d0", nets.masks_for(net, 9))
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("d0.safetensors"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MaskFileError, match="No space left on device; the change is recorded, and the next save"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(load_domain(tmp_path, "d0").bits, other.record("d0").bits)
    MaskBank(net).save(tmp_path)
    assert check_folder(tmp_path) == {}
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_leaves_no_part_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, written = _bank(3), []
    fsync = os.fsync

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaskFileError, match="nothing was changed"):
        bank.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".queue"}


@pytest.mark.parametrize("name", ["index.json", ".journal.json", ".lock", ".queue", "d0.safetensors"])
def test_a_pipe_in_the_place_of_a_file_never_hangs(name: str, tmp_path: Path) -> None:
    _bank(1).save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    read = [lambda: load_domain(tmp_path, "d0"), lambda: read_rows(tmp_path), lambda: _bank(2).save(tmp_path)]
    for work in read if name != "d0.safetensors" else read[:1]:
        if name.startswith((".l", ".q")) and work is not read[2]:
            assert work()
            continue
        if name == "index.json" and work is read[0]:
            continue
        with pytest.raises(MaskFileError, match="no ordinary file"):
            work()


def test_links_are_not_followed_where_files_are_made(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "bank"
    outside.write_text("mine")
    folder.mkdir()
    (folder / ".lock").symlink_to(outside)
    (folder / ".queue").symlink_to(tmp_path / "made")
    with pytest.raises(MaskFileError, match="cannot be written"):
        _bank(1).save(folder)
    (folder / ".lock").unlink()
    (folder / ".queue").unlink()
    _bank(1).save(folder)
    (folder / ".x.part").symlink_to(outside)
    (folder / "d0.safetensors").unlink()
    (folder / "d0.safetensors").symlink_to(outside)
    _bank(1).save(folder)
    assert outside.read_text() == "mine"
    assert not (tmp_path / "made").exists()
    assert not (folder / ".x.part").is_symlink()
    assert not (folder / "d0.safetensors").is_symlink()
    (folder / JOURNAL).symlink_to(outside)
    with pytest.raises(MaskFileError, match=JOURNAL):
        load_domain(folder, "d0")


def test_a_folder_of_links_to_files_reads_as_the_hubs_cache_does(tmp_path: Path) -> None:
    bank = _bank(2)
    bank.save(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").glob("[!.]*"):
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert _same(MaskBank.load(tmp_path / "snapshot", nets.small_net()), bank)
    assert check_folder(tmp_path / "snapshot") == {}
