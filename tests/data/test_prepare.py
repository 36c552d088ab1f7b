import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.chat.render import Kind, LabelRule
from engine.chat.tokenizer import TokenizerSpec, build_tokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import Interval, default_store, prepare
from engine.data.prepared import ARRAYS, META, Prepared
from engine.errors import UserError, WorkError
from tests.bench.prepare_throughput import measure
from tests.support.data import chat, config_of, content, killed_child

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
VARIED_ROWS = [
    chat("What is 2 + 2?", "Four. ☃"),
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "नमस्ते"},
            {"role": "assistant", "reasoning_content": "They greet.", "content": "नमस्ते!"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Bye."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Add 1 and 2."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "abcdefghi",
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": json.dumps([TOOL]),
    },
]


def config_for(path: Path, **keys) -> RunConfig:
    return config_of(DatasetConfig(path=str(path)), **keys)


def short_rows(count: int) -> list[dict[str, Any]]:
    return [
        chat(f"What is {n} plus {n * 7 % 10}?", f"It is {n + n * 7 % 10}.") for n in range(count)
    ]


class TestFormats:
    def test_all_formats_and_a_folder_give_the_same_arrays(self, tmp_path, tokenizer):
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
            prepared = prepare(config_for(data / name), tmp_path, tokenizer, tmp_path / "store")
            assert not prepared.reused
            assert prepared.meta.bad_rows == 0, prepared.meta.problems
            arrays[name] = content(prepared.folder, "ids", "kinds", "sources", "offsets", "hashes")
        assert all(found == arrays["a.jsonl"] for found in arrays.values())

    def test_the_arrays_hold_what_the_renderer_made(self, tmp_path, tokenizer, write_jsonl):
        path = write_jsonl([chat("q", "a"), "not a row", *VARIED_ROWS])
        prepared = prepare(config_for(path), tmp_path, tokenizer, tmp_path / "store")
        assert len(prepared) == 4
        specials = tokenizer.specials
        assert prepared.ids(0)[[0, 1, 3, -1]].tolist() == [
            specials.bos,
            specials.inst,
            specials.end_inst,
            specials.eos,
        ]
        assert prepared.kinds(0).tolist() == [
            Kind.BOS,
            Kind.USER,
            Kind.USER,
            Kind.USER,
            Kind.TEXT,
            Kind.EOS,
        ]
        assert prepared.sources(0).tolist() == [-1, 0, 0, 0, 1, 1]
        assert [prepared.line(index) for index in range(4)] == [1, 3, 4, 5]
        assert prepared.file(0) == "rows.jsonl"
        assert prepared.lengths.tolist() == [len(prepared.ids(index)) for index in range(4)]
        assert prepared.meta.bad_rows == 1
        assert prepared.meta.problems[0].line == 2

    def test_several_datasets_follow_one_another(self, tmp_path, tokenizer, write_jsonl):
        paths = [write_jsonl(short_rows(count), f"{count}.jsonl") for count in (2, 3)]
        datasets = tuple(DatasetConfig(path=path.name) for path in paths)
        config = RunConfig(base_model="any", datasets=datasets)
        prepared = prepare(config, tmp_path, tokenizer, tmp_path / "store")
        assert prepared.datasets.tolist() == [0, 0, 1, 1, 1]
        assert [prepared.file(index) for index in (1, 2)] == ["2.jsonl", "3.jsonl"]
        other = prepare(config, tmp_path, tokenizer, tmp_path / "store", datasets=datasets[:1])
        assert len(other) == 2


class TestReuse:
    @pytest.fixture
    def path(self, write_jsonl) -> Path:
        return write_jsonl([*VARIED_ROWS, *short_rows(10)])

    @pytest.fixture
    def first(self, path, tmp_path, tokenizer) -> Prepared:
        return prepare(config_for(path), tmp_path, tokenizer, tmp_path / "store")

    def test_an_unchanged_dataset_is_never_tokenized_again(self, first, path, tmp_path, tokenizer):
        def refuse(text):
            raise AssertionError(f"tokenized {text!r}")

        idle = dataclasses.replace(tokenizer, encode_ordinary=refuse, encode_repeated=refuse)
        second = prepare(config_for(path), tmp_path, idle, tmp_path / "store")
        assert second.reused
        assert second.folder == first.folder

    @pytest.mark.parametrize(
        "switch",
        [
            {"train_on_thinking": False},
            {"train_on_inputs": True},
            {"sequence_len": 64},
            {"seed": 7},
            {"learning_rate": 1.0},
        ],
    )
    def test_what_labels_or_length_decide_is_not_in_the_key(
        self, first, path, tmp_path, tokenizer, switch
    ):
        config = config_for(path, **switch)
        assert prepare(config, tmp_path, tokenizer, tmp_path / "store").reused

    def test_history_thinking_is(self, first, path, tmp_path, tokenizer):
        config = config_for(path, history_thinking="drop")
        assert not prepare(config, tmp_path, tokenizer, tmp_path / "store").reused

    @pytest.mark.parametrize("of_dataset", [False, True])
    def test_reasoning_effort_is(self, path, tmp_path, of_dataset):
        tokenizer = build_tokenizer(TokenizerSpec("v15", think=True, settings=True))
        lengths = []
        for effort in ("none", "high"):
            kwargs = {"reasoning_effort": effort}
            if of_dataset:
                config = config_of(DatasetConfig(path=str(path), chat_template_kwargs=kwargs))
            else:
                config = config_for(path, chat_template_kwargs=kwargs)
            found = prepare(config, tmp_path, tokenizer, tmp_path / "store")
            assert not found.reused
            lengths.append(found.ids(0).tolist())
        assert lengths[0] != lengths[1]

    def test_a_format_key_is(self, first, path, tmp_path, tokenizer):
        dataset = DatasetConfig(path=str(path), message_field_training="train")
        config = RunConfig(base_model="any", datasets=(dataset,))
        assert not prepare(config, tmp_path, tokenizer, tmp_path / "store").reused

    def test_the_tokenizer_is(self, first, path, tmp_path, tokenizer):
        other = dataclasses.replace(tokenizer, fingerprint="other")
        assert not prepare(config_for(path), tmp_path, other, tmp_path / "store").reused

    def test_an_edit_that_keeps_size_and_time_is_seen(self, first, path, tmp_path, tokenizer):
        before = path.stat()
        path.write_text(path.read_text().replace("Four", "Five"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        assert not prepare(config_for(path), tmp_path, tokenizer, tmp_path / "store").reused

    def test_a_moved_dataset_is_known(self, first, path, tmp_path, tokenizer):
        (tmp_path / "moved").mkdir()
        path = path.rename(tmp_path / "moved" / path.name)
        assert prepare(config_for(path), tmp_path, tokenizer, tmp_path / "store").reused

    @pytest.mark.parametrize("name", [*ARRAYS, META])
    def test_a_damaged_folder_is_made_again(self, first, path, tmp_path, tokenizer, name):
        whole = content(first.folder)
        os.truncate(first.folder / name, len(whole[name]) // 2 or 1)
        with pytest.raises(WorkError, match="does not hold whole prepared arrays"):
            Prepared(first.folder)
        again = prepare(config_for(path), tmp_path, tokenizer, tmp_path / "store")
        assert not again.reused
        assert content(again.folder) == whole


class TestInterruption:
    INTERVAL = Interval(rows=500)

    @pytest.fixture
    def config(self, write_jsonl) -> RunConfig:
        rows: list[object] = list(short_rows(3000))
        rows[100], rows[2500] = "not a row", {"messages": []}
        return config_for(write_jsonl(rows))

    @pytest.fixture
    def undisturbed(self, config, tmp_path, tokenizer) -> dict[str, bytes]:
        found = prepare(config, tmp_path, tokenizer, tmp_path / "whole", interval=self.INTERVAL)
        return content(found.folder)

    def resume(self, config, tmp_path, tokenizer, store) -> tuple[dict[str, bytes], int]:
        """The arrays after another call, and the rows that it found done."""
        seen: list[int] = []

        def note(progress):
            if progress.phase == "tokenizing":
                seen.append(progress.rows)

        found = prepare(config, tmp_path, tokenizer, store, note, interval=self.INTERVAL)
        assert [path.suffix for path in store.iterdir() if path != found.folder] == [".lock"]
        return content(found.folder), seen[0] - 64 if seen else 3000

    def test_killed_anywhere_it_ends_in_the_same_bytes(
        self, config, undisturbed, tmp_path, tokenizer, monkeypatch
    ):
        sync, calls = os.fsync, 0

        def count(descriptor):
            nonlocal calls
            calls += 1
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", count)
        prepare(config, tmp_path, tokenizer, tmp_path / "count", interval=self.INTERVAL)
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
            killed_child(
                partial(prepare, config, tmp_path, tokenizer, store, interval=self.INTERVAL)
            )
            monkeypatch.setattr(os, "fsync", sync)
            arrays, rows_done = self.resume(config, tmp_path, tokenizer, store)
            assert arrays == undisturbed, f"killed at fsync {last} of {calls}"
            done.append(rows_done)
        assert done == sorted(done)
        assert done[0] == 0
        assert done[len(done) // 2] >= 1000

    def test_killed_between_durable_points_it_goes_on_from_the_last(
        self, config, undisturbed, tmp_path, tokenizer
    ):
        def die(progress):
            if progress.rows >= 1700:
                os.kill(os.getpid(), signal.SIGKILL)

        store = tmp_path / "killed"
        killed_child(
            lambda: prepare(config, tmp_path, tokenizer, store, die, interval=self.INTERVAL)
        )
        arrays, rows_done = self.resume(config, tmp_path, tokenizer, store)
        assert arrays == undisturbed
        assert 1500 - 64 <= rows_done <= 1700

    def test_cancelling_keeps_the_work(self, config, undisturbed, tmp_path, tokenizer):
        class Cancelled(Exception):
            pass

        def cancel(progress):
            if progress.rows >= 1700:
                raise Cancelled

        store = tmp_path / "cancelled"
        with pytest.raises(Cancelled):
            prepare(config, tmp_path, tokenizer, store, cancel, interval=self.INTERVAL)
        arrays, rows_done = self.resume(config, tmp_path, tokenizer, store)
        assert arrays == undisturbed
        assert rows_done >= 1500 - 64

    def test_a_spoilt_state_starts_over(self, config, undisturbed, tmp_path, tokenizer):
        def die(progress):
            if progress.rows >= 1700:
                os.kill(os.getpid(), signal.SIGKILL)

        store = tmp_path / "killed"
        killed_child(
            lambda: prepare(config, tmp_path, tokenizer, store, die, interval=self.INTERVAL)
        )
        (partial,) = store.glob("*.partial")
        os.truncate(partial / "ids", 10)
        arrays, rows_done = self.resume(config, tmp_path, tokenizer, store)
        assert arrays == undisturbed
        assert rows_done == 0

    def test_two_processes_at_once_make_it_once(self, config, undisturbed, tmp_path, tokenizer):
        store = tmp_path / "shared"
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                status = 99
                try:
                    found = prepare(config, tmp_path, tokenizer, store, interval=self.INTERVAL)
                    status = int(found.reused)
                finally:
                    os._exit(status)
            children.append(child)
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert ends == [0, 1, 1]
        (folder,) = (path for path in store.iterdir() if path.is_dir())
        assert content(folder) == undisturbed

    def test_a_file_that_changes_while_it_is_read_is_refused(self, config, tmp_path, tokenizer):
        path = Path(config.datasets[0].path)

        def touch(progress):
            if progress.phase == "tokenizing":
                os.utime(path, ns=(1, progress.rows))

        with pytest.raises(WorkError, match="changed while it was being read"):
            prepare(config, tmp_path, tokenizer, tmp_path / "store", touch)
        assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]


class TestRefusals:
    def refusal(self, config, tmp_path, tokenizer) -> str:
        with pytest.raises(UserError) as caught:
            prepare(config, tmp_path, tokenizer, tmp_path / "store")
        return str(caught.value)

    def test_no_dataset(self, tmp_path, tokenizer):
        message = self.refusal(RunConfig(base_model="any"), tmp_path, tokenizer)
        assert "names no dataset" in message

    def test_no_usable_row_shows_the_first_reason(self, tmp_path, tokenizer, write_jsonl):
        message = self.refusal(config_for(write_jsonl([7, 8])), tmp_path, tokenizer)
        assert "None of the 2 rows can be used. Line 1 of rows.jsonl:" in message
        assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]

    def test_nothing_learned(self, tmp_path, tokenizer, write_jsonl):
        row = chat("q")
        row["messages"][1]["train"] = False
        dataset = DatasetConfig(path=str(write_jsonl([row])), message_field_training="train")
        config = RunConfig(base_model="any", datasets=(dataset,))
        assert "Nothing would be learned" in self.refusal(config, tmp_path, tokenizer)

    def test_a_store_that_cannot_be_written(self, tmp_path, tokenizer, write_jsonl):
        (tmp_path / "store").write_text("a file")
        assert "cannot be made into arrays" in self.refusal(
            config_for(write_jsonl([chat("q")])), tmp_path, tokenizer
        )


def test_the_store_is_the_configs_or_the_users_cache(tmp_path):
    config = RunConfig(base_model="any", dataset_prepared_path="arrays")
    assert default_store(config, tmp_path) == tmp_path / "arrays"
    assert default_store(RunConfig(base_model="any"), tmp_path).name == "prepared"


BIG_CHILD = """
import os, signal, sys
from pathlib import Path
from engine.chat.tokenizer import TokenizerSpec, build_tokenizer
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


def test_labels_come_from_the_kinds_at_load(tmp_path, tokenizer, write_jsonl):
    prepared = prepare(config_for(write_jsonl(VARIED_ROWS)), tmp_path, tokenizer, tmp_path / "s")
    for rule in (LabelRule(), LabelRule(thinking=False), LabelRule(inputs=True)):
        lengths = prepared.learned_lengths(rule)
        assert lengths.sum() == prepared.learned_tokens(rule)
    counts = prepared.tokens_by_kind()
    assert sum(counts.values()) == prepared.meta.tokens
    assert counts["think"] == prepared.learned_tokens(LabelRule()) - prepared.learned_tokens(
        LabelRule(thinking=False)
    )
