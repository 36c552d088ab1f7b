"""What `serve-hint` prints can be served: no flag for an adapter that the server refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.publish.card import VLLM_RANKS, serve_hints
from tests.support.written_runs import write_run


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


def test_a_base_is_served_with_the_positions_that_the_adapter_was_trained_with(
    tmp_path: Path,
) -> None:
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
