"""Recording under DistributedDataParallel and FSDP2 with gloo processes: one run, equal to that of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranked
import torch

from precscope.profiles import Profile
from precscope.sites import Role

ROOT = Path(__file__).parents[1]
OWNED = ("weight", "update", "state")


def launch(world: int, *arguments: object, script: Path = ROOT / "tests" / "ranked.py") -> list[tuple[int, str]]:
    """Run a script on `world` processes; (exit code, what it said) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {  # as torchrun has it
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    command = [sys.executable, str(script), *map(str, arguments)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def succeed(done: list[tuple[int, str]]) -> None:
    for code, said in done:
        assert code == 0, said


@pytest.fixture(
    scope="module", params=[("ddp", 2), ("fsdp", 2), *(pytest.param(p, marks=pytest.mark.slow)
                                                       for p in (("ddp", 3), ("ddp", 4), ("fsdp", 4), ("hsdp", 4)))],
    ids=lambda p: f"{p[0]}-{p[1]}",
)  # fmt: skip
def runs(request, tmp_path_factory):
    """(kind, processes, where their runs are). The processes have asserted that recording changed no number."""
    kind, world = request.param
    out = tmp_path_factory.mktemp(f"{kind}{world}")
    succeed(launch(world, "merged", kind, out))
    return kind, world, out


def single(out: Path, name: str, **options) -> Profile:
    """One process over the same global batch."""
    path = out / f"single-{name}-{len(list(out.iterdir()))}"
    torch.set_num_threads(1)
    ranked.train(name, "plain", path, **options)
    return Profile.load(path)


def rows(profile: Profile) -> dict:
    """(step, module, role, call, tensor) -> (scalars, histogram)."""
    from precscope.store import expand, read_part

    found = {}
    for part in sorted(profile.path.glob("**/stats-*.parquet")):
        table = read_part(part)
        counts = expand(table["hist_lo"].to_numpy(), table["hist"].combine_chunks())
        ratio_lo = table["ratio_lo"].to_numpy()
        ratios = expand(ratio_lo, table["ratio"].combine_chunks())
        for i, row in enumerate(table.drop_columns(["hist", "hist_lo", "ratio", "ratio_lo"]).to_pylist()):
            key = tuple(row.pop(name) for name in ("step", "module", "role", "call", "tensor"))
            assert key not in found, f"{key} was written twice"
            found[key] = (row, np.concatenate([counts[i], ratios[i]]))
    return found


def differences(a: Profile, b: Profile, skip: tuple[str, ...] = ()) -> int:
    """Elements that are counted elsewhere, over all rows; the scalars must agree but for rounding of their sums."""
    ours, theirs = rows(a), rows(b)
    assert [k for k in ours if k not in theirs] == [] == [k for k in theirs if k not in ours]
    moved = 0
    for key, (scalars, counts) in ours.items():
        if key[2] in skip:
            continue
        other, other_counts = theirs[key]
        for name in ("count", "pos_inf", "neg_inf", "nan", "source", "loss_scale"):
            assert scalars[name] == other[name], (key, name)
        for name in ("amax", "amin_nonzero", "sumsq"):
            assert scalars[name] == pytest.approx(other[name], rel=1e-3, abs=1e-30), (key, name)
        moved += np.abs(counts - other_counts).sum() // 2
        moved += sum(abs((scalars[n] or 0) - (other[n] or 0)) for n in ("zeros", "ratio_unchanged", "ratio_from_zero"))
    return int(moved)


def test_one_process_writes(runs):
    _, world, out = runs
    assert not list(out.glob("*/rank-*"))
    assert Profile.load(out / "exact").run["merged_over"] == world


def test_equal_count_for_count_to_one_process(runs):
    """Where sums are exact: every row of every role, histograms included; and with the batch taken at once all but the
    gradients of weights, of which each process has its own (as each micro-batch has)."""
    _, world, out = runs
    both = Profile.load(out / "exact")
    many = {"of_many": world, "scale": 1024.0}
    roles = {site.role for site in both.sites}
    assert roles == set(Role)
    if world & (world - 1) == 0:
        assert differences(both, single(out, "exact", **many)) == 0
        at_once = single(out, "exact", together=world, **many)
        assert differences(both, at_once, skip=("grad_weight",)) == 0
        assert [s for s in both.sites if s.role is Role.GRAD_WEIGHT]
    else:  # a third is no fp32 number
        assert differences(both, single(out, "exact", **many)) <= 20


def test_loss_scale_and_number_of_processes_are_divided_out(runs):
    _, world, out = runs
    history = Profile.load(out / "exact").history()
    gradients = history[history.role == "grad_output"]
    assert (gradients.loss_scale == 1024.0).all()
    reference = single(out, "exact", of_many=world, scale=1024.0).history()
    reference = reference[reference.role == "grad_output"]
    assert gradients.amax.tolist() == pytest.approx(reference.amax.tolist(), rel=1e-6)


def test_real_numbers_differ_in_a_handful(runs):
    """bf16 autocast, LayerNorm, AdamW: 2 steps, about 8,000 elements; at most 20 may cross the edge of a binade."""
    _, world, out = runs
    if world == 3:
        return  # one process rounds gradients to bf16 after, three processes before they are divided by 3
    assert differences(Profile.load(out / "real"), single(out, "real", of_many=world)) <= 20


def test_micro_batches_without_exchange_are_rows_like_any(runs):
    _, world, out = runs
    both, reference = Profile.load(out / "micro"), single(out, "micro", of_many=2 * world)
    assert differences(both, reference) == (0 if world & (world - 1) == 0 else pytest.approx(0, abs=20))


def test_shadow_steps_are_merged(runs):
    _, world, out = runs
    if world == 3:
        return  # as above
    both, reference = Profile.load(out / "shadowed"), single(out, "shadowed", of_many=2 * world, shadow=True)
    ours, theirs = both.ask("fp16").set_index(["module", "role"]), reference.ask("fp16").set_index(["module", "role"])
    priced = theirs.loss_noise.dropna()
    assert len(priced) > 5
    assert ours.loss_noise[priced.index].to_numpy() == pytest.approx(priced.to_numpy(), rel=1e-2)
    assert both.truth[["step", "parameter"]].equals(reference.truth[["step", "parameter"]])
    for name in ("cosine", "rel_error", "grad_norm_fp32", "loss_low", "loss_fp32"):
        assert both.truth[name].tolist() == pytest.approx(reference.truth[name].tolist(), rel=1e-3), name
    assert both.truth.rel_error.min() > 1e-4  # bf16 against fp32


def test_experts_that_some_processes_do_not_use(runs):
    kind, world, out = runs
    if kind != "ddp":
        return
    assert differences(Profile.load(out / "experts"), single(out, "experts", of_many=world)) <= (world == 3) * 20


@pytest.mark.parametrize("kind", ["raises", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_process_that_fails_is_not_waited_for(tmp_path, kind):
    """Steps 0 to 1 were merged; of 2 (and 3, where it came to that) each process writes what it has, once."""
    (zero, said), (one, _) = launch(2, "failing", kind, tmp_path / "run")
    assert zero == 3 and one == (3 if kind == "raises" else -9), said
    profile = Profile.load(tmp_path / "run")
    history = profile.history()
    output = history[(history.module == "first") & (history.role == "output")].groupby("step")["count"].sum()
    assert output.loc[[0, 1]].tolist() == [2 * 4 * 8] * 2
    weights = history[(history.module == "first") & (history.role == "weight") & (history.tensor == "weight")]
    assert (weights.groupby("step")["count"].sum() == 64).all()
    assert profile.run["status"] == "failed"
    if kind == "raises":
        assert output.loc[2] == 2 * 4 * 8
        other = json.loads((tmp_path / "run" / "rank-00001" / "run.json").read_text())
        assert other["rank"] == 1 and "on purpose" in other["error"]


def test_processes_that_cannot_be_merged_are_told(tmp_path):
    succeed(launch(2, "alone", "-", tmp_path))
    zero, one = ((tmp_path / f"words-{rank}").read_text().splitlines() for rank in (0, 1))
    assert "process 1 of 2 did not within 2 s" in zero.pop(0) and "merge=False" in zero[0] + one[0]
    assert zero[0] == one[0] and "process 1 records with every=2" in zero[0]
    assert "already holds a run" in zero[1] and "already holds a run" in one[1] and "said by process 0" in one[1]
    for rank in (0, 1):
        own = Profile.load(tmp_path / f"own-{rank}")
        assert "merged_over" not in own.run and own.merged()[1].count.max() > 0
    assert Profile.load(tmp_path / "both").run["merged_over"] == 2
