import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.catalog import TokenizerSpec
from engine.chat.images import ImageSpec, pixels
from engine.chat.render import Kind, LabelRule
from engine.chat.tokenizer import ChatTokenizer, build_tokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data import arrays as module
from engine.data.arrays import Interval
from engine.data.prepare import default_store, prepare
from engine.data.prepared import ARRAYS, META, Prepared
from engine.errors import UserError, WorkError
from engine.files import SUMS, changed_file, write_whole
from tests.bench.prepare_throughput import measure
from tests.support.data import about, chat, config_of, content, killed_child, write_rows
from tests.support.pictures import png

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
CALL = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
VARIED_ROWS = [
    chat("What is 2 + 2?", "Four. ☃"),
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "नमस्ते"},
            {"role": "assistant", "reasoning_content": "They greet.", "content": "नमस्ते!"},
            *chat("Bye", "Bye.")["messages"],
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Add 1 and 2."},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi"} | CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": json.dumps([TOOL]),
    },
]
INTERVAL = Interval(rows=500)


@pytest.fixture
def made(tmp_path, tokenizer) -> Callable[..., Prepared]:
    """Prepares a config, or the config of a data file, in a store beside it."""

    def prepare_it(source, progress=None, *, store="store", using=tokenizer, **keys) -> Prepared:
        if not isinstance(source, RunConfig):
            source = config_of(DatasetConfig(path=str(source)), **keys)
        return prepare(source, tmp_path, using, tmp_path / store, progress, interval=INTERVAL)

    return prepare_it


def short_rows(count: int) -> list[dict[str, Any]]:
    pairs = [(n, n * 7 % 10) for n in range(count)]
    return [chat(f"What is {n} plus {m}?", f"It is {n + m}.") for n, m in pairs]


class TestFormats:
    def test_all_formats_and_a_folder_give_the_same_arrays(self, tmp_path, made):
        data = tmp_path / "data"
        (data / "folder").mkdir(parents=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in VARIED_ROWS]
        (data / "a.jsonl").write_text("".join(lines), encoding="utf-8")
        (data / "a.json").write_text(json.dumps(VARIED_ROWS), encoding="utf-8")
        (data / "b.json").write_text(json.dumps({"data": VARIED_ROWS}, indent=2), encoding="utf-8")
        with (data / "a.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["messages", "tools"])
            writer.writeheader()
            for row in VARIED_ROWS:
                writer.writerow(row | {"messages": json.dumps(row["messages"])})
        # from_pylist takes its columns from the first row.
        table = pa.Table.from_pylist([{"tools": None} | row for row in VARIED_ROWS])
        parquet.write_table(table, data / "a.parquet")
        for number, line in enumerate(lines):
            (data / "folder" / f"part-{number}.jsonl").write_text(line, encoding="utf-8")

        arrays = {}
        for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet", "folder"):
            prepared = made(data / name)
            assert not prepared.reused
            assert prepared.meta.bad_rows == 0, prepared.meta.problems
            arrays[name] = content(prepared.folder, "ids", "kinds", "sources", "offsets", "hashes")
        assert all(found == arrays["a.jsonl"] for found in arrays.values())

    def test_no_other_user_looks_into_the_arrays(self, made, write_jsonl):
        before = os.umask(0o022)
        try:
            folder = made(write_jsonl([chat("q", "a")])).folder
        finally:
            os.umask(before)
        assert [each.stat().st_mode & 0o777 for each in (folder, folder.parent)] == [0o700, 0o700]

    def test_the_arrays_hold_what_the_renderer_made(self, made, tokenizer, write_jsonl):
        prepared = made(write_jsonl([chat("q", "a"), "not a row", *VARIED_ROWS]))
        assert len(prepared) == 4
        special = tokenizer.specials
        controls = [special.bos, special.inst, special.end_inst, special.eos]
        assert prepared.ids(0)[[0, 1, 3, -1]].tolist() == controls
        expected = [Kind.BOS, Kind.USER, Kind.USER, Kind.USER, Kind.TEXT, Kind.EOS]
        assert prepared.kinds(0).tolist() == expected
        assert prepared.sources(0).tolist() == [-1, 0, 0, 0, 1, 1]
        assert [prepared.line(index) for index in range(4)] == [1, 3, 4, 5]
        assert prepared.file(0) == "rows.jsonl"
        assert prepared.lengths.tolist() == [len(prepared.ids(index)) for index in range(4)]
        assert prepared.meta.bad_rows == 1
        assert prepared.meta.problems[0].line == 2

    def test_several_datasets_follow_one_another(self, made, tmp_path, tokenizer, write_jsonl):
        paths = [write_jsonl(short_rows(count), f"{count}.jsonl") for count in (2, 3)]
        datasets = tuple(DatasetConfig(path=path.name) for path in paths)
        config = config_of(*datasets)
        prepared = made(config)
        assert prepared.datasets.tolist() == [0, 0, 1, 1, 1]
        assert [prepared.file(index) for index in (1, 2)] == ["2.jsonl", "3.jsonl"]
        other = prepare(config, tmp_path, tokenizer, tmp_path / "store", datasets=datasets[:1])
        assert len(other) == 2


class TestReuse:
    @pytest.fixture
    def path(self, write_jsonl) -> Path:
        return write_jsonl([*VARIED_ROWS, *short_rows(10)])

    @pytest.fixture
    def first(self, made, path) -> Prepared:
        return made(path)

    def test_an_unchanged_dataset_is_never_tokenized_again(self, made, first, path, tokenizer):
        def refuse(text):
            raise AssertionError(f"tokenized {text!r}")

        idle = dataclasses.replace(tokenizer, encode_ordinary=refuse, encode_repeated=refuse)
        second = made(path, using=idle)
        assert second.reused
        assert second.folder == first.folder

    @pytest.mark.parametrize(
        ("switch", "reused"),
        [
            ({"train_on_thinking": False}, True),
            ({"train_on_inputs": True}, True),
            ({"sequence_len": 64}, True),
            ({"seed": 7}, True),
            ({"learning_rate": 1.0}, True),
            ({"history_thinking": "drop"}, False),
        ],
    )
    def test_what_labels_or_length_decide_is_in_no_key(self, made, first, path, switch, reused):
        assert made(path, **switch).reused is reused

    @pytest.mark.parametrize("of_dataset", [False, True])
    def test_reasoning_effort_is(self, made, path, of_dataset):
        tokenizer = build_tokenizer(TokenizerSpec("v15", think=True, settings=True))
        ids = []
        for effort in ("none", "high"):
            kwargs = {"chat_template_kwargs": {"reasoning_effort": effort}}
            dataset = {"path": str(path)} | (kwargs if of_dataset else {})
            shared = {} if of_dataset else kwargs
            config = config_of(DatasetConfig.model_validate(dataset), **shared)
            found = made(config, using=tokenizer)
            assert not found.reused
            ids.append(found.ids(0).tolist())
        assert ids[0] != ids[1]

    def test_a_format_key_and_the_tokenizer_are(self, made, first, path, tokenizer):
        dataset = DatasetConfig(path=str(path), roles={"user": ["asker"]})
        assert not made(config_of(dataset)).reused
        assert not made(path, using=dataclasses.replace(tokenizer, fingerprint="other")).reused

    def test_an_edit_that_keeps_size_and_time_is_seen(self, made, first, path):
        before = path.stat()
        path.write_text(path.read_text().replace("Four", "Five"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        assert not made(path).reused

    def test_a_moved_dataset_is_known(self, made, first, path, tmp_path):
        (tmp_path / "moved").mkdir()
        assert made(path.rename(tmp_path / "moved" / path.name)).reused

    @pytest.mark.parametrize("name", [*ARRAYS, META])
    def test_a_damaged_folder_is_made_again(self, made, first, path, name):
        whole = content(first.folder)
        os.truncate(first.folder / name, len(whole[name]) // 2 or 1)
        with pytest.raises(WorkError, match="does not hold whole prepared arrays"):
            Prepared(first.folder)
        again = made(path)
        assert (again.reused, again.damaged) == (False, name)
        assert content(again.folder) == whole

    @pytest.mark.parametrize("name", ["ids", "kinds", "offsets", META, SUMS])
    def test_one_flipped_bit_is_told_and_made_good(self, made, first, path, name):
        whole = content(first.folder)
        changed = bytearray(whole[name])
        changed[len(changed) // 2] ^= 1
        (first.folder / name).write_bytes(changed)
        again = made(path)
        assert not again.reused
        assert "damaged" in again.repair()
        assert content(again.folder) == whole
        assert made(path).repair() == ""

    def test_arrays_without_digests_are_made_again(self, made, first, path):
        (first.folder / SUMS).unlink()
        again = made(path)
        assert (again.reused, again.repair()) == (False, "")
        assert changed_file(again.folder) is None


class Cancelled(Exception):
    pass


def die_at_1700(progress) -> None:
    if progress.rows >= 1700:
        os.kill(os.getpid(), signal.SIGKILL)


def cancel_at_1700(progress) -> None:
    if progress.rows >= 1700:
        raise Cancelled


class TestInterruption:
    @pytest.fixture
    def config(self, write_jsonl) -> RunConfig:
        rows: list[object] = list(short_rows(3000))
        rows[100], rows[2500] = "not a row", {"messages": []}
        return config_of(DatasetConfig(path=str(write_jsonl(rows))))

    @pytest.fixture
    def undisturbed(self, made, config) -> dict[str, bytes]:
        return content(made(config, store="whole").folder)

    def resume(self, made, config, store: Path) -> tuple[dict[str, bytes], int]:
        """The arrays after another call, and the rows that it found done."""
        seen: list[int] = []

        def note(progress):
            if progress.phase == "tokenizing":
                seen.append(progress.rows)

        found = made(config, note, store=store)
        assert [path.suffix for path in store.iterdir() if path != found.folder] == [".lock"]
        return content(found.folder), seen[0] - 64 if seen else 3000

    def test_killed_anywhere_the_bytes_agree(
        self, made, config, undisturbed, tmp_path, monkeypatch
    ):
        sync, calls = os.fsync, 0

        def count(descriptor):
            nonlocal calls
            calls += 1
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", count)
        made(config, store="count")
        done = []
        for last in range(1, calls + 1, 5):
            store, left = tmp_path / f"killed-{last}", last

            def sync_and_die(descriptor):
                nonlocal left
                left -= 1
                sync(descriptor)
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(os, "fsync", sync_and_die)
            killed_child(partial(made, config, store=store))
            monkeypatch.setattr(os, "fsync", sync)
            arrays, rows_done = self.resume(made, config, store)
            assert arrays == undisturbed, f"killed at fsync {last} of {calls}"
            done.append(rows_done)
        assert done == sorted(done)
        assert done[0] == 0
        assert done[len(done) // 2] >= 1000

    @pytest.mark.parametrize("spoilt", [False, True])
    def test_killed_between_durable_points_it_goes_on_from_the_last_that_is_whole(
        self, made, config, undisturbed, tmp_path, spoilt
    ):
        store = tmp_path / "killed"
        killed_child(partial(made, config, die_at_1700, store=store))
        if spoilt:
            (left,) = store.glob("*.partial")
            os.truncate(left / "ids", 10)
        arrays, rows_done = self.resume(made, config, store)
        assert arrays == undisturbed
        assert rows_done == 0 if spoilt else 1500 - 64 <= rows_done <= 1700

    def test_cancelling_keeps_the_work(self, made, config, undisturbed, tmp_path):
        store = tmp_path / "cancelled"
        with pytest.raises(Cancelled):
            made(config, cancel_at_1700, store=store)
        arrays, rows_done = self.resume(made, config, store)
        assert arrays == undisturbed
        assert rows_done >= 1500 - 64

    def test_two_processes_at_once_make_it_once(self, made, config, undisturbed, tmp_path):
        store = tmp_path / "shared"
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                status = 99
                try:
                    status = int(made(config, store=store).reused)
                finally:
                    os._exit(status)
            children.append(child)
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert ends == [0, 1, 1]
        (folder,) = (path for path in store.iterdir() if path.is_dir())
        assert content(folder) == undisturbed

    def test_a_file_that_changes_while_it_is_read_is_refused(self, made, config, tmp_path):
        path = Path(config.datasets[0].path)

        def touch(progress):
            if progress.phase == "tokenizing":
                os.utime(path, ns=(1, progress.rows))

        with pytest.raises(WorkError, match="changed while it was being read"):
            made(config, touch)
        assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]


class TestRefusals:
    def test_no_dataset(self, made):
        with pytest.raises(UserError, match="names no dataset"):
            made(RunConfig(base_model="any"))

    def test_no_usable_row_shows_the_first_reason(self, made, tmp_path, write_jsonl):
        with pytest.raises(UserError) as caught:
            made(write_jsonl([7, 8]))
        said = "None of the 2 rows can be used. Line 1 of rows.jsonl:"
        assert said in str(caught.value)
        assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]

    def test_nothing_learned(self, made, write_jsonl):
        row = chat("q")
        row["messages"][1]["train"] = False
        dataset = DatasetConfig(path=str(write_jsonl([row])), message_field_training="train")
        with pytest.raises(UserError, match="Nothing would be learned"):
            made(config_of(dataset))

    def test_a_store_that_cannot_be_written(self, made, tmp_path, write_jsonl):
        (tmp_path / "store").write_text("a file")
        with pytest.raises(UserError, match="cannot be made into arrays"):
            made(write_jsonl([chat("q")]))


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for seed, name in enumerate(("cat", "dog", "owl")):
        (data / f"{name}.png").write_bytes(png(60, 40 + 30 * seed, seed))
    shutil.copy(data / "cat.png", data / "same.png")
    shown = [("cat.png", "dog.png"), ("same.png",), ("gone.png",), ("owl.png", "cat.png")]
    first, *others = (about(*names) for names in shown)
    write_rows(data / "rows.jsonl", first, chat("no image"), *others)
    return data


def stored(pictured: Path, tokenizer: ChatTokenizer, **keys: object) -> Prepared:
    config = config_of(DatasetConfig(path="rows.jsonl"), **keys)
    return prepare(config, pictured, tokenizer, pictured.parent / "store")


def test_each_row_has_its_images_and_each_image_is_kept_once(pictured, seeing):
    prepared = stored(pictured, seeing)
    assert [len(prepared.images(index)) for index in range(4)] == [2, 0, 1, 2]
    assert [image.number for image in prepared.images(0)] == [0, 1]
    assert [image.number for image in prepared.images(2)] == [0]
    assert [image.number for image in prepared.images(3)] == [2, 0]
    cat, dog = prepared.images(0)
    assert bytes(dog.content) == (pictured / "dog.png").read_bytes()
    assert (dog.rows, dog.columns) == (3, 3)
    assert prepared.image_spec == ImageSpec(14, 1540, 2, "bicubic")
    assert pixels(cat.content, cat.rows, cat.columns, prepared.image_spec).shape == (3, 56, 84)
    assert prepared.meta.image
    assert prepared.meta.image[:3] == (14, 1540, 2)
    assert prepared.meta.images == 3
    assert prepared.meta.problems[0].line == 4
    assert prepared.rendered(0).images[1].rows == 3


def test_rows_of_text_need_no_images(pictured, seeing):
    write_rows(pictured / "rows.jsonl", chat("q"))
    prepared = stored(pictured, seeing)
    assert prepared.image_spec is None
    assert prepared.images(0) == ()


def test_equal_texts_with_other_images_are_no_duplicates(pictured, seeing):
    names = ("cat.png", "same.png", "owl2.png")
    write_rows(pictured / "rows.jsonl", *map(about, names))
    (pictured / "owl2.png").write_bytes(png(60, 40, 9))
    same, twin, other = stored(pictured, seeing).hashes.tolist()
    assert same == twin != other


def test_the_arrays_outlive_the_images(pictured, seeing, tmp_path):
    first = stored(pictured, seeing)
    first.link_into(tmp_path / "run")
    for image in pictured.glob("*.png"):
        image.unlink()
    assert stored(pictured, seeing).reused
    shutil.rmtree(first.folder)
    linked = Prepared(tmp_path / "run")
    assert len(linked.images(0)[0].content) == len(png(60, 40))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= set(ARRAYS)


def test_a_changed_image_is_seen_and_one_that_appears(pictured, seeing):
    assert not stored(pictured, seeing).reused
    assert stored(pictured, seeing).reused
    (pictured / "dog.png").write_bytes(png(90, 90))
    changed = stored(pictured, seeing)
    assert not changed.reused
    assert (changed.images(0)[1].rows, changed.images(0)[1].columns) == (4, 4)
    (pictured / "gone.png").write_bytes(png())
    assert stored(pictured, seeing).meta.bad_rows == 0


def test_size_and_algorithm_are_part_of_what_is_kept(pictured, seeing):
    first = stored(pictured, seeing)
    small = stored(pictured, seeing, image_size=28, image_resize_algorithm="lanczos")
    assert first.folder != small.folder
    assert small.image_spec == ImageSpec(14, 28, 2, "lanczos")
    assert [(image.rows, image.columns) for image in small.images(0)] == [(1, 1)] * 2
    assert stored(pictured, seeing, image_size=9000).image_spec.longest == 1540


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_loses_nothing_that_was_durable(pictured, seeing, tmp_path, after):
    whole = content(stored(pictured, seeing).folder)
    config = config_of(DatasetConfig(path="rows.jsonl"))
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
        prepare(config, pictured, seeing, store, interval=Interval(rows=1))

    killed_child(work)
    resumed = prepare(config, pictured, seeing, store, interval=Interval(rows=1))
    assert content(resumed.folder) == whole


def test_the_store_is_the_configs_or_the_users_cache(tmp_path):
    config = RunConfig(base_model="any", dataset_prepared_path="arrays")
    assert default_store(config, tmp_path) == tmp_path / "arrays"
    assert default_store(RunConfig(base_model="any"), tmp_path).name == "prepared"


BIG_CHILD = """
import os, signal, sys
from pathlib import Path
from engine.catalog import TokenizerSpec
from engine.chat.tokenizer import build_tokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import prepare
data, store, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokenized = []
def report(progress):
    if progress.phase == "tokenizing":
        tokenized.append(progress.rows)
        if kill_at and progress.rows >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
config = RunConfig(base_model="any", datasets=(DatasetConfig(path=str(data)),))
tokenizer = build_tokenizer(TokenizerSpec("v13", think=True))
found = prepare(config, data.parent, tokenizer, store, report)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(found.folder, found.reused, tokenized[0] if tokenized else -1, int(peak) // 1024)
"""


@pytest.mark.slow
def test_200_000_rows_stay_below_400_mb_and_survive_a_kill_half_way(tmp_path, write_jsonl):
    path = write_jsonl(short_rows(200_000))

    def child(store: str, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BIG_CHILD, path, tmp_path / store, str(kill_at)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )

    whole = child("whole").stdout.split()
    assert child("killed", kill_at=100_000).returncode == -signal.SIGKILL
    resumed, again = child("killed").stdout.split(), child("killed").stdout.split()
    print("peak MB:", whole[3], resumed[3], again[3])
    assert whole[1:3] == ["False", "64"]
    assert resumed[1] == "False"
    assert int(resumed[2]) > 80_000
    assert again[1:3] == ["True", "-1"]
    assert content(Path(whole[0])) == content(Path(resumed[0]))
    assert max(int(found[3]) for found in (whole, resumed, again)) < 400


@pytest.mark.parametrize("turns", [1, 3])
def test_ids_and_labels_equal_those_of_encoding_every_turn_twice(turns, tokenizer):
    # measure() asserts it for each of its rows before it times anything.
    assert measure(turns, 3, 1, tokenizer).mean_tokens > 500


def test_labels_come_from_the_kinds_at_load(made, write_jsonl):
    prepared = made(write_jsonl(VARIED_ROWS))
    for rule in (LabelRule(), LabelRule(thinking=False), LabelRule(inputs=True)):
        lengths = prepared.learned_lengths(rule)
        assert lengths.sum() == prepared.learned_tokens(rule)
    counts = prepared.tokens_by_kind()
    assert sum(counts.values()) == prepared.meta.tokens
    assert counts["think"] == prepared.learned_tokens(LabelRule()) - prepared.learned_tokens(
        LabelRule(thinking=False)
    )
