"""Where images of rows may be, what is refused, and what check and preview say of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.chat.render import LabelRule
from engine.config import DatasetConfig, RunConfig
from engine.data.checkup import check_config
from engine.data.preview import preview_entry, preview_row, row_text
from engine.data.rows import ImageRules, RenderedRow, effective_datasets, iterate_rendered
from engine.data.shape import read_shape
from engine.errors import UserError
from engine.report.data import image_lines
from tests.support.data import about, config_of, write_rows
from tests.support.pictures import png


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset's folder with one image, beside a folder of others."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cat.png").write_bytes(png(60, 40))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.png").write_bytes(png(20, 20))
    (tmp_path / "secret.png").write_bytes(png(20, 20))
    return folder


@pytest.fixture
def read(data: Path) -> Callable[..., list[RenderedRow]]:
    def read_rows(*rows: object, beside: Path | None = None, **keys: Any) -> list[RenderedRow]:
        dataset = DatasetConfig(path=str(write_rows(data / "rows.jsonl", *rows)), **keys)
        config = config_of(dataset, image_folder=str(beside) if beside else None)
        return list(iterate_rendered(config, data, None))

    return read_rows


def images_of(row: RenderedRow) -> list[Any]:
    assert row.problem is None, str(row.problem)
    assert row.conversation is not None
    return list(row.conversation.messages[0].content[:-1])


class TestPlaces:
    def test_the_datasets_folder_comes_first_and_image_folder_after_it(self, data, read):
        photos = data.parent / "photos"
        (photos / "cat.png").write_bytes(b"not this one")
        rows = read(about("cat.png", "dog.png"), beside=photos)
        assert [image.size for image in images_of(rows[0])] == [(60, 40), (20, 20)]

    @pytest.mark.parametrize("form", ["{}", "file://{}"])
    def test_an_absolute_path_inside_them_is_read(self, data, read, form):
        (row,) = read(about(form.format(data / "cat.png")), beside=data)
        assert images_of(row)[0].size == (60, 40)

    def test_a_file_in_a_subfolder_finds_images_beside_it(self, data):
        (data / "part").mkdir()
        (data / "part" / "own.png").write_bytes(png(30, 30))
        write_rows(data / "part" / "rows.jsonl", about("own.png"))
        dataset = DatasetConfig(path=str(data), data_files="part/rows.jsonl")
        (row,) = iterate_rendered(config_of(dataset), data, None)
        assert images_of(row)[0].size == (30, 30)

    @pytest.mark.parametrize("how", ["dots", "absolute", "link", "file URL"])
    def test_nothing_outside_is_read(self, data, read, how):
        secret = data.parent / "secret.png"
        (data / "link.png").symlink_to(secret)
        names = {"dots": "../secret.png", "absolute": str(secret), "link": "link.png"}
        (row,) = read(about(names.get(how, f"file://{secret}")), beside=data)
        assert "is outside the dataset" in row.problem.what
        assert "image_folder" in row.problem.fix
        assert row.problem.message == 0
        (row,) = read(about(names.get(how, f"file://{secret}")), beside=data.parent)
        assert images_of(row)[0].size == (20, 20)

    def test_image_folder_of_a_config(self, data):
        config = RunConfig(base_model="any", image_folder="photos", image_size=[300, 200])
        rules = ImageRules.from_config(config, data.parent)
        assert (rules.folder, rules.longest) == (data.parent / "photos", 300)
        with pytest.raises(UserError, match="There is no folder none"):
            ImageRules.from_config(RunConfig(base_model="any", image_folder="none"), data)


class TestRefusals:
    def test_each_bad_image_costs_its_row_and_names_the_repair(self, data, read):
        (data / "cut.png").write_bytes(png(300, 300)[:900])
        (data / "page.png").write_bytes(b"<html>")
        (data / "large.png").write_bytes(bytes(20_000_001))
        (data / "folder.png").mkdir()
        os.mkfifo(data / "pipe.png")
        expected = {
            "none.png": "There is no image",
            "cut.png": "damaged",
            "page.png": "cannot be read",
            "large.png": "too many bytes",
            "folder.png": "no file",
            "pipe.png": "no file",
            "s3://bucket/a.png": "kind that is not read",
            "a\0b.png": "There is no image",
            "x" * 4000: "There is no image",
        }
        rows = read(*(about("cat.png", name) for name in expected), about("cat.png"))
        for row, sentence in zip(rows, expected.values(), strict=False):
            assert sentence in row.problem.what
            assert row.problem.message == 0
        assert images_of(rows[-1])

    def test_the_web_is_not_asked_while_looking(self, read):
        (row,) = read(about("http://127.0.0.1:9/cat.png"))
        assert "was not fetched" in row.problem.what
        assert "windtunnel prepare" in row.problem.fix


class TestSources:
    def test_a_parquet_column_of_images(self, data, seeing):
        images = [{"bytes": png(60, 40), "path": "a.png"}, {"bytes": None, "path": "cat.png"}]
        texts = {"question": ["What?", "And?"], "answer": ["A lung.", "A cat."]}
        parquet.write_table(pa.table({"image_id": images, **texts}), data / "rows.parquet")
        dataset = DatasetConfig(path=str(data / "rows.parquet"))
        for row in iterate_rendered(config_of(dataset), data, seeing):
            assert [(image.rows, image.columns) for image in row.rendered.images] == [(2, 3)]
        shape = read_shape(dataset, data, 2)
        assert "bytes>" in shape.rows[0].raw
        assert shape.rows[0].messages[0][1].startswith("[image of ")

    @pytest.fixture
    def read_folder(self, data) -> Callable[..., list[RenderedRow]]:
        def read_it(name: str = "") -> list[RenderedRow]:
            config = config_of(DatasetConfig(path=str(data / name)))
            return list(iterate_rendered(config, data.parent, None))

        return read_it

    def test_a_folder_with_metadata(self, data, read_folder):
        (data / "metadata.csv").write_text("file_name,text\ncat.png,A cat.\n", "utf-8")
        (row,) = read_folder()
        assert row.problem is None
        assert row.conversation.messages[0].content[0].size == (60, 40)

    def test_a_folder_of_images_with_captions(self, data, read_folder):
        (data / "cat.txt").write_text("A cat.\n", "utf-8")
        (data / "alone.jpg").write_bytes(png())
        alone, cat = read_folder()
        assert "no caption" in alone.problem.what
        assert (cat.file, cat.line) == ("cat.txt", 1)
        assert cat.conversation.messages[1].content == "A cat."

    def test_two_images_with_one_caption_are_two_rows(self, data, read_folder):
        (data / "cat.txt").write_text("A cat.\n", "utf-8")
        (data / "cat.jpg").write_bytes(png(20, 20))
        sizes = [row.conversation.messages[0].content[0].size for row in read_folder()]
        assert sizes == [(20, 20), (60, 40)]

    def test_a_text_file_alone_is_still_refused(self, data, read_folder):
        (data / "cat.txt").write_text("A cat.\n", "utf-8")
        with pytest.raises(UserError, match="not a data file"):
            read_folder("cat.txt")


class TestReports:
    def test_a_checkup_counts_images_and_names_bad_ones(self, data, seeing):
        rows = [about("cat.png", "cat.png"), about("none.png"), about()]
        path = write_rows(data / "rows.jsonl", *rows)
        found = check_config(config_of(DatasetConfig(path=str(path))), data, seeing)
        images = found.images
        assert (images.count, images.rows, images.different, images.named) == (2, 1, 1, 3)
        assert images.largest == (60, 40)
        assert [problem.line for problem in found.problems] == [2]
        assert found.tokens.by_kind["image"] == 16
        (line,) = image_lines(found)
        assert line.text.startswith("2 in 1 row, 16 tokens; 1 different, ")
        assert line.text.endswith(", up to 60x40")

    def test_a_preview_shows_an_image_as_one_mark(self, data, seeing):
        path = write_rows(data / "rows.jsonl", about("cat.png", "cat.png"))
        (row,) = iterate_rendered(config_of(DatasetConfig(path=str(path))), data, seeing)
        shown = preview_row(row, seeing)
        entry = preview_entry(shown, LabelRule())
        assert entry["images"] == [{"rows": 2, "columns": 3, "width": 60, "height": 40}] * 2
        assert entry["kinds"].count("image") == 16
        kinds = zip(shown.pieces, entry["kinds"], strict=True)
        pieces = [piece for piece, kind in kinds if kind == "image"]
        assert pieces == [*[""] * 7, "[image 60x40: 3 x 2 tokens]"] * 2
        text = row_text(shown, LabelRule(), underline=False)
        mark = "⟦image 60x40: 3 x 2 tokens⟧"
        assert f"- image             0/16  {mark}{mark}\n" in text


def test_a_datasets_own_effort_wins_over_the_runs_and_what_is_asked_over_both():
    own, run = ({"reasoning_effort": effort} for effort in ("high", "none"))
    dataset = DatasetConfig(path="x", chat_template_kwargs=own)
    config = config_of(dataset, DatasetConfig(path="y"), chat_template_kwargs=run)
    kept = [each.chat_template_kwargs for each in effective_datasets(config)]
    asked = effective_datasets(config, reasoning_effort="none")
    assert kept == [own, run]
    assert [each.chat_template_kwargs for each in asked] == [run, run]
