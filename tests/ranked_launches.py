"""What the processes of tests/test_launches.py run: recording inside Accelerate's and Fabric's own loops.

python ranked_launches.py accelerate|fabric OUT
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

import ranked
import torch
import torch.nn.functional as F

import precscope as ps

MICRO = 2


def with_accelerate(out: Path | None, plan: ps.PrecisionPlan | None) -> list[torch.Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    inner, batch_of = ranked.build("exact")
    handle = ps.apply(plan, inner) if plan is not None else contextlib.nullcontext()
    model, optimizer = accelerator.prepare(inner, ranked.optimizer_of("exact", inner))
    losses = []
    with handle, _recording(out, model, optimizer) as rec:
        for index in range(ranked.STEPS * MICRO):
            x, y = batch_of(index * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x).float(), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if rec is not None and accelerator.sync_gradients:
                rec.step()
    return [*losses, *(p.detach() for p in inner.parameters())]


def with_fabric(out: Path | None, plan: ps.PrecisionPlan | None) -> list[torch.Tensor]:
    from lightning_fabric import Fabric

    world = int(os.environ["WORLD_SIZE"])
    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    fabric.launch()
    inner, batch_of = ranked.build("exact")
    handle = ps.apply(plan, inner) if plan is not None else contextlib.nullcontext()
    model, optimizer = fabric.setup(inner, ranked.optimizer_of("exact", inner))
    losses = []
    with handle, _recording(out, model, optimizer) as rec:
        for index in range(ranked.STEPS * MICRO):
            x, y = batch_of(index * world + fabric.global_rank)
            last = (index + 1) % MICRO == 0
            with fabric.no_backward_sync(model, enabled=not last):
                loss = F.mse_loss(model(x).float(), y)
                fabric.backward(loss / MICRO)
            losses.append(loss.detach())
            if last:
                optimizer.step()
                optimizer.zero_grad()
                if rec is not None:
                    rec.step()
    return [*losses, *(p.detach() for p in inner.parameters())]


def _recording(out, model, optimizer):
    return ps.record(model, out, optimizer=optimizer, every=1) if out is not None else contextlib.nullcontext()


def main() -> None:
    kind, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("default")
    loop = {"accelerate": with_accelerate, "fabric": with_fabric}[kind]
    plain, watched = loop(None, None), loop(out / "run", None)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    planned = loop(out / "planned", ps.PrecisionPlan(default="bf16"))
    assert not all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    if torch.distributed.get_rank() == 0:
        (out / "sources.json").write_text(json.dumps("done"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
