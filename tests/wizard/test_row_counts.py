"""Every way to the rows of a config counts the same: what a plan believes is what trains."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.chat.tokenizer import open_tokenizer
from engine.cli import main
from engine.config import read_config
from engine.data import shares
from engine.data.checkup import check_config
from engine.data.prepare import default_store, label_rule, prepare
from engine.data.requests import CheckRows, plain, read_answer
from engine.data.rows import RenderedRow, iterate_rendered
from engine.data.statistics import Statistics
from engine.data.worker import Worker
from engine.hardware import assume
from engine.plan import best_device
from engine.wizard.draft import check_rows, count_config_rows, draft_from
from engine.wizard.flow import Wizard, perform
from engine.wizard.start import read_planned
from tests.support.data import write_rows
from tests.support.pictures import png

QUESTION = {"role": "user", "content": "Why?"}
TURNS = [
    QUESTION,
    {"role": "assistant", "content": "So.", "reasoning_content": "a long thought " * 20},
    QUESTION,
    {"role": "assistant", "content": "Because of it.", "reasoning_content": "short"},
]
SHOWN = {
    "role": "user",
    "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "?"}],
}
FILES: Mapping[str, list[dict[str, Any]]] = {
    "rows": [{"messages": TURNS}, {"messages": TURNS[:2]}, {"messages": "bad"}],
    "more": [{"messages": [QUESTION, {"role": "assistant", "content": "yes " * 90}]}],
    "images": [{"messages": [SHOWN, TURNS[-1]]}, {"messages": TURNS}],
    "other": [{"talk": [{"who": "user", "said": "q"}, {"who": "assistant", "said": "a b c"}]}],
}
MAPPED = {
    "path": "other.jsonl",
    "field_messages": "talk",
    "message_property_mappings": {"role": "who", "content": "said"},
}
IMAGES = {"datasets": [{"path": "images.jsonl"}], "processor_type": "AutoProcessor"}
CASES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "thinking not learned": {"train_on_thinking": False},
    "old thinking dropped": {"history_thinking": "drop"},
    "inputs learned": {"train_on_inputs": True},
    "effort": {
        "base_model": "mistral-small-4",
        "chat_template_kwargs": {"reasoning_effort": "none"},
    },
    "images elsewhere": IMAGES | {"image_folder": "photos"},
    "small images": IMAGES | {"image_folder": "photos", "image_size": 56},
    "two sets, one mapped": {"datasets": [{"path": "rows.jsonl"}, MAPPED, {"path": "more.jsonl"}]},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, rows in FILES.items():
        write_rows(tmp_path / f"{name}.jsonl", *rows)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(png(300, 200))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(values: Mapping[str, Any]) -> Path:
    base = {"base_model": "ministral-3-3b", "datasets": [{"path": "rows.jsonl"}]}
    path = Path("config.yml").absolute()
    path.write_text(json.dumps({**base, "adapter": "lora", "lora_r": 8, **values}), "utf-8")
    return path


def of_worker(path: Path) -> Statistics | None:
    request, answers = CheckRows(read_config(path).config, path.parent), io.StringIO()
    Worker(answers).serve({"id": 1, **plain(request)})
    last = json.loads(answers.getvalue().splitlines()[-1])
    return read_answer(request, last["result"]).statistics()


def of_plain(path: Path) -> Statistics | None:
    draft = draft_from(read_config(path), path.parent)
    draft.device = best_device(assume("H100 80GB"))
    wizard = Wizard(draft)
    work = wizard.work()
    assert work is not None
    wizard.receive(work, perform(work, lambda _done: None))
    return draft.statistics


FIRST = ("two sets, one mapped", "images elsewhere", "old thinking dropped")


def command(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) in (0, 3)
    answer: dict[str, Any] = json.loads(capfd.readouterr().out)
    return answer


@pytest.mark.parametrize(
    "case",
    [
        case if case in FIRST else pytest.param(case, marks=pytest.mark.slow)  # each takes seconds
        for case in CASES
    ],
)
def test_a_config_has_equal_rows(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(CASES[case])
    config, architecture = read_planned(path)
    estimated, why = count_config_rows(config, architecture, tmp_path)
    assert estimated is not None, why
    found = check_rows(config, tmp_path)
    assert found.statistics() == of_worker(path) == of_plain(path) == estimated

    prepared = prepare(config, tmp_path, open_tokenizer(config.base_model), tmp_path / "store")
    rule, kinds = label_rule(config), prepared.tokens_by_kind()
    assert len(prepared) == estimated.usable_rows
    assert prepared.meta.tokens == estimated.total_tokens
    assert prepared.learned_tokens(rule) == found.tokens.learned
    assert int(np.max(prepared.lengths)) == estimated.longest_tokens
    assert kinds.get("image", 0) == estimated.image_tokens
    assert kinds.get("think", 0) == estimated.thinking_tokens

    told = command(capfd, "check", "config.yml")
    assert (told["rows"], told["usable"]) == (found.rows, estimated.usable_rows)
    assert told["tokens"]["learned"] == found.tokens.learned


@pytest.mark.parametrize("goal", ["text", "think"])
@pytest.mark.parametrize("case", ["old thinking dropped", "effort", "images elsewhere"])
def test_what_is_recommended_counts_the_rows_of_the_config_that_it_writes(
    case: str, goal: str, capfd: pytest.CaptureFixture[str]
) -> None:
    values = dict(CASES[case])
    model = values.pop("base_model", "ministral-3-3b")
    (dataset,) = values.pop("datasets", [{"path": "rows.jsonl"}])
    changes = [
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in values.items()
    ]
    where = ("--assume", "H100 80GB")
    advised = command(
        capfd,
        *("recommend", "--goal", goal, "--model", model, "--data", dataset["path"], *where),
        *("-o", "made.yml", *changes),
    )
    counted = command(capfd, "estimate", "made.yml", *where)
    assert counted["rows_counted"] == 2
    for key in ("peak_allocated_bytes", "device_bytes", "parts", "tokens_at_once"):
        assert advised["estimate"][key] == counted[key], key


def test_rows_that_are_prepared_are_counted_from_their_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read = 0

    def counting(*arguments: Any, **keys: Any) -> Iterator[RenderedRow]:
        nonlocal read
        for row in iterate_rendered(*arguments, **keys):
            read += 1
            yield row

    monkeypatch.setattr(shares, "iterate_rendered", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    muted = {"role": "assistant", "content": "Hush.", "weight": 0}
    more = [{"messages": [QUESTION, muted]}, FILES["more"][0], FILES["more"][0] | {"hint": "x"}]
    path = write(IMAGES | {"image_folder": "photos", "sequence_len": 60})
    with Path("images.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*FILES["rows"], *more, "no row"])
    config = read_config(path).config
    tokenizer = open_tokenizer(config.base_model)
    truncated = config.model_copy(update={"excess_length_strategy": "truncate"})
    variants = (
        config,
        truncated,
        truncated.model_copy(update={"train_on_thinking": False, "train_on_inputs": True}),
    )
    anew = [check_config(each, tmp_path, tokenizer, sequence_len=60) for each in variants]
    prepare(config, tmp_path, tokenizer, default_store(config, tmp_path))
    assert read == 4 * len(Path("images.jsonl").read_text().splitlines())

    assert [check_rows(each, tmp_path) for each in variants] == anew
    told = [command(capfd, "estimate", "config.yml", "--assume", "H100 80GB")["rows_counted"]]
    again = ("recommend", "--model", config.base_model, "--data", "images.jsonl")
    keys = ("image_folder=photos", "--assume", "H100 80GB")
    assert command(capfd, *again, *keys)["config"]
    assert told == [anew[0].usable]
    assert of_worker(path) == of_plain(path) == anew[0].statistics()
    assert read == 4 * anew[0].rows
    Path("photos/cat.png").write_bytes(png(60, 40))
    assert check_rows(config, tmp_path) != anew[0]
    assert read == 5 * anew[0].rows
