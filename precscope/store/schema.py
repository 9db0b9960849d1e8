"""Columns of the parts, and how each is laid out on disk.

A histogram's counts are noise in their low bytes and near those of the next row in their high ones: byte streams apart
(BYTE_STREAM_SPLIT) compress to 2/3 of what whole integers do, and twice as fast. Columns of few values are
dictionaries. sum and sumsq are left whole in the order in which rows come (equal values repeat there: zeros, constants)
and split where a site's steps follow one another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1

CHANGES = ("bf16", "fp16", "e4m3", "e5m2")
"""Formats to which shadow steps really round parameters: columns change_bf16, ... of shadow parts."""
TRUTH_COLUMNS = ("step", "parameter", "module", "cosine", "rel_error", "grad_norm_fp32", "loss_low", "loss_fp32")
SCALARS = ("count", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq", "loss_scale")
SITE = ("module", "role", "call", "tensor")

_SPLIT = (
    "zeros", "amax", "amin_nonzero", "hist_lo", "hist.list.element", "ratio_lo", "ratio.list.element",
    "weights.list.element", "input_amax",
)  # fmt: skip
_WHOLE = ("sum", "sumsq", *(f"change_{f}" for f in CHANGES), "cosine", "rel_error", "grad_norm_fp32")


def part_schema(kind: str) -> pa.Schema:
    """Arrow schema of parts of one kind: "stats", "shadow" (the same and `weights`) or "truth"; the schema number is in
    its metadata."""
    import pyarrow as pa

    metadata = {b"precscope.schema": str(SCHEMA).encode(), b"precscope.kind": kind.encode()}
    if kind == "truth":
        types = {"step": pa.int64(), "parameter": pa.string(), "module": pa.string()}
        return pa.schema([(name, types.get(name, pa.float64())) for name in TRUTH_COLUMNS], metadata=metadata)
    schema = stats_schema()
    if kind == "shadow":
        more = {"weights_lo": pa.int16(), "weights": pa.list_(pa.float64())}
        for name, kind_of in (more | {f"change_{f}": pa.float64() for f in CHANGES}).items():
            schema = schema.append(pa.field(name, kind_of))
    return schema.with_metadata(metadata)


def stats_schema() -> pa.Schema:
    """Columns of stats-*.parquet."""
    import pyarrow as pa

    integers = ("count", "zeros", "pos_inf", "neg_inf", "nan")
    floats = ("amax", "amin_nonzero", "sum", "sumsq", "loss_scale")
    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("step", pa.int64()),
            ("module", text),
            ("role", text),
            ("call", pa.int32()),
            ("tensor", text),
            ("source", text),
            *((name, pa.int64()) for name in integers),
            *((name, pa.float64()) for name in floats),
            ("hist_lo", pa.int16()),
            ("hist", pa.list_(pa.int64())),
            ("ratio_lo", pa.int16()),
            ("ratio", pa.list_(pa.int64())),
            ("ratio_unchanged", pa.int64()),
            ("ratio_from_zero", pa.int64()),
        ]
    )


def layout(schema: pa.Schema, *, by_site: bool = False) -> dict[str, Any]:
    """Settings of pyarrow.parquet.write_table for a table of these columns. by_site: rows by site, then by step."""
    import pyarrow as pa

    paths = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema]
    split = (*_SPLIT, *_WHOLE) if by_site else _SPLIT
    encodings = {p: "BYTE_STREAM_SPLIT" if p in split else "PLAIN" for p in (*_SPLIT, *_WHOLE) if p in paths}
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [p for p in paths if p not in encodings],
        "column_encoding": encodings,
        "row_group_size": 1 << 20,
    }
