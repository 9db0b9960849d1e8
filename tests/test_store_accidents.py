"""Parts that are put together: a process that is killed, a full disk, readers beside a writer, files that go away.

Whatever happens, each row that was written is loaded once, and the recorded run goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stored import covered, from_parts, put_together_often, rows_of, same, write

from precscope.errors import RunDirectoryError
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.store import AGGREGATE, StatsWriter, aggregate, drop_all_steps, history, list_parts, parts
from precscope.store import writer as writing


@pytest.fixture
def often(monkeypatch):
    put_together_often(monkeypatch)


class Killed(BaseException):
    """The process ends here."""


def dies_at(monkeypatch, moment: int) -> list[str]:
    """Let the writer die before the `moment`-th of its renames and removals; they are listed as they come."""
    done: list[str] = []

    def counted(action, name):
        def wrapped(*args, **options):
            if len(done) == moment:
                raise Killed
            done.append(name)
            return action(*args, **options)

        return wrapped

    monkeypatch.setattr(os, "replace", counted(os.replace, "replace"))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink, "unlink"))
    return done


@pytest.mark.parametrize("moment", [4, 5, 6, 7, 9, 11, 16, 17, 19, 99])
def test_killed_at_any_moment_loses_and_doubles_nothing(tmp_path, often, monkeypatch, moment):
    """Then gone on with, and killed or not: what is loaded is what the steps were, each once."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        done = dies_at(patch, moment)
        with contextlib.suppress(Killed):
            write(path, range(12), sites=2)
        assert (len(done) == moment) == (moment != 99)
    steps = Profile.load(path).steps
    assert steps == list(range(len(steps)))
    whole = write(tmp_path / "whole", range(len(steps)), sites=2)
    same(Profile.load(path), Profile.load(whole), ordered=False)
    same(Profile.load(path), from_parts(path), ordered=False)
    drop_all_steps(path, len(steps))  # what a run that goes on does first
    assert not list(path.glob(".*.tmp")) and list_parts(path, "stats") == sorted(path.glob("stats-*"))
    write(path, range(len(steps), 16), sites=2)
    same(Profile.load(path), Profile.load(write(tmp_path / "all", range(16), sites=2)), ordered=False)


@pytest.mark.parametrize("stage", ["merged part", "aggregate", "removal"])
def test_what_fails_while_parts_are_put_together_ends_no_run(tmp_path, often, monkeypatch, stage):
    """A full disk, or a reader that has a part open on Windows."""
    write_table, unlink = pq.write_table, Path.unlink

    def full(table, where, **options):
        name = Path(where).name
        if name.startswith(".aggregate") if stage == "aggregate" else name.count("-") == 2 and stage == "merged part":
            Path(where).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_table(table, where, **options)

    def busy(path, **options):
        if path.name == "stats-000002.parquet" and stage == "removal":
            raise PermissionError(13, "being used by another process")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        patch.setattr(Path, "unlink", busy)
        path = write(tmp_path / "run", range(20))
    same(Profile.load(path), Profile.load(write(tmp_path / "whole", range(20))))
    assert not list(path.glob(".*.tmp"))
    assert (path / AGGREGATE).exists() == (stage != "aggregate")
    left = len(list(path.glob("stats-*"))) - len(list_parts(path, "stats"))
    assert left == (stage == "removal")


def test_a_full_disk_when_new_sites_come_is_no_error_at_the_end(tmp_path, monkeypatch):
    directory = write(tmp_path / "run", range(2), close=False)
    writer, rng = StatsWriter(directory), np.random.default_rng(0)
    writer.write(np.asarray([2]), [Site("a", Role.INPUT)], rows_of(rng, 1), np.ones(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_part", lambda *a, **k: (_ for _ in ()).throw(RunDirectoryError("full")))
        with pytest.raises(RunDirectoryError, match="full"):
            writer.write(np.asarray([3]), [Site("new", Role.INPUT)], rows_of(rng, 1), np.ones(1), {})
    writer.close()
    profile = Profile.load(directory)
    assert profile.steps == [0, 1, 2] and "new" not in profile.modules
    assert {part for part, *_ in covered(directory)} == {p.name for p in list_parts(directory, "stats")}


@pytest.mark.parametrize("moment", ["sums", "history", "peaks"])
def test_read_beside_a_writer_that_puts_parts_together(tmp_path, monkeypatch, moment):
    """The parts that were listed are gone when they are to be read."""
    path = write(tmp_path / "run", range(6), close=False)
    truth = Profile.load(path)
    truth.history()
    profile = None if moment == "sums" else Profile.load(path)
    writer, happened = StatsWriter(path), []
    writer._small = [(p, 1) for p in list_parts(path, "stats")]
    writer._behind, original = True, parts.read_part

    def reading(at, **options):
        if not happened:
            happened.append(at)
            with monkeypatch.context() as patch:
                patch.setattr(writing, "_MERGED_PARTS", 2)
                writer.tidy()
            writer.write(np.asarray([77]), [Site("late", Role.INPUT)], rows_of(np.random.default_rng(0), 1),
                         np.ones(1), {})  # fmt: skip
        return original(at, **options)

    monkeypatch.setattr(aggregate, "read_part", reading)
    monkeypatch.setattr(history, "read_part", reading)
    if profile is None:
        profile = Profile.load(path)
        assert profile.steps == [*range(6), 77] and profile.times.sum() == truth.times.sum() + 1
    elif moment == "history":
        assert len(profile.history()) == truth.times.sum() and profile.history().step.max() == 5
    else:
        assert np.array_equal(profile.peaks.amax, truth.peaks.amax, equal_nan=True)
    assert happened and len(list_parts(path, "stats")) == 2


def test_parts_are_listed_once_for_the_sums(tmp_path, monkeypatch):
    """Between the aggregate and the parts that it lacks they may be put together: each row counts once."""
    path = write(tmp_path / "run", range(6))
    truth, original = Profile.load(path), aggregate.read_aggregate
    writer = StatsWriter(path)
    writer._small = [(p, 1) for p in list_parts(path, "stats")]

    def reading(*args):
        found = original(*args)
        with monkeypatch.context() as patch:
            patch.setattr(writing, "_MERGED_PARTS", 2)
            writer.tidy()
        return found

    monkeypatch.setattr(aggregate, "read_aggregate", reading)
    same(Profile.load(path), truth)
    assert len(list_parts(path, "stats")) == 1


def test_rows_that_are_gone_since_loading_are_missed(tmp_path):
    path = write(tmp_path / "run", range(6))
    profile = Profile.load(path)
    list_parts(path, "stats")[2].unlink()
    with pytest.raises(RunDirectoryError, match="has lost rows since it was loaded.*load it again"):
        profile.history(["amax"])
    shutil.rmtree(path)
    with pytest.raises(RunDirectoryError, match="has lost rows since it was loaded.*0 now"):
        _ = profile.peaks


def test_a_damaged_part_found_late_is_left_out_where_that_was_asked_for(tmp_path):
    path = write(tmp_path / "run", range(6))
    part = list_parts(path, "stats")[0]
    content = bytearray(part.read_bytes())
    content[40:400] = bytes(360)  # the footer is whole, so that the aggregate holds
    part.write_bytes(content)
    profile = Profile.load(path, skip_damaged=True)
    assert profile.steps == list(range(6)) and set(profile.history().step) == set(range(1, 6))
    assert np.isnan(profile.peaks.amax[:, 0]).all()
