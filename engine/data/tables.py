"""Rows of tables in columns: Parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.chat.conversation import RowProblem
from engine.data.content import SourceRow, damaged, found, not_an_object, not_utf8

_PARQUET_BATCH_ROWS = 256
# Of rows that hold bytes, such as images.
_PARQUET_BATCH_BYTE_ROWS = 16


def read_parquet(path: Path) -> Iterator[SourceRow]:
    """Rows of a .parquet file; `line` is the row's number.

    Nulls inside a row are dropped at every depth: Arrow gives each record of a column the keys of
    all of them and fills the absent ones with null.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            size, count, number = path.stat().st_size, max(1, file.metadata.num_rows), 0
            many = "binary" not in str(file.schema_arrow)
            batch_rows = _PARQUET_BATCH_ROWS if many else _PARQUET_BATCH_BYTE_ROWS
            for batch in file.iter_batches(batch_rows, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    at = size * number // count
                    yield found(number, _parquet_row(batch, index), at, "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, f"It is not readable as Parquet: {error}.") from error


def _parquet_row(batch: Any, index: int) -> dict[str, Any] | RowProblem:
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        return not_utf8(f"Byte {error.start + 1} of a text in it is {error.reason}.")
    kept = without_nulls(row)
    return kept if isinstance(kept, dict) else not_an_object(kept)


def without_nulls(value: Any) -> Any:
    """`value` without the dict entries that are None, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
