"""Long runs of large models: parts put together, the aggregate, histories that are read late, buffers that stay small.

What is loaded by way of an aggregate is what the parts say, whatever became of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import COUNTED, covered, from_parts, put_together_often, rows_of, same, write
from torch import nn

from precscope.errors import RunDirectoryError, UsageError
from precscope.profiles import Profile
from precscope.recording import record
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import (
    AGGREGATE,
    HISTORY,
    StatsWriter,
    drop_all_steps,
    drop_steps,
    list_parts,
    part_schema,
    prepare_directory,
    read_part,
)  # fmt: skip
from precscope.store import writer as writing


@pytest.fixture
def often(monkeypatch):
    put_together_often(monkeypatch)


def oracle(path: Path) -> StatsTable:
    """Rows of all parts grouped by site in one go, by StatsTable's own rules. In the order of Profile.load."""
    profile = Profile.load(path)
    frame = pd.concat([read_part(p).to_pandas() for p in list_parts(path, "stats")], ignore_index=True)
    table = StatsTable.empty(len(frame))
    for name in ("zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq", "source"):
        getattr(table, name)[:] = frame[name]
    for i, (lo, hist) in enumerate(zip(frame.hist_lo, frame["hist"], strict=True)):
        table.counts[i, lo + 151 : lo + 151 + len(hist)] = hist
    table.source_exponent[:] = -np.log2(frame.loss_scale).astype(int)
    keys = zip(frame.module, frame.role, frame.call, frame.tensor, strict=True)
    return table.group([profile.sites.index(Site(m, Role(r), c, t)) for m, r, c, t in keys], len(profile.sites))


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(3, 60))
@settings(max_examples=8, deadline=None)
def test_aggregate_equals_the_parts(tmp_path_factory, seed, steps, sites, per_part, merged_rows):
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_MERGED_ROWS", merged_rows)
        patch.setattr(writing, "_MERGED_PARTS", 5)
        write(path, range(steps), seed=seed, sites=sites, per_part=per_part)
    assert (path / AGGREGATE).exists()
    loaded, truth = Profile.load(path), oracle(path)
    same(loaded, from_parts(path))
    for name in COUNTED:
        assert np.array_equal(getattr(loaded.table, name), getattr(truth, name)), name
    np.testing.assert_allclose(loaded.table.sumsq, truth.sumsq, rtol=1e-12)
    assert loaded.table.source.tolist() == truth.source.tolist()
    shutil.rmtree(path)


def test_merged_parts_lose_no_row_and_keep_their_columns(tmp_path, often):
    path = write(tmp_path / "run", range(40), sites=5)
    names = [p.name for p in list_parts(path, "stats")]
    assert len(names) < 20 and any(name.count("-") == 2 for name in names)
    plain = write(tmp_path / "plain", range(40), sites=5, close=False)
    frame = pd.concat([pd.read_parquet(path / name) for name in names])
    assert list(frame.columns) == part_schema("stats").names
    for part in path.glob("stats-*-*.parquet"):  # by site, then by step
        some = pd.read_parquet(part)
        for _, rows in some.groupby(["module", "role", "call", "tensor"], observed=True):
            assert rows.step.is_monotonic_increasing and (np.diff(rows.index) == 1).all()
    key = ["step", "module", "role", "call", "tensor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_MERGED_PARTS", 10**9)
        patch.setattr(writing, "_MERGED_ROWS", 10**9)
        whole = write(tmp_path / "whole", range(40), sites=5)
    assert len(list_parts(whole, "stats")) == 40
    text = dict.fromkeys(("module", "role", "tensor", "source"), str)
    a, b = (Profile.load(p).history().astype(text).sort_values(key) for p in (path, whole))
    assert a.reset_index(drop=True).equals(b.reset_index(drop=True)) and len(a) == len(frame)
    same(Profile.load(path), Profile.load(plain))


def damage_truncated(path: Path) -> None:
    file = path / AGGREGATE
    file.write_bytes(file.read_bytes()[:-100])


def damage_foreign(path: Path) -> None:
    (path / AGGREGATE).write_bytes(b"not parquet at all")


def damage_newer(path: Path) -> None:
    table = pq.read_table(path / AGGREGATE)
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"precscope.schema": b"99"}), path / AGGREGATE
    )


def damage_unknown_columns(path: Path) -> None:
    table = pq.read_table(path / AGGREGATE)
    pq.write_table(table.drop_columns(["sumsq"]), path / AGGREGATE)


def damage_wrong_numbers(path: Path) -> None:
    """Numbers of another run, which covers parts of the same names."""
    other = write(path.parent / "other", range(12), seed=99)
    shutil.copy(other / AGGREGATE, path / AGGREGATE)


def damage_part_is_gone(path: Path) -> None:
    list_parts(path, "stats")[1].unlink()


def damage_part_was_written_again(path: Path) -> None:
    """The part as anybody might write it: other encodings, one row changed."""
    part = list_parts(path, "stats")[0]
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)


@pytest.mark.parametrize("damage", [v for k, v in list(globals().items()) if k.startswith("damage_")])
def test_an_aggregate_that_does_not_hold_is_not_used(tmp_path, damage):
    path = write(tmp_path / "run", range(12))
    same(Profile.load(path), from_parts(path))
    damage(path)
    same(Profile.load(path), from_parts(path))


def test_parts_that_the_aggregate_lacks_are_added(tmp_path, often):
    path = write(tmp_path / "run", range(31), close=False)  # killed: what came after the last merge is not in it
    held = {part for part, *_ in covered(path)}
    assert held and held < {p.name for p in list_parts(path, "stats")}
    same(Profile.load(path), from_parts(path))


def test_killed_while_parts_are_put_together(tmp_path, often, monkeypatch):
    """The merged part is there, and so are those that it holds: each row counts once."""
    whole = write(tmp_path / "whole", range(12))
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "run", range(12))
    monkeypatch.undo()
    path = tmp_path / "run"
    left = [p.name for p in path.glob("stats-*")]
    assert len(left) > len(list_parts(path, "stats")) == 1
    steps = Profile.load(path).steps
    drop_all_steps(whole, steps[-1] + 1)
    same(Profile.load(path), Profile.load(whole))
    drop_steps(path, 0)  # must not bring the small ones back
    assert Profile.load(path).sites == [] and not list(path.glob("stats-*"))


def test_dropped_steps_leave_the_sums(tmp_path, often):
    path, short = write(tmp_path / "run", range(20)), write(tmp_path / "short", range(12))
    drop_steps(path, 12)
    assert not (path / AGGREGATE).exists()
    same(Profile.load(path), Profile.load(short))
    write(path, range(12, 20))  # gone on with
    assert {part for part, *_ in covered(path)} == {p.name for p in list_parts(path, "stats")}
    same(Profile.load(path), from_parts(path))
    same(Profile.load(path), Profile.load(write(tmp_path / "whole", range(20))))
    drop_steps(path, 20)  # nothing to drop
    assert (path / AGGREGATE).exists()


def test_overwriting_removes_it(tmp_path):
    path = write(tmp_path / "run", range(3))
    prepare_directory(path, exist="overwrite")
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("world", [0, 4])
def test_ranks_with_aggregates_of_their_own(tmp_path, world):
    path = write(tmp_path / "run", range(8), run={"merged_over": world} if world else {})
    write(path / "rank-00001", range(8), seed=5)
    loaded = Profile.load(path)
    same(loaded, from_parts_of_all(path))
    gradients = [i for i, s in enumerate(loaded.sites) if s.role.is_gradient and loaded.table.count[i]]
    assert set(loaded.table.source_exponent[gradients]) == {-10 - (2 if world else 0)}
    assert len(loaded.history()) == loaded.times.sum()


def from_parts_of_all(path: Path) -> Profile:
    (path / "rank-00001" / AGGREGATE).unlink()
    return from_parts(path)


def test_a_directory_of_an_earlier_version(tmp_path):
    """Small parts, Parquet's default encodings, no aggregate."""
    path = write(tmp_path / "run", range(6), close=False)
    before = Profile.load(path)
    for part in list_parts(path, "stats"):
        pq.write_table(read_part(part), part, compression="zstd")
    same(Profile.load(path), before)
    assert Profile.load(path).history().equals(before.history())


def test_histories_are_read_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / "run", range(6))
    part = list_parts(path, "stats")[0]
    content = bytearray(part.read_bytes())
    content[40:400] = bytes(360)  # the footer is whole
    part.write_bytes(content)
    profile = Profile.load(path)
    assert profile.steps == list(range(6)) and len(profile.ask("e4m3"))
    with pytest.raises(RunDirectoryError, match=f"{part.name} cannot be read"):
        profile.history()


def test_history_of_some_columns_and_roles(tmp_path, often):
    profile = Profile.load(write(tmp_path / "run", range(20)))
    few = profile.history(("step", "amax", "module"), roles=["update", "input"])
    whole = profile.history()
    assert list(whole.columns) == list(HISTORY)
    kept = whole[whole.role.isin(["update", "input"])][["step", "amax", "module"]]
    assert few.astype({"module": str}).equals(kept.astype({"module": str}).reset_index(drop=True))
    again = profile.history(("step", "amax", "module"), roles=["update", "input"])  # from what is in memory by now
    assert again.reset_index(drop=True).astype({"module": str}).equals(few.astype({"module": str}))
    with pytest.raises(UsageError, match="no column 'amaxx' in the history; columns are step, module"):
        profile.history(["amaxx"])


def test_peaks_are_the_largest_of_each_site_and_step(tmp_path, often):
    path = write(tmp_path / "run", [0, 3, 5, 8, 100, 101, 102], sites=9)
    profile, frame = Profile.load(path), Profile.load(path).history()
    peaks = profile.peaks
    assert peaks.steps.tolist() == profile.steps == [0, 3, 5, 8, 100, 101, 102]
    groups = frame.groupby(["module", "role", "call", "step"], observed=True)
    assert len(groups) == (~np.isnan(peaks.amax)).sum()
    for (module, role, call, step), rows in groups:
        at = peaks.sites.index(Site(module, Role(role), call)), profile.steps.index(step)
        assert peaks.amax[at] == rows.amax.max()
        bad = (rows.pos_inf + rows.nan).sum() > 0
        assert peaks.broken[at] == (2 if bad else 1 if rows.neg_inf.sum() else 0)
    profile.history()
    del profile.__dict__["peaks"]
    assert np.array_equal(profile.peaks.amax, peaks.amax, equal_nan=True)  # from the frame, too


# memory


class Chain(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return x


def test_buffers_do_not_grow_with_the_steps(tmp_path):
    """A fixed buffer per site: slots for one step, sums, and at most as many rows waiting as one flush takes."""
    torch.manual_seed(0)
    model = Chain(30)
    optimizer = torch.optim.AdamW(model.parameters())
    seen = []
    with record(model, tmp_path / "run", optimizer=optimizer, every=1, flush_every=2) as recorder:
        for _ in range(12):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            waiting = recorder._observations.used
            recorder.step()
            (buffer,) = recorder._observations._buffers.values()
            totals = recorder._output._writer("stats")._totals
            seen.append((buffer.capacity, waiting, len(totals._counts.rows), len(recorder._observations._rows)))
    sites = len(Profile.load(tmp_path / "run").sites)
    assert sites > 400
    later = seen[4:]
    assert {capacity for capacity, *_ in later} == {later[0][0]}
    assert max(waiting for _, waiting, *_ in later) <= 2 * 2 * sites  # two steps, two slots for an update
    assert {held for _, _, held, _ in later} == {later[0][2]} and later[0][2] <= sites * 9 // 8
    assert [left for *_, left in later[1::2]] == [0] * 4  # after each flush


def test_the_writer_bounds_what_it_puts_together(tmp_path, often):
    directory = prepare_directory(tmp_path / "run")
    writer = StatsWriter(directory)
    site = [Site("a", Role.INPUT)]
    for step in range(100):
        writer.write(np.asarray([step]), site, rows_of(np.random.default_rng(step), 1), np.ones(1), {})
        assert len(writer._small) <= 4 and sum(n for _, n in writer._small) <= 20 + 4
    assert len(list_parts(directory, "stats")) <= 100 // 20 + 4
