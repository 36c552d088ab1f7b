"""The wizard on plain lines: what each answer does, and what a bad one is told."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine.config import DatasetConfig, RunConfig, read_config
from engine.errors import UserError
from engine.events import Ended
from engine.hardware import assume
from engine.plan import best_device, gpu_device
from engine.runs import RunFolder, ask, create_run, find_run, summarize
from engine.wizard.draft import Draft, draft_from
from engine.wizard.start import save_config, start_run, why_not
from tests.fakes.nvml import RTX_4090, FakeDriver
from tests.fakes.processes import PATIENCE_SECONDS, running_fake, wait_until
from tests.support.data import Conversation, chat, write_rows
from tests.support.extras import needs_trainer
from tests.support.written_runs import written_run
from tui.plain import Dialogue, Leave, follow_run, run_plain

SAMPLE = DatasetConfig(path="sample:harbour-pilot")
SIX = ("Machine", "Model", "Data", "Preview", "Plan", "Review")
TO_PLAN = ("", "", "", "", "")
"""Enter up to the question about the plan; Data asks twice."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cwd"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def converse(*answers: str, draft: Draft | None = None) -> Conversation:
    conversation = Conversation(*answers)
    run_plain(draft or Draft(), conversation.dialogue)
    return conversation


def drafted(gpu: str | None = None, **changes: object) -> Draft:
    draft = Draft(model="demo-tiny", dataset=SAMPLE, changes=dict(changes))
    draft.machine = assume(gpu or "24 GB")
    draft.device = best_device(draft.machine if gpu else replace(draft.machine, gpus=()))
    return draft


def saved(name: str = "out.yml") -> RunConfig:
    return read_config(Path(name)).config


@needs_trainer
def test_enter_alone_comes_to_the_review_of_the_demo() -> None:
    told = converse(*TO_PLAN, "", "2", "out.yml")
    assert told.headings() == list(SIX)
    assert "* 1  start now" in told.text.replace("  1  ", " 1  ")
    assert (saved().base_model, saved().datasets[0].path) == ("demo-tiny", SAMPLE.path)
    path = Path("out.yml").absolute()
    assert told.lines[-1] == f"  ✓ saved: {path}; run it with: windtunnel train {path}"


@pytest.mark.parametrize("answered", [0, 1, 2, 5, 6])
def test_ctrl_d_leaves_any_question_with_a_sentence(answered: int, home: Path) -> None:
    told = converse(*[""] * answered)
    assert told.lines[-1] == "The answers ended (ctrl+d). No run was started."
    assert not (home / "runs").exists()


def test_b_goes_back_and_keeps_the_answers() -> None:
    told = converse("", "2", "b", "", "b", "b", "q")
    assert told.headings() == ["Machine", "Model", "Data", "Model", "Data", "Model", "Machine"]
    assert sum("*  2  Ministral 3 3B" in line for line in told.lines) == 2
    assert told.lines[-1] == "Left. No run was started."


def test_b_at_a_typed_answer_goes_back_to_its_question() -> None:
    told = converse("2", "b", "", "", "2", "b", "q")
    assert told.headings() == ["Machine", "Model", "Data"]


def test_a_question_mark_explains_the_marked_answer_or_a_numbered_one() -> None:
    told = converse("", "?", "? 2", "?99", "q")
    assert "two CPU cores" in told.lines[told.lines.index("> ?") + 2]
    assert "3.8B" in told.lines[told.lines.index("> ? 2") + 1]
    assert "is no answer here" in told.lines[told.lines.index("> ?99") + 1]


@pytest.mark.parametrize("answer", ["0", "12", "-1", "1_0", "x", "²", "1 2", "\udcff", "a\0b"])
def test_what_is_no_answer_is_asked_again(answer: str) -> None:
    told = converse("", answer, "q")
    assert told.headings() == ["Machine", "Model"]
    assert "is no " in told.lines[-3] or "That is no text." in told.lines[-3]


def test_what_was_typed_is_told_back_without_its_escapes() -> None:
    told = converse("", "\x1b[31mred", "q")
    assert "  ␛[31mred is no answer here" in told.text
    assert told.text.count("\x1b") == 1


def test_a_gpu_can_be_planned_for_and_its_config_is_only_saved() -> None:
    told = converse("2", "H1000000", "H100 PCIe", "3", "", "", "", "", "1", "", "out.yml")
    assert "There is no GPU named H1000000." in told.text
    assert "H100 PCIe is planned for and not here." in told.text
    assert "*  2  save only" in told.text
    assert "run it with: windtunnel train out.yml" in told.lines[-2]
    assert told.lines[-1] == "  · planned: first copy it to the machine that has the card"
    assert saved().base_model == "ministral-3-8b"


def test_a_gpu_that_is_here_is_used_and_still_offered_after_planning(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    told = converse("3", "H100 PCIe", "b", "2", "q")
    assert "  *  1  RTX 4090: 24.0 GiB" in told.text
    assert "  *  1  plan for H100 PCIe" in told.text
    assert "     2  RTX 4090" in told.text
    assert told.headings() == ["Machine", "Model", "Machine", "Model"]


def test_an_own_model_is_read_before_it_is_taken(folder: Path) -> None:
    told = converse("", "11", "./nowhere", "mixtral-9x9b", "magistral-small-2509", "1", "b", "q")
    assert "There is no folder ./nowhere." in told.text
    assert "There is no model named mixtral-9x9b." in told.text
    assert "*  7  Magistral Small 1.2" in told.text


@needs_trainer
def test_a_file_is_read_whole_and_what_is_wrong_is_told_by_line(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", chat("hi", "ho"), {"messages": []}, chat("who", "me"))
    told = converse("", "", "typed", "nope.jsonl", "rows.jsonl", "", "", "", "2", "out.yml")
    assert "There is no nope.jsonl." in told.text
    assert "! 2 conversations: 2 to learn from, none held out; 1 row left out" in told.text
    assert "line 2 of rows.jsonl" in told.text
    assert saved().datasets[0].path == "rows.jsonl"
    assert saved().sequence_len == 128


def test_other_rows_can_be_taken_after_a_look(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", chat("hi", "ho"))
    told = converse("", "", "typed", "rows.jsonl", "others", "1", "", "q")
    assert told.headings() == ["Machine", "Model", "Data", "Preview"]
    assert "104 of 104 rows" in told.text


def test_text_of_strangers_cannot_act_on_the_terminal(folder: Path) -> None:
    rows = [chat("\x1b[31m\u202ehi", "\x07ho"), {"\x1b]0;x\x07": 1}]
    write_rows(folder / "rows.jsonl", *rows)
    (folder / "ro\x1b[2Jws.jsonl").symlink_to("rows.jsonl")
    told = converse("", "", "typed", "ro\x1b[2Jws.jsonl", "typed", "rows.jsonl", "", "q")
    assert "holds invisible characters" in told.text
    assert "1 of 2 rows" in told.text
    typed = "  path: ro\x1b[2Jws.jsonl"
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(set(told.lines) - {typed}))


@needs_trainer
def test_columns_of_other_names_are_mapped_when_asked(folder: Path) -> None:
    turns = [{"speaker": "user", "body": "hi"}, {"speaker": "assistant", "body": "ho"}]
    write_rows(folder / "rows.jsonl", {"dialogue": turns})
    told = converse("", "", "typed", "rows.jsonl", "map", "", "", "", "2", "out.yml")
    assert "map columns: messages = dialogue, role = speaker, content = body" in told.text
    assert saved().datasets[0].message_property_mappings == {"role": "speaker", "content": "body"}


def test_rows_without_any_use_are_refused(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", {"a": 1}, {"a": 2})
    told = converse("", "", "typed", "rows.jsonl", "q")
    assert "none of 2 rows can be used" in told.text
    assert told.headings()[-1] == "Data"


def test_the_hub_is_asked_about_only_after_consent() -> None:
    told = converse("", "", "hub", "nobody/nothing", "2", "q")
    assert "There is no local nobody/nothing. The hub is told this name" in told.text
    assert "Reading" not in told.text


def test_an_opened_config_does_not_reach_for_the_hub(folder: Path) -> None:
    text = "base_model: demo-tiny\ndatasets:\n  - path: nobody/nothing\n"
    (folder / "run.yml").write_text(text, "utf-8")
    draft = draft_from(read_config(Path("run.yml")), folder)
    draft.machine, draft.device = drafted().machine, drafted().device
    told = converse("q", draft=draft)
    assert told.headings() == ["Review"]
    assert "Reading" not in told.text


def test_preview_goes_through_the_rows_and_marks_what_is_learned() -> None:
    told = converse("", "", "", "", "2", "q")
    assert "row 1, line 1 of train.jsonl" in told.text
    assert "row 2, line 2 of train.jsonl" in told.text
    assert any(line.startswith("  + think") for line in told.lines)
    assert any(line.startswith("  - user") for line in told.lines)
    assert "4,372 of 5,843 tokens are learned" in told.text


def test_after_the_last_row_comes_the_first(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", chat("hi", "ho"), chat("who", "me"))
    told = converse("", "", "typed", "rows.jsonl", "", "2", "2", "q")
    rows = [line[2:7] for line in told.lines if line.startswith("  row ")]
    assert rows == ["row 1", "row 2", "row 1"]


@needs_trainer
def test_thinking_can_be_left_out_of_what_is_learned() -> None:
    told = converse("", "", "", "", "thinking=no", "", "", "2", "out.yml")
    assert any(line.startswith("  - think") for line in told.lines)
    assert "thinking: yes: now no" in told.text
    assert saved().train_on_thinking is False


def test_rows_that_teach_nothing_stop_at_the_preview(folder: Path) -> None:
    row = chat("hi", "ho")
    row["messages"][1]["weight"] = 0
    write_rows(folder / "rows.jsonl", row)
    told = converse("", "", "typed", "rows.jsonl", "", "", "q")
    assert "no token is learned in any row" in told.text
    assert told.headings()[-1] == "Preview"


@needs_trainer
def test_a_changed_value_reaches_the_config() -> None:
    told = converse(*TO_PLAN, "lora_r", "4", "seed=11", "", "2", "out.yml")
    assert "lora_r, now 16; u takes the recommended one: 4" in told.text
    assert "lora_r 16 -> 4" in told.text
    assert (saved().lora_r, saved().seed) == (4, 11)
    assert "seed: 11" in Path("out.yml").read_text("utf-8")


@needs_trainer
def test_a_bad_value_is_a_sentence_and_changes_nothing() -> None:
    bad = {
        "lora_r=3x": 'lora_r is "3x".',
        "lora_r=0": "lora_r is 0.",
        "loar_r=8": '"loar_r" is not a key.',
        "optimizer=lion": 'optimizer is "lion".',
        "fp16=true": "fp16: true is not supported.",
        "lora_target_linear=false": "nothing gets one.",
        "lora_target_modules=[nope]": "nope matches no module",
        "99": "99 sets no value.",
        "? nonsense": "nonsense",
    }
    told = converse(*TO_PLAN, *bad, "lora_r", "x", "b", "", "2", "out.yml")
    for answer, sentence in bad.items():
        assert sentence in told.lines[told.lines.index(f"> {answer}") + 1], answer
    assert "The command line" not in told.text
    assert "The config: " not in told.text
    assert told.text.count("lora_r, now 16; ") == 2
    assert (saved().lora_r, saved().lora_target_linear) == (16, True)


@needs_trainer
def test_u_takes_the_recommended_value_back_and_a_number_is_explained() -> None:
    told = converse(*TO_PLAN, "lora_r", "4", "lora_r", "u", "? lora_r", "", "2", "out.yml")
    assert "lora_r 4 -> 16" in told.text
    assert "lora_r: " in told.lines[told.lines.index("> ? lora_r") + 1]
    assert saved().lora_r == 16


@needs_trainer
def test_the_method_is_one_value_and_what_follows_from_it_follows() -> None:
    draft = Draft()
    methods = ("2", "qlora", "adapter", "full", "2", "lora")
    told = converse(*TO_PLAN, *methods, "", "2", "out.yml", draft=draft)
    assert "adapter lora -> qlora; load_in_4bit false -> true" in told.text
    assert "adapter qlora -> full; load_in_4bit true -> false" in told.text
    assert draft.changes == {"adapter": "lora", "load_in_4bit": False}
    assert (saved().adapter, saved().load_in_4bit) == ("lora", False)


def test_f_makes_a_plan_fit() -> None:
    draft = drafted("12 GB", adapter="lora")
    draft.model = "ministral-3-8b"
    told = converse(*TO_PLAN, "fit", "b", "fit", "", "", "", "out.yml", draft=draft)
    assert told.text.count("· make it fit: a change is taken with all above it") == 2
    assert told.text.count("adapter lora -> qlora") == 1
    assert "does not fit: needs" in told.text
    assert "2  make it fit: what would, the least change first" in told.text
    assert any(line.startswith("  ✓ fits: needs") for line in told.lines)
    assert saved().adapter == "qlora"


@needs_trainer
def test_the_config_is_shown_and_the_run_renamed() -> None:
    told = converse(*TO_PLAN, "", "3", "4", "harbour-2", "2", "")
    assert "base_model: demo-tiny" in told.text
    assert read_config(Path("harbour-2.yml")).config.base_model == "demo-tiny"


@needs_trainer
def test_a_file_is_replaced_only_when_asked(folder: Path) -> None:
    (folder / "mine.yml").write_text("mine", "utf-8")
    converse(*TO_PLAN, "", "2", "mine.yml", "", "q")
    assert (folder / "mine.yml").read_text("utf-8") == "mine"
    converse(*TO_PLAN, "", "2", "mine.yml", "1")
    assert saved("mine.yml").base_model == "demo-tiny"


@needs_trainer
def test_a_config_that_cannot_be_written_is_a_sentence(folder: Path) -> None:
    (folder / "file").write_text("", "utf-8")
    told = converse(*TO_PLAN, "", "2", "a\0b.yml", "file/out.yml", "q")
    assert "That is no text." in told.text
    assert "out.yml could not be written." in told.text


# --- starting


def without(draft: Draft, package: str) -> Draft:
    assert draft.machine is not None
    draft.machine = replace(draft.machine, stack={**draft.machine.stack, package: None})
    return draft


def undone(**answers: object) -> Draft:
    draft = drafted()
    for name, answer in answers.items():
        setattr(draft, name, answer)
    return draft


@pytest.mark.parametrize(
    ("make", "what", "status"),
    [
        (Draft, "No device is chosen.", 2),
        (lambda: undone(model=None), "No model is chosen.", 2),
        (lambda: undone(model="ministral-3-3b", dataset=None), "No dataset is chosen.", 2),
        (lambda: drafted("H100"), "is planned for and not here.", 2),
        (lambda: drafted(resume_from_checkpoint=True), "goes on with a run", 2),
        (lambda: without(drafted(), "torch"), "The training stack is not installed.", 2),
        (lambda: undone(model="mistral-medium-3.5", device=small_gpu()), "It does not fit", 3),
        (lambda: on_gpu(""), "torch 2.13.0 cannot use a GPU.", 2),
        (lambda: on_gpu("13.0"), "driver is too old for the installed torch 2.13.0.", 2),
    ],
)
def test_why_a_run_cannot_start(make: Callable[[], Draft], what: str, status: int) -> None:
    error = why_not(make())
    assert error is not None
    assert what in error.what
    assert error.exit_status == status
    with pytest.raises(UserError):
        start_run(make())


def on_gpu(torch_cuda: str) -> Draft:
    """A card that is here, under a driver of CUDA 12."""
    machine = replace(assume("H100"), assumed=False, cuda_version="12.2", torch_cuda=torch_cuda)
    stack = {**machine.stack, **dict.fromkeys(("transformers", "peft", "safetensors"), "1.0")}
    machine = replace(machine, stack={**stack, "torch": "2.13.0"})
    return undone(machine=machine, device=gpu_device(machine.gpus[0], machine))


def small_gpu() -> object:
    return replace(best_device(assume("6 GB")), planned=False)


@needs_trainer
def test_nothing_speaks_against_the_demo_and_packages_for_other_methods_may_miss() -> None:
    assert why_not(drafted()) is None
    assert why_not(without(drafted(), "pillow")) is None


def test_a_saved_config_means_the_same_from_its_own_folder(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", chat("hi", "ho"))
    draft = drafted()
    draft.dataset = DatasetConfig(path="rows.jsonl")
    save_config(draft, Path("here.yml"))
    save_config(draft, Path("deep/there.yml"))
    assert saved("here.yml").datasets[0].path == "rows.jsonl"
    assert saved("deep/there.yml").datasets[0].path == str(folder / "rows.jsonl")


@needs_trainer
@pytest.mark.slow
def test_enter_seven_times_trains_the_demo_to_its_end(home: Path) -> None:
    told = converse(*TO_PLAN, "max_steps=20", "", "")
    assert "step 10 of 20" in told.text
    assert "Finished at step 20" in told.lines[-1]
    run = find_run("harbour-pilot-demo-tiny")
    assert summarize(run).status == "finished"
    assert json.loads(run.plan.read_text("utf-8"))["estimate"]["verdict"] == "fits"
    again = start_run(drafted(max_steps=1))
    assert again.name == "harbour-pilot-demo-tiny-2"
    wait_until(lambda: summarize(again).status == "finished", 120)


# --- following


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_run_is_told_every_ten_seconds_and_at_its_end() -> None:
    run = create_run("told")
    written_run(run.path, 25, Ended("finished", 25))
    told = Conversation()
    follow_run(run, told.dialogue, Clock())
    steps = [line.split()[1] for line in told.lines if line.startswith("step") and "lr" in line]
    assert steps == ["1", "11", "19"]  # the phases between have asked the clock, too
    assert told.lines[-1].startswith("Finished at step 25")


def test_slow_steps_are_all_told() -> None:
    run = create_run("told")
    written_run(run.path, 4, Ended("finished", 4))
    told = Conversation()
    times: Iterator[float] = iter(range(0, 10**6, 61))
    follow_run(run, told.dialogue, lambda: next(times))
    steps = [line.split()[1] for line in told.lines if line.startswith("step") and "lr" in line]
    assert steps == ["1", "2", "3", "4"]


def test_a_run_that_failed_says_why() -> None:
    run = create_run("told")
    written_run(run.path, 3, Ended("failed", 3, "The loss is NaN.", "It diverged.", "Lower lr."))
    with pytest.raises(UserError, match=r"The loss is NaN\.") as raised:
        follow_run(run, Conversation().dialogue)
    assert raised.value.exit_status == 1


def test_ctrl_c_leaves_the_run_alone() -> None:
    run: RunFolder = create_run("live")

    def write(line: str) -> None:
        if line.startswith("step 1 "):
            raise KeyboardInterrupt

    with running_fake(run, steps=10**6, step_seconds=0.01) as trainer:
        with pytest.raises(Leave, match="live is still training: windtunnel watch live"):
            follow_run(run, Dialogue(write=write))
        assert trainer.poll() is None


def test_a_live_run_is_mentioned_first() -> None:
    with running_fake(create_run("live"), steps=10**6, step_seconds=0.05):
        told = converse("q")
    assert told.lines[1] == "▶ live is still training: windtunnel watch live"


def test_a_paused_run_is_not_called_training() -> None:
    run = create_run("live")
    with running_fake(run, steps=10**6, step_seconds=0.05):
        ask(run, "pause", timeout_seconds=PATIENCE_SECONDS)
        told = converse("q")
    assert told.lines[1] == "▶ live is still paused: windtunnel watch live"
