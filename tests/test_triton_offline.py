"""The Triton kernels compiled for GPUs that are not here: every kernel and format, and how many instructions it takes.

Triton brings NVIDIA's assembler and disassembler along, so that the loop over values can be counted.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
offline = pytest.importorskip("kernels_offline", reason="benchmarks/ is not here")
if offline.missing():
    pytest.skip(f"triton brings no {offline.missing()}", allow_module_level=True)

# Instructions per value of the loop over values, of a warp's lane: what keeps up with 80 % of an H100's memory.
BUDGET = {"fp32": 40, "bf16": 20, "fp16": 20, "fp64": 80}


@cache
def compiled(name: str, kind: str, capability: int = 90):
    """Compiling takes a second or more: Triton keeps the results on disk, and this in memory."""
    return offline.compile_one(name, kind, capability)


def check(program) -> None:
    """What must hold of every kernel on every GPU."""
    from precscope.kernels import triton as ours

    weights = program.name == "accumulate_weights"
    threads = 32 * program.warps
    assert program.registers * threads * ours._PROGRAMS_PER_SM <= 65536  # two at a time on a multiprocessor
    assert program.shared <= 48 * 1024  # what needs no attribute of the function
    atomics = re.findall(r"\batom\.global\S*|\bred\.global\S*", program.ptx)
    assert 1 <= len(atomics) <= (4 if weights else 16), atomics
    if not weights:  # the table of counts: declared once, cleared before it is used
        places = [program.ptx.index(text) for text in
                  ("precscope_table[32768]", "st.shared.v4.u32 [a+0]", "red.shared.add.u32")]  # fmt: skip
        assert places == sorted(places) and program.ptx.count("precscope_table[32768]") == 1


@pytest.mark.parametrize("kind", BUDGET)
def test_the_loop_over_values_stays_in_the_budget(kind):
    program = compiled("accumulate", kind)
    check(program)
    assert 5 < program.per_value < BUDGET[kind]
    # 16 bytes a load, one shared-memory addition a value, nothing kept in local memory
    assert program.loop["LDG"] * 16 == program.values * offline.BYTES[kind]
    assert program.loop["ATOMS"] == program.values
    assert not program.loop["LDL"] + program.loop["STL"]


def test_many_tensors_in_one_launch_cost_no_more_per_value():
    program = compiled("accumulate_many", "bf16")
    check(program)
    assert program.per_value < 1.1 * compiled("accumulate", "bf16").per_value


def test_updates_read_both_tensors_in_one_pass():
    program = compiled("accumulate_update", "fp32")
    check(program)
    assert program.loop["LDG"] * 16 == 2 * program.values * 4
    assert program.loop["ATOMS"] == 2 * program.values
    assert program.per_value < 2 * BUDGET["fp32"]


def test_weighted_histograms_compile():
    check(compiled("accumulate_weights", "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_every_kernel_and_format_compiles(capability):
    programs = list(offline.compile_all(capability))
    assert {(p.name, p.kind) for p in programs} == {(n, k) for n in offline.KERNELS for k in offline.FORMATS[n]}
    for program in programs:
        check(program)
        if program.name in ("accumulate", "accumulate_many"):
            assert program.per_value < 2 * BUDGET[program.kind]
            assert program.loop["LDG"] * 16 == program.values * offline.BYTES[program.kind]


def test_compute_capability_8_0_takes_them():
    check(compiled("accumulate", "bf16", 80))


def test_the_benchmark_prints_and_writes_what_it_counted(tmp_path, capsys):
    import json

    offline.main(["--capability", "90", "--kernels", "accumulate", "--json", str(tmp_path / "out.json")])
    text = capsys.readouterr().out
    assert "no time was measured" in text
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["schema"] == 1 and content["benchmark"] == "kernels_offline"
    row = next(r for r in content["rows"] if r["format"] == "bf16")
    assert row["kernel"] == "accumulate" and row["instructions_per_value"] < 20
    assert row["floor_issue_us"] < row["floor_bytes_us"]  # of 2^26 values: memory is the limit, not instructions
