"""The project's own zoo: every case fails where it says so, is cured by fp32 in its guilty modules, and reads well."""

from __future__ import annotations

import json

import pytest
import torch

from precscope.bench.cases import FORMATS, load_cases
from precscope.bench.harness import fails, islands, run_case
from precscope.bench.zoo import own_zoo

CASES = {case.name: case for case in load_cases(own_zoo())}
QUICK = {"dice_overlap", "phase_sum", "tiny_vectors", "soft_assignment", "diffusion_timestep", "state_decay",
         "contrast_exponential", "ctl_mean_overlap", "ctl_quick_average", "ctl_dead_features"}  # fmt: skip
PAIRS = [
    pytest.param(name, fmt, seed, marks=[] if name in QUICK and seed == 0 else [pytest.mark.slow])
    for name in CASES
    for fmt in FORMATS
    for seed in range(3)
]


@pytest.mark.parametrize(("name", "fmt", "seed"), PAIRS)
def test_a_case_fails_as_it_says_and_is_cured_by_its_guilty_modules(name, fmt, seed):
    case = CASES[name]
    reference = run_case(case, seed=seed)
    assert reference.usable
    low = run_case(case, fmt=fmt, seed=seed)
    assert fails(case, low, reference) == case.fails_in(fmt), f"{low} beside {reference}"
    if case.fails_in(fmt):
        fixed = run_case(case, fmt=fmt, plan=islands(case, fmt, case.guilty[fmt]), seed=seed)
        assert not fails(case, fixed, reference), f"{fixed} beside {reference}: {fixed.error}"


def test_the_zoo_is_as_large_as_promised():
    failing = [c for c in CASES.values() if not c.is_control]
    assert len(failing) >= 12 and sum(c.is_control for c in CASES.values()) >= 4
    assert all(c.fails_in("fp16") or c.fails_in("bf16") for c in failing)
    assert not any(c.fails_in(f) for c in CASES.values() if c.is_control for f in FORMATS)
    finite = [c for c in failing if "overflow" not in c.kind and "underflow" not in c.kind]
    assert len(finite) >= 8  # half of the failures that are documented never produce an inf


@pytest.mark.parametrize("name", CASES)
def test_a_case_names_modules_it_has_and_says_where_it_is_from(name):
    case = CASES[name]
    model, batch_fn, loss_fn = case.build()
    names = dict(model.named_modules())
    accepted = [a for f in FORMATS for a in (*case.accepts(f).stand_ins, *case.accepts(f).spared)]
    for module in (*case.guilty["fp16"], *case.guilty["bf16"], *accepted):
        assert module in names, module
    assert case.source.startswith(("https://", "made up here", "counterpart of ")), case.source
    assert case.kind and case.phase and (case.fix or case.is_control)
    loss = loss_fn(model, batch_fn(0))
    assert loss.numel() == 1 and torch.isfinite(loss)


def test_a_case_builds_alike_under_a_seed():
    for case in CASES.values():
        built = []
        for _ in range(2):
            torch.manual_seed(3)
            model, batch_fn, _ = case.build()
            built.append([*model.state_dict().values(), *batch_fn(1)])
        assert all(torch.equal(a, b) for a, b in zip(*built, strict=True)), case.name


def test_accepted_answers_are_of_failing_pairs():
    content = json.loads((own_zoo() / "accept.json").read_text())
    assert {(c, f) for c, formats in content.items() for f in formats} == {
        (c.name, f) for c in CASES.values() for f in FORMATS if c.fails_in(f)
    }
