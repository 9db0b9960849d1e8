"""Run directories: what is written comes back, and damage is named."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precscope.errors import RunDirectoryError, UsageError
from precscope.histogram import BINS, EXP_LO
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, expand, prepare_directory, read_part, trim, update_json, write_json


def table_of(rows: int, seed: int = 0) -> StatsTable:
    rng = np.random.default_rng(seed)
    table = StatsTable.empty(rows)
    for row in range(rows):
        at = rng.integers(0, BINS - 20)
        table.counts[row, at : at + 12] = rng.integers(0, 1000, 12)
        table.counts[row, at] = 1
        table.zeros[row] = row
        table.amax[row] = 2.0 ** (EXP_LO + at + 11)
        table.amin_nonzero[row] = 2.0 ** (EXP_LO + at)
        table.sumsq[row] = 1.0 + row
    table.source[:] = "fp32"
    return table


def write(path: Path, steps: int = 3, sites: int = 4) -> StatsTable:
    directory = prepare_directory(path)
    write_json(directory / "run.json", {"schema": 1, "precision": "fp32"})
    writer = StatsWriter(directory)
    tables = []
    for step in range(steps):
        table = table_of(sites, step)
        names = [Site(f"layer{i}", Role.OUTPUT) for i in range(sites)]
        writer.write(np.full(sites, step), names, table, np.ones(sites), {})
        tables.append(table)
    return StatsTable.concat(tables).group(np.tile(np.arange(sites), steps), sites)


def test_round_trip(tmp_path):
    whole = write(tmp_path / "run")
    profile = Profile.load(tmp_path / "run")
    assert [s.module for s in profile.sites] == [f"layer{i}" for i in range(4)]
    for name in ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq"):
        assert np.array_equal(getattr(profile.table, name), getattr(whole, name)), name
    assert profile.steps == [0, 1, 2] and len(profile.history()) == 12


@given(st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=9), min_size=1, max_size=6), st.integers(0, BINS - 9))
@settings(max_examples=50, deadline=None)
def test_trimming_and_expanding_are_inverse(rows, start):
    counts = np.zeros((len(rows), BINS), np.int64)
    for i, row in enumerate(rows):
        counts[i, start : start + len(row)] = row
    lo, lists = trim(counts)
    assert np.array_equal(expand(lo, lists), counts)
    assert np.array_equal(expand(lo[1:], lists[1:]), counts[1:])


def test_truncated_part_is_named_and_can_be_left_out(tmp_path):
    write(tmp_path / "run")
    part = tmp_path / "run" / "stats-000002.parquet"
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(RunDirectoryError, match="stats-000002.parquet cannot be read.*skip_damaged=True"):
        Profile.load(tmp_path / "run")
    profile = Profile.load(tmp_path / "run", skip_damaged=True)
    assert profile.steps == [0, 2] and len(profile.damaged) == 1


@pytest.mark.parametrize("content", [b"", b"not parquet at all"])
def test_foreign_bytes(tmp_path, content):
    write(tmp_path / "run")
    (tmp_path / "run" / "stats-000009.parquet").write_bytes(content)
    with pytest.raises(RunDirectoryError, match="stats-000009.parquet"):
        Profile.load(tmp_path / "run")
    assert Profile.load(tmp_path / "run", skip_damaged=True).steps == [0, 1, 2]


def test_foreign_parquet_and_newer_schema(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "run")
    part = tmp_path / "run" / "stats-000001.parquet"
    good = read_part(part)
    pq.write_table(pa.table({"a": [1]}), part)
    with pytest.raises(RunDirectoryError, match="not written by precscope"):
        Profile.load(tmp_path / "run")
    newer = good.replace_schema_metadata({"precscope.schema": "99", "precscope.kind": "stats"})
    pq.write_table(newer, part)
    with pytest.raises(RunDirectoryError, match="schema 99.*upgrade precscope"):
        Profile.load(tmp_path / "run")


def test_missing_directory_names_the_nearest(tmp_path):
    write(tmp_path / "baseline")
    with pytest.raises(RunDirectoryError, match="did you mean baseline"):
        Profile.load(tmp_path / "baselin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="holds no recorded run"):
        Profile.load(tmp_path / "empty")


def test_prepare_directory(tmp_path):
    write(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds a run.*--overwrite"):
        prepare_directory(tmp_path / "run")
    prepare_directory(tmp_path / "run", exist="append")
    assert Profile.load(tmp_path / "run").steps == [0, 1, 2]
    prepare_directory(tmp_path / "run", exist="overwrite")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="exist must be"):
        prepare_directory(tmp_path, exist="maybe")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs Linux")
def test_unwritable_directory():
    with pytest.raises(RunDirectoryError, match="cannot write to /proc/precscope.*choose another directory"):
        prepare_directory("/proc/precscope")


def test_json_with_nan_and_half_written_json(tmp_path):
    import json

    write_json(tmp_path / "a.json", {"x": float("nan"), "y": np.float32(2), "z": {1: (np.int64(3),)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": "nan", "y": 2.0, "z": {"1": [3]}}
    update_json(tmp_path / "a.json", {"y": 5})
    assert json.loads((tmp_path / "a.json").read_text())["y"] == 5
    write(tmp_path / "run")
    (tmp_path / "run" / "graph.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="graph.json is not JSON"):
        Profile.load(tmp_path / "run")


def test_ranks_are_merged(tmp_path):
    write(tmp_path / "run")
    write(tmp_path / "run" / "rank-00001")
    one = write(tmp_path / "one")
    both = Profile.load(tmp_path / "run")
    assert np.array_equal(both.table.counts, 2 * one.counts)
    assert np.array_equal(both.table.amax, one.amax)


def test_full_disk_on_a_real_small_file_system(tmp_path):
    """A tmpfs of 256 kB: writing stops with one clear error, what was written before loads."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        directory = prepare_directory(mount / "run")
        write_json(directory / "run.json", {"schema": 1})
        writer, parts = StatsWriter(directory), 0
        with pytest.raises(RunDirectoryError, match="No space left on device.*everything written before is intact"):
            for step in range(1000):
                sites = [Site(f"layer{i}", Role.OUTPUT) for i in range(300)]
                writer.write(np.full(300, step), sites, table_of(300, step), np.ones(300), {})
                parts += 1
        assert parts > 0
        assert Profile.load(mount / "run").steps == list(range(parts))
        assert not list((mount / "run").glob(".*.tmp"))
    finally:
        gc.collect()  # on Python 3.13 the failed writer and its open file are left to the collector
        subprocess.run(["umount", str(mount)], check=True)


KILLED = """
import sys, torch
from torch import nn
from precscope.recording import record
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
with record(model, sys.argv[1], every=1, flush_every=2) as rec:
    for step in range(1_000_000):
        model(torch.randn(4, 8)).sum().backward()
        rec.step()
        if step % 2:
            print(step, flush=True)   # said after its flush
"""


def test_killed_at_random_moments(tmp_path):
    """kill -9, ten times: every directory loads and nothing that was flushed is missing."""
    rng = random.Random(0)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for attempt in range(10):
        out, said = tmp_path / f"run{attempt}", tmp_path / f"said{attempt}"
        with open(said, "w") as file:
            process = subprocess.Popen([sys.executable, script, out], stdout=file, env=environment)
        deadline = time.monotonic() + 60
        while not said.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lines = said.read_text().rsplit("\n", 1)[0].split()  # the last line may be cut
        profile = Profile.load(out)
        assert profile.run["status"] == "running"
        assert lines and profile.steps[: int(lines[-1]) + 1] == list(range(int(lines[-1]) + 1))
        assert profile.steps == list(range(len(profile.steps)))
        shutil.rmtree(out)
