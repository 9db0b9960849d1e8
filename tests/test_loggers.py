"""What a run's figures become in TensorBoard, Weights & Biases and MLflow, read back from what they wrote."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import precscope as ps
from precscope.errors import UsageError
from precscope.histogram import EXP_LO
from precscope.integrations.log_writers import _allowed
from precscope.integrations.loggers import (
    MlflowLogger,
    RunLog,
    TensorBoardLogger,
    WandbLogger,
    log_run,
    logging_to,
)
from precscope.sites import Role, Site
from precscope.training.recorders import recording_every

STEPS = 12


def make_task() -> ps.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 8, generator=draw), torch.randint(0, 3, (16,), generator=draw)) for _ in range(6)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return ps.Task(model=model, loss=loss, batches=data, forward=lambda model, batch: model(batch[0]))


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.errors: tuple[type[Exception], ...] = (RuntimeError,)
        self.about, self.points, self.drawn, self.files, self.closed, self.error = {}, {}, {}, {}, [], error

    def settings(self, values):
        self.about.update(values)

    def scalars(self, values, step):
        if self.error is not None:
            raise self.error
        for tag, value in values.items():
            self.points.setdefault(tag, {})[step] = value

    def histograms(self, histograms, step):
        for tag, histogram in histograms.items():
            self.drawn.setdefault(tag, {})[step] = histogram

    def artefact(self, path):
        self.files[path.name] = path.read_text(encoding="utf-8")

    def close(self, *, failed=False):
        self.closed.append(failed)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Kept]:
    """A recorded fp16 run that skipped steps, and what was told while it went on."""
    out, kept = tmp_path_factory.mktemp("run") / "a", Kept()
    with RunLog(out, kept, precision="fp16", worst=3) as log:
        ps.train(make_task(), steps=STEPS, out=out, precision="fp16", progress=log, initial_scale=2.0**40,
                 recorder=recording_every(2, out))  # fmt: skip
    return out, kept


def totals(drawn) -> dict[str, dict[int, int]]:
    """tag -> binade -> count over all steps; drawn: tag -> step -> (edges, counts)."""
    found: dict[str, dict[int, int]] = {}
    for tag, steps in drawn.items():
        own = found.setdefault(tag, {})
        for edges, counts in steps.values():
            for edge, count in zip(edges[:-1], counts, strict=True):
                if count:
                    own[int(edge)] = own.get(int(edge), 0) + int(count)
    return found


def recorded(out: Path) -> dict[str, dict[int, int]]:
    sites, table = ps.Profile.load(out).merged()
    return {
        f"log2_magnitude/{s}": {int(b) + EXP_LO: int(table.counts[i, b]) for b in np.flatnonzero(table.counts[i])}
        for i, s in enumerate(sites)
        if table.counts[i].any()
    }


# what is told


def test_the_log_and_the_counts_of_the_profile_are_told(run):
    out, kept = run
    log = ps.Profile.load(out).train
    for tag, column in (("loss", "loss"), ("loss_scale", "scale"), ("grad_norm", "grad_norm"), ("lr", "lr")):
        assert list(kept.points[f"train/{tag}"]) == log.step.tolist()
        np.testing.assert_array_equal(list(kept.points[f"train/{tag}"].values()), log[column])
    assert list(kept.points["train/skipped"].values()) == np.cumsum(log.skipped).tolist()
    assert kept.points["train/skipped"][STEPS - 1] > 0
    drawn = {tag: {s: (h.edges, h.counts) for s, h in steps.items()} for tag, steps in kept.drawn.items()}
    assert totals(drawn) == recorded(out) and len(drawn) > 10
    assert kept.about["precision"] == "fp16" and kept.about["run"] == str(out)
    assert kept.closed == [False] and "<html" in kept.files["report.html"][:200]


def test_head_room_and_flushed_shares_are_those_of_the_run(run):
    out, kept = run
    sites, table = ps.Profile.load(out).merged()
    step = max(kept.points["headroom/least"])
    told = {tag: points[step] for tag, points in kept.points.items() if tag.startswith("headroom/") and step in points}
    assert told["headroom/least"] == min(told.values()) and len(told) > 3
    site = Site("0", Role.WEIGHT)
    with RunLog(out, again := Kept(), precision="fp16", worst=100, report=False):
        pass
    room = again.points[f"headroom/{site}"][max(again.points["headroom/least"])]
    assert room == pytest.approx(np.log2(65504) - np.log2(table.amax[sites.index(site)]))
    shares = {tag: p for tag, p in again.points.items() if tag.startswith("flushed/")}
    assert all(0 <= share <= 1 for points in shares.values() for share in points.values())


def test_the_flushed_share_counts_the_loss_scale(tmp_path):
    """Gradients are recorded without the scale; under it they are not flushed."""
    shares = {}
    for scale in (1.0, 2.0**20):
        model = nn.Linear(4, 2)
        with ps.record(model, tmp_path / f"{scale}", every=1, scaler=scale) as rec:
            (model(torch.ones(3, 4)).sum() * 1e-9 * scale).backward()
            rec.step()
        log_run(tmp_path / f"{scale}", kept := Kept(), precision="fp16", report=False)
        shares[scale] = kept.points["flushed/most"][0]
    assert shares == {1.0: 1.0, 2.0**20: 0.0}


def test_afterwards_the_same_is_told(run):
    out, live = run
    log_run(out, kept := Kept())
    assert kept.points["train/loss"] == live.points["train/loss"]
    told = [{t: {s: (h.edges, h.counts) for s, h in d.items()} for t, d in k.drawn.items()} for k in (kept, live)]
    assert totals(told[0]) == totals(told[1]) and kept.files.keys() == {"report.html"}
    assert kept.points["headroom/least"] and kept.closed == [False]


def test_a_loop_of_ones_own(tmp_path):
    task, kept = make_task(), Kept()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    with (
        RunLog(tmp_path / "a", kept, precision="bf16") as log,
        ps.record(task.model, tmp_path / "a", optimizer=optimizer, every=2, flush_every=2) as rec,
    ):
        for step in range(7):
            loss = task.loss(task.model, task.batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
            log.scalars(step, loss=loss.item())
    assert list(kept.points["train/loss"]) == list(range(7))
    assert list(kept.drawn["log2_magnitude/0.output"]) == [2, 6]
    assert "report.html" in kept.files


def test_a_watched_run_is_the_same_bit_for_bit(run):
    result = ps.train(task := make_task(), steps=STEPS, precision="fp16", initial_scale=2.0**40)
    assert list(run[1].points["train/loss"].values()) == list(result.losses)
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_a_logger_that_fails_ends_nothing(tmp_path):
    good, bad, seen = Kept(), Kept(RuntimeError("no server")), []
    with pytest.warns(RuntimeWarning, match=r"Kept is told no more of .*RuntimeError: no server.*log_run tells it all"):
        with RunLog(tmp_path / "a", bad, good, beside=lambda *figures: seen.append(figures[0])) as log:
            ps.train(make_task(), steps=3, out=tmp_path / "a", progress=log)
    assert log.failed == "" and len(good.points["train/loss"]) == 3 and seen[-1] == 3 and not good.files
    with pytest.warns(RuntimeWarning, match="told no more"), RunLog(tmp_path / "b", bad) as log:
        ps.train(make_task(), steps=3, out=tmp_path / "b", progress=log)
    assert log.failed == "RuntimeError: no server" and bad.closed == [False, False]


def test_a_report_that_cannot_be_written_ends_nothing(run, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("precscope.reporting.report", full)
    with pytest.warns(RuntimeWarning, match=r"no report of .* for the logger: OSError: \[Errno 28\] No space left"):
        log_run(run[0], kept := Kept())
    assert kept.points["train/loss"] and not kept.files and kept.closed == [False]


def test_loggers_are_closed_whatever_the_report_raises(run, monkeypatch):
    def short(*args, **options):
        raise MemoryError("too many sites")

    monkeypatch.setattr("precscope.reporting.report", short)
    one, other = Kept(), Kept()
    with pytest.raises(MemoryError, match="too many sites"):
        log_run(run[0], one, other)
    assert one.closed == other.closed == [True]


def test_a_run_that_is_refused_is_told_nothing_of(run):
    with pytest.raises(UsageError, match="already holds a run"), RunLog(run[0], kept := Kept()) as log:
        ps.train(make_task(), steps=1, out=run[0], progress=log)
    assert not kept.points and not kept.drawn and kept.closed == [True]


# the writers


def test_tensorboard_reads_it(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_run(run[0], TensorBoardLogger(tmp_path / "board"))
    events = accumulator.EventAccumulator(str(tmp_path / "board"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    assert losses == pytest.approx(run[1].points["train/loss"])
    assert set(events.Tags()["histograms"]) == set(recorded(run[0])) and "headroom/least" in events.Tags()["scalars"]
    assert (tmp_path / "board" / "report.html").stat().st_size > 10_000


def records(path: Path):
    """The records of a .wandb file: blocks of 32 KiB with records of crc (4 bytes), length (2), kind (1) and data, as
    in LevelDB's logs, behind a header of 7 bytes; kinds 2, 3 and 4 are the parts of one that crosses blocks."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if not kind:
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def whole(folder: Path) -> list:
    """The records of the one run in `folder`. wandb's own process writes the last block after finish() has returned."""
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(600):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def quietly() -> dict:
    """What keeps wandb to itself."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    about = {"console": "off", "x_disable_stats": True, "x_disable_machine_info": True, "disable_git": True}
    return {"mode": "offline", "settings": wandb.Settings(silent=True, **about)}


def test_wandb_writes_it_offline(run, tmp_path):
    log_run(run[0], WandbLogger("precscope-tests", name="a", dir=str(tmp_path), **quietly()))
    losses, drawn, told = {}, {}, whole(tmp_path)
    for record in told:
        values = {tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in record.history.item}
        step = values.get(("step",))
        if ("train/loss",) in values:
            losses[step] = values["train/loss",]
        for tag in {key[0] for key in values if key[0].startswith("log2_magnitude/")}:
            value = values.get((tag,)) or {word: values[tag, word] for word in ("bins", "values")}
            drawn.setdefault(tag, {})[step] = (value["bins"], value["values"])
    assert losses == pytest.approx(run[1].points["train/loss"])
    assert totals(drawn) == recorded(run[0])
    config = {item.key: json.loads(item.value_json) for record in told for item in record.config.update}
    assert config["precision"] == "fp16" and told[-1].exit.exit_code == 0
    files = [entry.path for record in told for entry in record.artifact.manifest.contents]
    assert files == ["report.html"]


def test_wandb_takes_a_run_that_is_open(tmp_path):
    quiet = quietly()
    import wandb

    with wandb.init(project="p", dir=str(tmp_path), **quiet) as mine:
        logger = WandbLogger(run=mine)
        logger.scalars({"train/loss": 1.0}, 3)
        logger.close()
        mine.log({"still": "open"})
    told = [{tuple(i.nested_key) or (i.key,) for i in r.history.item} for r in whole(tmp_path) if r.history.item]
    assert ("train/loss",) in told[0] and ("still",) in told[1]


def test_mlflow_reads_it(run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MlflowLogger(tmp_path / "mlruns", experiment="tests", name="a")
    log_run(run[0], logger)
    client = logger.client
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "a" and found.data.params["precision"] == "fp16"
    losses = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "train/loss")}
    assert losses == run[1].points["train/loss"]
    assert client.get_metric_history(found.info.run_id, "headroom/least")
    folder = Path(client.download_artifacts(found.info.run_id, "", str(tmp_path)))
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")[:200]
    drawn: dict = {}
    for path in (folder / "histograms").iterdir():
        for tag, histogram in json.loads(path.read_text()).items():
            drawn.setdefault(tag, {})[path.stem] = (histogram["edges"], histogram["counts"])
    assert totals(drawn) == recorded(run[0])


def test_mlflow_refuses_folders_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import environment_variables

    if not hasattr(environment_variables, "MLFLOW_ALLOW_FILE_STORE"):
        pytest.skip("this mlflow takes folders")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UsageError, match=r"MLflow refuses '.*mlruns': .*MLFLOW_ALLOW_FILE_STORE=true"):
        MlflowLogger(tmp_path / "mlruns")


@pytest.mark.parametrize(("name", "allowed"), [
    ("0.weight[bias]", "0.weight:bias"), ("net#1.output", "net:1.output"), ("(root).input", "root.input"),
    ("a+b", "a_b"),
])  # fmt: skip
def test_names_that_mlflow_takes(name, allowed):
    assert _allowed(name) == allowed


@pytest.mark.parametrize(("module", "make"), [
    ("wandb", lambda: WandbLogger("p")), ("mlflow.tracking", lambda: MlflowLogger("mlruns")),
])  # fmt: skip
def test_missing_packages_are_told_with_the_extra(module, make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UsageError, match=r'pip install "precscope\[loggers\]"'):
        make()


# the command line


def test_without_loggers_the_callback_is_passed_on():
    def callback(done, total, loss):
        raise AssertionError

    with logging_to("nowhere", beside=callback) as same:
        assert same is callback


def test_the_command_line_tells_mlflow(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    from typer.testing import CliRunner

    from precscope.cli import app

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(
        "import torch, precscope as ps\nfrom torch import nn\n\n\ndef make():\n"
        "    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(4)]\n"
        "    return ps.Task(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), batches=data,\n"
        "                   loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))\n"
    )
    for command in (["train", "tiny.py:make", "--record-every", "2"],
                    ["profile", "tiny.py:make", "--no-costs", "--no-ops", "--shadow-every", "none"]):  # fmt: skip
        out = f"runs/{command[0]}"
        done = CliRunner().invoke(app, [*command, "--steps", "4", "--out", out, "--mlflow", "mlruns"])
        assert done.exit_code == 0, done.output
    client = tracking.MlflowClient("mlruns")
    runs = client.search_runs([client.get_experiment_by_name("precscope").experiment_id])
    assert {r.info.run_name for r in runs} == {"train", "profile"}
    for found in runs:
        assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 4
        assert "report.html" in {a.path for a in client.list_artifacts(found.info.run_id)}
