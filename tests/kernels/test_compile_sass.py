"""The compile gate sees every fault that it promises to see. Nothing is compiled here: texts stand for the tools'."""

import dataclasses

import pytest

from dwm_fast.kernels import _compile
from dwm_fast.kernels._compile_sass import Usage, faults, usage_of
from dwm_fast.kernels._configuration import Configuration

RESOURCES = """
Fatbin elf code:
 Function kernel:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R4, desc[UR8][R2.64] ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0030*/               @P1 LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x10] ;
        /*0040*/                   LDG.E.U8 R8, desc[UR8][R2.64+0x10] ;
        /*0050*/             @!UP0 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R6.64], P0 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0080*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0090*/                   STG.E desc[UR8][R2.64], R4 ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1);
        /*00b0*/                   NOP;
"""
SERIALISED = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers in the function 'kernel'\n"
)
SOUND = Usage(100, 40, 0, 0, {128: 8}, {128: 4}, barriers=0, copies=6, matrix=4)
MEANT = Configuration(
    "a kernel", None, (), {}, 4, loads=(128, 8), stores=(128, 4), barriers=0, matrix=True, pipelined=True
)


def test_accesses_barriers_and_matrix_instructions_are_counted():
    usage = usage_of(SASS, RESOURCES, "", 1024)
    assert usage == Usage(
        11, 40, 0, 1024, {64: 1, 128: 2, 8: 1}, {128: 1, 32: 1}, barriers=1, copies=1, matrix=1, serialised=False
    )


def test_the_serialising_warning_is_read_from_the_log():
    assert usage_of(SASS, RESOURCES, SERIALISED, 0).serialised


@pytest.mark.parametrize(
    ("resources", "extra", "expected"),
    [
        (RESOURCES.replace("STACK:0", "STACK:24"), "", 24),
        (RESOURCES.replace("LOCAL:0", "LOCAL:8"), "", 8),
        (RESOURCES, "        /*00c0*/                   STL.64 [R1], R2 ;\n", 4),
    ],
)
def test_local_memory_counts_as_spilled_wherever_it_shows(resources, extra, expected):
    assert usage_of(SASS + extra, resources, "", 0).spilled == expected


def test_a_sound_kernel_has_no_fault():
    assert faults(MEANT, SOUND, 90) == {}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"spilled": 8}, "spills"),
        ({"loads": {128: 7, 32: 4}}, "narrow loads"),
        ({"loads": {}}, "narrow loads"),
        ({"stores": {32: 16}}, "narrow stores"),
        ({"barriers": 1}, "shared memory"),
        ({"shared": 16}, "shared memory"),
        ({"copies": 0}, "no asynchronous copies"),
        ({"matrix": 0}, "no wgmma"),
        ({"serialised": True}, "serialised"),
    ],
)
def test_every_fault_is_named(change, kind):
    assert list(faults(MEANT, dataclasses.replace(SOUND, **change), 90)) == [kind]


def test_shared_memory_is_limited_by_the_target():
    big = dataclasses.replace(SOUND, shared=200 * 1024)
    loose = dataclasses.replace(MEANT, barriers=None)
    assert list(faults(loose, big, 80)) == ["too much shared memory"]
    assert faults(loose, big, 90) == {}


def test_wgmma_is_asked_for_on_sm_90_alone():
    without = dataclasses.replace(SOUND, matrix=0)
    assert faults(MEANT, without, 80) == faults(MEANT, without, 100) == {}


def test_an_excuse_takes_its_fault_away_and_fails_once_it_is_not_needed(monkeypatch):
    excuse = _compile.Excuse("spills", (80,), ("3.8",), "ptxas keeps to 168 registers")
    monkeypatch.setattr(_compile, "EXCUSES", {"a kernel": (excuse,)})
    assert _compile.excused("a kernel", {"spills": "24 bytes"}, 80, "3.8.0") == {}
    assert list(_compile.excused("a kernel", {}, 80, "3.8.0")) == ["unneeded excuse"]
    for target, version in ((90, "3.8.0"), (80, "3.9.0")):
        assert _compile.excused("a kernel", {"spills": "24 bytes"}, target, version) == {"spills": "24 bytes"}
        assert _compile.excused("a kernel", {}, target, version) == {}
    assert list(_compile.excused("another", {"spills": "24 bytes"}, 80, "3.8.0")) == ["spills"]


def test_excuses_name_configurations_that_there_are():
    assert set(_compile.EXCUSES) <= {known.name for known in _compile.configurations()}


def test_configurations_have_names_of_their_own():
    names = [known.name for known in _compile.configurations()]
    assert len(names) == len(set(names))
