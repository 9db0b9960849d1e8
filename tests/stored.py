"""Run directories with made-up rows, for tests of how they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from precscope.histogram import BINS
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import AGGREGATE, StatsWriter, prepare_directory, write_json
from precscope.store import writer as writing

ROLES = (Role.INPUT, Role.GRAD_OUTPUT, Role.UPDATE, Role.STATE)
SOURCES = ("fp32", "bf16", "none")
COUNTED = ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "source_exponent")


def rows_of(rng: np.random.Generator, n: int) -> StatsTable:
    """n rows, some of them empty, some not finite."""
    table = StatsTable.empty(n)
    for i in range(n):
        at = rng.integers(0, BINS - 9)
        table.counts[i, at : at + 9] = rng.integers(0, 4, 9) * rng.integers(0, 2) * 10 ** rng.integers(0, 9)
        if table.counts[i].any():
            table.amax[i], table.amin_nonzero[i] = rng.lognormal(size=2)
    for name in ("zeros", "pos_inf", "neg_inf", "nan"):
        getattr(table, name)[:] = rng.integers(0, 5, n) * rng.integers(0, 2, n)
    table.sum[:], table.sumsq[:] = rng.normal(size=n), rng.lognormal(size=n)
    table.source[:] = rng.choice(SOURCES, n)
    return table


def write(path: Path, steps: range | list[int], *, seed: int = 0, sites: int = 7, per_part: int = 1, **options) -> Path:
    """A run in which each step has some of the sites, with ratios and loss scales; closed unless close=False."""
    directory = prepare_directory(path, exist="append")
    write_json(directory / "run.json", {"schema": 1, "precision": "fp16", **options.get("run", {})})
    everything = [Site(f"layers.{i // 3}", ROLES[i % 4], i % 2, "ab"[i % 2]) for i in range(sites)]
    writer, steps = StatsWriter(directory), list(steps)
    for first in range(0, len(steps), per_part):
        at, names = [], []
        for step in steps[first : first + per_part]:
            rng = np.random.default_rng([seed, step])
            chosen = [everything[i] for i in rng.permutation(sites)[: rng.integers(1, sites + 1)]]
            at, names = at + [step] * len(chosen), names + chosen
        rng = np.random.default_rng([seed, steps[first], 1])
        ratios = {
            i: (rng.integers(0, 9, BINS), int(rng.integers(9)), int(rng.integers(9)))
            for i, site in enumerate(names) if site.role is Role.UPDATE
        }  # fmt: skip
        scale = np.asarray([1024.0 if s.role.is_gradient else 1.0 for s in names])
        writer.write(np.asarray(at), names, rows_of(rng, len(names)), scale, ratios)
    if options.get("close", True):
        writer.close()
    return directory


def same(one: Profile, other: Profile, *, ordered: bool = True) -> None:
    """Counts and extremes equal, sums to the last bits."""
    assert set(one.sites) == set(other.sites) and one.steps == other.steps
    assert not ordered or one.sites == other.sites
    place = [other.sites.index(site) for site in one.sites]
    a, b = one.table, other.table.take(place)
    for name in COUNTED:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("sum", "sumsq"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-14)
    assert a.source.tolist() == b.source.tolist()
    assert np.array_equal(one.times, other.times[place]) and np.array_equal(one.most, other.most[place])
    for i, j in enumerate(place):
        mine, theirs = one.ratios.get(i), other.ratios.get(j)
        assert (mine is None) == (theirs is None)
        assert mine is None or (np.array_equal(mine[0], theirs[0]) and mine[1:] == theirs[1:])


def from_parts(path: Path) -> Profile:
    """The same run without its aggregate."""
    plain = path.parent / f"{path.name}-plain"
    shutil.copytree(path, plain, ignore=shutil.ignore_patterns(AGGREGATE))
    try:
        return Profile.load(plain)
    finally:
        shutil.rmtree(plain)


def put_together_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are put together at 20 rows or 4 parts."""
    monkeypatch.setattr(writing, "_MERGED_ROWS", 20)
    monkeypatch.setattr(writing, "_MERGED_PARTS", 4)


def covered(path: Path) -> list:
    return json.loads(pq.read_schema(path / AGGREGATE).metadata[b"precscope.covers"])["parts"]
