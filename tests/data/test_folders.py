"""Folders as people have them: splits, what the hub and save_to_disk write, and what is no rows."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.chat.conversation import RowFormat, RowProblem
from engine.chat.row import read_row
from engine.config import DatasetConfig
from engine.data.folders import split_of
from engine.data.sources import dataset_notes, held_out_sets, iterate_rows, locate
from engine.errors import UserError
from engine.wizard.data import find_newest
from tests.support.data import config_of, write_rows


def fill(folder: Path, files: str) -> None:
    """Each file holds one row, its own name."""
    for name in files.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pa.table({"file": [name]}), path)
        elif path.suffix == ".arrow":
            with pa.ipc.new_stream(path, pa.schema({"file": pa.string()})) as stream:
                stream.write_table(pa.table({"file": [name]}))
        else:
            path.write_text(json.dumps({"file": name}) + "\n")


def rows_of(folder: Path, **keys: object) -> str:
    dataset = DatasetConfig.model_validate({"path": ".", **keys})
    return " ".join(row.row["file"] for row in iterate_rows(dataset, folder) if row.row)


def refusal(folder: Path, **keys: object) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(folder, **keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train.jsonl", "train"), ("Training_set.json", "train"), ("squad-train.csv", "train")),
        *(("validation.jsonl.gz", "validation"), ("valid_1.json", "validation")),
        *(("dev.tsv", "validation"), ("val", "validation"), ("test2.jsonl", "test")),
        *(("eval.jsonl", "test"), ("train-00000-of-00002.parquet", "train")),
        *(("train_sft-00000-of-00002.parquet", "train_sft"), ("data-00000-of-00001.arrow", None)),
        *(
            ("testimony.jsonl", None),
            ("device.jsonl", None),
            ("training_notes_of_2020.csv", "train"),
        ),
        *(("unit-test-cases.jsonl", None), ("rows.jsonl", None), ("...", None)),
    ],
)
def test_a_name_tells_its_split(name, split):
    assert split_of(Path(name)) == split


@pytest.mark.parametrize(
    ("files", "read", "others"),
    [
        ("train.jsonl test.jsonl", "train.jsonl", ["test"]),
        ("train_1.jsonl train_2.jsonl dev.json", "train_1.jsonl train_2.jsonl", ["validation"]),
        ("a.jsonl b.jsonl test.jsonl", "a.jsonl b.jsonl", ["test"]),
        ("a.jsonl b.jsonl", "a.jsonl b.jsonl", []),
        ("test.jsonl", "test.jsonl", []),
        ("train/a.jsonl train/b.jsonl test/a.jsonl", "train/a.jsonl train/b.jsonl", ["test"]),
        ("data/a.jsonl", "data/a.jsonl", []),
        (
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet"
            " data/test-00000-of-00001.parquet dataset_infos.json",
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet",
            ["test"],
        ),
        (
            "train_sft-00000-of-00001.parquet test_sft-00000-of-00001.parquet",
            "train_sft-00000-of-00001.parquet",
            ["test_sft"],
        ),
        ("rows.jsonl dataset_info.json config.json cache-1a.arrow", "rows.jsonl", []),
        ("run/events.jsonl run/lock run/plan.json train/a.jsonl", "train/a.jsonl", []),
    ],
)
def test_splits_are_never_mixed_and_those_not_learned_are_named(tmp_path, files, read, others):
    fill(tmp_path, files)
    assert rows_of(tmp_path) == read
    notes = dataset_notes(DatasetConfig(path="."), tmp_path)
    assert [note.text.split(",")[0] for note in notes] == [f"the split {name}" for name in others]
    for name in others:  # what the note offers is read, and is another set
        offer = f"test_datasets: [{{path: ., split: {name}}}] evaluates it"
        assert any(note.text.endswith(offer) for note in notes)
        assert not set(rows_of(tmp_path, split=name).split()) & set(read.split())


def test_splits_in_one_object_are_read_as_the_folder_that_the_refusal_asks_for(tmp_path):
    whole = {"train": [{"file": "a"}, {"file": "b"}], "valid": [{"file": "c"}]}
    with pytest.raises(RowProblem) as refused:
        read_row(whole, RowFormat())
    assert "(train.jsonl, valid.jsonl), and give that folder" in refused.value.fix
    for split, rows in whole.items():
        write_rows(tmp_path / f"{split}.jsonl", *rows)
    assert (rows_of(tmp_path), rows_of(tmp_path, split="validation")) == ("a b", "c")


def test_a_file_of_no_split_beside_train_is_said_not_to_be_read(tmp_path):
    fill(tmp_path, "train.jsonl extra.jsonl")
    (note,) = dataset_notes(DatasetConfig(path="."), tmp_path)
    assert (note.file, "not read" in note.text) == ("extra.jsonl", True)
    assert rows_of(tmp_path, data_files="*.jsonl") == "extra.jsonl train.jsonl"


def test_parts_that_are_not_here_are_said(tmp_path):
    fill(tmp_path, "train-00000-of-00003.jsonl train-00002-of-00003.jsonl")
    (note,) = dataset_notes(DatasetConfig(path="."), tmp_path)
    assert "only 2 files of the 3 of train are here" in note.text


@pytest.mark.parametrize(
    ("files", "keys", "why"),
    [
        ("train.jsonl test.jsonl", {"split": "dev"}, "It has the splits test, train."),
        ("a.jsonl", {"split": "test"}, "Its files name no split."),
        ("train.jsonl", {"path": "train.jsonl", "split": "test"}, "It is one file"),
        ("train.jsonl", {"data_files": "train.jsonl", "split": "test"}, "It is one file"),
        (
            "train_a-00000-of-00001.jsonl train_b-00000-of-00001.jsonl",
            {},
            "Choose one in a config: `split: train_a`",
        ),
        ("test.jsonl dev.jsonl", {}, "None of them is train"),
        ("dataset_info.json", {"path": "dataset_info.json"}, "Name the folder"),
        ("run/events.jsonl run/lock", {"path": "run/events.jsonl"}, "about a dataset"),
        ("run/events.jsonl run/lock", {"path": "run"}, "holds no data file"),
        ("deep/er/a.jsonl", {}, "Name another folder"),
        ("rows/a.jsonl", {}, "rows instead"),
        ("a.jsonl", {"data_files": "*.csv"}, "There is no *.csv"),
    ],
)
def test_a_split_or_a_file_that_is_not_there_is_a_sentence(tmp_path, files, keys, why):
    fill(tmp_path, files)
    assert why in refusal(tmp_path, **keys)


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_the_key_split_chooses(tmp_path, split):
    fill(tmp_path, "train.jsonl test.jsonl validation.jsonl")
    assert rows_of(tmp_path, split=split).startswith(split)
    assert rows_of(tmp_path, path=f"{rows_of(tmp_path, split=split)}", split="train")


def save(folder: Path, files: list[str], **more: object) -> None:
    """What `datasets.Dataset.save_to_disk` leaves."""
    fill(folder, " ".join(files))
    (folder / "dataset_info.json").write_text("{}")
    listed = [{"filename": name} for name in files]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, **more}))


class TestSaveToDisk:
    def test_one_split_is_the_files_that_its_state_lists(self, tmp_path):
        save(tmp_path, ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"])
        fill(tmp_path, "left-over.arrow")
        assert rows_of(tmp_path) == "data-00001-of-00002.arrow data-00000-of-00002.arrow"

    def test_several_splits_are_its_folders(self, tmp_path):
        for name in ("train", "test"):
            save(tmp_path / name, [f"{name}-0.arrow"])
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        assert rows_of(tmp_path) == "train-0.arrow"
        assert rows_of(tmp_path, split="test") == "test-0.arrow"
        (note,) = dataset_notes(DatasetConfig(path="."), tmp_path)
        assert note.file == "test/test-0.arrow"

    @pytest.mark.parametrize(
        ("state", "why"),
        [
            ('{"_data_files": [{"filename": "../a.arrow"}]}', "does not list files of rows"),
            ('{"_data_files": [{"filename": "gone.arrow"}]}', "state.json lists it"),
            ('{"_data_files": [], "_indices_data_files": [1]}', "order of rows"),
            ("{", "is damaged"),
            ("[]", "is not a JSON object"),
        ],
    )
    def test_a_state_that_lists_no_files_here(self, tmp_path, state, why):
        save(tmp_path, ["data.arrow"])
        (tmp_path / "state.json").write_text(state)
        assert why in refusal(tmp_path)


def test_the_wizard_offers_no_file_that_is_about_others(tmp_path):
    fill(tmp_path, "rows.jsonl run/events.jsonl run/control.jsonl run/lock events.jsonl")
    assert sorted(find_newest(tmp_path)) == ["events.jsonl", "rows.jsonl"]


def test_images_with_captions_lie_in_splits_too(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(b"")
        (tmp_path / split / "a.txt").write_text("a harbour")
    assert locate(DatasetConfig(path="."), tmp_path).files == (tmp_path / "train" / "a.txt",)


@pytest.mark.parametrize(
    ("files", "keys", "read"),
    [
        ("train.jsonl validation.jsonl test.jsonl", {}, "validation.jsonl"),
        ("train.jsonl eval.jsonl", {}, "eval.jsonl"),
        ("train.jsonl test.jsonl", {"split": "train"}, "train.jsonl"),
        ("train.jsonl test.jsonl", {"data_files": "train.jsonl"}, "train.jsonl"),
        ("train.jsonl test.jsonl", {"path": "train.jsonl"}, "train.jsonl"),
        ("test.jsonl", {}, "test.jsonl"),
        ("a.jsonl b.jsonl", {}, "a.jsonl b.jsonl"),
        ("train.jsonl", {}, "the split train alone"),
        ("train_a.jsonl train_b.jsonl", {}, "the split train alone"),
        ("", {"path": "org/name"}, "`split: validation` or `split: test`"),
    ],
)
def test_a_test_set_without_a_split_is_never_the_rows_for_training(tmp_path, files, keys, read):
    fill(tmp_path, files)
    config = config_of(test_datasets=(DatasetConfig(**{"path": "."} | keys),))
    if ".jsonl" not in read:
        with pytest.raises(UserError, match=read):
            held_out_sets(config, tmp_path)
        return
    (held_out,) = held_out_sets(config, tmp_path)
    assert rows_of(tmp_path, **held_out.model_dump(exclude_defaults=True)) == read


def test_a_subset_is_the_folder_of_its_name(tmp_path):
    fill(tmp_path, "easy/train.jsonl hard/train.jsonl")
    assert rows_of(tmp_path, name="hard") == "hard/train.jsonl"
    for path, name, why in (
        (".", "none", "Its folders are easy, hard."),
        (".", "..", "Its folders are easy, hard."),
        ("easy/train.jsonl", "hard", "It holds no folders"),
    ):
        assert why in refusal(tmp_path, path=path, name=name)
