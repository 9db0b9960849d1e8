"""Train what a comparison lacks: a run's configuration once more, under another seed or in fp32.

A twin is an ordinary run directory, trained from what the run's own directory tells: task, settings of the trainer,
precision or plan, first loss scale, device. One that is there and finished is reused; one that was killed goes on from
its last checkpoint, or starts again; one whose configuration is no longer the run's is trained anew, where it was
trained here. A twin that diverged is an outcome and stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunDirectoryError, TaskError, TrainingError, UsageError
from .runs import STORAGE, Run, changed, first_scale, read_run

Progress = Callable[[str], Any]
Note = Callable[[str], None]

WORDS = ("fp32", "tf32", "bf16", "fp16")


def train_seeds(
    runs: Sequence[Run],
    base: Run,
    seeds: int,
    *,
    task: Any = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> None:
    """Train each run under the seeds base.seed, base.seed + 1, ... as far as they are missing; seed by seed, so that a
    machine that grows slower meanwhile does so for all runs alike.

    Raises UsageError for a number below 2, where a run's task or settings are not known, and where a directory holds
    another run, made by hand; RunDirectoryError where a directory cannot be written.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 2:
        raise UsageError(f"seeds must be an integer of at least 2 (the run's own counts as one), not {seeds!r}")
    for run in runs:
        check_can_be_made_again(run, task)
    assert base.seed is not None
    wanted = [
        (run, seed, run.path / "seeds" / f"{seed:04d}")
        for seed in range(base.seed, base.seed + seeds)
        for run in runs
        if seed != run.seed
    ]
    for run, _, out in wanted:
        check_may_be_replaced(run, out)
    for run, seed, out in wanted:
        train_twin(run, out, seed=seed, task=task, progress=progress, note=note)


def train_twin(
    run: Run,
    out: Path,
    *,
    seed: int,
    precision: str | None = None,
    task: Any = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> None:
    """Train the run's configuration under `seed` into `out`, in `precision` instead of its own where that is given,
    unless that was done before. A run that diverges leaves a directory that says so, and raises nothing."""
    from ..training import train

    say = note or (lambda text: None)
    there = _what_is_there(run, out, precision)
    if there == "done":
        say(f"{out}: there already")
        return
    say(f"{out}: {'goes on' if there == 'unfinished' else there or 'training'}")
    made = _make_task(run, task, seed)
    if there != "unfinished":
        _begin(run, out)
    shown = progress(f"{run.name}, {precision or f'seed {seed}'}") if progress else None
    try:
        train(made, seed=seed, out=out, resume=True, progress=shown, **arguments(run, precision))
    except TrainingError as error:
        say(f"{out}: {error}")


def _begin(run: Run, out: Path) -> None:
    """An empty run directory that says whose twin it is, also when it is killed before its first step."""
    from ..store import SCHEMA, prepare_directory, write_json

    prepare_directory(out, exist="overwrite")
    content = {"status": "running", "twin_of": str(run.path), "twin_of_start": run.about.get("started")}
    write_json(out / "run.json", {"schema": SCHEMA, **content})


def check_may_be_replaced(run: Run, out: Path, *, precision: str | None = None) -> None:
    """Raises UsageError where `out` holds a run that is not the twin wanted and was not made for `run`: it is kept."""
    file = out / "run.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        made_for = content.get("twin_of") if isinstance(content, dict) else None
        if made_for is not None and (precision is None or Path(made_for).name == run.path.name):
            return
        reason = changed(run, read_run(out), precision=precision)
    except (ValueError, RunDirectoryError) as error:
        reason = str(error)
    if reason:
        where = "give the fp32 twin a directory of its own with out= (--verify-out)" if precision else "move it away"
        raise UsageError(f"{out} holds another run ({reason}): {where}")


def _what_is_there(run: Run, out: Path, precision: str | None) -> str:
    """ "" (nothing), "done", "unfinished", or why the run that is there does not count and is trained anew."""
    if not (out / "run.json").is_file():
        return ""
    try:
        twin = read_run(out)
    except RunDirectoryError:
        return "no whole run there, training anew"
    reason = changed(run, twin, precision=precision)
    if reason:
        return f"{reason}: training anew"
    return "unfinished" if twin.unfinished else "done"


def check_can_be_made_again(run: Run, task: Any) -> None:
    if task is None and not run.about.get("task_ref"):
        raise UsageError(
            f"{run.path} was trained on a task made by hand, which no other seed can be made of: pass task= (--task), "
            "the function that makes it, as file.py:function; next time give train that function instead of a task"
        )
    if not run.settings or run.seed is None:
        raise UsageError(
            f"{run.path} does not tell how it was trained (no settings in run.json): train it with precscope train, or "
            f"train the other seeds yourself into {run.path / 'seeds' / '0001'}, ..."
        )
    world = run.about.get("world_size", 1)
    if isinstance(world, int) and world > 1:
        raise UsageError(
            f"{run.path} was trained on {world} processes: train the other seeds the same way, under torchrun with "
            f"--seed 1 --out {run.path / 'seeds' / '0001'}, and so on; then compare without --seeds"
        )
    if run.unfinished:
        raise UsageError(f"{run.path} is {run.unfinished}: finish it first (precscope train ... --resume)")
    if run.precision not in WORDS and run.plan is None:
        raise UsageError(f"{run.path} ran in {run.precision!r} and holds no plan.json that can be read: train it again")
    if "guard" not in run.about and (run.path / "events.jsonl").is_file():
        raise UsageError(
            f"{run.path} ran under a guard, and its run.json does not tell which: train the other seeds yourself, with "
            f"--guard and --seed 1 --out {run.path / 'seeds' / '0001'}, and so on; then compare without --seeds"
        )


def _make_task(run: Run, task: Any, seed: int) -> Any:
    """The task under `seed`; raises UsageError where it is not the one that the run trained."""
    from ..tasks import make_task

    reference = task if task is not None else run.about.get("task_ref")
    try:
        made = make_task(reference, seed=seed)
    except TaskError as error:
        raise UsageError(
            f"the task of {run.path} cannot be made again ({error}): run this where it was trained, or pass task= "
            "(--task), where its function is now"
        ) from error
    count = sum(p.numel() for p in made.model.parameters())
    mine, theirs = (type(made.model).__name__, count), (run.about.get("model"), run.about.get("parameters"))
    if None not in theirs and mine != theirs:
        raise UsageError(
            f"{reference} now makes a {mine[0]} of {mine[1]:,} parameters, and {run.path} trained a {theirs[0]} of "
            f"{theirs[1]:,}: pass task= (--task), the function that made that one"
        )
    return made


def arguments(run: Run, precision: str | None) -> dict[str, Any]:
    """What `train` takes to do what the run did, seed and directory apart."""
    from ..plans import PrecisionPlan

    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in run.settings.items() if k != "seed"}
    if precision is not None:  # what is stored low belongs to the precision
        settings |= dict.fromkeys(STORAGE)
    device = run.about.get("device")
    found: dict[str, Any] = {**settings, "device": device} if device else dict(settings)
    compiled, guard = run.about.get("compile_config"), run.about.get("guard")
    if compiled:
        from ..training import CompileConfig

        found["compile"] = CompileConfig(**compiled)
    if guard and precision is None:  # an fp32 twin is the reference: nothing is to be promoted in it
        from ..training.guard import GuardConfig

        found["guard"] = GuardConfig(**guard)
    word = precision or run.precision
    if word in WORDS:
        found |= {
            "precision": word,
            "initial_scale": first_scale(run) if word == "fp16" and precision is None else None,
        }
    else:
        found |= {"plan": PrecisionPlan.load(run.plan_file), "params": None}  # the plan says it
    return found
