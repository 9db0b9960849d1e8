"""Is the predicted loss noise right? Round one tensor at a time, and look at the loss.

    python benchmarks/noise.py                  # demo GPT, a ResNet on digits, MiniLM (skipped where not installed)
    python benchmarks/noise.py gpt --json OUT

Shadow steps on a few batches give, per site, the gradient-weighted histogram and from it the standard deviation of the
change of the loss when this one tensor is rounded to a format. Then, on the same batches (whether a few batches stand
for a data set is another question), this tensor alone is really rounded (nearest even, everywhere it is used), the rest
computed in fp64 so that nothing else moves the loss, and

    ratio = (loss with the tensor rounded - loss) / predicted standard deviation

should have an rms of 1 over sites and batches; and sites should come in the predicted order (Spearman correlation of
predicted and measured noise, the latter an rms over batches). Every tensor counts once: an output that is the next
module's input, or a container's output that is its last child's, is one site.

`curved`, for the last format, is the share of the mean square of the change that is not of first order: what remains
when the change under the opposite rounding error is added, ((d+ + d-) / 2)^2, on one batch. It belongs to the second
derivative of the loss, which no histogram of gradients knows.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import realmodels
import torch
from common import write_json
from torch import Tensor, nn

import precscope as ps
from precscope.recording import record
from precscope.recording.tensors import call_tensors, named_tensors
from precscope.sites import Role, Site

FORMATS = ("bf16", "fp16", "e4m3")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model, and the batches to judge it on."""

    name: str
    model: nn.Module
    loss: Loss
    batches: Sequence[Any]


@dataclass(frozen=True)
class Measured:
    """One site in one format. change: of the loss, per batch. mirrored: under the opposite error, on the first ones."""

    site: Site
    fmt: str
    scale_exponent: int
    predicted: float
    change: tuple[float, ...]
    mirrored: tuple[float, ...]

    @property
    def rms(self) -> float:
        """Measured noise: rms of the change over batches."""
        return math.sqrt(np.mean(np.square(self.change)))


def predict(case: Case, formats: Sequence[str] = FORMATS) -> dict[tuple[Site, str], tuple[int, float]]:
    """(site, format) -> (scale exponent, predicted standard deviation), by the public route: a shadow step per batch,
    Profile.ask. The exponent is 0 unless the tensor would overflow the format."""
    with tempfile.TemporaryDirectory() as folder:
        with record(case.model, f"{folder}/run", every=1) as rec:
            for batch in case.batches:
                rec.shadow(lambda batch=batch: case.loss(case.model, batch))
                rec.step()
        shadow = ps.Profile.load(f"{folder}/run").shadow
    found: dict[tuple[Site, str], tuple[int, float]] = {}
    for fmt in formats:
        largest = ps.get_format(fmt).max
        amax = shadow.table.amax
        scale = np.where(amax > largest, np.floor(np.log2(largest / np.maximum(amax, largest))), 0).astype(int)
        for k in np.unique(scale):
            noise = shadow.ask(fmt, scale_exponent=int(k), by="tensor").loss_noise.to_numpy()
            for i in np.flatnonzero((scale == k) & np.isfinite(noise)):
                found[shadow.sites[i], fmt] = (int(k), float(noise[i]))
    kept = set(_distinct(shadow))
    return {key: value for key, value in found.items() if key[0] in kept}


def _distinct(shadow: ps.Profile) -> Iterator[Site]:
    """Each tensor once: outputs first, inputs only where they are no module's output."""
    seen = set()
    order = {Role.OUTPUT: 0, Role.INPUT: 1, Role.WEIGHT: 2}
    for i in sorted(range(len(shadow.sites)), key=lambda i: order.get(shadow.sites[i].role, 3)):
        site, row = shadow.sites[i], shadow.table.row(i)
        if site.role not in order:
            continue
        key = (site.role is Role.WEIGHT, row.count, row.sum, row.sumsq, row.amax)
        if site.role is Role.WEIGHT or key not in seen:
            seen.add(key)
            yield site


@contextmanager
def rounded(model: nn.Module, site: Site, fmt: str, k: int, mirror: bool) -> Iterator[None]:
    """Inside, the tensor of `site` is rounded, for all that take it; mirror: with the opposite error."""

    def round_(x: Tensor) -> None:
        with torch.no_grad():
            low = ps.quantize(x.detach(), fmt, scale_exponent=k)
            x.copy_(2 * x - low if mirror else low)

    module, calls = dict(model.named_modules())[site.module], [0]

    def hook(tensors: list[tuple[str, Tensor]]) -> None:
        if calls[0] == site.call:
            for path, x in tensors:
                if path == site.tensor:
                    round_(x)
        calls[0] += 1

    if site.role is Role.WEIGHT:
        parameter = getattr(module, site.tensor)
        kept = parameter.detach().clone()
        round_(parameter)
        try:
            yield
        finally:
            with torch.no_grad():
                parameter.copy_(kept)
        return
    if site.role is Role.OUTPUT:
        handle = module.register_forward_hook(lambda m, args, out: hook(list(named_tensors(out))))
    else:
        handle = module.register_forward_pre_hook(lambda m, a, kw: hook(call_tensors(a, kw)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def measure(
    case: Case, *, most: int | None = None, formats: Sequence[str] = FORMATS, mirror: int = 1
) -> list[Measured]:
    """Every site (at most `most`, evenly spaced) in every format. mirror: batches on which the last format's rounding
    error is also taken with the opposite sign."""
    predicted = predict(case, formats)
    sites = list(dict.fromkeys(site for site, _ in predicted))
    if most is not None and len(sites) > most:
        sites = [sites[int(i)] for i in np.linspace(0, len(sites) - 1, most)]
    model = copy.deepcopy(case.model).double()
    batches = [_double(batch) for batch in case.batches]
    signs = [(i, False) for i in range(len(batches))]
    found = []
    with torch.no_grad():
        plain = [float(case.loss(model, batch)) for batch in batches]
        for site in sites:
            for fmt in formats:
                k, noise = predicted[site, fmt]
                change = []
                for i, opposite in signs + ([(i, True) for i in range(mirror)] if fmt == formats[-1] else []):
                    with rounded(model, site, fmt, k, opposite):
                        change.append(float(case.loss(model, batches[i])) - plain[i])
                n = len(batches)
                found.append(Measured(site, fmt, k, noise, tuple(change[:n]), tuple(change[n:])))
    return found


def _double(value: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def judge(found: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Per format: rms of the ratio, Spearman correlation, and more (see the module's docstring)."""
    from scipy.stats import spearmanr

    table = {}
    for fmt in dict.fromkeys(m.fmt for m in found):
        rows = [m for m in found if m.fmt == fmt]
        exact = [m for m in rows if m.predicted == 0]
        rows = [m for m in rows if m.predicted > 0]
        ratios = np.array([m.change for m in rows]) / np.array([[m.predicted] for m in rows])
        row = {
            "sites": len(rows),
            "rms": float(np.sqrt(np.mean(ratios**2))),
            "median_abs": float(np.median(np.abs(ratios))),
            "spearman": float(spearmanr([m.predicted for m in rows], [m.rms for m in rows]).statistic),
            "exact": len(exact),
            "exact_worst": max((m.rms for m in exact), default=0.0),
        }
        if rows and rows[0].mirrored:
            mirrored = np.array([m.mirrored for m in rows]) / np.array([[m.predicted] for m in rows])
            both = (ratios[:, : mirrored.shape[1]] + mirrored) / 2
            row["curved"] = float(np.mean(both**2) / np.mean(ratios[:, : mirrored.shape[1]] ** 2))
        table[fmt] = row
    return table


# models


def gpt(steps: int = 40) -> Case:
    """The demo's GPT after a short training, judged on 4 batches of 2 x 128 bytes."""
    from precscope.training.tasks.gpt import gpt as make

    torch.manual_seed(0)
    task = make()
    ps.train(task, steps=steps, precision="fp32", eval_limit=1)
    task.model.eval()
    cut = [tuple(t[:2, :128] for t in task.batch(10_000 + i)) for i in range(4)]
    return Case("gpt", task.model, task.loss, cut)


def resnet(steps: int = 60) -> Case | str:
    """The shared ResNet on handwritten digits, judged in training mode on 8 batches of 64."""
    try:
        task = realmodels.resnet()
    except realmodels.Missing as missing:
        return str(missing)
    ps.train(task, steps=steps, precision="fp32", lr=2e-3, eval_limit=1)
    task.model.train()
    return Case("resnet", task.model, task.loss, [task.batch(10_000 + i) for i in range(8)])


def minilm() -> Case | str:
    """The shared pretrained sentence encoder, in evaluation mode, on 6 batches of 12 pairs."""
    try:
        task = realmodels.minilm()
    except realmodels.Missing as missing:
        return str(missing)
    torch.manual_seed(0)
    return Case("minilm", task.model.eval(), task.loss, [task.batch(i) for i in range(6)])


CASES: dict[str, tuple[Callable[[], Case | str], int | None]] = {
    "gpt": (gpt, None), "resnet": (resnet, None), "minilm": (minilm, 40)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--json", help="write figures and all sites to this file")
    parser.add_argument("--most", type=int, help="sites per model at most, evenly spaced")
    parser.add_argument("--worst", type=int, default=0, help="also list this many sites with the largest ratios")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'model':8} {'format':6} {'sites':>5} {'rms':>6} {'median':>7} {'Spearman':>8} {'curved':>7}")
    for name in arguments.models or CASES:
        make, most = CASES[name]
        started = time.perf_counter()
        case = make()
        if isinstance(case, str):
            print(f"{name:8} skipped: {case}")
            results[name] = {"skipped": case}
            continue
        found = measure(case, most=arguments.most or most)
        figures = judge(found)
        for fmt, row in figures.items():
            curved = f"{row['curved']:7.1%}" if "curved" in row else ""
            numbers = f"{row['rms']:6.2f} {row['median_abs']:7.2f} {row['spearman']:8.3f} {curved}"
            print(f"{name:8} {fmt:6} {row['sites']:5} {numbers}", flush=True)
        _print_worst(found, arguments.worst)
        seconds = time.perf_counter() - started
        measured = len({m.site for m in found})
        how = f"{seconds:.0f} s, {torch.get_num_threads()} threads"
        print(f"{name:8} {measured} sites, {len(case.batches)} batches, {how}")
        rows = [{**asdict(m), "site": str(m.site)} for m in found]
        results[name] = {"figures": figures, "seconds": seconds, "sites": rows}
    write_json(arguments.json, "noise", [{"model": name, **found} for name, found in results.items()])


def _print_worst(found: Sequence[Measured], count: int) -> None:
    rows = [m for m in found if m.predicted > 0]
    rows.sort(key=lambda m: -abs(math.log(max(m.rms, 1e-30) / m.predicted)))
    for m in rows[:count]:
        ratio = m.rms / m.predicted
        print(f"    {m.fmt:5} {m.site!s:40} predicted {m.predicted:.3g} measured {m.rms:.3g} ({ratio:.2f})")


if __name__ == "__main__":
    main()
