"""Files as people have them: under other names, in other layouts, packed, or no data at all."""

import gzip
import json
import shlex
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from engine.config import DatasetConfig
from engine.data.sources import dataset_notes, iterate_rows
from engine.errors import UserError

ROWS = [{"messages": [{"role": "user", "content": f"café {n}"}], "n": n} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\nq,a\nr,b\n"
TABLE_ROWS = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]


def packed(content: bytes) -> bytes:
    """Without the time of day: the bytes are part of a test's name, which every worker has to make
    alike."""
    return gzip.compress(content, mtime=0)


def zstd(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


def dataset_of(folder: Path, name: str, content: bytes | str) -> DatasetConfig:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return DatasetConfig(path=name)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.ndjson", LINES, None),
        ("a.jsonl.gz", packed(LINES.encode()), None),
        ("a.json.gz", packed(json.dumps(ROWS).encode()), None),
        ("a.jsonl.zst", zstd(LINES), None),
        ("a.json.zst", zstd(json.dumps(ROWS, indent=1)), None),
        ("a.jsonl", "\ufeff" + LINES, None),
        ("a.jsonl", packed(LINES.encode()), "compressed with gzip"),
        ("a.json", zstd(LINES), "compressed with zstd"),
        ("a.jsonl.zst", packed(LINES.encode()), "compressed with gzip"),
        ("a.jsonl.gz", LINES, "not compressed"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be"), "UTF-16"),
        ("a.jsonl", json.dumps(ROWS), "one JSON array"),
        ("a.jsonl", json.dumps(ROWS, indent=2), "one JSON array"),
        ("a.ndjson.gz", packed(json.dumps(ROWS).encode()), "one JSON array"),
        ("a.json", json.dumps(ROWS), None),
        ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS), "several lines each"),
        ("a.json", "".join(json.dumps(row, indent=2) for row in ROWS), "several lines each"),
        ("a.jsonl", ",\n".join(json.dumps(row, indent=2) for row in ROWS), "several lines each"),
        ("a.jsonl", ",\n".join(map(json.dumps, ROWS)), "commas between them"),
        ("a.json", json.dumps({"version": [1], "data": ROWS, "more": [2]}, indent=1), None),
    ],
)
def test_rows_are_read_whatever_the_name_says_and_a_note_says_how(tmp_path, name, content, note):
    dataset = dataset_of(tmp_path, name, content)
    assert [row.row for row in iterate_rows(dataset, tmp_path)] == ROWS
    notes = [text.text for text in dataset_notes(dataset, tmp_path)]
    assert len(notes) == (note is not None)
    assert not note or note in notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.csv.gz", packed(TABLE.encode())),
        ("a.tsv.zst", zstd(TABLE.replace(",", "\t"))),
        ("a.csv", TABLE.encode("utf-16")),
        ("a.csv", TABLE.replace("\n", "\r").encode()),
    ],
)
def test_tables_in_text(tmp_path, name, content):
    dataset = dataset_of(tmp_path, name, content)
    assert [row.row for row in iterate_rows(dataset, tmp_path)] == TABLE_ROWS


def test_a_tab_separates_the_cells_of_a_tsv_file_even_where_the_header_has_commas(tmp_path):
    dataset = dataset_of(tmp_path, "a.tsv", "a,b\tc\n1\t2\n")
    assert [row.row for row in iterate_rows(dataset, tmp_path)] == [{"a,b": "1", "c": "2"}]


LATIN = LINES.encode("cp1252")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", LATIN, "is not UTF-8 text"),
        ("a.jsonl", LINES.encode("utf-16-le"), "is not UTF-8 text"),
        ("a.jsonl", LINES.encode("utf-32"), "is not UTF-8 text"),
        ("a.jsonl.gz", packed(LATIN), "is not UTF-8 text"),
        ("a.jsonl", b"BZh91AY&SY", "compressed with bzip2"),
        ("a.jsonl.gz", packed(packed(LINES.encode())), "compressed twice"),
        ("a.jsonl", b"PK\x03\x04 rows", "a zip archive"),
        ("a.json", b"%PDF-1.7 rows", "a PDF document"),
        ("a.csv", b"\n <!DOCTYPE html>\n<html>", "a web page"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS"),
        ("a.jsonl", b"\0" * 9, "holds no text"),
        ("a.jsonl", "", "holds no rows. It is empty: 0 bytes."),
        ("a.jsonl", "\ufeff\n \n", "holds no rows. It was read to its end"),
    ],
)
def test_what_holds_no_rows_is_one_sentence_with_a_repair(tmp_path, name, content, what):
    dataset = dataset_of(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        list(iterate_rows(dataset, tmp_path))
    assert what in str(caught.value)
    command = caught.value.fix.partition("Convert it: ")[2].partition(" (or")[0]
    if command:  # the repair is tried: with it the rows are read
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        repaired = DatasetConfig(path=shlex.split(command)[-1])
        assert [row.row for row in iterate_rows(repaired, tmp_path)] == ROWS


@pytest.mark.parametrize(
    ("text", "numbers", "unit"),
    [
        ('[{"n": 0}, {"n": 1},\n{"n": 2}]', [1, 2, 3], "row"),
        ('\n[{"n": 0},\n{"n": 1},\n{"n": 2}]', [2, 3, 4], "line"),
        ('{"n": 0}\n\n{"n": 1}\n{"n": 2}', [1, 3, 4], "line"),
        ('{\n"n": 0}\n{\n"n": 1}\n{"n":\n2}', [1, 3, 5], "line"),
    ],
)
def test_a_row_is_counted_where_lines_do_not_tell_rows_apart(tmp_path, text, numbers, unit):
    found = list(iterate_rows(dataset_of(tmp_path, "a.json", text), tmp_path))
    assert [row.row for row in found] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [row.line for row in found] == numbers
    assert {row.unit for row in found} == {unit}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        # A damaged object costs itself, where the next begins a line.
        ('{\n"n": 0\n}\n{\n"n" 1\n}\n{\n"n": 2\n}\n', [{"n": 0}, None, {"n": 2}]),
        # A bad byte costs its object.
        (b'{\n"n": "\xff"\n}\n{\n"n": "\xc3\xa9"}\n{\n"n": "\xff"}', [None, {"n": "é"}, None]),
        # The first line is cut; the others are rows.
        ('{"n": 0\n{"n": 1}\n', [None, {"n": 1}]),
        # Two objects with a list of their own called data.
        ('{"data": ["q"]}\n{"data": ["r"]}\n', [{"data": ["q"]}, {"data": ["r"]}]),
        ('{\n"data": ["q"]}\n{\n"data": ["r"]}\n', [{"data": ["q"]}, {"data": ["r"]}]),
        ('{"n":\n1,\n"data": [{"role": "user"}]}', [{"n": 1, "data": [{"role": "user"}]}]),
        ('[{"n": 0},\n{"n": 1}]\n[{"n": 2}]', [{"n": 0}, {"n": 1}, {"n": 2}]),
    ],
)
def test_no_row_of_another_layout_is_lost(tmp_path, text, rows):
    dataset = dataset_of(tmp_path, "a.json", text)
    assert [row.row for row in iterate_rows(dataset, tmp_path)] == rows
