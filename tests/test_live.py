"""The live view and the TensorBoard writer: what they show is what was read, and the run does not notice them."""

from __future__ import annotations

import io
import math
import sys
import threading

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import precscope as ps
from precscope.errors import PlanError, RunDirectoryError, TrainingError, UsageError
from precscope.formats import get_format
from precscope.histogram import EXP_LO
from precscope.live import Board, Course, LiveView, Parts, sparkline, watching
from precscope.live.boards import raw_histogram
from precscope.live.state import in_time
from precscope.progress import Progress, is_terminal
from precscope.recording import record
from precscope.sites import Role, Site
from precscope.store import StatsWriter
from precscope.training.log import Row
from precscope.training.recorders import recording_every


def make_task() -> ps.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 8, generator=draw), torch.randint(0, 3, (16,), generator=draw)) for _ in range(6)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return ps.Task(model=model, loss=loss, batches=data, forward=lambda model, batch: model(batch[0]))


def row(step: int, loss: float = 1.0, **about) -> Row:
    figures = {"lr": 1e-3, "scale": 1.0, "skipped": False, "nonfinite": False, "grad_norm": 0.5, "time_ms": 2.0}
    return Row(step, loss, memory_bytes=0, **{**figures, **about})


def drawn(view: LiveView, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(view.picture())
    return console.file.getvalue()


# what was flushed


def table_of(task: ps.Task, out, *, steps: int, flush_every: int = 2, every: int = 1):
    with record(task.model, out, every=every, flush_every=flush_every) as rec:
        for step in range(steps):
            task.loss(task.model, task.batch(step)).backward()
            yield step
            rec.step()


def test_parts_are_seen_once_and_add_up_to_the_profile(tmp_path):
    task, parts, seen = make_task(), Parts(tmp_path / "a"), []
    for _ in table_of(task, tmp_path / "a", steps=7):
        seen += [found] if (found := parts.look()) is not None else []
    seen += [found] if (found := parts.look()) is not None else []
    assert [found.steps for found in seen] == [(0, 1), (2, 3), (4, 5), (6,)] and parts.look() is None
    profile = ps.Profile.load(tmp_path / "a")
    sites, table = profile.merged()
    assert {s for found in seen for s in found.sites} == set(sites)
    for site in (Site("0", Role.OUTPUT), Site("2", Role.GRAD_OUTPUT)):
        total = sum(found.table.counts[found.sites.index(site)] for found in seen)
        assert (total == table.counts[sites.index(site)]).all() and total.sum() > 0
        reach = max(found.reach[found.sites.index(site)] for found in seen)
        assert reach == pytest.approx(table.amax[sites.index(site)])


def test_parts_that_are_put_together_are_not_told_again(tmp_path, monkeypatch):
    from precscope.store import writer

    monkeypatch.setattr(writer, "_MERGED_PARTS", 3)
    parts, steps = Parts(tmp_path / "a"), []
    for _ in table_of(make_task(), tmp_path / "a", steps=12, flush_every=1):
        steps += found.steps if (found := parts.look()) is not None else ()
    steps += found.steps if (found := parts.look()) is not None else ()
    assert steps == list(range(12))
    assert any(p.name.count("-") == 2 for p in (tmp_path / "a").glob("stats-*.parquet"))


def test_a_run_that_goes_back_is_told_again_from_there(tmp_path):
    task, parts = make_task(), Parts(tmp_path / "a")
    with record(task.model, tmp_path / "a", every=1, flush_every=1) as rec:
        for step in range(4):
            task.loss(task.model, task.batch(step)).backward()
            rec.step()
        assert parts.look().steps == (0, 1, 2, 3)
        rec.go_back(2)
        parts.begin(2)
        assert parts.look() is None
        task.loss(task.model, task.batch(2)).backward()
        rec.step()
        assert parts.look().steps == (2,)


def test_damaged_and_missing_parts_are_left_to_others(tmp_path):
    assert Parts(tmp_path / "nothing").look() is None
    (tmp_path / "stats-000001.parquet").write_bytes(b"PAR1 cut short")
    assert Parts(tmp_path).look() is None


def test_head_room_is_to_the_format_of_the_module_and_each_value_is_told_once(tmp_path):
    from test_reporting import row_of, table_of

    sites = [Site("a", Role.OUTPUT), Site("b", Role.INPUT), Site("b", Role.OUTPUT), Site("c", Role.GRAD_OUTPUT),
             Site("d", Role.OUTPUT), Site("b", Role.UPDATE), Site("e", Role.OUTPUT)]  # fmt: skip
    values = [[1.0, 4.0], [4.0], [2.0], [0.5], [60000.0], [1e30], [0.0]]
    table, scale = table_of([row_of(v) for v in values]), np.array([1.0, 1, 1, 1024, 1, 1, 1])
    (tmp_path / "a").mkdir()
    StatsWriter(tmp_path / "a").write(np.zeros(7, np.int64), sites, table, scale, {})
    found = Parts(tmp_path / "a").look()
    formats = {"a": "fp16", "b": "fp16", "c": "fp16", "e": "fp16"}
    near = found.nearest(lambda m: get_format(formats[m]) if m in formats else None, 3)
    assert [(str(site), reach, fmt) for _, site, reach, fmt in near] == [
        ("c.grad_output", 512.0, "fp16"), ("a.output", 4.0, "fp16"), ("b.output", 2.0, "fp16")
    ]  # fmt: skip
    assert near[0][0] == pytest.approx(math.log2(65504 / 512))


# the state


def test_the_course_of_a_run(capsys):
    now = [100.0]
    course = Course(clock=lambda: now[0])
    assert course.line("train x") == "train x: step 0 of 0" and math.isnan(course.left)
    for step in range(4):
        now[0] += 2.0
        course.read([row(step, 3.0 - step, scale=2.0**16, skipped=step == 1)])
        course.at(step + 1, 10, 3.0 - step)
    assert course.left == 12.0 and course.elapsed == 8.0
    assert course.line("train x") == "train x: step 4 of 10, loss 0.0000, scale 2^16, 1 skipped, 0:12 left"
    assert ("loss scale", "2^16") in course.figures() and ("skipped", "1") in course.figures()
    assert course.read([row(2, float("nan"), nonfinite=True)])  # went back
    assert "1 step not finite" in course.line("train x")


def test_long_runs_keep_a_bounded_curve():
    course = Course()
    for step in range(10_000):
        course.read([row(step, float(step))])
    assert len(course.losses) < 2000 and course.losses == sorted(course.losses)


@pytest.mark.parametrize(("values", "width", "said"), [
    ([], 5, ""), ([1.0], 5, "▁"), ([1, 2, 3], 3, "▁▅█"), ([2.0, 2.0], 4, "▁▁"), ([3, 1, 2, float("nan")], 4, "█▁▅!"),
    (list(range(100)), 4, "▁▃▆█"),
])  # fmt: skip
def test_sparklines(values, width, said):
    assert sparkline(values, width) == said
    assert sparkline(values, width, plain=True).isascii()


def test_times():
    assert [in_time(s) for s in (3, 123.4, 3723, float("nan"), float("inf"))] == ["0:03", "2:03", "1:02:03", "?", "?"]


# the view


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_picture_fits_and_says_all(width, tmp_path):
    task = make_task()
    with LiveView(
        "train x", out=tmp_path / "a", format_of=lambda m, step: get_format("fp16"), stream=io.StringIO()
    ) as view:
        ps.train(task, steps=6, out=tmp_path / "a", precision="fp32", progress=view,
                 recorder=recording_every(2, tmp_path / "a"))  # fmt: skip
    shown = drawn(view, width)
    assert max(map(len, shown.splitlines())) <= width
    said = " ".join(shown.split())
    assert "step 6/6" in said and "loss" in said and "least head-room" in said
    assert view.recorded == (0, 2, 4) and len(view.worst) == 6
    assert [w[0] for w in view.worst] == sorted(w[0] for w in view.worst)
    profile = ps.Profile.load(tmp_path / "a")
    for _, site, reach, _ in view.worst:
        sites, table = profile.merged()
        assert reach == pytest.approx(table.amax[sites.index(site)])


def test_without_a_terminal_there_are_plain_lines(tmp_path):
    stream = io.StringIO()
    with LiveView("train x", out=tmp_path / "a", format_of=lambda m, step: get_format("fp16"), assumed=True,
                  stream=stream) as view:  # fmt: skip
        view.note("a note")
        ps.train(make_task(), steps=3, out=tmp_path / "a", progress=view, recorder=recording_every(1, tmp_path / "a"))
    said = stream.getvalue()
    assert "\x1b" not in said and "\r" not in said
    lines = said.splitlines()
    assert lines[0] == "a note" and lines[1].startswith("train x: step 3 of 3, loss ")
    assert lines[2] == "least head-room to the format were they in it, steps 0 to 2:" and len(lines) == 9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "term", "ci", "drawn"), [
    (Terminal(), "xterm-256color", "", True), (Terminal(), "dumb", "", False), (Terminal(), "xterm", "true", False),
    (Terminal(), "xterm", "false", True), (io.StringIO(), "xterm", "", False),
])  # fmt: skip
def test_logs_are_not_drawn_on(stream, term, ci, drawn, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("CI", ci)
    assert is_terminal(stream) is drawn
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress() as shown:
        step = shown.run("train x")
        step(1, 2, 1.5)
        step(2, 2, 1.25)
    with LiveView("train y") as view:
        view(2, 2, 1.0)
    said = stream.getvalue()
    assert ("\x1b" in said) is drawn
    assert drawn or said == "train x: step 2 of 2, loss 1.2500\ntrain y: step 2 of 2, loss 1.0000\n"


def test_a_name_cannot_move_the_cursor():
    view = LiveView("train \x1b[2J[red]x", stream=io.StringIO())
    assert "\x1b" not in drawn(view) and "[red]x" in drawn(view)


def test_what_an_earlier_run_left_is_not_told(tmp_path):
    ps.train(make_task(), steps=2, out=tmp_path / "a", recorder=recording_every(1, tmp_path / "a"))
    stream = io.StringIO()
    with pytest.raises(UsageError, match="already holds a run"):
        with watching("train x", out=tmp_path / "a", live=True) as watch:
            ps.train(make_task(), steps=2, out=tmp_path / "a", progress=watch.callback)
    with pytest.raises(UsageError, match="already holds a run"):
        with LiveView("x", out=tmp_path / "a", format_of=lambda m, step: get_format("fp16"), stream=stream) as view:
            ps.train(make_task(), steps=2, out=tmp_path / "a", progress=view)
    assert stream.getvalue() == ""


def test_a_watched_run_is_the_same_bit_for_bit(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")

    def train(**options) -> tuple[tuple[float, ...], list[torch.Tensor]]:
        task = make_task()
        result = ps.train(task, steps=8, precision="fp16", **options)
        return result.losses, [p.detach().clone() for p in task.model.parameters()]

    losses, weights = train()
    out = tmp_path / "a"
    console = Console(file=Terminal(), force_terminal=True, width=80)
    with LiveView("train", out=out, format_of=lambda m, step: get_format("fp16"), console=console) as view:
        with Board(tmp_path / "board", out=out) as board:

            class Both:
                def read(self, rows):
                    view.read(rows)
                    board.read(rows)

                def __call__(self, *figures):
                    view(*figures)
                    board(*figures)

            watched, same = train(out=out, progress=Both(), recorder=recording_every(2, out))
    assert watched == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert "step 8/8" in console.file.getvalue() and "binades" in console.file.getvalue()


def test_formats_come_from_the_plan_and_fp32_asks_about_fp16(tmp_path):
    from precscope.live.watching import formats_of
    from precscope.training.phases import parse

    plan = ps.PrecisionPlan(default="fp16", modules={"head": "fp32", "body": "e4m3"})
    of, assumed = formats_of(None, plan)
    assert not assumed and of("head", 0) is None and of("body", 0).name == "e4m3" and of("x", 0).name == "fp16"
    of, assumed = formats_of("fp32", None)
    assert assumed and of("x", 0).name == "fp16"
    of, assumed = formats_of("bf16", None)
    assert not assumed and of("x", 0).name == "bf16"
    of, assumed = formats_of(None, parse(["0:bf16", "3:fp16", "5:fp32"]))
    assert not assumed and [f and f.name for f in (of("x", 0), of("x", 3), of("x", 9))] == ["bf16", "fp16", None]
    with pytest.raises(PlanError, match="no such file"), watching("x", live=True, plan=tmp_path / "no.json"):
        pass


# TensorBoard


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    return events


def binades_of(event) -> dict[int, int]:
    """binade -> count, of a histogram event."""
    found, left = {}, event.histogram_value.min
    for limit, count in zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True):
        if count:
            assert limit - left == 1
            found[int(left)] = int(count)
        left = limit
    return found


def test_the_event_file_holds_the_log_and_the_counts_of_the_profile(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")
    out = tmp_path / "a"
    with watching("train", out=out, tensorboard=tmp_path / "board") as watch:
        ps.train(make_task(), steps=30, out=out, precision="fp16", progress=watch.callback, initial_scale=2.0**40,
                 recorder=recording_every(2, out))  # fmt: skip
    events, profile = read_events(tmp_path / "board"), ps.Profile.load(out)
    log = profile.train
    for tag, column in (("loss", "loss"), ("lr", "lr"), ("loss_scale", "scale"), ("step_time_ms", "time_ms")):
        points = events.Scalars(f"train/{tag}")
        assert [p.step for p in points] == log.step.tolist()
        np.testing.assert_allclose([p.value for p in points], log[column], rtol=1e-6)
    assert events.Scalars("train/skipped")[-1].value == log.skipped.sum() > 0
    sites, table = profile.merged()
    tags = {f"log2_magnitude/{s}": i for i, s in enumerate(sites) if table.counts[i].any()}
    assert set(events.Tags()["histograms"]) == set(tags) and len(tags) > 10
    for tag, i in tags.items():
        total: dict[int, int] = {}
        for event in events.Histograms(tag):
            for binade, count in binades_of(event).items():
                total[binade] = total.get(binade, 0) + count
        filled = np.flatnonzero(table.counts[i])
        assert total == {int(b) + EXP_LO: int(table.counts[i, b]) for b in filled}, tag
    assert [e.step for e in events.Histograms("log2_magnitude/0.output")] == [18, 28]


def test_histograms_of_inference_are_written_too(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")
    with Board(tmp_path / "board", out=tmp_path / "a", most=3) as board:
        profile = ps.profile(make_task(), out=tmp_path / "a", steps=4, every=1, train=False, costs=False, ops=False,
                             shadow_every=None, precision="fp32", progress=board)  # fmt: skip
    tags = read_events(tmp_path / "board").Tags()
    assert len(tags["histograms"]) == 3 and not tags["scalars"]
    assert board.left_out == len(profile.merged()[0]) - 3


def test_a_histogram_without_values_is_none(tmp_path):
    from test_reporting import row_of, table_of

    table = table_of([row_of([0.0, np.nan, np.inf]), row_of([0.75, -3.0, 3.5])])
    assert list(raw_histogram(table, 0)) == []
    (made,) = raw_histogram(table, 1)
    assert made["bucket_limits"] == [-1.0, 0.0, 1.0, 2.0] and made["bucket_counts"] == [0.0, 1.0, 0.0, 2.0]
    assert (made["min"], made["max"], made["num"]) == (-1.0, 2.0, 3)


def test_a_run_that_is_refused_leaves_no_file(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")
    with pytest.raises(UsageError, match="already holds a run"), Board(tmp_path / "board", out=tmp_path / "a") as board:
        ps.train(make_task(), steps=1, out=tmp_path / "a")
        ps.train(make_task(), steps=1, out=tmp_path / "a", progress=board)
    assert not (tmp_path / "board").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="cannot write to .*choose another place"):
        ps.train(make_task(), steps=1, progress=Board(tmp_path / "file" / "b"))


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")
    resource = pytest.importorskip("resource", reason="the size of files cannot be limited here")
    monkeypatch.setattr(threading, "excepthook", lambda about: None)  # tensorboard's own thread says it, too
    rows = [row(step) for step in range(400)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    board = Board(tmp_path / "board")
    with pytest.warns(RuntimeWarning, match="no more is written to the TensorBoard file in .*the run itself goes on"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with board:
                for some in range(0, 400, 10):
                    board.read(rows[some : some + 10])
                    board(some + 10, 400, 1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert board.failed == "File too large"


def test_the_cursor_comes_back_whatever_happens(tmp_path, monkeypatch):
    console = Console(file=Terminal(), force_terminal=True, width=80)
    with pytest.raises(PermissionError):
        with LiveView("x", out=tmp_path, format_of=lambda m, step: get_format("fp16"), console=console) as view:
            view(1, 2, 1.0)
            monkeypatch.setattr(view._parts, "look", lambda: open_nothing())
    said = console.file.getvalue()
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1


def open_nothing():
    raise PermissionError("parts")


def test_bad_steps_are_shown_before_the_run_ends_of_them():
    good = make_task()
    task = ps.Task(model=good.model, batches=[good.batch(0)], forward=good.forward,
                   loss=lambda model, batch: good.loss(model, batch) * float("nan"))  # fmt: skip
    view = LiveView("x", stream=io.StringIO())
    with pytest.raises(TrainingError, match="finite"), view:
        ps.train(task, steps=20, progress=view)
    assert view.course.nonfinite > 0 and math.isnan(view.course.losses[-1])


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"need the package tensorboard .*pip install tensorboard"):
        Board(tmp_path / "board")


def test_recorders_refuse_steps_below_one(tmp_path):
    with pytest.raises(UsageError, match="every must be a number of steps of at least 1, not 0"):
        recording_every(0, tmp_path)
    with pytest.raises(UsageError, match="shadow_every must be a number of steps of at least 1, not -1"):
        recording_every(1, tmp_path, shadow_every=-1)


TASK = """
import torch, precscope as ps
from torch import nn

def make():
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(4)]
    return ps.Task(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), batches=data,
                   loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
"""


def test_the_command_line_watches(precscope_cli, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the writer is not tried")
    (tmp_path / "tiny.py").write_text(TASK)
    done = precscope_cli(
        "train", "tiny.py:make", "--steps", 4, "--out", "runs/a", "--record-every", 2, "--live", "--tensorboard", "b"
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert "train tiny.py:make: step 4 of 4, loss " in done.stderr
    assert "least head-room to the format were they in it, steps 0 to 2:" in done.stderr
    assert len(read_events(tmp_path / "b").Tags()["histograms"]) > 4
