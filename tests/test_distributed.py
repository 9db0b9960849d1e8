"""Recording under DistributedDataParallel and FSDP2: two gloo processes; their statistics add up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from precscope.profiles import Profile
from precscope.recording import record
from precscope.sites import Role, Site

SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import models
from precscope.recording import record
kind, out = sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
inner = models.MLP()
if kind == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(inner)
else:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    for layer in (inner.fc1, inner.fc2):
        fully_shard(layer, mesh=mesh)
    model = fully_shard(inner, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with record(model, out, optimizer=optimizer, every=1) as rec:
    for step in range(3):
        x, y = models.batch(step, 12)
        half = slice(6 * rank, 6 * rank + 6)
        models.loss_of(model, (x[half], y[half])).backward()
        optimizer.step()
        optimizer.zero_grad()
        rec.step()
dist.barrier()
dist.destroy_process_group()
"""


def launch(tmp_path: Path, kind: str, script_text: str = SCRIPT) -> Profile:
    script = tmp_path / "run.py"
    script.write_text(script_text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "WORLD_SIZE": "2"}  # fmt: skip
    arguments = [sys.executable, str(script), str(root / "tests"), kind, str(tmp_path / "run")]
    processes = [
        subprocess.Popen(arguments, env={**environment, "RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return Profile.load(tmp_path / "run")


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Profile:
    """One process over the same global batch."""
    import models

    out = tmp_path_factory.mktemp("single") / "run"
    torch.manual_seed(0)
    model = models.MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, out, optimizer=optimizer, every=1) as rec:
        for step in range(3):
            models.loss_of(model, models.batch(step, 12)).backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
    return Profile.load(out)


def row(profile: Profile, module: str, role: Role):
    sites, table = profile.merged()
    return table.row(sites.index(Site(module, role)))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process_over_the_global_batch(tmp_path, single, kind):
    both = launch(tmp_path, kind)
    assert both.steps == [0, 1, 2] and {s.module for s in both.sites} == {s.module for s in single.sites}
    for module, role in (("fc1", Role.INPUT), ("fc1", Role.OUTPUT), ("act", Role.OUTPUT), ("fc2", Role.OUTPUT)):
        a, b = row(both, module, role), row(single, module, role)
        assert a.count == b.count
        assert a.amax == pytest.approx(b.amax, rel=1e-5)
        assert np.abs(a.counts - b.counts).sum() <= 4  # a value on a binade's edge may fall on the other side
    copies = 1 if kind == "fsdp" else 2  # shards against replicas
    for role in (Role.GRAD_WEIGHT, Role.UPDATE, Role.WEIGHT):
        if (kind, role) != ("fsdp", Role.WEIGHT):
            assert row(both, "fc1", role).count == copies * row(single, "fc1", role).count, role
    assert (row(both, "fc1", Role.UPDATE).amax) == pytest.approx(row(single, "fc1", Role.UPDATE).amax, rel=1e-4)


SHADOW = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from precscope.recording import record
kind, out = sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


def train(watch, path):
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(16))
    inner.append(torch.nn.Linear(16, 4))
    if kind == "stored_low":
        inner.bfloat16()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        model = fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = torch.nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=kind != "plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(rank)
    losses = []
    with record(inner if kind == "not_told" else model, path, optimizer=optimizer, every=1) as rec:
        for step in range(3):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2 * step + rank))
            x = x.bfloat16() if kind == "stored_low" else x

            def loss_of():
                return model(x).float().square().mean()

            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of()
            loss.backward()
            if watch:
                rec.shadow(loss_of, loss=loss)
            optimizer.step()
            losses.append(loss.item())
            rec.step()
    state = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in inner.state_dict().values()]
    return losses, state


(losses, state), (watched_losses, watched) = train(False, out + "-without"), train(True, out)
assert losses == watched_losses, (losses, watched_losses)
assert all(torch.equal(a, b) for a, b in zip(state, watched, strict=True))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["plain", "bucket_views", "stored_low", "not_told", "fsdp"])
def test_shadow_steps_on_two_ranks_change_nothing_and_compare_averages(tmp_path, kind):
    """bucket_views: .grad lies in memory that DDP exchanges gradients in. not_told: the wrapper was not given."""
    truth = launch(tmp_path, kind, SHADOW).truth
    assert truth.step.unique().tolist() == [0, 1, 2]
    assert truth.cosine.min() > 0.99 and 1e-4 < truth.rel_error.max() < 0.1
