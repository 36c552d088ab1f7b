"""The model card, and the commands that serve a result."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from engine.publish.card import VLLM_RANKS, serve_hints, write_card
from engine.publish.hub import publish_result
from tests.support.written_runs import write_run


def front_matter(text: str) -> dict[str, object]:
    found: dict[str, object] = YAML(typ="safe").load(text.split("---\n")[1])
    return found


def test_the_front_matter_names_base_library_and_licence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pilot")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    matter = front_matter(write_card(run, run.adapter).read_text("utf-8"))
    assert matter["base_model"] == "mistralai/Ministral-3-3B-Instruct-2512-BF16"
    assert matter["base_model_relation"] == "adapter"
    assert (matter["library_name"], matter["license"]) == ("peft", "apache-2.0")
    assert matter["pipeline_tag"] == "image-text-to-text"
    assert matter["tags"] == ["windtunnel", "mistral", "lora"]


def test_a_merged_model_is_a_fine_tune_for_transformers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pilot", "mistral-medium-3.5")
    (tmp_path / "merged").mkdir()
    text = write_card(run, tmp_path / "merged").read_text("utf-8")
    matter = front_matter(text)
    assert (matter["library_name"], matter["base_model_relation"]) == ("transformers", "finetune")
    assert (matter["license"], matter["license_name"]) == ("other", "modified-mit")
    assert "PeftModel" not in text


def test_figures_and_answers_are_those_of_the_events(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pilot")
    text = write_card(run, tmp_path).read_text("utf-8")
    assert "| training loss, first step | 4.0000 |" in text
    assert "| training loss, last step | 1.0000 |" in text
    assert "| held-out loss, before (step 0) | 4.5000 |" in text
    assert "| held-out loss, lowest (step 4) | 1.5000 |" in text
    assert "| `validation` exact answers after (8 rows) | 75.0% |" in text
    assert "400 learned tokens" in text
    assert "12,345 parameters" in text
    assert "torch 2.13.0" in text


def test_no_answer_ends_its_block_or_colours_a_terminal(tmp_path: Path) -> None:
    text = write_card(write_run(tmp_path / "pilot"), tmp_path).read_text("utf-8")
    assert "````text\nA ```pilot``` ␛[31mmodel.\n````" in text


def test_neither_rows_nor_paths_nor_devices_leave_the_computer(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "pilot",
        str(tmp_path / "some" / "base"),
        datasets=[{"path": str(tmp_path / "private.jsonl"), "type": "chat_template"}],
        output_dir=str(tmp_path / "pilot"),
    )
    text = write_card(run, tmp_path).read_text("utf-8")
    assert "secret" not in text
    assert "private question" not in text
    assert "GPU-1234" not in text
    assert str(tmp_path) not in text
    assert "path: private.jsonl" in text
    assert "base_model:" not in text.split("---\n")[1]


def test_a_card_that_cannot_be_written_is_a_note_and_fails_nothing(tmp_path: Path) -> None:
    from engine.config import read_config

    run = write_run(tmp_path / "pilot")
    config = read_config(run.config).config
    (note,) = publish_result(run, tmp_path / "gone", config)
    assert getattr(note, "level", None) == "warning"


def arguments(run: Any, title: str) -> list[str]:
    (hint,) = [hint for hint in serve_hints(run) if hint.title.startswith(title)]
    return list(hint.steps[-1])


def test_an_adapter_is_served_beside_its_base_with_room_for_its_rank(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pilot", lora_r=24)
    command = arguments(run, "vLLM, the adapter")
    assert command[:3] == ["vllm", "serve", "mistralai/Ministral-3-3B-Instruct-2512-BF16"]
    assert f"pilot={run.adapter}" in command
    assert command[command.index("--max-lora-rank") + 1] == "32"
    assert 32 in VLLM_RANKS
    assert command[command.index("--tokenizer-mode") + 1] == "mistral"


def test_a_base_is_served_with_the_positions_of_its_training(tmp_path: Path) -> None:
    rope = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}}
    run = write_run(tmp_path / "pilot", overrides_of_model_config=rope)
    command = arguments(run, "vLLM, the adapter")
    assert json.loads(command[command.index("--hf-overrides") + 1]) == rope
    assert "--hf-overrides" not in arguments(run, "vLLM, merged")  # its config.json has them


@pytest.mark.parametrize(
    "keys",
    [{"peft_use_dora": True}, {"lora_modules_to_save": ["lm_head"]}, {"lora_r": 1024}],
    ids=["dora", "whole modules", "rank"],
)
def test_an_adapter_that_vllm_refuses_is_merged_first(keys: dict[str, Any], tmp_path: Path) -> None:
    hints = serve_hints(write_run(tmp_path / "pilot", **keys))
    assert [hint.title for hint in hints] == ["vLLM, merged into one model", "llama.cpp"]
    assert hints[0].steps[0][:2] == ("windtunnel", "merge")


def test_a_full_fine_tune_is_served_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "pilot", adapter=None)
    first, second = serve_hints(run)
    assert first.steps[0][:3] == ("vllm", "serve", str(run.model))
    assert second.steps[0][0] == "python"


def test_thinking_is_parsed_only_for_models_that_think(tmp_path: Path) -> None:
    thinks = write_run(tmp_path / "a", "magistral-small-2507")
    answers = write_run(tmp_path / "b", "mistral-small-3.2")
    assert "--reasoning-parser" in arguments(thinks, "vLLM, merged")
    assert "--reasoning-parser" not in arguments(answers, "vLLM, merged")


def test_a_vision_model_that_saw_no_images_keeps_no_room_for_them(tmp_path: Path) -> None:
    command = arguments(write_run(tmp_path / "pilot"), "vLLM, merged")
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"image": 0}'


def test_every_flag_has_its_reason(tmp_path: Path) -> None:
    for hint in serve_hints(write_run(tmp_path / "pilot")):
        flags = {w for w in hint.steps[-1] if w.startswith("--")}
        assert flags <= {flag for flag, _ in hint.reasons}
        assert all(why for _, why in hint.reasons)


def test_the_shell_lines_are_the_command(tmp_path: Path) -> None:
    import shlex

    hint = serve_hints(write_run(tmp_path / "a run"))[0]
    assert shlex.split(hint.shell().replace("\\\n", " ")) == list(hint.steps[0])
