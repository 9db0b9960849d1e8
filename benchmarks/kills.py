"""Kill a training run (SIGKILL) at random moments, resume it, and compare with the run that was never killed.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--steps 120] [--every 20] [--json OUT]

Each kill is of a process of its own that trains a small model (dropout, BatchNorm, a shuffling loader) under a plan
with three phases, fp16, fp32 and fp16 again, writes a checkpoint every 20 steps, and sends itself SIGKILL. Moments are
drawn from the seed, not from the clock, so that a slow machine kills at the same ones:

    call     at the n-th call of a function, Python's or C's, of all that the loop makes from its third step on:
             anywhere in a step, an evaluation or a write
    write    when a part of a checkpoint's bytes has been written
    stage    before the file is synced, before or after it gets its name, after the directory is synced

Then every checkpoint with a final name must load, and the run, resumed from another start of the model, must end with
the losses, parameters and buffers of the uninterrupted one, bit for bit. All of them train in processes of one kind,
forked from one server: what an earlier test left on a process (threads, switches) is no part of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from precscope.errors import RunDirectoryError
from precscope.tasks import Task, make_task
from precscope.training import checkpoint, phases, train

STAGES = ("before sync", "before rename", "after rename", "after directory sync")


@dataclass(frozen=True)
class Moment:
    """When to kill. kind: "call", "write" or "stage". number: of the call, or of the checkpoint, from 1. part: of the
    checkpoint's bytes. stage: one of STAGES."""

    kind: str
    number: int
    part: float = 0.0
    stage: str = ""

    def __str__(self) -> str:
        if self.kind == "call":
            return f"at call {self.number}"
        where = f"{self.part:.0%} written" if self.kind == "write" else self.stage
        return f"checkpoint {self.number}, {where}"


@dataclass(frozen=True)
class Outcome:
    """What came of a kill. killed: the process died of SIGKILL. checkpoints: how many there were. damaged: those that
    do not load. unfinished: files without a final name. resumed_from: steps. equal: the resumed run ended as the
    uninterrupted one."""

    moment: str
    killed: bool
    checkpoints: int
    damaged: int
    unfinished: int
    resumed_from: int
    equal: bool


def make() -> Task:
    """A small regression; dropout draws from the generator, BatchNorm keeps buffers, the loader shuffles."""
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    return Task(
        model=model,
        loss=lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1]),
        batches=DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True),
        eval_batches=[(x[:32], x[:32].sum(1, keepdim=True))],
    )


def go(task: Task, out: Path, *, steps: int, every: int) -> Any:
    """The run, begun or gone on with."""
    plan = phases.parse(["0:fp16", f"{steps // 3}:fp32", f"{steps // 2}:fp16"])
    settings: dict[str, Any] = {"eval_every": every, "keep_best": True, "seed": 3, "flush_seconds": 0.0}
    return train(task, plan=plan, out=out, steps=steps, checkpoint_every=every, resume=True, **settings)


def moments(count: int, *, seed: int, calls: int, checkpoints: int) -> list[Moment]:
    """`count` moments: of ten, five at calls, three within writes, two between their stages."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        kind = ("call", "write", "stage", "call", "write", "call", "stage", "call", "write", "call")[i % 10]
        if kind == "call":
            found.append(Moment(kind, draw.randint(1, calls)))
        elif kind == "write":
            found.append(Moment(kind, draw.randint(1, checkpoints), part=draw.random()))
        else:
            found.append(Moment(kind, draw.randint(1, checkpoints), stage=draw.choice(STAGES)))
    return found


# the process that is killed


def die() -> None:
    """SIGKILL, as from outside: nothing runs after it, no buffer is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Counts the calls of functions from the third loss on (the first ones import much); dies at the given one."""

    def __init__(self, last: int | None) -> None:
        self.last, self.total, self._losses = last, 0, 0

    def begin(self) -> None:
        """A loss is about to be computed."""
        self._losses += 1
        if self._losses == 3:
            sys.setprofile(self._event)

    def _event(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.total += 1
            if self.total == self.last:
                die()


class DyingFile:
    """A file that lets so many bytes through, and kills the process."""

    def __init__(self, path: Path, allowed: int) -> None:
        self._file, self._left = open(path, "wb"), allowed  # noqa: SIM115 (it is closed by __exit__)

    def __enter__(self) -> DyingFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Of the last piece, only what is allowed."""
        view = memoryview(data).cast("B")
        if len(view) >= self._left:
            self._file.write(view[: self._left])
            self._file.flush()
            die()
        self._left -= len(view)
        return self._file.write(view)

    def flush(self) -> None:
        """As for any file."""
        self._file.flush()


def counting(task: Task, last: int | None = None) -> Counter:
    """Count the calls that training `task` makes, and die at the `last`."""
    counter, loss = Counter(last), task.loss

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        counter.begin()
        return loss(model, batch)

    task.loss = counted
    return counter


def arm(moment: Moment, task: Task, *, every: int, size: int) -> None:
    """Prepare the death of this process. size: of a checkpoint, in bytes."""
    if moment.kind == "call":
        counting(task, moment.number)
        return
    # with keep_best the state of an evaluated step may be written as best-N first, and linked to step-N
    names = tuple(f"{kind}-{moment.number * every:08d}.pt" for kind in ("step", "best"))
    if moment.kind == "stage":
        _arm_stage(moment.stage, names)
        return
    allowed = max(1, int(moment.part * size))
    checkpoint.open = lambda path, mode: (  # type: ignore[attr-defined]
        DyingFile(path, allowed) if any(n in path.name for n in names) else open(path, mode)  # noqa: SIM115
    )


def _arm_stage(stage: str, names: tuple[str, ...]) -> None:
    sync, replace, renamed = os.fsync, os.replace, [False]

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if stage == "before sync" and any(n in path for n in names):
            die()
        sync(handle)
        if stage == "after directory sync" and renamed[0] and path.endswith("checkpoints"):
            die()

    def rename(source: Any, target: Any) -> None:
        ours = Path(target).name in names
        if ours and stage == "before rename":
            die()
        replace(source, target)
        renamed[0] = renamed[0] or ours
        if ours and stage == "after rename":
            die()

    os.fsync, os.replace = fsync, rename  # type: ignore[assignment]


def train_whole(out: Path, end: Path, *, other: bool, count: bool, **how: int) -> None:
    """Train to the end, from a checkpoint where there is one, and write losses, evaluations, weights and, if `count`,
    the number of calls to `end`. other: start from another model, which a checkpoint is to replace."""
    task = make_task(make, seed=99) if other else make_task(make)
    counter = counting(task) if count else None
    try:
        result = go(task, out, **how)
    finally:
        sys.setprofile(None)
    calls = counter.total if counter is not None else 0
    known = {"losses": list(result.losses), "evaluations": [list(e) for e in result.evaluations], "calls": calls}
    torch.save({**known, "weights": weights(task)}, end)


def train_until(out: Path, moment: Moment, *, size: int, **how: int) -> None:
    """Train until `moment`, which does not return. size: of a checkpoint, in bytes."""
    task = make_task(make)
    arm(moment, task, every=how["every"], size=size)
    go(task, out, **how)


def serve() -> None:
    """Read settings from stdin, a line each; fork a process that trains as they say; print how it ended.

    Forking saves the seconds that each would need to import torch. It is safe as long as this process has one thread
    (importing pyarrow starts another).
    """
    import torch._dynamo  # noqa: F401  # the first optimizer step imports it

    for line in sys.stdin:
        settings = json.loads(line)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: forking is not safe"
        number = os.fork()
        if number == 0:
            code = 1  # it raised, or the moment did not come
            try:
                out, moment, end = Path(settings.pop("out")), settings.pop("moment", None), settings.pop("end", None)
                if moment is not None:
                    train_until(out, Moment(**moment), **settings)
                else:
                    train_whole(out, Path(end), **settings)
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


# the process that looks on


class Victims:
    """Processes that train, one at a time: whole, until they are killed, or from where a killed one was."""

    def __enter__(self) -> Victims:
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate()

    def kill(self, out: Path, moment: Moment, **how: int) -> bool:
        """Train in `out` until `moment`; whether the process died of SIGKILL."""
        return self._ask({"out": str(out), "moment": asdict(moment), **how}) == -signal.SIGKILL

    def train(self, out: Path, *, other: bool = False, count: bool = False, **how: int) -> dict[str, Any]:
        """Train in `out` to the end; losses, evaluations, weights and calls (see `train_whole`)."""
        end = out.with_suffix(".end.pt")
        code = self._ask({"out": str(out), "end": str(end), "other": other, "count": count, **how})
        assert code == 0, f"the process that trains in {out} ended with {code}: its traceback is above"
        return torch.load(end, weights_only=True)

    def _ask(self, what: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def weights(task: Task) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[n].dtype is b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        if a[n].dim()
        else torch.equal(a[n], b[n])
        for n in a
    )


def judge(victims: Victims, out: Path, moment: Moment, killed: bool, expected: dict[str, Any], **how: int) -> Outcome:
    """Look at what the killed process left, resume, and compare with what was `expected`."""
    files = checkpoint.checkpoints(out)
    damaged = 0
    for path in [*files, *(out / "checkpoints").glob("best-*.pt")]:
        try:
            checkpoint.load(path)
        except RunDirectoryError:
            damaged += 1
    unfinished = len(list(out.rglob(".*.tmp")))
    found = checkpoint.latest(out)
    result = victims.train(out, other=found is not None, **how)
    equal = all(result[name] == expected[name] for name in ("losses", "evaluations"))
    equal = equal and same(result["weights"], expected["weights"]) and not list(out.rglob(".*.tmp"))
    return Outcome(str(moment), killed, len(files), damaged, unfinished, found["step"] if found else 0, equal)


def run(
    count: int, *, seed: int = 0, steps: int = 120, every: int = 20, note: Callable[[str], None] = print
) -> list[Outcome]:
    """`count` kills, each of a run of its own. note: is told of each."""
    how = {"steps": steps, "every": every}
    with tempfile.TemporaryDirectory() as folder, Victims() as victims:
        whole = Path(folder, "whole")
        expected = victims.train(whole, count=True, **how)
        size = checkpoint.checkpoints(whole)[0].stat().st_size
        outcomes = []
        for index, moment in enumerate(moments(count, seed=seed, calls=expected["calls"], checkpoints=steps // every)):
            out = Path(folder, f"run-{index}")
            killed = victims.kill(out, moment, size=size, **how)
            outcomes.append(judge(victims, out, moment, killed, expected, **how))
            note(row(index, outcomes[-1]))
        return outcomes


def row(index: int, outcome: Outcome) -> str:
    """A line of the table."""
    return (
        f"{index + 1:>3}  {outcome.moment:<40} {'yes' if outcome.killed else 'NO':<7} {outcome.checkpoints:>5} "
        f"{outcome.damaged:>8} {outcome.unfinished:>11} {outcome.resumed_from:>8}  {'yes' if outcome.equal else 'NO'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return 0
    from common import write_json  # only where this is run as a script

    head = f"{'':>3}  {'moment':<40} {'killed':<7} {'files':>5} {'damaged':>8} {'unfinished':>11} {'resumed':>8}  equal"
    print(head)
    outcomes = run(given.kills, seed=given.seed, steps=given.steps, every=given.every)
    good = sum(o.killed and o.equal and not o.damaged for o in outcomes)
    print(f"{good} of {len(outcomes)} kills: resumed, and ended bit for bit as the run that was never killed")
    write_json(given.json, "kills", [asdict(o) for o in outcomes], seed=given.seed, steps=given.steps)
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
