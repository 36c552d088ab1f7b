import gzip
import json
import os
import signal
import sys
from contextlib import closing, suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.chat.conversation import RowProblem
from engine.child import Child
from engine.config import DatasetConfig
from engine.data import shares
from engine.data.arrays import Interval
from engine.data.checkup import CountRows, check_config
from engine.data.prepare import prepare
from engine.data.rows import Share, iterate_rendered
from engine.data.shares import count_processes, iterate_parts
from engine.errors import UserError, WorkError
from tests.fakes.processes import run_python, wait_until
from tests.support.data import about, chat, config_of, content, killed_child, write_rows
from tests.support.pictures import png

BLOCKS = 7
FIRST_DIES = """
import json, os, signal, sys, time
if json.loads(sys.stdin.readline())["share"]["index"] == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def odd_rows(count: int) -> list[object]:
    """Rows with everything that is counted: bad ones, repeated ones, notes, keys that no rule
    reads, thinking, calls, and images."""
    thinking = chat("Think.", "Yes.")
    thinking["messages"][1]["reasoning_content"] = "Hm."
    muted = chat("Hush.")
    muted["messages"][1]["weight"] = 0
    marked = chat("Think aloud.", "<think>Well.</think>No.")
    kinds: list[object] = [
        *(thinking, marked, muted, {"messages": []}, about("cat.png"), about("gone.png")),
        *(chat("What?") | {"hint": "look"}, {"messages": [*chat("q")["messages"], {"role": "x"}]}),
    ]
    rows = [chat(f"{n} and {n % 9}?", "word " * (n % 40)) for n in range(count)]
    return [kinds[n // 5 % len(kinds)] if n % 5 == 0 else row for n, row in enumerate(rows)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of several kinds of files, of some BLOCKS blocks in all."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cat.png").write_bytes(png(60, 40))
    rows = odd_rows(64 * (BLOCKS - 2) + 5)
    write_rows(folder / "a.jsonl", *rows[:150])
    lines = "\n\n".join(map(json.dumps, rows[150:]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.json").write_text(json.dumps(rows[:60], indent=1))
    parquet.write_table(
        pa.Table.from_pylist([chat(f"q {n}") for n in range(70)]), folder / "d.parquet"
    )
    (folder / "e.csv").write_text("prompt,response\n" + 'what,"a\nb"\n' * 9)
    return folder


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Keys of a config by which even small data is read by two processes."""
    monkeypatch.setattr(shares, "PAYS_BYTES", 1)
    return {"dataset_num_proc": 2}


def children() -> list[int]:
    """Ids of the processes that this one has started, and that run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(entry.name))
    return found


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestShares:
    @pytest.mark.parametrize("skip", [0, 100])
    def test_each_row_is_in_one_and_the_others_are_passed_over(self, data, skip):
        config = config_of(DatasetConfig(path=str(data)))
        rows = list(iterate_rendered(config, data, None, skip=skip))
        parts = [
            list(iterate_rendered(config, data, None, skip=skip, share=Share(index, 3, 64)))
            for index in range(3)
        ]
        assert len({row.file for row in rows}) == 5
        assert [row.number for row in parts[1][:65]] == [*range(skip + 65, skip + 129), skip + 257]
        joined = sorted((row for part in parts for row in part), key=lambda row: row.number)
        assert list(map(repr, joined)) == list(map(repr, rows))

    def test_what_another_makes_is_not_even_parsed(self, tmp_path, monkeypatch):
        path, parsed = write_rows(tmp_path / "rows.jsonl", *odd_rows(300)), 0

        def parse(line: bytes) -> object:
            nonlocal parsed
            parsed += 1
            return json.loads(line)

        monkeypatch.setattr("engine.data.json_rows.parse_object", parse)
        config = config_of(DatasetConfig(path=str(path)))
        rows = list(iterate_rendered(config, tmp_path, None, share=Share(0, 4, 10)))
        assert (len(rows), parsed) == (80, 80)

    def test_a_name_that_no_row_has_is_known_in_each(self, tmp_path):
        rows = [chat(f"q {n}") for n in range(200)]
        path = tmp_path / "rows.jsonl"
        config = config_of(DatasetConfig(path=str(path), field_system="rules"))
        shares = [Share(index, 2, 64) for index in range(2)]
        write_rows(path, *rows)
        for share in shares:
            with pytest.raises(UserError, match="field_system names rules, and no row of"):
                list(iterate_rendered(config, tmp_path, None, share=share))
        rows[190]["rules"] = "Be brief."
        write_rows(path, *rows)
        assert (
            sum(len(list(iterate_rendered(config, tmp_path, None, share=s))) for s in shares) == 200
        )


class TestSeveral:
    def test_they_report_what_one_reports(self, data, seeing, several):
        found = []
        for keys in ({"dataset_num_proc": 1}, several):
            config = config_of(
                DatasetConfig(path=str(data)), excess_length_strategy="truncate", **keys
            )
            found.append(check_config(config, data, seeing, sequence_len=20))
        assert found[0] == found[1]
        assert found[0].rows > 64 * (BLOCKS - 1)
        assert found[0].tokens.thinking_answers
        assert found[0].images.different == 1
        assert found[0].bad_rows > 10
        assert {"thinking_read", "nothing_learned"} <= {each.id for each in found[0].findings}

    def test_killed_half_way_and_gone_on_with_they_leave_the_bytes_of_one(
        self, data, seeing, several, tmp_path, monkeypatch
    ):
        dataset, note = DatasetConfig(path=str(data)), tmp_path / "processes"
        interval = Interval(rows=100)
        one = config_of(dataset, dataset_num_proc=1)
        whole = prepare(one, data, seeing, tmp_path / "whole")
        config, store = config_of(dataset, **several), tmp_path / "store"
        done, started = [], []

        class Known(Child):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments)
                started.append(self.id)

        monkeypatch.setattr(shares, "Child", Known)

        def die_half_way(progress):
            if progress.rows >= 250:
                note.write_text(json.dumps(started))
                os.kill(os.getpid(), signal.SIGKILL)

        killed_child(lambda: prepare(config, data, seeing, store, die_half_way, interval=interval))
        killed = json.loads(note.read_text())
        assert len(killed) == 2
        wait_until(lambda: not any(map(runs, killed)))
        resumed = prepare(config, data, seeing, store, lambda progress: done.append(progress.rows))
        assert content(resumed.folder) == content(whole.folder)
        assert min(filter(None, done)) > 200
        assert not children()

    def test_one_that_dies_is_one_sentence_and_ends_the_others(self, data, several, monkeypatch):
        monkeypatch.setattr(shares, "_SHARER", (sys.executable, "-c", FIRST_DIES))
        with pytest.raises(WorkError, match="was stopped by signal 9"):
            check_config(config_of(DatasetConfig(path=str(data)), **several), data)
        assert not children()

    def test_it_ends_with_whoever_asks(self):
        assert run_python("-m", "engine.data.sharer").returncode == 0

    def test_images_of_the_web_are_fetched_by_one_in_order(self, tmp_path, several, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = write_rows(
            tmp_path / "rows.jsonl", *(about(f"https://host/{n}.png") for n in range(200))
        )
        asked: list[str] = []

        class Web:
            def fetch(self, url: str) -> bytes:
                asked.append(url)
                raise RowProblem("It is gone.", f"{url} is not there.", "Look elsewhere.")

            def finish(self) -> None:
                asked.append("the end")

        config = config_of(DatasetConfig(path=str(path)), **several)
        task = CountRows(config=config, folder=tmp_path)
        with closing(iterate_parts(task, None, Web())) as parts:
            said = [problem.why for part in parts for problem in part.made.facts.problems]
        assert asked == [*(f"https://host/{n}.png" for n in range(200)), "the end"]
        assert said == [f"{url} is not there." for url in asked[:-1]]


@pytest.mark.parametrize(
    ("keys", "size", "free", "count"),
    [
        ({}, 4, 10**10, 3),
        ({}, 2, 10**10, 2),
        ({}, 4, 900 * 10**6, 2),
        ({"dataset_num_proc": 2}, 4, 10**10, 2),
        ({"dataset_num_proc": 9}, 4, 10**10, 4),
        ({}, 0.5, 10**10, 1),
        ({}, 4, 0, 1),
    ],
)
def test_cores_config_data_and_memory_say_how_many(tmp_path, monkeypatch, keys, size, free, count):
    path = tmp_path / "rows.jsonl"
    path.touch()
    os.truncate(path, int(size * shares.PAYS_BYTES))
    monkeypatch.setattr(shares, "count_cpus", lambda: 3)
    monkeypatch.setattr(shares, "read_memory", lambda: (free, free))
    assert count_processes(config_of(DatasetConfig(path=str(path)), **keys), tmp_path) == count


def test_what_is_on_the_hub_is_read_once(tmp_path):
    config = config_of(DatasetConfig(path="org/set"), dataset_num_proc=8)
    assert count_processes(config, tmp_path) == 1
