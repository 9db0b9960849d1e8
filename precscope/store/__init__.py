"""A run directory: open formats, whole parts, no pickle.

    run.json                       what ran; written first, updated at the end ("status": running, done or failed)
    stats-000001.parquet           a row per (step, site): scalars, and the exponent histogram trimmed to its filled
    stats-000002-000017.parquet    binades; a name with two numbers: these parts in one, rows by site, then by step
    aggregate.parquet              a row per site: the sums over the steps of the parts it names; can be made again
    shadow-000001.parquet          as stats, for one shadow step in fp32, with gradient-weighted histograms (`weights`)
    truth-000001.parquet           the gradients of a shadow step against the run's own: a row per parameter
    graph.json                     modules, parameters, FLOPs, producer -> consumer edges
    cost.parquet                   measured times per module and format
    train.parquet                  a row per training step

Every part is written beside its final name and renamed over it, so a part is either complete or absent: a process
killed at any moment leaves a directory that loads, with all that was flushed. Each file carries a schema number.
Several processes merge their statistics, and rank 0 writes. What was not merged (a process that failed, merge=False)
rank k > 0 writes below `rank-0000k/`; histograms add up, so a reader merges them.

A killed process may leave parts beside the one that they were put together in: `list_parts` leaves them out.
"""

from .aggregate import AGGREGATE, load_totals, write_aggregate
from .directory import drop_all_steps, drop_steps, prepare_directory, rank_name
from .files import json_text, replacing, this_command, update_json, write_json
from .histograms import expand, trim
from .history import HISTORY, Peaks, as_arrow, joined, read_history
from .parts import arrow_array, list_parts, of_steady_parts, read_part, write_part, write_truth
from .schema import CHANGES, SCALARS, SCHEMA, TRUTH_COLUMNS, part_schema, stats_schema
from .totals import Totals
from .writer import StatsWriter

__all__ = [
    "AGGREGATE", "CHANGES", "HISTORY", "SCALARS", "SCHEMA", "TRUTH_COLUMNS", "Peaks", "StatsWriter", "Totals",
    "arrow_array", "as_arrow", "drop_all_steps", "drop_steps", "expand", "joined", "json_text", "list_parts",
    "load_totals", "of_steady_parts", "part_schema", "prepare_directory", "rank_name", "read_history", "read_part",
    "replacing", "stats_schema", "this_command", "trim", "update_json", "write_aggregate",
    "write_json", "write_part", "write_truth",
]  # fmt: skip
