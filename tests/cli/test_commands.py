"""What holds for all commands: wrong requests, a reader that leaves, other tokenizers."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest

from engine.catalog import find_model
from engine.cli import main
from engine.cli.terminal import Host
from engine.config import read_config
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import best_device
from engine.wizard.draft import Draft, draft_from
from engine.wizard.flow import perform
from engine.wizard.model import OWN, ModelStep
from tests.fakes.processes import PATIENCE_SECONDS, ROOT, printed_by
from tests.support.commands import Call

PUBLISHED = Path(mistral_common.__file__).parent / "data"
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
WRONG = [
    ("no-such-command", ["no-such-command"]),
    ("demo --no-such-flag", ["--no-such-flag"]),
    ("demo run max_stepz=3", ["max_stepz", "max_steps"]),
    ("demo run --vision --qlora", ["Choose --qlora or --vision."]),
    ("train", ["CONFIG"]),
    ("train absent.yml", ["absent.yml"]),
    ("train good.yml lerning_rate=1e-4", ["lerning_rate", "learning_rate"]),
    ("train good.yml lora_r=many", ["lora_r"]),
    ("train good.yml learning_rate", ["learning_rate"]),
    ("train good.yml rl=dpo", ["rl"]),
    ("train good.yml trust_remote_code=true", ["trust_remote_code"]),
    ("train good.yml adapter=qlora", ["load_in_4bit"]),
    ("train good.yml base_model=./no-such-model output_dir=run", ["no-such-model"]),
    ("train good.yml lora_target_modules=[q_project] output_dir=run", ["q_project", "q_proj"]),
    ("train good.yml --no-such-flag", ["--no-such-flag"]),
    ("train good.yml --max-steps -1", ["max_steps"]),
    ("train good.yml --max-steps 0 datasets[0].path=gone.jsonl", ["gone.jsonl"]),
    ("train good.yml --max-steps 0 load_in_4bit=true", ["load_in_4bit"]),
    ("train good.yml --max-steps 0 base_model=no-such-model", ["no-such-model"]),
    ("train good.yml --max-steps 0 lora_target_modules=[nothing_proj]", ["nothing_proj"]),
    ("train good.yml --max-steps 0 tensor_parallel_size=2 rl=dpo", ["rl"]),
    ("fit gone.yml", ["gone.yml"]),
    ("fit good.yml nonsense=1", ["nonsense"]),
    ("probe --assume A100", ["40.0 GiB", "80.0 GiB"]),
    ("recommend", ["--model"]),
    ("recommend --model nope", ["no model named nope", "windtunnel models"]),
    ("recommend --model demo-tiny --assume 'Voodoo 2'", ["no GPU named Voodoo 2"]),
    ("recommend --model demo-tiny --assume A100", ["40.0 GiB", "80.0 GiB"]),
    ("recommend --model demo-tiny --data gone.jsonl", ["There is no gone.jsonl."]),
    ("recommend --model demo-tiny --goal vision", ["reads no images"]),
    ("recommend --model mistral-small-3.2 --goal think", ["does not think"]),
    ("recommend --model demo-tiny --goal fame", ["fame", "text", "vision"]),
    ("recommend --model demo-tiny lora_r", ["sets no key", "key=value"]),
    ("recommend --model demo-tiny loar_r=3", ["loar_r", "lora_r"]),
    ("recommend --model demo-tiny lora_r=many", ["lora_r"]),
    ("recommend --model demo-tiny adapter=qlora load_in_4bit=no", ["load_in_4bit"]),
    ("recommend --model demo-tiny lora_target_modules=[query]", ["matches no module"]),
    ("estimate", ["CONFIG"]),
    ("estimate gone.yml", ["gone.yml was not found"]),
    ("estimate good.yml --assume A100", ["more than one GPU"]),
    ("estimate good.yml lora_r", ["sets no key"]),
    ("estimate good.yml lora_target_modules=[query]", ["matches no module", "q_proj"]),
    ("estimate good.yml base_model=./absent", ["absent"]),
    ("estimate good.yml rl=dpo", ["rl"]),
    ("help clutser", ["no help page", "clutser", "clusters"]),
    ("models --assume A100", ["more than one GPU"]),
    ("models --assume ''", ["No GPU is named"]),
]
"""Each command line, and what its three lines say."""


@pytest.fixture(autouse=True)
def model(call: Call) -> Path:
    """A folder that holds only a config.json, beside a config and rows for it."""
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n", "utf-8")
    keys = {"base_model": "model", "datasets": [{"path": "rows.jsonl"}], "adapter": "lora"}
    Path("made.yml").write_text(json.dumps(keys), "utf-8")
    Path("good.yml").write_text(json.dumps(keys | {"base_model": "demo-tiny"}), "utf-8")
    folder = Path("model").absolute()
    folder.mkdir()
    config = find_model("demo-tiny").config
    (folder / "config.json").write_text(json.dumps(dict(config)), "utf-8")
    return folder


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_request_leaves_nothing(
    words: str, said: list[str], call: Call, home: Path
) -> None:
    code, out, err = call(*shlex.split(words))
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) >= 3
    assert "Traceback" not in err
    assert all(each in err for each in said), err
    assert not Path("run").exists()
    assert not home.exists()


def test_an_output_that_knows_ascii_alone_gets_numbers_for_other_letters() -> None:
    printed = printed_by("-m", "engine", "models", "--assume", "4090", PYTHONIOENCODING="ascii")
    assert "\\u2713 fits" in printed


@pytest.mark.parametrize("program", ["tui", "engine"])
@pytest.mark.parametrize("words", [["--help"], ["models"], ["schema"]], ids=" ".join)
def test_a_command_whose_reader_has_left_says_nothing(program: str, words: list[str]) -> None:
    receiver, sender = os.pipe()
    os.close(receiver)
    done = subprocess.run(
        [sys.executable, "-m", program, *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=sender,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    os.close(sender)
    left = 1 if words == ["--help"] else 0  # rich, which prints the help, leaves by itself
    assert (done.returncode, done.stderr) == (left, "")


class Leaving(io.StringIO):
    """A reader that leaves when the list of commands is there."""

    def write(self, text: str) -> int:
        if "THE WIZARD" in text:
            raise BrokenPipeError
        return super().write(text)


def test_nor_one_that_leaves_before_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Leaving())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["--help"], Host(more_help="THE WIZARD")) == 0


COMMANDS = (
    *("estimate made.yml", "train made.yml", "train made.yml --max-steps 0", "prepare made.yml"),
    *("preview made.yml", "preview rows.jsonl --model model", "check made.yml"),
    *("recommend --model model", "recommend --model model --data rows.jsonl"),
)
SENTENCEPIECE = (PUBLISHED / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
OTHERS = [
    (
        "tokenizer.model.v3",
        SENTENCEPIECE,
        "a sentencepiece one. Sentencepiece tokenizers (Mistral 7B, Mixtral) are not supported",
    ),
    (
        "tekken.json",
        b'{"config": {"version": "v17"}, "vocab": []}',
        "is v17. Rows are rendered exactly for v3, v7, v11, v13 and v15",
    ),
    (
        "tokenizer.json",
        b"{}",
        "It has tokenizer.json, by which rows would not be what Mistral's own tokenizer makes",
    ),
]
"""Tokenizers by which no row can be rendered, and why."""


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(("name", "content", "why"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_every_command_refuses_another_tokenizer_and_says_why(
    name: str, content: bytes, why: str, words: str, model: Path, call: Call
) -> None:
    (model / name).write_bytes(content)
    status, out, err = call(*words.split())
    assert status == 2
    assert why in " ".join(err.split())
    assert "fits" not in out


def test_a_folder_with_a_config_alone_is_still_estimated(call: Call) -> None:
    assert call.document("estimate", "made.yml")["rows_counted"] is None
    assert call.document("recommend", "--model", "model")


def test_a_tokenizer_of_another_place_replaces_the_folders(model: Path, call: Call) -> None:
    (model / "tokenizer.model.v3").write_bytes(SENTENCEPIECE)
    shutil.copyfile(PUBLISHED / "tekken_240718.json", "tekken.json")
    found = call.document("estimate", "made.yml", "tokenizer_config=tekken.json")
    assert found["rows_counted"] == 1


def test_a_folder_with_a_tokenizer_alone_still_previews(model: Path, call: Call) -> None:
    (model / "config.json").unlink()
    shutil.copyfile(PUBLISHED / "tekken_240718.json", model / "tekken.json")
    kinds = call.document("preview", "rows.jsonl", "--model", "model")["kinds"]
    assert kinds == ["bos", "user", "user", "user", "text", "eos"]


def test_the_wizard_refuses_it_where_the_model_is_read(model: Path) -> None:
    name, content, why = OTHERS[0]
    (model / name).write_bytes(content)
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
