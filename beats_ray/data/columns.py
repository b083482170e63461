"""The rows of Arrow columns as views of their memory: a Python object for each value would cost too much."""

from itertools import pairwise

import numpy as np
import pyarrow as pa


def binary_views(column: pa.ChunkedArray) -> list[memoryview]:
    """The rows of a binary column without nulls; offsets of 32 or 64 bits."""
    views: list[memoryview] = []
    for chunk in column.chunks:
        assert not chunk.null_count
        width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        whole = memoryview(data if data is not None else b"")
        views += [whole[first:last] for first, last in pairwise(ends)]
    return views


def list_views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a column of lists of numbers without nulls."""
    views: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        ends = chunk.offsets.to_numpy().tolist()
        views += [values[first:last] for first, last in pairwise(ends)]
    return views
