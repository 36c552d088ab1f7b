"""A model whose rows cannot be rendered is refused by every command, before any word of memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest

from engine.catalog import find_model
from engine.cli import main
from engine.config import read_config
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import best_device
from engine.wizard.draft import Draft, draft_from
from engine.wizard.flow import perform
from engine.wizard.model import OWN, ModelStep

PUBLISHED = Path(mistral_common.__file__).parent / "data"
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
COMMANDS = (
    ("estimate", "made.yml"),
    ("train", "made.yml"),
    ("train", "made.yml", "--max-steps", "0"),
    ("prepare", "made.yml"),
    ("preview", "made.yml"),
    ("preview", "rows.jsonl", "--model", "model"),
    ("check", "made.yml"),
    ("recommend", "--model", "model"),
    ("recommend", "--model", "model", "--data", "rows.jsonl"),
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds only a config.json, beside a config and rows for it."""
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n", "utf-8")
    keys = {"base_model": "model", "datasets": [{"path": "rows.jsonl"}], "adapter": "lora"}
    (tmp_path / "made.yml").write_text(json.dumps(keys | {"lora_r": 8}), "utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    config = find_model("demo-tiny").config
    (folder / "config.json").write_text(json.dumps(dict(config)), "utf-8")
    return folder


def give_sentencepiece(model: Path) -> str:
    name = "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copyfile(PUBLISHED / name, model / "tokenizer.model.v3")
    return "a sentencepiece one. Sentencepiece tokenizers (Mistral 7B, Mixtral) are not supported"


def give_newer(model: Path) -> str:
    head = '{"config": {"version": "v17"}, "vocab": []}'
    (model / "tekken.json").write_text(head, "utf-8")
    return "is v17. Rows are rendered exactly for v3, v7, v11, v13 and v15"


def give_another_format(model: Path) -> str:
    (model / "tokenizer.json").write_text("{}", "utf-8")
    return "It has tokenizer.json, by which rows would not be what Mistral's own tokenizer makes"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("give", [give_sentencepiece, give_newer, give_another_format])
def test_every_command_refuses_it_and_says_why(
    give: Callable[[Path], str],
    words: tuple[str, ...],
    model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    why = give(model)
    assert main(list(words)) == 2
    out, err = capfd.readouterr()
    assert why in " ".join(err.split())
    assert "fits" not in out


def test_a_folder_with_a_config_alone_is_still_estimated(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", "made.yml", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows_counted"] is None
    assert main(["recommend", "--model", "model", "--json"]) == 0


def test_a_tokenizer_of_another_place_takes_the_place_of_the_folders(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    give_sentencepiece(model)
    shutil.copyfile(PUBLISHED / "tekken_240718.json", model.parent / "tekken.json")
    assert main(["estimate", "made.yml", "tokenizer_config=tekken.json", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows_counted"] == 1


def test_a_folder_with_a_tokenizer_alone_still_previews(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").unlink()
    shutil.copyfile(PUBLISHED / "tekken_240718.json", model / "tekken.json")
    assert main(["preview", "rows.jsonl", "--model", "model", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kinds"] == [
        "bos",
        "user",
        "user",
        "user",
        "text",
        "eos",
    ]


def test_the_wizard_refuses_it_where_the_model_is_read(model: Path) -> None:
    why = give_sentencepiece(model)
    step = ModelStep(Draft(device=best_device(assume("H100"))))
    work = step.work()
    assert work is not None
    step.receive(work, perform(work, lambda _done: None))
    for ask in (
        lambda: draft_from(read_config("made.yml"), model.parent),
        lambda: step.take(OWN, "model"),
        lambda: step.read_own("model"),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        assert f"{caught.value.what} {caught.value.why}".find(why) > 0
