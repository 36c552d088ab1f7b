"""A model card tells the run's figures and nothing of the computer or of the rows."""

from pathlib import Path

from ruamel.yaml import YAML

from engine.publish.card import write_card
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
