"""Rows of tables in columns, Parquet and Arrow, in memory that a small file cannot blow up.

A column that repeats a value or is compressed may unpack to a million times its size. So texts stay
in their dictionary until their row is made, batches are small, and what would not fit into memory
is refused by the sizes that the file states, before it is unpacked.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from engine.chat.conversation import RowProblem
from engine.data.content import (
    PASSED,
    ROW_LIMIT_BYTES,
    ROW_LIMIT_VALUES,
    SourceRow,
    Wants,
    damaged,
    found,
    not_utf8,
    open_raw,
    require_start,
    too_long,
)
from engine.errors import UserError
from engine.units import stored

_BATCH_ROWS: Final = 256
# Of all columns together; one row may be more.
_BATCH_BYTES: Final = 16 * 2**20
# Beyond it a column of a row group has to hold as much in the file, but for this factor.
_UNPACKED_BYTES: Final = 64 * 2**20
_UNPACKED_FACTOR: Final = 50
# Of a column in a row group, where rows have many or few; each takes 8 bytes in a batch.
_VALUES_OF_LISTS: Final = 2**23
_VALUES: Final = 2**25
_FEW_VALUES: Final = 64
_ARROW_BATCH_BYTES: Final = 192 * 2**20


def read_parquet(path: Path, wants: Wants) -> Iterator[SourceRow]:
    """Rows of a .parquet file; `line` is the row's number.

    Nulls inside a column are dropped at every depth: Arrow gives each record of a column the keys
    of all of them and fills the absent ones with null.
    """
    import pyarrow
    from pyarrow import parquet

    require_start(path, "a Parquet file", b"PAR1")
    try:
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema, file.metadata
        texts = [
            column.path
            for column in map(schema.column, range(len(schema)))
            if column.physical_type == "BYTE_ARRAY"
        ]
        size, count, number = path.stat().st_size, max(1, metadata.num_rows), 0
        with parquet.ParquetFile(
            path, metadata=metadata, read_dictionary=texts, pre_buffer=False, buffer_size=2**20
        ) as file:
            for index in range(metadata.num_row_groups):
                rows = _rows_of_a_batch(path, metadata.row_group(index))
                for batch in file.iter_batches(rows, row_groups=[index], use_threads=False):
                    for row in _rows(batch, wants):
                        number += 1
                        done = size * number // count
                        yield PASSED if row is None else found(number, row, done, "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, f"It is not readable as Parquet: {error}.") from error


def _rows_of_a_batch(path: Path, group: Any) -> int:
    """How many rows of a row group are read at a time. Raises UserError where it holds too much."""
    rows, unpacked, values = max(1, group.num_rows), 0, 0
    for column in map(group.column, range(group.num_columns)):
        whole, held = column.total_uncompressed_size, column.total_compressed_size
        unpacked, values = unpacked + whole, max(values, column.num_values)
        few = column.num_values <= _FEW_VALUES * rows
        many = column.num_values > (_VALUES if few else _VALUES_OF_LISTS)
        if many or (whole > _UNPACKED_BYTES and whole > _UNPACKED_FACTOR * held):
            what = f"{column.num_values:,} values" if many else f"{stored(whole)} in {stored(held)}"
            raise UserError(
                f"{path} unpacks to more than is read at once.",
                f"A row group of {rows:,} rows has {what} in its column {column.path_in_schema}.",
                "Write it with smaller row groups, such as df.to_parquet(path, row_group_size=1000)"
                " in pandas, or without that column.",
            )
    by_bytes: int = rows * _BATCH_BYTES // max(1, unpacked)
    by_values: int = rows * ROW_LIMIT_VALUES // max(1, values)
    return max(1, min(_BATCH_ROWS, by_bytes, by_values))


def read_arrow(path: Path, wants: Wants) -> Iterator[SourceRow]:
    """Rows of an .arrow file, a stream or a file with a footer; `line` is the row's number."""
    import pyarrow
    from pyarrow import ipc

    magic = b"ARROW1\0\0"
    require_start(path, "an Arrow file", magic, b"\xff\xff\xff\xff")
    try:
        with open_raw(path) as raw:
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            whole = pyarrow.py_buffer(mapped)
            body = whole.slice(len(magic)) if mapped[: len(magic)] == magic else whole
            _refuse_what_unpacks(path, body)
            number = done = 0
            for batch in ipc.open_stream(body):
                batch.validate(full=True)
                done = min(done + batch.nbytes, len(mapped))
                for row in _rows(batch, wants):
                    number += 1
                    yield PASSED if row is None else found(number, row, done, "row")
                # What was read would count as this process's memory until the file is closed.
                mapped.madvise(mmap.MADV_DONTNEED)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, f"It is not readable as Arrow: {error}.") from error


def _refuse_what_unpacks(path: Path, body: Any) -> None:
    """Raises UserError where a batch unpacks to more than memory is for."""
    from pyarrow import ipc

    for message in ipc.MessageReader.open_stream(body):
        size = _unpacked_bytes(message.metadata.to_pybytes(), message.body)
        if size > _ARROW_BATCH_BYTES:
            raise UserError(
                f"{path} unpacks to more than is read at once.",
                f"A batch of its rows takes {stored(size)}, and it is unpacked as a whole.",
                "Write it with smaller batches, such as df.to_feather(path, chunksize=1000) in"
                " pandas, or as Parquet.",
            )


def _unpacked_bytes(message: bytes, body: Any) -> int:
    """What the compressed buffers of a record batch unpack to; 0 for any other message.

    The message is a flatbuffer (format/Message.fbs of Apache Arrow); each compressed buffer begins
    with its size in 8 bytes.
    """

    def field(table: int, index: int) -> int | None:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        size = struct.unpack_from("<H", message, vtable)[0]
        at = (
            struct.unpack_from("<H", message, vtable + 4 + 2 * index)[0]
            if 4 + 2 * index < size
            else 0
        )
        return table + at if at else None

    def follow(at: int | None) -> int | None:
        return None if at is None else at + struct.unpack_from("<I", message, at)[0]

    batch = follow(field(struct.unpack_from("<I", message, 0)[0], 2))
    kind = field(struct.unpack_from("<I", message, 0)[0], 1)
    if batch is None or kind is None or message[kind] not in (2, 3):
        return 0
    if message[kind] == 2:  # a dictionary holds a batch
        batch = follow(field(batch, 1))
    buffers = follow(field(batch, 2)) if batch is not None else None
    if batch is None or buffers is None or field(batch, 3) is None:
        return 0
    total = 0
    for index in range(struct.unpack_from("<I", message, buffers)[0]):
        offset, length = struct.unpack_from("<qq", message, buffers + 4 + 16 * index)
        if length >= 8:
            (size,) = struct.unpack_from("<q", body, offset)
            total += size if size > 0 else length  # -1: left as it was
    return total


def _rows(batch: Any, wants: Wants) -> Iterator[dict[str, Any] | RowProblem | None]:
    """The rows of a batch, None for one that is not wanted."""
    light: bool | None = None
    for index in range(batch.num_rows):
        if not wants():
            yield None
            continue
        if light is None:
            size, values = _weigh(batch.to_struct_array())
            light = size <= ROW_LIMIT_BYTES and values <= ROW_LIMIT_VALUES
        yield _row(batch.slice(index, 1), light)


def _row(batch: Any, light: bool) -> dict[str, Any] | RowProblem:
    """The one row of a batch; it is weighed before it is made, unless the whole batch is light."""
    if not light:
        size, values = _weigh(batch.to_struct_array())
        if size > ROW_LIMIT_BYTES:
            return too_long(
                f"It unpacks to {stored(size)}, and {stored(ROW_LIMIT_BYTES)} are read."
            )
        if values > ROW_LIMIT_VALUES:
            return too_long(f"It has {values:,} values, and {ROW_LIMIT_VALUES:,} are read.")
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return not_utf8(f"Byte {error.start + 1} of a text in it is {error.reason}.")
    return {name: without_nulls(value) for name, value in row.items()}


def _weigh(array: Any) -> tuple[int, int]:
    """The bytes and the number of the values that an array becomes outside of Arrow."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return len(array) * 8, len(array)
        lengths = compute.binary_length(array.dictionary).cast("int64")
        return compute.sum(lengths.take(array.indices)).as_py() or 0, len(array)
    if _is_text(kind):
        return compute.sum(compute.binary_length(array).cast("int64")).as_py() or 0, len(array)
    if types.is_nested(kind) and hasattr(array, "flatten"):
        below = array.flatten()
        parts = list(map(_weigh, below if isinstance(below, list) else [below]))
        return sum(size for size, _ in parts), len(array) + sum(count for _, count in parts)
    return array.nbytes, len(array)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(
        test(kind)
        for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def without_nulls(value: Any) -> Any:
    """`value` without the dict entries that are None, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
