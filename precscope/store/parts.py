"""Parts: which there are, written and read whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import RunDirectoryError, first_line
from .files import replacing
from .schema import SCHEMA, layout, part_schema

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
_TRIES = 5
_ADVICE = "move it away, or load with skip_damaged=True (--skip-damaged) to use the rest"


def part_numbers(path: Path) -> tuple[int, int] | None:
    """(first, last) of the parts that this one holds, from its name; None for a foreign name."""
    found = re.fullmatch(r"[a-z]+-(\d+)(?:-(\d+))?", path.stem)
    return None if found is None else (int(found[1]), int(found[2] or found[1]))


def part_path(directory: Path, kind: str, first: int, last: int | None = None) -> Path:
    """Name of part `first`, or of the one that holds those from `first` to `last`."""
    return directory / (f"{kind}-{first:06d}" + ("" if last is None else f"-{last:06d}") + ".parquet")


def list_parts(directory: Path, kind: str) -> list[Path]:
    """The parts of one kind in `directory` (those of further ranks not included), in the order of writing.

    A part that another one holds was about to be removed when its writer was killed: it is left out.
    """
    paths = sorted(directory.glob(f"{kind}-*.parquet"))
    spans = {path: part_numbers(path) or (0, 0) for path in paths}
    alive, end = [], 0
    for path in sorted(paths, key=lambda p: (spans[p][0], -spans[p][1])):
        first, last = spans[path]
        if first == 0 or last > end:  # a foreign name is for the reader to complain of
            alive.append(path)
            end = max(end, last)
    return alive


def of_steady_parts(directories: Iterable[Path], kind: str, action: Callable[[dict[Path, list[Path]]], T]) -> T:
    """action(the parts of each directory), done again where a run that goes on put some of them together meanwhile.

    Raises what `action` raises where that is not the reason, RunDirectoryError where the parts do not come to rest.
    """
    directories = list(directories)
    for _ in range(_TRIES):
        parts = {directory: list_parts(directory, kind) for directory in directories}
        try:
            found = action(parts)
        except RunDirectoryError:
            if not _moved(parts, kind):
                raise
        else:
            if not _moved(parts, kind):
                return found
    raise RunDirectoryError(f"{directories[0]} was changed while it was read, {_TRIES} times: read it again")


def _moved(parts: dict[Path, list[Path]], kind: str) -> bool:
    """Whether there are others now. Those that came after the last one do not matter."""
    for directory, before in parts.items():
        end = max(((part_numbers(p) or (0, 0))[1] for p in before), default=0)
        if before != [p for p in list_parts(directory, kind) if (part_numbers(p) or (0, 0))[0] <= end]:
            return True
    return False


def is_by_site(path: Path) -> bool:
    """Whether a part holds several, its rows by site, then by step."""
    first, last = part_numbers(path) or (0, 0)
    return first != last


def next_number(directory: Path, kind: str) -> int:
    """Number of the part to be written next."""
    return 1 + max(((part_numbers(p) or (0, 0))[1] for p in directory.glob(f"{kind}-*.parquet")), default=0)


def read_part(path: Path, *, kind: str = "stats", columns: Iterable[str] | None = None) -> pa.Table:
    """Read one part: kind "stats", "shadow", "truth" or "ops" (whose columns opstore.py checks), all of its columns or
    some.

    Raises RunDirectoryError where it is truncated, foreign or of a newer schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_part(path, schema, kind)
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({first_line(error)}): {_ADVICE}") from error


def check_part(path: Path, schema: pa.Schema, kind: str) -> None:
    """Raise RunDirectoryError for a foreign file, a newer schema or missing columns."""
    metadata = schema.metadata or {}
    if metadata.get(b"precscope.kind") != kind.encode():
        raise RunDirectoryError(f"{path} was not written by precscope (no schema number in it): {_ADVICE}")
    number = int(metadata[b"precscope.schema"])
    if number > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {number}, this precscope reads up to {SCHEMA}: upgrade precscope")
    missing = set() if kind == "ops" else set(part_schema(kind).names) - set(schema.names)
    if missing:
        raise RunDirectoryError(f"{path} lacks the columns {', '.join(sorted(missing))}: {_ADVICE}")


def write_part(path: Path, table: pa.Table, *, by_site: bool = False) -> None:
    """Write a part, whole or not at all. by_site: its rows are by site, then by step. Raises RunDirectoryError."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(table, temporary, **layout(table.schema, by_site=by_site))


def last_step(path: Path, *, kind: str) -> int:
    """The largest step in a part, from its statistics. Raises RunDirectoryError as `read_part` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_part(path, file.schema_arrow, kind)
            at = file.schema_arrow.names.index("step")
            groups = [file.metadata.row_group(i).column(at).statistics for i in range(file.metadata.num_row_groups)]
            if all(g is not None and g.has_min_max for g in groups):
                return max((g.max for g in groups), default=-1)
            return max(file.read(columns=["step"]).column("step").to_pylist(), default=-1)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({first_line(error)}): {_ADVICE}") from error


def write_truth(directory: Path, columns: dict[str, Any]) -> Path:
    """Write truth-NNNNNN.parquet with the columns TRUTH_COLUMNS, lists of equal length."""
    import pyarrow as pa

    path = part_path(directory, "truth", next_number(directory, "truth"))
    schema = part_schema("truth")
    write_part(path, pa.Table.from_arrays([arrow_array(columns[f.name], f.type) for f in schema], schema=schema))
    return path


def arrow_array(values: Any, kind: pa.DataType) -> pa.Array:
    """`values` as an Arrow array of that type; text in dictionaries where the type says so."""
    import pyarrow as pa

    if isinstance(values, pa.Array):
        return values
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, kind)
