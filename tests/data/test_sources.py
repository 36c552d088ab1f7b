import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from engine.config import DatasetConfig
from engine.data import formats, json_rows
from engine.data.content import SPEAKERS
from engine.data.prepare import prepare
from engine.data.sources import iterate_rows, list_samples, locate, with_absolute_paths
from engine.errors import UserError
from tests.support.data import config_of, write_rows

ROWS = [{"messages": [{"role": "user", "content": f"q {n}"}], "n": n} for n in range(5)]


def read(path: Path, folder: Path = Path("/nowhere")):
    return list(iterate_rows(DatasetConfig(path=str(path)), folder))


def write(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusal(path: Path, folder: Path = Path("/nowhere")) -> str:
    with pytest.raises(UserError) as caught:
        read(path, folder)
    return str(caught.value)


class TestGoodFiles:
    def test_json_lines_give_their_rows_and_lines(self, tmp_path):
        found = read(write(tmp_path, "a.jsonl", lines(ROWS)))
        assert [row.row for row in found] == ROWS
        assert [row.line for row in found] == [1, 2, 3, 4, 5]
        assert {row.file for row in found} == {"a.jsonl"}

    def test_a_bom_crlf_and_blank_lines_are_nothing_wrong(self, tmp_path):
        content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \r\n{"a": 2}'
        found = read(write(tmp_path, "a.jsonl", content))
        assert [(row.line, row.row) for row in found] == [(1, {"a": 1}), (4, {"a": 2})]

    def test_gzip_is_unpacked(self, tmp_path):
        found = read(write(tmp_path, "a.jsonl.gz", gzip.compress(lines(ROWS).encode())))
        assert [row.row for row in found] == ROWS

    @pytest.mark.parametrize("indent", [None, 1])
    @pytest.mark.parametrize("key", [None, "data"])
    def test_a_json_array_gives_its_elements_and_their_lines(self, tmp_path, indent, key):
        value = ROWS if key is None else {"version": [1, {"x": "]"}], "data": ROWS, "more": 1}
        text = "\ufeff\n" + json.dumps(value, indent=indent)
        found = read(write(tmp_path, "a.json", text))
        assert [row.row for row in found] == ROWS
        starts = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "{"]
        if indent and key is None:
            assert [row.line for row in found] == [
                line for line in starts if text.splitlines()[line - 1] == " {"
            ]

    def test_json_lines_under_the_name_json_are_read(self, tmp_path):
        assert [row.row for row in read(write(tmp_path, "a.json", lines(ROWS)))] == ROWS

    @settings(deadline=None)  # a disk decides how long it takes
    @given(
        rows=st.lists(
            st.dictionaries(
                # A list of what has a speaker is one conversation.
                st.text(max_size=5).filter(lambda key: key not in SPEAKERS),
                st.text() | st.integers() | st.lists(st.floats(allow_nan=False)),
            ),
            min_size=1,
        )
    )
    def test_an_array_is_read_the_same_in_blocks_of_any_size(self, tmp_path_factory, rows):
        text = json.dumps({"version": 1234567, "data": rows}, ensure_ascii=False, indent=0)
        path = write(tmp_path_factory.mktemp("json"), "a.json", text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "BLOCK_BYTES", 3)
            assert [row.row for row in read(path)] == rows

    def test_csv_cells_are_text_and_empty_cells_null(self, tmp_path):
        content = 'prompt,completion,tools\n"two\nlines","say ""hi""",\n\nq,a,[]\n'
        found = read(write(tmp_path, "a.csv", content))
        assert [(row.line, row.row) for row in found] == [
            (2, {"prompt": "two\nlines", "completion": 'say "hi"', "tools": None}),
            (5, {"prompt": "q", "completion": "a", "tools": "[]"}),
        ]

    def test_csv_with_semicolons_is_recognised(self, tmp_path):
        (row,) = read(write(tmp_path, "a.csv", "prompt;completion\nx, y;z\n"))
        assert row.row == {"prompt": "x, y", "completion": "z"}

    def test_parquet_drops_the_nulls_that_arrow_fills_in(self, tmp_path):
        rows = [{"m": [{"a": "x"}, {"b": [1]}]}, {"m": None, "k": "y"}]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
        found = read(tmp_path / "a.parquet")
        assert [(row.line, row.row) for row in found] == [
            (1, {"m": [{"a": "x"}, {"b": [1]}]}),
            (2, {"m": None}),
        ]

    def test_a_folder_is_its_files_in_sorted_order(self, tmp_path):
        write(tmp_path, "b.jsonl", lines(ROWS[2:]))
        write(tmp_path, "a.json", json.dumps(ROWS[:2]))
        write(tmp_path, "notes.txt", "not data")
        write(tmp_path, ".hidden.jsonl", "broken")
        found = read(tmp_path)
        assert [row.row for row in found] == ROWS
        assert [row.file for row in found] == ["a.json"] * 2 + ["b.jsonl"] * 3

    def test_data_files_choose_among_the_files_of_a_folder(self, tmp_path):
        (tmp_path / "deep").mkdir()
        write(tmp_path / "deep", "b.jsonl", lines(ROWS[2:]))
        write(tmp_path, "a.jsonl", lines(ROWS[:2]))
        dataset = DatasetConfig(path=str(tmp_path), data_files=["deep/b.jsonl"])
        found = list(iterate_rows(dataset, tmp_path))
        assert [row.row for row in found] == ROWS[2:]
        assert found[0].file == "deep/b.jsonl"

    def test_a_relative_path_starts_at_the_configs_folder(self, tmp_path):
        write(tmp_path, "a.jsonl", lines(ROWS))
        assert len(read(Path("a.jsonl"), tmp_path)) == 5

    def test_how_far_the_reading_is_ends_at_the_size_of_all_files(self, tmp_path):
        for name in ("a.jsonl", "b.jsonl"):
            write(tmp_path, name, lines(ROWS))
        done = [row.read_bytes for row in read(tmp_path)]
        assert done == sorted(done)
        assert done[-1] == 2 * len(lines(ROWS))


class TestBadRows:
    """Each costs itself and nothing else."""

    @pytest.mark.parametrize(
        ("line", "what", "why"),
        [
            (b'{"a": 1', "not JSON", "Column 8: Expecting ',' delimiter"),
            (b'{"a": 1} x', "not JSON", "Column 10: Extra data"),
            (b"[1]", "not a JSON object", "It is a list"),
            (b'"text"', "not a JSON object", "It is a string"),
            (b"7", "not a JSON object", "It is a number"),
            (b"null", "not a JSON object", "It is null"),
            (b"true", "not a JSON object", "It is true or false"),
            (b'{"a": "\xff"}', "not UTF-8", "Byte 8 of the line is invalid start byte"),
            (b'{"a": "\xed\xa0\x80"}', "not UTF-8", "Byte 8"),
            (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read", "limit"),
            (b'{"a": ' + b"[" * 100_000, "cannot be read", "recursion"),
        ],
    )
    def test_of_json_lines(self, tmp_path, line, what, why):
        found = read(write(tmp_path, "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n'))
        assert [row.row for row in found] == [{"a": 1}, None, {"a": 3}]
        problem = found[1].problem
        assert found[1].line == 2
        assert what in problem.what
        assert why in problem.why
        assert problem.fix
        assert problem.message is None

    def test_a_line_beyond_the_limit_is_passed_over_in_small_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(json_rows, "ROW_LIMIT_BYTES", 1000)
        monkeypatch.setattr(json_rows, "BLOCK_BYTES", 64)
        content = '{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n{"a": 3}\n'
        found = read(write(tmp_path, "a.jsonl", content))
        assert [row.row for row in found] == [{"a": 1}, None, {"a": 3}]
        assert "too long" in found[1].problem.what

    def test_of_a_json_array(self, tmp_path):
        content = b'[{"a": 1},\n7,\n{"a": "\xff"},\n{"a": "\\udcff"}]'
        found = read(write(tmp_path, "a.json", content))
        assert [row.line for row in found] == [1, 2, 3, 4]
        assert "not a JSON object" in found[1].problem.what
        assert "not UTF-8" in found[2].problem.what
        assert found[3].row == {"a": "\udcff"}

    def test_of_csv(self, tmp_path):
        content = b"prompt,completion\nq,a\nq,a,more\nq\nq\xff,a\nq,a\n"
        found = read(write(tmp_path, "a.csv", content))
        assert [row.row is None for row in found] == [False, True, True, True, False]
        assert [row.line for row in found] == [2, 3, 4, 5, 6]
        assert "3 cells and the header has 2" in found[1].problem.why
        assert "not UTF-8" in found[3].problem.what

    def test_of_csv_with_a_quote_that_never_closes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(formats, "ROW_LIMIT_BYTES", 100)
        content = 'prompt,completion\n"q,a\n' + "q,a\n" * 40
        found = read(write(tmp_path, "a.csv", content))
        assert "not CSV" in found[0].problem.what
        assert found[0].line == 2
        assert found[-1].row == {"prompt": "q", "completion": "a"}

    def test_of_parquet(self, tmp_path):
        bad = pa.Array.from_buffers(
            pa.string(),
            2,
            [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"x\xff")],
        )
        parquet.write_table(pa.table({"a": bad}), tmp_path / "a.parquet")
        found = read(tmp_path / "a.parquet")
        assert found[0].row == {"a": "x"}
        assert "not UTF-8" in found[1].problem.what


class TestUnreadableFiles:
    """Damage that hides the rest of a file is one sentence, with what to do."""

    def test_a_missing_file_names_the_nearest(self, tmp_path):
        write(tmp_path, "train.jsonl", lines(ROWS))
        message = refusal(tmp_path / "trian.jsonl")
        assert "There is no" in message
        assert "Did you mean train.jsonl?" in message

    def test_a_missing_file_beside_nothing_similar_names_data_files(self, tmp_path):
        write(tmp_path, "train.jsonl", lines(ROWS))
        assert "Did you mean train.jsonl?" in refusal(tmp_path / "zzz.csv")

    def test_a_name_that_no_file_system_can_hold_is_missing(self, tmp_path):
        for name in ("a" * 5000, f"{'a' * 500}/b.jsonl", "~nobody-of-this-name/a.jsonl"):
            assert "There is no" in refusal(Path(name), tmp_path)

    def test_an_empty_path_is_not_the_folder_of_the_config(self, tmp_path):
        write(tmp_path, "a.jsonl", lines(ROWS))
        with pytest.raises(UserError, match="path of a dataset is empty"):
            list(iterate_rows(DatasetConfig(path=""), tmp_path))

    def test_a_pipe_is_refused_before_anything_waits_for_it(self, tmp_path):
        os.mkfifo(tmp_path / "a.jsonl")
        assert "neither a file nor a folder" in refusal(tmp_path / "a.jsonl")

    def test_a_missing_folder_is_named(self, tmp_path):
        assert "does not exist" in refusal(tmp_path / "no" / "a.jsonl")

    def test_a_local_looking_name_is_not_taken_for_a_hub_id(self, tmp_path):
        (tmp_path / "data").mkdir()
        assert "There is no data/chats" in refusal(Path("data/chats"), tmp_path)
        assert "There is no other/train.jsonl" in refusal(Path("other/train.jsonl"), tmp_path)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
    @pytest.mark.parametrize(
        ("content", "why"),
        [("", "holds no rows"), ("\n \n", "holds no rows"), ("\ufeff", "holds no rows")],
    )
    def test_a_file_without_rows(self, tmp_path, name, content, why):
        assert why in refusal(write(tmp_path, name, content))

    def test_a_folder_without_data_names_a_subfolder_that_has_some(self, tmp_path):
        assert "Name another folder" in refusal(tmp_path)
        (tmp_path / "deep").mkdir()
        write(tmp_path / "deep", "a.jsonl", lines(ROWS))
        assert f"Name {tmp_path / 'deep'}" in refusal(tmp_path)

    def test_data_files_that_are_missing_are_named(self, tmp_path):
        write(tmp_path, "a.jsonl", lines(ROWS))
        dataset = DatasetConfig(path=str(tmp_path), data_files="b.jsonl")
        with pytest.raises(UserError, match=r"There is no b\.jsonl"):
            list(iterate_rows(dataset, tmp_path))

    def test_a_cut_gzip_is_damage_after_its_rows(self, tmp_path):
        rows = [{"n": n, "x": "%032x" % (n * 7919**5)} for n in range(9999)]
        whole = gzip.compress(lines(rows).encode())
        path = write(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])
        stream = iterate_rows(DatasetConfig(path=str(path)), tmp_path)
        assert next(stream).row == rows[0]
        with pytest.raises(UserError, match="damaged"):
            list(stream)

    @pytest.mark.parametrize(
        ("name", "content", "why"),
        [
            ("a.json", '[{"a": 1},\n{"a": }]', "Line 2: Expecting value"),
            (
                "a.json",
                '[{"a": 1}\n{"a": 2}]',
                "Line 2: a comma or the end of the array was expected",
            ),
            ("a.json", '[{"a": 1},', "Line 1: Expecting value"),
            ("a.json", '[{"a": 1},\n{"a": 2}]\n7', "Line 3: more text follows where the rows end"),
            ("a.json", '{"data":\n[{"a": 1}]}\n7', "Line 3: more text follows where the rows end"),
            ("a.csv", "a,b,a\n1,2,3\n", "two columns of the name a"),
            ("a.parquet", b"PAR1 nonsense PAR1", "not readable as Parquet"),
            ("b.jsonl.gz", b"\x1f\x8b not gzip", "damaged"),
            ("a.docx", "x", "ends in .docx"),
            ("a.docx", "x", formats.KNOWN_ENDINGS),
            ("rows", "x", "ends in nothing"),
        ],
    )
    def test_what_is_no_data_says_where_and_why(self, tmp_path, name, content, why):
        assert why in refusal(write(tmp_path, name, content))

    def test_a_file_that_may_not_be_read(self, tmp_path, without_privileges):
        path = write(tmp_path, "a.jsonl", lines(ROWS))
        path.chmod(0)
        assert "cannot be opened" in refusal(path)


def test_what_ships_is_listed_with_its_rows():
    (sample,) = list_samples()
    assert (sample.name, sample.title, sample.rows) == ("harbour-pilot", "Harbour pilot", 104)
    assert sample.description
    assert sample.path.name == "train.jsonl"


def test_a_sample_is_read_by_name_from_any_folder(tmp_path):
    rows = list(iterate_rows(DatasetConfig(path="sample:harbour-pilot"), tmp_path))
    assert len(rows) == 104
    assert rows[0].file == "train.jsonl"


def test_a_config_keeps_the_name_and_prepares_the_same_arrays(tmp_path, tokenizer):
    def prepared(path: str):
        config = config_of(DatasetConfig(path=path))
        assert config.datasets[0].path == path
        return prepare(config, tmp_path, tokenizer, tmp_path / "store")

    named = prepared("sample:harbour-pilot")
    (sample,) = list_samples()
    assert prepared(str(sample.path)).folder == named.folder


def test_a_held_out_set_of_a_sample_has_a_name_too(tmp_path):
    rows = list(iterate_rows(DatasetConfig(path="sample:harbour-pilot/heldout_wording"), tmp_path))
    assert len(rows) == 52
    with pytest.raises(UserError, match="it has base, heldout_pairing, heldout_wording"):
        locate(DatasetConfig(path="sample:harbour-pilot/../../gpus"), tmp_path)


def test_an_unknown_sample_names_the_nearest():
    with pytest.raises(UserError, match="Name sample:harbour-pilot"):
        locate(DatasetConfig(path="sample:harbor"), list_samples()[0].path.parent)
    with pytest.raises(UserError, match="There is no sample named"):
        locate(DatasetConfig(path="sample:\x1b[31m"), list_samples()[0].path.parent)


def test_a_file_of_that_name_wins(tmp_path):
    (tmp_path / "sample:mine.jsonl").write_text('{"a": 1}\n')
    (row,) = iterate_rows(DatasetConfig(path="sample:mine.jsonl"), tmp_path)
    assert row.row == {"a": 1}


def test_a_copy_of_the_config_elsewhere_still_names_the_images(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 1)
    config = config_of(DatasetConfig(path="rows.jsonl"))
    moved = with_absolute_paths(config, tmp_path)
    assert moved.image_folder == os.path.realpath(tmp_path)
