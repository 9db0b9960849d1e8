"""What the processes of tests/test_distributed.py run: `python ranked.py SCENARIO KIND OUT`, under RANK and WORLD_SIZE.

The same functions run in one process as the reference: there `world` micro-batches follow one another.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from precscope.recording import record

STEPS, ROWS = 2, 4  # rows of a micro-batch
REAL = ("real", "shadowed")


class Exact(nn.Module):
    """Every sum that is made of its numbers in two steps is exact in fp32, in whatever order it is taken."""

    def __init__(self, experts: bool = False) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2)) if experts else None
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)

    def forward(self, x, expert=0):
        x = self.act(self.first(x))
        if self.experts is not None:
            x = self.experts[expert](x)
        return self.last(x)


def exact_batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(-3, 4, (ROWS, 8), generator=generator).float(), torch.zeros(ROWS, 4)


class Real(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.last = nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.act(self.norm(self.first(x))))


def real_batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 4, generator=generator)


def build(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    return (Real(), real_batch) if name in REAL else (Exact(name == "experts"), exact_batch)


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        unused = getattr(model, "experts", None) is not None
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    if kind in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        sizes = (2, dist.get_world_size() // 2) if kind == "hsdp" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        fully_shard(model.first, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in REAL:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.SGD(model.parameters(), lr=2.0**-6, momentum=0.5)


def train(name: str, kind: str, out: Path | None, *, world: int = 1, rank: int = 0, together: int = 1, of_many: int = 1,
          scale: float | None = None, shadow: bool = False) -> list[torch.Tensor]:  # fmt: skip
    """STEPS steps on `of_many` micro-batches each; this process takes every `world`-th. together: as one batch each
    that many. scale: a constant loss scale. Returns losses and parameters."""
    inner, batch_of = build(name)
    model = wrapped(inner, kind)
    optimizer = optimizer_of(name, inner)
    losses = []
    with record(model, out, optimizer=optimizer, every=1, scaler=scale) if out else contextlib.nullcontext() as rec:
        for step in range(STEPS):
            mine = range(step * of_many + rank * together, (step + 1) * of_many, world * together)
            closures, count = [], len(mine)
            for first in mine:
                x, y = (torch.cat(parts) for parts in zip(*(batch_of(first + i) for i in range(together)), strict=True))
                last = first == mine[-1]
                options = {"expert": first % 2} if name == "experts" else {}

                def loss_of(x=x, y=y, options=options, share=1 / count):
                    return F.mse_loss(model(x, **options).float(), y) * share

                with _accumulating(model, kind, last), torch.autocast("cpu", torch.bfloat16, enabled=name in REAL):
                    loss = loss_of()
                    (loss * (scale or 1.0)).backward()
                losses.append(loss.detach())
                closures.append(loss_of)
            if shadow and rec is not None:
                rec.shadow(closures, loss=torch.stack(losses[-len(mine) :]).sum())
            if scale:
                for parameter in inner.parameters():
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
            optimizer.step()
            optimizer.zero_grad()
            if rec is not None:
                rec.step()
    return [*losses, *(p.detach() for p in inner.parameters())]


@contextlib.contextmanager
def _accumulating(model, kind, last):
    if kind == "ddp" and not last:
        with model.no_sync():
            yield
        return
    if kind in ("fsdp", "hsdp"):
        model.set_requires_gradient_sync(last)
    yield


def merged(kind: str, out: Path, world: int, rank: int) -> None:
    """Runs whose statistics are compared with one process, and that are the same with and without a recorder."""
    for name, micro in (("exact", 1), ("real", 1), ("micro", 2), ("experts", 1), ("shadowed", 2)):
        if name == "experts" and kind != "ddp":
            continue  # its collectives need all parameters on every process
        many = {"world": world, "rank": rank, "of_many": micro * world}
        scale = 1024.0 if name == "exact" else None
        plain = train(name, kind, None, scale=scale, **many)
        watched = train(name, kind, out / name, scale=scale, shadow=name == "shadowed", **many)
        assert all(torch.equal(_local(a), _local(b)) for a, b in zip(plain, watched, strict=True)), name


def _local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def failing(kind: str, out: Path, world: int, rank: int) -> None:
    """The last process ends in the middle, by an exception or killed; the others must not wait for it."""
    try:
        inner, batch_of = build("exact")
        model = wrapped(inner, "ddp")
        with record(model, out, every=1, flush_every=2) as rec:
            for step in range(6):
                if step == 3 and rank == world - 1:
                    if kind == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ZeroDivisionError("on purpose")
                x, y = batch_of(step * world + rank)
                F.mse_loss(model(x), y).backward()
                rec.step()
    except (ZeroDivisionError, RuntimeError) as error:
        print(f"process {rank}: {type(error).__name__}")
        os._exit(3)


def alone(kind: str, out: Path, world: int, rank: int) -> None:
    """What cannot be merged says so on all processes."""
    from precscope.recording import meeting

    model = build("exact")[0]

    def said(action) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def run(path, **options):
        with record(model, path, **options) as rec:
            F.mse_loss(model(exact_batch(rank)[0]), exact_batch(rank)[1]).backward()
            rec.step()

    words = []
    if rank == 0:
        usual, meeting.PATIENCE = meeting.PATIENCE, 2.0
        words.append(said(lambda: run(out / "absent")))
        meeting.PATIENCE = usual
        run(out / "apart", merge=False)
    dist.barrier()
    words += [said(lambda: run(out / "other", every=rank + 1)), said(lambda: run(out / "apart"))]
    run(out / f"own-{rank}")
    run(out / "both")
    (out / f"words-{rank}").write_text("\n".join(words))


def main() -> None:
    scenario, kind, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.filterwarnings("default")
    dist.init_process_group("gloo")
    globals()[scenario](kind, out, dist.get_world_size(), dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
