"""Images in prepared arrays: kept once, known by content, whole after a kill, never stale."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from engine.chat.images import ImageSpec, pixels
from engine.chat.tokenizer import ChatTokenizer, TokenizerSpec
from engine.config import DatasetConfig, RunConfig
from engine.data import prepare as module
from engine.data.prepare import Interval, prepare
from engine.data.prepared import ARRAYS, Prepared
from engine.data.sources import with_absolute_paths
from engine.files import write_whole
from tests.support.data import about, chat, config_of, content, killed_child
from tests.support.pictures import png
from tests.support.tokenizers import tokenizer_of


@pytest.fixture(scope="module")
def seeing() -> ChatTokenizer:
    return tokenizer_of(TokenizerSpec("v13", think=True, image=(14, 1540, 2)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for seed, name in enumerate(("cat", "dog", "owl")):
        (data / f"{name}.png").write_bytes(png(60, 40 + 30 * seed, seed))
    shutil.copy(data / "cat.png", data / "same.png")
    rows = [
        about("cat.png", "dog.png"),
        chat("no image"),
        about("same.png"),
        about("gone.png"),
        about("owl.png", "cat.png"),
    ]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return data


def made(folder: Path, tokenizer: ChatTokenizer, **keys: object) -> Prepared:
    config = config_of(DatasetConfig(path="rows.jsonl"), **keys)
    return prepare(config, folder, tokenizer, folder.parent / "store")


def test_each_row_has_its_images_and_each_image_is_kept_once(folder, seeing):
    prepared = made(folder, seeing)
    assert [len(prepared.images(index)) for index in range(4)] == [2, 0, 1, 2]
    assert [image.number for image in prepared.images(0)] == [0, 1]
    assert [image.number for image in prepared.images(2)] == [0]
    assert [image.number for image in prepared.images(3)] == [2, 0]
    cat, dog = prepared.images(0)
    assert bytes(dog.content) == (folder / "dog.png").read_bytes()
    assert (dog.rows, dog.columns) == (3, 3)
    assert prepared.image_spec == ImageSpec(14, 1540, 2, "bicubic")
    assert pixels(cat.content, cat.rows, cat.columns, prepared.image_spec).shape == (3, 56, 84)
    assert prepared.meta.image
    assert prepared.meta.image[:3] == (14, 1540, 2)
    assert prepared.meta.images == 3
    assert prepared.meta.problems[0].line == 4
    assert prepared.rendered(0).images[1].rows == 3


def test_rows_of_text_need_no_images(folder, seeing):
    (folder / "rows.jsonl").write_text(json.dumps(chat("q")), "utf-8")
    prepared = made(folder, seeing)
    assert prepared.image_spec is None
    assert prepared.images(0) == ()


def test_equal_texts_with_other_images_are_no_duplicates(folder, seeing):
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(about(name)) + "\n" for name in ("cat.png", "same.png", "owl2.png")),
        "utf-8",
    )
    (folder / "owl2.png").write_bytes(png(60, 40, 9))
    same, twin, other = made(folder, seeing).hashes.tolist()
    assert same == twin != other


def test_the_arrays_outlive_the_images(folder, seeing, tmp_path):
    first = made(folder, seeing)
    first.link_into(tmp_path / "run")
    for image in folder.glob("*.png"):
        image.unlink()
    assert made(folder, seeing).reused
    shutil.rmtree(first.folder)
    linked = Prepared(tmp_path / "run")
    assert len(linked.images(0)[0].content) == len(png(60, 40))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= set(ARRAYS)


def test_a_changed_image_is_seen_and_one_that_appears(folder, seeing):
    assert not made(folder, seeing).reused
    assert made(folder, seeing).reused
    (folder / "dog.png").write_bytes(png(90, 90))
    changed = made(folder, seeing)
    assert not changed.reused
    assert (changed.images(0)[1].rows, changed.images(0)[1].columns) == (4, 4)
    (folder / "gone.png").write_bytes(png())
    assert made(folder, seeing).meta.bad_rows == 0


def test_size_and_algorithm_are_part_of_what_is_kept(folder, seeing):
    first = made(folder, seeing)
    small = made(folder, seeing, image_size=28, image_resize_algorithm="lanczos")
    assert first.folder != small.folder
    assert small.image_spec == ImageSpec(14, 28, 2, "lanczos")
    assert [(image.rows, image.columns) for image in small.images(0)] == [(1, 1)] * 2
    assert made(folder, seeing, image_size=9000).image_spec.longest == 1540


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_loses_nothing_that_was_durable(folder, seeing, tmp_path, after):
    whole = content(made(folder, seeing).folder)
    config = RunConfig(base_model="any", datasets=(DatasetConfig(path="rows.jsonl"),))
    store = tmp_path / "other"

    def work() -> None:
        commits = 0
        write = write_whole

        def write_and_die(path: Path, value: bytes) -> None:
            nonlocal commits
            write(path, value)
            commits += 1
            if commits == after:
                os.kill(os.getpid(), signal.SIGKILL)

        pytest.MonkeyPatch().setattr(module, "write_whole", write_and_die)
        prepare(config, folder, seeing, store, interval=Interval(rows=1))

    killed_child(work)
    resumed = prepare(config, folder, seeing, store, interval=Interval(rows=1))
    assert content(resumed.folder) == whole


def test_a_copy_of_the_config_elsewhere_still_names_the_images(folder, tmp_path):
    config = RunConfig(base_model="any", datasets=(DatasetConfig(path="data/rows.jsonl"),))
    moved = with_absolute_paths(config, tmp_path)
    assert moved.image_folder == os.path.realpath(tmp_path)
