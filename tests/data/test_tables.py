"""Parquet and Arrow: the rows that were written, and memory that a small file cannot blow up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from engine.config import DatasetConfig
from engine.data import tables
from engine.data.sources import iterate_rows
from engine.errors import UserError

MEBIBYTE = "x" * 2**20
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}], "image": {"bytes": b"\x89P"}},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
]


def read(path: Path):
    return list(iterate_rows(DatasetConfig(path=str(path)), path.parent))


def write_arrow(path: Path, table: pa.Table, compression: str | None, stream: bool) -> None:
    options = ipc.IpcWriteOptions(compression=compression)
    new = ipc.new_stream if stream else ipc.new_file
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10_000)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("stream", [True, False])
def test_arrow_gives_the_rows_that_were_written(tmp_path, compression, stream):
    write_arrow(tmp_path / "a.arrow", pa.Table.from_pylist(ROWS * 2), compression, stream)
    found = read(tmp_path / "a.arrow")
    assert [row.row for row in found] == [ROWS[0], ROWS[1] | {"image": None}] * 2
    assert [(row.line, row.unit) for row in found] == [(n, "row") for n in (1, 2, 3, 4)]


def test_parquet_gives_the_rows_that_were_written_whatever_their_encoding(tmp_path):
    dictionary = pa.array(["q", "r", "q", None]).dictionary_encode()
    numbers = pa.array([[1, 2], [], None, [3]])
    table = pa.table({"prompt": dictionary, "completion": ["é", "b", "", "d"], "n": numbers})
    expected = [
        {"prompt": "q", "completion": "é", "n": [1, 2]},
        {"prompt": "r", "completion": "b", "n": []},
        {"prompt": "q", "completion": "", "n": None},
        {"prompt": None, "completion": "d", "n": [3]},
    ]
    encodings: tuple[dict[str, Any], ...] = (
        {"use_dictionary": True},
        {"use_dictionary": False},
        {"row_group_size": 1},
    )
    for keys in encodings:
        parquet.write_table(table, tmp_path / "a.parquet", **keys)
        assert [row.row for row in read(tmp_path / "a.parquet")] == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_an_object_of_lists_is_a_list_of_messages(tmp_path, name):
    """How `datasets` keeps a Sequence of a dict; other objects of lists stay what they are."""
    answers = {"text": ["Lyon"], "answer_start": [3]}
    given = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}, "answers": answers}
    table = pa.Table.from_pylist([given])
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    elif name == "a.arrow":
        write_arrow(tmp_path / name, table, None, True)
    else:
        (tmp_path / name).write_text(json.dumps(given))
    assert [row.row for row in read(tmp_path / name)] == [ROWS[1] | {"answers": answers}]


def repeated(text: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def nested(values: pa.Array) -> pa.Array:
    """One row that is a list of all values."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def bomb(path: Path, kind: str) -> None:
    """A small file whose rows take gigabytes."""
    if kind == "rows that repeat a text":
        table = pa.table({"prompt": repeated(MEBIBYTE, 1000), "completion": ["a"] * 1000})
    elif kind == "a row that repeats a text":
        table = pa.table({"messages": nested(repeated(MEBIBYTE, 2000))})
    elif kind == "a row of a million nulls":
        table = pa.table({"messages": nested(pa.nulls(2_000_000, pa.string()))})
    elif kind == "nulls":
        table = pa.table({"messages": nested(pa.nulls(9_000_000, pa.string()))})
    else:
        count = 80 if path.suffix == ".parquet" else 200
        table = pa.table({"prompt": [MEBIBYTE] * count, "completion": ["a"] * count})
    if path.suffix == ".arrow":
        compression = "zstd" if kind == "a page that unpacks" else None
        write_arrow(path, table, compression, True)
    else:
        one_page = {"use_dictionary": False, "compression": "zstd", "data_page_size": 2**30}
        parquet.write_table(table, path, **(one_page if kind == "a page that unpacks" else {}))


SMALL = [
    ("a.parquet", "rows that repeat a text", "1000 rows"),
    ("a.parquet", "a row that repeats a text", "It unpacks to 2.1 GB"),
    ("a.parquet", "a row of a million nulls", "values, and 1,048,576 are read"),
    ("a.parquet", "nulls", "9,000,000 values"),
    ("a.parquet", "a page that unpacks", "has 83.9 MB in"),
    ("a.arrow", "rows that repeat a text", "1000 rows"),
    ("a.arrow", "a row that repeats a text", "It unpacks to 2.1 GB"),
    ("a.arrow", "a page that unpacks", "takes 209.7 MB"),
]


@pytest.mark.parametrize(("name", "kind", "said"), SMALL)
def test_what_a_small_file_unpacks_to_is_bounded(tmp_path, monkeypatch, name, kind, said):
    bomb(tmp_path / name, kind)
    assert (tmp_path / name).stat().st_size < 9 * 2**20
    before = pa.total_allocated_bytes()
    most = 0
    rows = []
    try:
        for found in iterate_rows(DatasetConfig(path=name), tmp_path):
            most = max(most, pa.total_allocated_bytes() - before)
            rows.append(str(found.problem) if found.problem else "")
    except UserError as error:
        rows.append(str(error))
    assert said in (f"{len(rows)} rows" if "rows" in said and not rows[0] else rows[0])
    assert most < 64 * 2**20


def test_batches_are_as_small_as_rows_are_large(tmp_path):
    texts = [f"{n:04}" * 2**16 for n in range(200)]
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet", use_dictionary=False)
    with parquet.ParquetFile(tmp_path / "a.parquet") as file:
        rows = tables._rows_of_a_batch(tmp_path / "a.parquet", file.metadata.row_group(0))
    assert rows == 63
    assert [row.row["prompt"] for row in read(tmp_path / "a.parquet") if row.row] == texts


def test_the_repair_of_too_large_row_groups_works(tmp_path):
    bomb(tmp_path / "a.parquet", "a page that unpacks")
    table = parquet.read_table(tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet", use_dictionary=False, row_group_size=20)
    assert len(read(tmp_path / "b.parquet")) == 80
    write_arrow(tmp_path / "b.arrow", table.slice(0, 50), "zstd", False)
    assert len(read(tmp_path / "b.arrow")) == 50


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "It is empty: 0 bytes."),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<html>", "a web page"),
        (b'{"a": 1}', "does not start as one"),
    ],
)
def test_what_is_no_table_is_said_by_what_it_is(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert why in str(caught.value)


def test_a_cut_or_changed_table_is_damage(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.table({"prompt": ["q"] * 99}), None, True)
    whole = (tmp_path / "a.arrow").read_bytes()
    body = whole.index(b"qqqq")
    for content in (
        whole[: len(whole) // 2],
        whole[: body - 200] + b"\xff" * 8 + whole[body - 192 :],
    ):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / "a.arrow")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "prepare"])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind, _ in SMALL])
def test_a_command_stays_below_400_mb_for_all_of_them(tmp_path, command, name, kind):
    bomb(tmp_path / name, kind)
    words = ["check", name, "--model", "demo-tiny"]
    if command == "prepare":
        text = (
            f"base_model: demo-tiny\ndataset_prepared_path: store\ndatasets: [{{path: {name}}}]\n"
        )
        (tmp_path / "c.yml").write_text(text)
        words = ["prepare", "c.yml"]
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'engine', *sys.argv[1:]])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    root = Path(tables.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) * 1024 < 400e6
