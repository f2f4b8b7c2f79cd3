"""The reading of compiled code; what it says of our kernels is in tests/rational/test_gpu.py."""

import dataclasses
from collections import Counter

import pytest

from grkan.bench import kernels

NVIDIA = """
	/*0000*/                   MOV R1, c[0x0][0x28] ;
	/*0010*/                   LDG.E.128 R4, [R2] ;
.L_x_0:
	/*0020*/                   LDG.E.128 R4, [R2.64] ;
	/*0030*/                   FFMA R8, R4, R5, RZ ;
.L_x_1:
	/*0040*/                   FMUL R9, R8, R8 ;
	/*0050*/               @P1 BRA `(.L_x_1) ;
	/*0060*/               @P0 RED.E.ADD.F32 [R2], R9 ;
	/*0070*/                   STG.E.U16 [R2.64], R9 ;
	/*0080*/              @!P0 BRA `(.L_x_0) ;
	/*0090*/                   BRA `(.L_x_2) ;
	/*00a0*/                   NOP ;
.L_x_2:
	/*00b0*/                   EXIT ;
"""  # fmt: skip


def test_loops_are_found_in_the_code_of_nvidia(monkeypatch):
    monkeypatch.setattr(kernels, "_run_on_cubin", lambda tool, option, cubin: "Function f:\n REG:40 STACK:8 SHARED:0")
    registers, stack, loops, outside = kernels._read_nvidia(NVIDIA, b"")
    assert (registers, stack) == (40, 8)
    assert loops == [["LDG.E.128", "FFMA", "FMUL", "BRA", "RED.E.ADD.F32", "STG.E.U16", "BRA"]]
    assert outside == ["MOV", "LDG.E.128", "BRA", "EXIT"]
    assert kernels._widest(loops[0], kernels._LOADS) == 128
    assert kernels._widest(loops[0], kernels._STORES) == 16


AMD = """
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
	global_load_dwordx4 v[0:3], v[4:5], off
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	global_store_short v[4:5], v0, off
	s_nop 0
	s_cbranch_vccnz .LBB0_1
	s_endpgm
    .agpr_count:     4
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     50
    .vgpr_spill_count: 5
"""


def test_loops_are_found_in_the_code_of_amd():
    registers, stack, loops, outside = kernels._read_amd(AMD)
    assert (registers, stack) == (54, 24)
    assert loops == [["global_load_dwordx4", "v_pk_fma_f32", "global_store_short", "s_cbranch_vccnz"]]
    assert outside == ["s_load_dwordx2", "s_endpgm"]
    assert kernels._widest(loops[0], kernels._LOADS) == 128
    assert kernels._widest(loops[0], kernels._STORES) == 16


def test_estimates_are_those_of_the_roofline():
    at = kernels.Stats(
        "sm_80", "forward", "bfloat16", "abs_of_sum", (5, 4), vector=8, registers=50, stack=0, load=128, store=128,
        atomics=0, barriers=0, instructions=9.0, with_ends=10.0, arithmetic=5.0, bytes=4.0, sums=0.0,
    )  # fmt: skip
    assert at.estimate() == (pytest.approx(2.039e12 / 4), "memory")
    assert dataclasses.replace(at, with_ends=100.0).estimate() == (pytest.approx(108 * 128 * 1.41e9 / 100), "issue")
    assert dataclasses.replace(at, arithmetic=30.0).estimate() == (pytest.approx(108 * 64 * 1.41e9 / 30), "arithmetic")
    assert dataclasses.replace(at, dtype="float64").estimate() is None


def test_the_same_is_compiled_for_all_targets():
    cases = list(kernels.all_cases())
    assert len(set(cases)) == len(cases) == 104
    assert Counter(case[0] for case in cases) == dict.fromkeys(kernels.TARGETS, 26)


def test_the_interpreter_is_no_compiler(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        kernels.stats("sm_90", "forward", "bfloat16", "abs_of_sum", (5, 4))
