import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from engine.chat.render import LabelRule
from engine.child import Child
from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import prepare
from engine.data.requests import WORKER, PreviewRow, ResolveRevision, ask_worker
from engine.data.sources import iterate_rows
from engine.errors import UserError
from engine.hardware.packages import install_command
from tests.support.data import chat


def answers(worker: Child, request_id: int) -> Iterator[dict[str, Any]]:
    """Everything up to the last answer to that request."""
    for answer in worker.records(strict=True):
        assert answer["id"] == request_id
        yield answer
        if {"result", "error", "cancelled"} & set(answer):
            return


def ask(worker: Child, **request: Any) -> dict[str, Any]:
    worker.ask(request)
    *_, last = answers(worker, request["id"])
    return last


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Iterator[Child]:
    # Someone's own `engine` in the working folder must not be run instead of ours.
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    with Child(WORKER, ("", "")) as found:
        yield found
        found.end(60)
        assert "exit status 0" in found.death().why


def config(path: Path, model: str, **keys) -> dict[str, Any]:
    return {"base_model": model, "datasets": [{"path": path.name}], **keys}


def test_one_process_checks_and_previews(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat("q", "a"), 7, *(chat(f"q {n}", "a") for n in range(200))])
    place = {"config": config(path, model), "folder": str(tmp_path)}
    worker.ask(dict(id=1, request="check", **place))
    *progress, last = answers(worker, 1)
    assert [answer["progress"]["phase"] for answer in progress][:2] == ["tokenizer", "reading"]
    assert (last["result"]["rows"], last["result"]["usable"]) == (202, 201)

    rows = ask(worker, id=2, request="preview", row=1, count=2, **place)["result"]["rows"]
    good, bad = (convert(row, PreviewRow) for row in rows)
    assert good.problem is None
    assert bad.problem is not None
    assert "".join(good.pieces) == "<s>[INST]q[/INST]a</s>"
    assert good.learned(LabelRule()) == [False] * 4 + [True] * 2


def test_the_screen_gets_groups_of_problems_and_its_labels(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat("q", "a"), *([7] * 500), chat("word " * 15_000), *([chat("r")] * 8)])
    place = {"config": config(path, model), "folder": str(tmp_path)}
    found = ask(worker, id=1, request="check", **place)["result"]
    (group,) = found["groups"]
    assert (found["problems"], group["count"], len(group["rows"])) == ([], 500, 100)

    shape = ask(worker, id=2, request="shape", count=1, **place)["result"]
    assert shape["rows"][0]["messages"] == [["user", "q"], ["assistant", "a"]]

    shown = ask(worker, id=3, request="preview", row=502, **place)["result"]
    # A row of 15,000 tokens and its neighbours, but no more than a screen can take at once.
    assert [row["number"] for row in shown["rows"]] == [*range(502, 511)]
    assert shown["rows"][0]["kinds"][0] == 0
    assert shown["rows"][0]["first_text_id"] == 1000
    assert shown["efforts"] == []


def test_a_preview_stops_after_many_tokens(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat("word " * 30_000), chat("q"), chat("q")])
    place = {"config": config(path, model), "folder": str(tmp_path)}
    shown = ask(worker, id=1, request="preview", row=1, **place)["result"]
    assert [row["number"] for row in shown["rows"]] == [1]


def test_an_unchanged_dataset_is_checked_once(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat("q", "a")])
    place = {"config": config(path, model), "folder": str(tmp_path)}
    first = ask(worker, id=1, request="check", **place)
    worker.ask(dict(id=2, request="check", **place))
    assert list(answers(worker, 2)) == [first | {"id": 2}]
    write_jsonl([chat("q", "a"), chat("q", "b")])
    assert ask(worker, id=3, request="check", **place)["result"]["rows"] == 2


def test_a_config_that_is_not_allowed_is_a_sentence(worker, tmp_path):
    place = {"config": {"base_model": "m", "datasets": [{"path": "\x1b"}]}, "folder": "."}
    error = ask(worker, id=1, request="check", **place)["error"]
    assert error["what"] == "The config does not allow this."
    assert "holds invisible characters" in error["why"]


def test_errors_are_sentences_and_the_process_lives_on(worker, tmp_path, model):
    place = {"config": config(Path("missing.jsonl"), model), "folder": str(tmp_path)}
    error = ask(worker, id=1, request="check", **place)["error"]
    assert error["what"] == "There is no missing.jsonl."
    assert "Invalid value 'dance'" in ask(worker, id=2, request="dance")["error"]["why"]
    assert "could not do this" in ask(worker, id=3, request="check")["error"]["what"]


def test_a_request_can_be_cancelled_while_it_runs_and_before(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat(f"q {n}") for n in range(20_000)])
    place = {"config": config(path, model), "folder": str(tmp_path)}
    worker.ask(dict(id=1, request="check", **place))
    worker.ask(dict(id=2, request="check", **place))
    running = answers(worker, 1)
    next(running)
    worker.ask(dict(cancel=2))
    worker.ask(dict(cancel=1))
    *_, last = running
    assert last["cancelled"]
    assert last["id"] == 1
    assert worker.is_alive
    assert list(answers(worker, 2)) == [{"id": 2, "cancelled": True}]


def test_it_ends_with_the_wizard_even_in_the_middle_of_work(worker, tmp_path, write_jsonl, model):
    path = write_jsonl([chat(f"q {n}") for n in range(20_000)])
    worker.ask(dict(id=1, request="check", config=config(path, model), folder=str(tmp_path)))
    worker.end(60)
    assert "exit status 0" in worker.death().why


FAKE_DATASETS = """
import datetime
print("datasets prints where it likes")
class Stream:
    def __init__(self, rows):
        self.rows = rows
    def decode(self, enable):
        assert not enable
        return self.rows
def load_dataset(path, name=None, **keys):
    return Stream(rows(path, name, **keys))
def rows(path, name, *, data_files, split, revision, streaming):
    assert streaming
    if path == "org/gone":
        raise RuntimeError("Dataset 'org/gone' doesn't exist\\nor is private")
    if path == "org/chat":
        for n in range(3):
            yield {"q": n, "prompt": f"{revision} {n}", "completion": "a"}
        return
    said = f"{path} {name} {split} {revision}"
    yield {"messages": [{"role": "user", "content": said, "tool_calls": None}], "picture": b"x"}
    yield {"messages": [], "picture": datetime.date(2026, 1, 2)}
"""
FAKE_HUB = """
class HfApi:
    def dataset_info(self, path, revision=None):
        if revision == "no":
            raise RuntimeError("no such revision")
        return type("Info", (), {"sha": (revision or "main") + "-commit"})
"""


class TestHub:
    """A hub set is read by a child; its libraries are faked by packages that come first."""

    @pytest.fixture(autouse=True)
    def fake_packages(self, tmp_path, monkeypatch):
        packages = tmp_path / "packages"
        for name, code in {"datasets": FAKE_DATASETS, "huggingface_hub": FAKE_HUB}.items():
            (packages / name).mkdir(parents=True)
            (packages / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(packages), prepend=":")
        self.packages = packages

    def test_rows_are_streamed_at_the_revision_without_arrows_nulls(self, tmp_path):
        dataset = DatasetConfig(path="org/set", split="test", revision="abc")
        first, second = iterate_rows(dataset, tmp_path)
        said = "org/set None test abc"
        assert first.row == {
            "messages": [{"role": "user", "content": said}],
            "picture": {"base64": "eA=="},
        }
        assert second.row == {"messages": [], "picture": "2026-01-02"}
        assert (first.line, second.line, first.file) == (1, 2, "org/set")
        assert "datasets" not in sys.modules

    def test_the_train_split_is_the_default(self, tmp_path):
        row = next(iterate_rows(DatasetConfig(path="org/set"), tmp_path))
        assert "org/set None train None" in str(row.row)

    def test_a_branch_is_pinned_to_its_commit(self):
        asked = (DatasetConfig(path="org/set", revision=name) for name in ("v2", "no"))
        assert list(ask_worker(ResolveRevision(next(asked)))) == ["v2-commit"]
        with pytest.raises(UserError, match="no such revision"):
            list(ask_worker(ResolveRevision(next(asked))))

    def test_it_is_prepared_once_for_a_commit(self, tmp_path, tokenizer):
        def prepared(revision):
            dataset = DatasetConfig(path="org/chat", revision=revision)
            config = RunConfig(base_model="any", datasets=(dataset,))
            return prepare(config, tmp_path, tokenizer, tmp_path / "store")

        first = prepared("v2")
        assert (len(first), first.reused, first.file(0)) == (3, False, "org/chat")
        assert "v2-commit" in "".join(tokenizer.pieces(first.ids(0).tolist()))
        assert prepared("v2").reused
        assert not prepared("v3").reused

    def test_what_the_hub_says_is_one_sentence(self, tmp_path):
        with pytest.raises(UserError) as caught:
            list(iterate_rows(DatasetConfig(path="org/gone"), tmp_path))
        assert caught.value.what == "org/gone cannot be read from the hub."
        assert caught.value.exit_status == 1
        assert caught.value.why == "RuntimeError: Dataset 'org/gone' doesn't exist"

    def test_without_the_train_extra_it_says_what_to_install(self, tmp_path):
        (self.packages / "datasets" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'datasets'\", name='datasets')"
        )
        with pytest.raises(UserError, match=re.escape(install_command("train"))):
            list(iterate_rows(DatasetConfig(path="org/set"), tmp_path))

    def test_a_child_that_dies_is_not_taken_for_the_end(self, tmp_path):
        (self.packages / "datasets" / "__init__.py").write_text("import os; os._exit(7)")
        with pytest.raises(UserError, match="left with exit status 7"):
            list(iterate_rows(DatasetConfig(path="org/set"), tmp_path))
