"""Run directories of any size through the real writer: a transformer that trains, without the transformer.

Each block has the rows that recording one of the demo GPT under bf16 autocast gives: 112 of them, of 10 modules, in
which neighbours share tensors as they do there. Histograms are Gaussian or log-normal tensors of realistic sizes that
drift, with Poisson noise drawn anew in each step; sums end where the smallest recorded binade's grid does, as sums of
bf16 and fp32 values do. Nothing is rounded, repeated or ordered for the compressor's sake: real weights and optimizer
state, whose histograms hardly move from step to step, compress better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from precscope.histogram import BINS, EXP_LO
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, prepare_directory, write_json, write_truth

TOKENS, WIDTH = 2048, 256
_DATA = {  # tensor -> (elements per token and width, format, log2 of its standard deviation)
    "x": (1, "fp32", -2), "ln1": (1, "fp32", 0), "qkv": (3, "bf16", -2), "att": (1, "bf16", -3),
    "proj": (1, "bf16", -4), "x2": (1, "fp32", -2), "ln2": (1, "fp32", 0), "fc1": (4, "bf16", -2),
    "act": (4, "bf16", -3), "fc2": (1, "bf16", -4),
}  # fmt: skip
_INPUTS = (("", "x"), ("ln1", "x"), ("attn", "ln1"), ("attn.qkv", "ln1"), ("attn.proj", "att"), ("ln2", "x2"),
           ("mlp", "ln2"), ("mlp.fc1", "ln2"), ("mlp.act", "fc1"), ("mlp.fc2", "act"))  # fmt: skip
_OUTPUTS = (("ln1", "ln1"), ("attn.qkv", "qkv"), ("attn.proj", "proj"), ("attn", "proj"), ("ln2", "ln2"),
            ("mlp.fc1", "fc1"), ("mlp.act", "act"), ("mlp.fc2", "fc2"), ("mlp", "fc2"), ("", "next"))  # fmt: skip
_PARAMETERS = {  # module -> shape of its weight
    "ln1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "ln2": (WIDTH,),
    "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH),
}  # fmt: skip
_TYPES = {"": "Block", "attn": "Attention", "mlp": "MLP", "ln1": "LayerNorm", "ln2": "LayerNorm", "mlp.act": "GELU"}
_WINDOW = 32  # binades from the largest down
_ERF = np.vectorize(math.erf)(np.linspace(0, 6, 6001))


class SyntheticRun:
    """A model of `sites` rows a step. Tensors: what is counted once; several sites may look at one."""

    def __init__(self, sites: int, *, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.sites: list[Site] = []
        self._of: list[int] = []  # tensor of each site
        self._tensors: dict[str, int] = {}
        self._sizes: list[tuple[int, str, float, bool]] = []  # elements, format, log2 sigma, whether log-normal
        self.blocks = 0
        while len(self.sites) < sites:
            self._add_block(self.blocks)
            self.blocks += 1
        del self.sites[sites:], self._of[sites:]
        size, source, sigma, wide = zip(*self._sizes, strict=True)
        self._n, self._source = np.asarray(size, float), np.asarray(source, object)
        self._sigma, self._wide = np.asarray(sigma) + self.rng.normal(0, 0.5, len(sigma)), np.asarray(wide)
        self._updates = [i for i, s in enumerate(self.sites) if s.role is Role.UPDATE]

    def _tensor(self, name: str, elements: int, source: str, sigma: float, *, wide: bool = False) -> int:
        if name not in self._tensors:
            self._tensors[name] = len(self._sizes)
            self._sizes.append((elements, source, sigma, wide))
        return self._tensors[name]

    def _add_block(self, b: int) -> None:
        def add(module: str, role: Role, tensor: int, call: int = 0, name: str = "") -> None:
            self.sites.append(Site(f"blocks.{b}.{module}".rstrip("."), role, call, name))
            self._of.append(tensor)

        for roles, gradient in (((Role.INPUT, Role.OUTPUT), ""), ((Role.GRAD_INPUT, Role.GRAD_OUTPUT), "grad ")):
            for role, pairs in zip(roles, (_INPUTS, _OUTPUTS), strict=True):
                for module, data in pairs:
                    key = f"{gradient}{b + 1} x" if data == "next" else f"{gradient}{b} {data}"
                    factor, source, sigma = _DATA[data.replace("next", "x")]
                    down = -18 if gradient else 0
                    if data in ("x", "next") and not gradient:  # grows with depth, to near the end of fp16
                        down = 13 * (b + (data == "next")) / (b + 10)
                    elements = factor * TOKENS * WIDTH
                    add(module, role, self._tensor(key, elements, source, sigma + down, wide=bool(gradient)))
        for module, shape in _PARAMETERS.items():
            for name, elements in (("weight", math.prod(shape)), ("bias", shape[0])):
                kinds = {Role.WEIGHT: (name, -5), Role.GRAD_WEIGHT: (name, -10), Role.UPDATE: (name, -11)}
                for role, (tensor, sigma) in kinds.items():
                    key = f"{b} {module} {role} {name}"
                    add(module, role, self._tensor(key, elements, "fp32", sigma), name=tensor)
                for state, sigma, wide in (("exp_avg", -11, False), ("exp_avg_sq", -22, True)):
                    key = f"{b} {module} {name}.{state}"
                    add(module, Role.STATE, self._tensor(key, elements, "fp32", sigma, wide=wide), 0, f"{name}.{state}")
            for fmt in ("bf16", "fp16"):
                key = f"{b} {module} swallowed {fmt}"
                tensor = self._tensor(key, min(math.prod(shape), 16_384), "fp32", -13)
                add(module, Role.STATE, tensor, 1, f"weight.swallowed_{fmt}")

    # statistics

    def step(self) -> tuple[StatsTable, dict[int, tuple[np.ndarray, int, int]]]:
        """The next step's rows and ratios, as a recorder hands them to the writer."""
        rng, n = self.rng, self._n
        self._sigma += rng.normal(0, 0.02, len(n))
        top = np.floor(self._sigma).astype(int) + np.where(self._wide, 6, 2)
        table, tensors = StatsTable.empty(len(self.sites)), self._draw(top)
        counts, low, high = tensors
        grid = 2.0 ** (low - np.where(self._source == "bf16", 7, 23))
        sigma, z = 2.0**self._sigma, rng.normal(size=(3, len(n)))
        columns = {
            "zeros": np.where(self._source == "bf16", rng.poisson(3, len(n)), 0),
            "sum": np.rint(sigma * np.sqrt(n) * z[0] / grid) * grid,
            "sumsq": np.rint(n * sigma**2 * (1 + z[1] * np.sqrt(2 / n)) / grid**2) * grid**2,
            "amax": np.rint(2.0**high * (1 + rng.random(len(n))) / (e := grid * 2.0 ** (high - low))) * e,
            "amin_nonzero": np.rint(2.0**low * (1 + rng.random(len(n))) / grid) * grid,
            "source": self._source,
        }
        for name, values in columns.items():
            getattr(table, name)[:] = values[self._of]
        table.counts[:] = counts[self._of]
        return table, self._ratios(table)

    def _draw(self, top: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(counts int64[tensors, BINS], lowest and highest filled binade of each)."""
        binade = top[:, None] - np.arange(_WINDOW)
        u = np.clip(2.0 ** (binade - self._sigma[:, None]) / math.sqrt(2) * 1000, 0, 3000).astype(int)
        normal = _ERF[2 * u] - _ERF[u]
        tail = u < 30  # where the table is too coarse the density is flat: a binade's share is its width
        normal = np.where(tail, 0.797885 * 2.0 ** (binade - self._sigma[:, None]), normal)
        lognormal = np.exp(-0.5 * ((binade - self._sigma[:, None]) / 2.2) ** 2) / (2.2 * math.sqrt(2 * math.pi))
        drawn = self.rng.poisson(np.where(self._wide[:, None], lognormal, normal) * self._n[:, None])
        largest = drawn.argmax(1)
        rows = np.arange(len(drawn))
        drawn[rows, largest] += np.maximum(self._n.astype(int) - drawn.sum(1), 1 - drawn[rows, largest])
        counts = np.zeros((len(drawn), BINS), np.int64)
        np.put_along_axis(counts, binade - EXP_LO, drawn, 1)
        filled = drawn > 0
        return counts, top - (_WINDOW - 1 - filled[:, ::-1].argmax(1)), top - filled.argmax(1)

    def _ratios(self, table: StatsTable) -> dict[int, tuple[np.ndarray, int, int]]:
        mean = np.exp(-0.5 * ((np.arange(BINS) + EXP_LO + 7) / 2.5) ** 2) / (2.5 * math.sqrt(2 * math.pi))
        counts = self.rng.poisson(mean * table.count[self._updates][:, None])
        unchanged = self.rng.poisson(2, len(counts)).tolist()
        return {row: (counts[i], unchanged[i], 0) for i, row in enumerate(self._updates)}

    # the rest of a directory

    def graph(self) -> dict[str, object]:
        """Content of graph.json."""
        modules, parameters, edges = [{**_MODULE, "name": "", "type": "GPT", "parent": None, "leaf": False}], [], []
        for b in range(self.blocks):
            at = f"blocks.{b}"
            for name in dict.fromkeys(module for module, _ in _INPUTS):
                shape = _PARAMETERS.get(name)
                flops = 2 * TOKENS * math.prod(shape) if shape and len(shape) == 2 else 0
                own = math.prod(shape) + shape[0] if shape else 0
                full, parent = f"{at}.{name}".rstrip("."), f"{at}.{name.rpartition('.')[0]}".rstrip(".") if name else ""
                leaf = name not in ("", "attn", "mlp")
                modules.append({**_MODULE, "name": full, "type": _TYPES.get(name, "Linear"), "parent": parent,
                                "leaf": leaf, "own_params": own, "flops": flops})  # fmt: skip
                for tensor, size in (("weight", list(shape)), ("bias", [shape[0]])) if shape else ():
                    parameters.append({"name": f"{full}.{tensor}", "shape": size, "dtype": "float32",
                                       "requires_grad": True, "buffer": False, "owners": [full]})  # fmt: skip
            for a, c in (("ln1", "attn.qkv"), ("attn.qkv", "attn.proj"), ("attn.proj", "ln2"), ("ln2", "mlp.fc1"),
                         ("mlp.fc1", "mlp.act"), ("mlp.act", "mlp.fc2")):  # fmt: skip
                edges.append({"producer": f"{at}.{a}", "consumer": f"{at}.{c}", "elements": TOKENS * WIDTH})
            if b:
                edges.append(
                    {"producer": f"blocks.{b - 1}.mlp.fc2", "consumer": f"{at}.ln1", "elements": TOKENS * WIDTH}
                )
        return {"schema": 1, "modules": modules, "parameters": parameters, "edges": edges}

    def shadow(self, directory: Path, step: int) -> None:
        """One shadow step: its statistics with weights, and what it says of the gradients."""
        table, _ = self.step()
        table.source[:] = "fp32"
        priced = np.asarray([s.role in (Role.INPUT, Role.OUTPUT, Role.WEIGHT) for s in self.sites])
        noise = self.rng.lognormal(0, 0.3, table.counts.shape)
        table.weights = np.where(priced[:, None], table.counts * noise * 2.0**-44, np.nan)
        ones = np.ones(len(self.sites))
        StatsWriter(directory, kind="shadow").write(np.full(len(ones), step), self.sites, table, ones, {})
        names = [s for s in self.sites if s.role is Role.GRAD_WEIGHT]
        columns = {name: self.rng.random(len(names)).tolist() for name in ("cosine", "rel_error", "grad_norm_fp32")}
        write_truth(directory, {
            **columns, "step": [step] * len(names), "parameter": [f"{s.module}.{s.tensor}" for s in names],
            "module": [s.module for s in names], "loss_low": [2.5] * len(names), "loss_fp32": [2.5] * len(names),
        })  # fmt: skip


_MODULE = {"params": 0, "own_params": 0, "calls": 1, "elements": TOKENS * WIDTH, "flops": 0}


def write_run(
    out: Path, sites: int, steps: int, *, timed: Callable[[Callable[[], object]], None] | None = None
) -> None:
    """Write a run directory of `sites` rows for each of `steps` recorded steps, flushed as a recorder does.

    timed: called with each piece of work of the writer, which it must call; making the numbers up is outside.
    """
    run, call = SyntheticRun(sites), timed or (lambda work: work())
    directory = prepare_directory(out, exist="overwrite")
    optimizer = {"class": "AdamW", "groups": [{"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "parameters": [
        f"{s.module}.{s.tensor}" for s in run.sites if s.role is Role.UPDATE]}]}  # fmt: skip
    write_json(directory / "run.json", {
        "schema": 1, "model": "GPT", "precision": "bf16", "every": 1, "recorded_steps": steps,
        "optimizers": [optimizer], "status": "done"})  # fmt: skip
    write_json(directory / "graph.json", run.graph())
    writer, per_flush = StatsWriter(directory), min(10, -(-4096 // sites))
    for first in range(0, steps, per_flush):
        made = [run.step() for _ in range(min(per_flush, steps - first))]
        table, ratios = StatsTable.concat(t for t, _ in made), {}
        for i, (_, few) in enumerate(made):
            ratios |= {i * sites + row: ratio for row, ratio in few.items()}
        at, rows = np.repeat(np.arange(first, first + len(made)), sites), run.sites * len(made)
        call(
            lambda at=at, rows=rows, table=table, ratios=ratios: writer.write(at, rows, table, np.ones(len(at)), ratios)
        )
    call(writer.close)
    for step in sorted({0, steps // 2, steps - 1}):
        run.shadow(directory, step)
