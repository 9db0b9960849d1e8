"""Arrow arrays from numpy's and back, by way of their buffers.

pyarrow.array and to_numpy would do, but import pandas when they are first called: 40 MB and half a
second of a training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def numbers(values: Any, kind: pa.DataType | None = None, *, unknown: np.ndarray | None = None) -> pa.Array:
    """Integers or floats, of the type `kind` (None: that of the array). unknown: bool[n], which are null."""
    import pyarrow as pa

    dtype = None if kind is None else kind.to_pandas_dtype()
    values = np.ascontiguousarray(values, dtype)
    kind = pa.from_numpy_dtype(values.dtype) if kind is None else kind
    mask = None if unknown is None else pa.py_buffer(np.packbits(~unknown, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(values)])


def flags(values: np.ndarray) -> pa.Array:
    """Booleans."""
    import pyarrow as pa

    bits = np.packbits(np.asarray(values, bool), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def text(codes: Any, names: Sequence[str]) -> pa.DictionaryArray:
    """names[code] for each code, with `names` as the dictionary."""
    import pyarrow as pa

    encoded = [name.encode() for name in names]
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in encoded])]).astype(np.int32)
    data = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    words = pa.Array.from_buffers(pa.string(), len(encoded), data)
    return pa.DictionaryArray.from_arrays(numbers(codes, pa.int32()), words)


def coded(words: Sequence[str]) -> pa.DictionaryArray:
    """The same for words that repeat."""
    number: dict[str, int] = {}
    codes = [number.setdefault(word, len(number)) for word in words]
    return text(np.asarray(codes, np.int32), list(number))


def plain(array: pa.Array) -> np.ndarray:
    """Numbers or booleans as numpy has them; where they are null, anything."""
    import pyarrow as pa

    end = array.offset + len(array)
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(len(array), np.int64)
    if pa.types.is_boolean(array.type):
        bits = np.frombuffer(buffer, np.uint8)[: -(-end // 8)]
        return np.unpackbits(bits, count=end, bitorder="little")[array.offset :].astype(bool)
    return np.frombuffer(buffer, array.type.to_pandas_dtype(), count=end)[array.offset :]
