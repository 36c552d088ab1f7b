import pytest

from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import prepare
from engine.data.sources import iterate_rows, list_samples, locate
from engine.errors import UserError


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
        config = RunConfig(base_model="any", datasets=(DatasetConfig(path=path),))
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
