"""Commands on a trained run: what they ask, what they print, and how they fail."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.cli import main, use
from engine.cli.terminal import Host
from tests.support.extras import needs_trainer
from tests.support.written_runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "pilot", base_model="demo-tiny").path


def command(*words: str | Path) -> int:
    """One command line, with a process that needs no torch."""
    return main([str(word) for word in words], Host(trainer="tests.fakes.answerer"))


Out = pytest.CaptureFixture[str]


def test_an_answer_is_printed_and_acts_on_no_terminal(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "Hi") == 0
    printed = capfd.readouterr()
    assert printed.out == 'tuned:1:"Hi"␛[31m\n'
    assert f"answers come from {run}/adapter" in printed.err


def test_base_answers_first_and_the_tuned_model_after_it(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "Hi", "--base") == 0
    out = capfd.readouterr().out
    assert out.index("before:") < out.index("base:1") < out.index("after:") < out.index("tuned:1")


def test_json_is_one_document_with_every_answer(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "Hi", "--base", "--json") == 0
    printed = capfd.readouterr()
    document = json.loads(printed.out)
    assert document["run"] == str(run)
    (answer,) = document["answers"]
    assert answer["prompt"] == "Hi"
    assert answer["text"].startswith("tuned")
    assert answer["base"]["text"].startswith("base")
    assert not printed.err


def test_a_line_of_stdin_is_a_question(
    run: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert command("generate", run, "--json") == 0
    prompts = [each["prompt"] for each in json.loads(capfd.readouterr().out)["answers"]]
    assert prompts == ["one", "two"]


def test_settings_reach_the_model_others_stay_open(run: Path, capfd: Out, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"png")
    options = ["--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9", "--seed", "3"]
    options += ["--image", str(tmp_path / "x.png"), "--reasoning-effort", "high", "--json"]
    assert command("generate", run, "--prompt", "Hi", *options) == 0
    asked: dict[str, Any] = json.loads(capfd.readouterr().out)["answers"][0]["asked"]
    assert (asked["temperature"], asked["max_tokens"], asked["top_p"]) == (0.5, 9, None)
    assert (asked["seed"], asked["reasoning_effort"]) == (3, "high")
    system, question = asked["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    image, text = question["content"]
    assert image == {"type": "image", "path": str(tmp_path / "x.png")}
    assert text == {"type": "text", "text": "Hi"}


@pytest.mark.parametrize("words", [["generate", "--prompt", "Hi"], ["chat"]])
def test_a_model_that_does_not_fit_is_not_loaded_unless_anyway(
    words: list[str], tmp_path: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    run = write_run(tmp_path / "large", base_model="mistral-medium-3.5").path
    assert command(words[0], run, *words[1:]) == 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("The model does not fit: ")
    assert "adapter: qlora" in lines[2]
    assert command(words[0], run, *words[1:], "--anyway") == 0
    assert capfd.readouterr().out.startswith("tuned:1")


def test_an_answer_that_was_cut_off_says_so(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "long") == 0
    assert "cut off after 2 tokens" in capfd.readouterr().err


def test_a_picture_that_is_not_there_is_refused(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "Hi", "--image", "gone.png") == 2
    assert "There is no picture gone.png." in capfd.readouterr().err


def test_a_refused_question_is_three_sentences(run: Path, capfd: Out) -> None:
    assert command("generate", run, "--prompt", "refuse me") == 2
    assert capfd.readouterr().err.splitlines()[-3:] == ["Refused.", "It asked.", "Ask less."]


@pytest.mark.parametrize("words", [["generate", "--prompt", "Hi"], ["merge", "-o", "out"]])
def test_what_the_process_says_of_an_error_arrives_as_it_is(
    words: list[str], run: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "The card is full.")
    assert command(words[0], run, *words[1:]) == 1
    assert capfd.readouterr().err.splitlines()[-3:] == ["The card is full.", "Because.", "Do it."]


def test_a_process_that_dies_is_reported_with_its_last_lines(
    run: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "no such device\x1b[2J")
    assert command("generate", run, "--prompt", "Hi") == 1
    error = capfd.readouterr().err
    assert "exit status 7" in error
    assert "no such device␛[2J" in error


def test_a_chat_remembers_its_turns_and_a_refused_one_is_no_turn(
    run: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nrefuse me\ntwo\n"))
    assert command("chat", run, "--system", "Be brief.") == 0
    printed = capfd.readouterr()
    assert "tuned:2:" in printed.out
    assert "tuned:4:" in printed.out
    assert "Refused." in printed.err


def test_thinking_goes_into_the_history_as_thinking() -> None:
    assert use._content("[THINK]so[/THINK]yes") == [
        {"type": "thinking", "thinking": "so"},
        {"type": "text", "text": "yes"},
    ]
    assert use._content("yes") == "yes"


def test_merge_says_where_the_model_is(run: Path, capfd: Out, tmp_path: Path) -> None:
    assert command("merge", run, "-o", tmp_path / "out") == 0
    assert f"{tmp_path}/out" in capfd.readouterr().out
    assert command("merge", run, "--out", tmp_path / "more", "--json") == 0
    assert json.loads(capfd.readouterr().out)["merged"] == str(tmp_path / "more")


def test_merging_a_4_bit_run_says_that_answers_can_differ(tmp_path: Path, capfd: Out) -> None:
    run = write_run(tmp_path / "q", adapter="qlora", load_in_4bit=True).path
    assert command("merge", run, "-o", tmp_path / "out") == 0
    assert "answers can differ a little" in capfd.readouterr().out


def test_compare_prints_figures_and_differences(tmp_path: Path, capfd: Out) -> None:
    first = write_run(tmp_path / "a", losses=(4, 3)).path
    second = write_run(tmp_path / "b", losses=(5, 4), lora_r=8, lora_alpha=32).path
    assert main(["compare", str(first), str(second)]) == 0
    out = capfd.readouterr().out
    assert "at 200 learned tokens" in out
    assert "lora_r: 16 -> 8" in out
    assert main(["compare", str(first), str(second), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["figures"]["loss at the same tokens"] == [3.0, 4.0]
    assert document["differences"] == {"lora_r": ["16", "8"]}
    assert document["held_out_differs_by"] == []


@pytest.mark.parametrize(
    ("key", "values", "where"),
    [("val_set_size", (0.1, 0.2), "different rows"), ("sequence_len", (64, 128), "other tokens")],
)
def test_compare_names_no_winner_over_other_held_out_rows_or_tokens(
    tmp_path: Path, capfd: Out, key: str, values: tuple[Any, Any], where: str
) -> None:
    first, second = (write_run(tmp_path / f"{value}", **{key: value}).path for value in values)
    assert main(["compare", str(first), str(second)]) == 0
    assert f"Held out on {where} ({key})" in capfd.readouterr().out
    assert main(["compare", str(first), str(second), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["held_out_differs_by"] == [key]


def test_serve_hint_prints_commands_and_a_reason_each(run: Path, capfd: Out) -> None:
    assert main(["serve-hint", str(run)]) == 0
    out = capfd.readouterr().out
    assert "vllm serve" in out
    assert "#   --tokenizer-mode: " in out
    assert main(["serve-hint", str(run), "--json"]) == 0
    titles = [hint["title"] for hint in json.loads(capfd.readouterr().out)["hints"]]
    assert titles[-1] == "llama.cpp"


def test_push_without_a_repository_or_a_result_says_what_is_missing(run: Path, capfd: Out) -> None:
    assert main(["push", str(run)]) == 2
    assert "No repository is named." in capfd.readouterr().err
    assert main(["push", str(run), "--to", "me/pilot"]) == 2
    assert "has no finished result" in capfd.readouterr().err


@needs_trainer
@pytest.mark.slow
def test_a_demo_run_answers_and_is_merged_for_real(tmp_path: Path, capfd: Out) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", str(folder), "max_steps=2"]) == 0
    capfd.readouterr()
    words = ["--prompt", "Which sea signs tell me it is force 3?", "--max-tokens", "4", "--json"]
    assert main(["generate", str(folder), *words]) == 0
    assert json.loads(capfd.readouterr().out)["answers"][0]["tokens"] <= 4
    assert main(["merge", str(folder), "-o", str(tmp_path / "merged"), "--json"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (folder / "adapter" / "README.md").is_file()
