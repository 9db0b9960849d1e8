"""Count what the GPU kernels execute, without a GPU: instructions per value, and the floor that it sets.

    python benchmarks/kernels_offline.py [--capability 90] [--kernels accumulate ...] [--elements 26] [--json OUT]

Each kernel is compiled for the GPU by Triton and its bundled ptxas, the binary is disassembled, and the instructions
of its loop over values are counted. Two floors follow from the numbers that the maker states (an H100 SXM: 132
multiprocessors, 1.7 GHz, 4 warp instructions per clock in each, 3.35 TB/s):

- bytes: what is read over the memory's bandwidth;
- issue: instructions per value over those that all multiprocessors can issue. Where it is below 80 % of the bytes'
  floor, and neither latency nor one of the pipes is in the way, memory is the limit.

These are counts. No time was measured, and floors are no promises.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import machine, write_json

KINDS = ("fp32", "bf16", "fp16", "fp64")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
FORMATS = {
    "accumulate": KINDS,
    "accumulate_many": KINDS,
    "accumulate_update": KINDS[:3],
    "accumulate_weights": ("fp32", "fp64"),
}
KERNELS = tuple(FORMATS)
MULTIPROCESSORS, CLOCK, ISSUES, BANDWIDTH = 132, 1.7e9, 4, 3.35e12


@dataclass(frozen=True)
class Program:
    """A compiled kernel. loop: opcodes of its loop over values; values: how many a thread handles in a turn of it."""

    name: str
    kind: str
    ptx: str
    loop: Counter[str]
    values: int
    registers: int
    shared: int  # bytes, static and dynamic
    warps: int

    @property
    def per_value(self) -> float:
        """Instructions per value and lane."""
        return self.loop.total() / self.values


def missing() -> str:
    """The tool that Triton should have brought along and has not; "" if all are there."""
    return next((t for t in ("ptxas", "nvdisasm", "cuobjdump") if not _tool(t).exists()), "")


def compile_all(capability: int, *, names: Sequence[str] = KERNELS) -> Iterator[Program]:
    """Every kernel in every format it takes, for an NVIDIA GPU of that compute capability (90 for 9.0)."""
    for name in names:
        for kind in FORMATS[name]:
            yield compile_one(name, kind, capability)


def compile_one(name: str, kind: str, capability: int) -> Program:
    """One kernel for values of one format."""
    import triton
    from triton.backends.compiler import GPUTarget

    from precscope.kernels import triton as ours
    from precscope.kernels import triton_kernels as kernels

    number = KINDS.index(kind)
    options = dict(ours._options(number))
    update = name == "accumulate_update"
    if name == "accumulate_weights":
        function = kernels.weights_kernel
        signature = {"weights": "*fp64", "y_pointer": f"*{kind}", "g_pointer": f"*{kind}", "n": "i64", "slot": "i32"}
        constants = {"kind": number, "block": ours._WEIGHTS_BLOCK}
        options = {"num_warps": ours._WEIGHTS_WARPS, "enable_fp_fusion": True}
    else:
        constants = {key: options.pop(key) for key in ("kind", "ptx", "groups", "vector")} | {"update": update}
        if name == "accumulate_many":
            function, signature = kernels.many_kernel, {"rows": "*i64", "work": "*i64"}
            constants["aligned"] = True
        else:
            function = kernels.one_kernel
            signature = {
                "rows": "*i64", "pointer": f"*{kind}", "before": f"*{kind}", "n": "i64", "slot": "i32",
                "ratio_slot": "i32", "k": "i32",
            }  # fmt: skip
    names = list(signature) + list(constants)
    order = sorted(names, key=function.arg_names.index)
    pointers = [order.index(n) for n, t in signature.items() if t.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(
        fn=function, signature={n: signature[n] for n in order}, constexprs=constants, attrs=attributes
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    loops, usage = _disassembled(binary.asm["cubin"])
    # The walk that usual values take is the first loop that reads; of the weights' loops it is the outer one.
    loop = max(loops, key=Counter.total) if name == "accumulate_weights" else loops[0]
    values = constants["block"] // (32 * options["num_warps"]) if name == "accumulate_weights" else (
        constants["groups"] * constants["vector"])  # fmt: skip
    shared = max(usage["SHARED"], binary.metadata.shared)
    return Program(name, kind, binary.asm["ptx"], loop, values, usage["REG"], shared, options["num_warps"])


def _disassembled(cubin: bytes) -> tuple[list[Counter[str]], dict[str, int]]:
    """(opcodes of each loop that reads global memory, in order; registers and static shared memory)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = _run("nvdisasm", "-c", path)
        usage = {
            key: int(value) for key, value in re.findall(r"(REG|SHARED):(\d+)", _run("cuobjdump", "-res-usage", path))
        }
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    loops = []
    for at, instruction in enumerate(code):
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if jump and labels.get(jump[1], at) < at:
            body = Counter(_opcode(line) for line in code[labels[jump[1]] : at + 1])
            if body["LDG"]:
                loops.append(body)
    return loops, usage


def _opcode(instruction: str) -> str:
    """IMAD of "@!P0 IMAD.SHL.U32 R1, ..."."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([_tool(tool), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def _tool(name: str) -> Path:
    import triton

    return Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def row_of(program: Program, elements: int) -> dict[str, object]:
    """A row of the table; floors in microseconds for `elements` values."""
    reads = 2 if program.name in ("accumulate_update", "accumulate_weights") else 1
    size = reads * BYTES[program.kind] * elements
    issue = program.per_value * elements / 32 / (MULTIPROCESSORS * CLOCK * ISSUES)
    return {
        "kernel": program.name, "format": program.kind, "instructions_per_value": round(program.per_value, 2),
        "bytes_per_value": reads * BYTES[program.kind],
        "floor_bytes_us": 1e6 * size / BANDWIDTH, "floor_issue_us": 1e6 * issue, "registers": program.registers,
        "shared_bytes": program.shared, "loop": dict(program.loop.most_common()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--elements", type=int, default=26, help="log2 of the number of values (default 26)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    options = parser.parse_args(arguments)
    if missing():
        parser.exit(1, f"Triton brings no {missing()} here: install triton for Linux with its NVIDIA backend\n")
    rows = [row_of(p, 1 << options.elements) for p in compile_all(options.capability, names=options.kernels)]
    import triton

    print(f"compute capability {options.capability / 10}, triton {triton.__version__}; counts: no time was measured")
    print(f"floors for 2^{options.elements} values on {MULTIPROCESSORS} multiprocessors, {CLOCK / 1e9} GHz, "
          f"{BANDWIDTH / 1e12} TB/s")  # fmt: skip
    print(f"{'kernel':20}{'format':>7}{'instr/value':>13}{'bytes/value':>13}{'bytes us':>10}"
          f"{'issue us':>10}{'issue/bytes':>13}{'registers':>11}")  # fmt: skip
    for row in rows:
        print(f"{row['kernel']:20}{row['format']:>7}{row['instructions_per_value']:>13.1f}"
              f"{row['bytes_per_value']:>13}{row['floor_bytes_us']:>10.1f}{row['floor_issue_us']:>10.1f}"
              f"{row['floor_issue_us'] / row['floor_bytes_us']:>13.2f}{row['registers']:>11}")  # fmt: skip
    write_json(
        options.json, "kernels_offline", rows, capability=options.capability, elements=1 << options.elements,
        hardware={"multiprocessors": MULTIPROCESSORS, "clock_hz": CLOCK, "issues_per_clock": ISSUES,
                  "bytes_per_s": BANDWIDTH}, **machine(triton),
    )  # fmt: skip


if __name__ == "__main__":
    main()
