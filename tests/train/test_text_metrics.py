"""What the model writes by itself: the figures are those of answers that were really generated."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.catalog.cards import Sampling
from engine.chat.conversation import RowFormat
from engine.chat.render import WITHHELD, Kind, LabelRule, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.events import Answers, Drift, Event, Note, Sample
from engine.runs import Follower
from engine.train.batches import Rows
from engine.train.evaluate import general_questions
from engine.train.generate import ask, ask_by_default, generate
from engine.train.loop import Training
from engine.train.run import sampling_of
from engine.train.text_metrics import (
    Reference,
    TextMetrics,
    calls_agree,
    choose_references,
    find_reference,
    read_calls,
)
from tests.support.tiny import (
    MISTRAL,
    MakeRows,
    Models,
    Row,
    learn_by_heart,
    row,
    settings,
    training,
    wake_adapter,
    write_model,
)
from tests.support.tokenizers import SPECS, tokenizer_of
from tests.support.trainers import VOCABULARY as SMALL
from tests.support.trainers import small_tekken

TAUGHT = 4


def tokenizer(version: str = "v13") -> ChatTokenizer:
    return tokenizer_of(SPECS[version])


@pytest.fixture(scope="module")
def taught(model_folder: Models, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A model that knows four rows by heart, and never learned to end the fourth."""
    given = [row(4, 3 + n, seed=n) for n in range(TAUGHT)]
    given[3] = given[3][:-1]
    return learn_by_heart(tmp_path_factory.mktemp("taught"), model_folder("ministral3"), given)


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that has expectations, and a small tokenizer of its own."""
    folder = tmp_path_factory.mktemp("sure") / "model"
    write_model(folder, MISTRAL | {"vocab_size": SMALL, "initializer_range": 0.5})
    (folder / "tekken.json").write_text(small_tekken(), "utf-8")
    return folder


def measures(run: Training, sets: dict[str, Rows], home: Path, **keys: Any) -> TextMetrics:
    config = settings(**({"eval_drift": False, "eval_max_new_tokens": 20} | keys))
    return TextMetrics(run.model, run.base.device, sets, config, tokenizer(), home)


def events(run: Training, sets: dict[str, Rows], home: Path, **keys: Any) -> list[Event]:
    return list(measures(run, sets, home, **keys).take(0, inside=False))


class TestFigures:
    def test_of_real_answers(self, taught: Training, make_rows: MakeRows, tmp_path: Path) -> None:
        rows = make_rows(
            [
                *(row(4, 3 + n, seed=n) for n in range(TAUGHT)),
                row(5, 4, seed=90),
                row(3, 6, seed=91),
            ]
        )
        made, target = [], []
        for index in range(len(rows)):
            reference = find_reference(rows, index, LabelRule())
            assert reference
            ids = rows.ids(index).tolist()
            target.append(ids[reference.begins : reference.ends])
            question = ids[: reference.begins]
            asked = (taught.model, taught.base.device, question)
            made.append(generate(*asked, end=2, max_new_tokens=20))
        (found,) = events(taught, {"some": rows}, tmp_path)
        assert isinstance(found, Answers)
        assert (found.step, found.dataset, found.rows) == (0, "some", 6)
        assert found.exact == sum(m == w for m, w in zip(made, target, strict=True)) / 6
        assert found.stopped == sum(m[-1] == 2 for m in made) / 6
        ratios = [len(m) / len(w) for m, w in zip(made, target, strict=True)]
        assert found.length_ratio == np.median(ratios)
        assert 0.5 <= found.exact < found.stopped or found.stopped < 1
        assert (found.calls, found.calls_valid) == (0, None)

    def test_endless_answers(self, taught: Training, make_rows: MakeRows, tmp_path: Path) -> None:
        rows = make_rows([row(4, 3 + 3, seed=3)])
        (found,) = events(taught, {"some": rows}, tmp_path)
        assert isinstance(found, Answers)
        assert (found.stopped, found.exact) == (0.0, 0.0)
        assert found.length_ratio == 20 / 7

    def test_valid_calls(self, taught: Training, make_rows: MakeRows, tmp_path: Path) -> None:
        special = tokenizer().specials
        call: Row = [(special.call, Kind.CALL), (60, Kind.CALL)]
        rows = make_rows([[(1, Kind.BOS), (30, Kind.USER), *call, (2, Kind.EOS)]])
        (found,) = events(taught, {"some": rows}, tmp_path)
        assert isinstance(found, Answers)
        assert (found.calls, found.calls_valid) == (1, 0.0)


class TestBounds:
    @pytest.mark.parametrize(
        ("size", "sets", "each"), [(8, 1, 8), (8, 3, 3), (2, 3, 1), (99, 1, 8)]
    )
    def test_the_rows_are_shared_by_the_sets(
        self, size: int, sets: int, each: int, taught: Training, uneven: Rows, tmp_path: Path
    ) -> None:
        held_out = {f"set {n}": uneven for n in range(sets)}
        keys = {"eval_table_size": size, "eval_max_new_tokens": 40}
        found = events(taught, held_out, tmp_path, **keys)
        assert [e.rows for e in found if isinstance(e, Answers)] == [each] * sets

    def test_a_quarter_inside_a_run(self, taught: Training, uneven: Rows, tmp_path: Path) -> None:
        measure = measures(taught, {"some": uneven}, tmp_path, eval_max_new_tokens=40)
        (found,) = measure.take(20, inside=True)
        assert isinstance(found, Answers)
        assert found.rows == 2

    def test_zero_generates_none(self, taught: Training, uneven: Rows, tmp_path: Path) -> None:
        assert events(taught, {"some": uneven}, tmp_path, eval_table_size=0) == []

    def test_long_references_are_out(self, taught: Training, uneven: Rows, tmp_path: Path) -> None:
        config = settings(eval_max_new_tokens=4)
        found = choose_references(uneven, config, 8)
        assert sorted(r.tokens for r in found) == [2, 2, 3, 4]
        assert choose_references(uneven, config, 3) == found[:3]
        (note,) = events(taught, {"some": uneven}, tmp_path, eval_max_new_tokens=1)
        assert isinstance(note, Note)
        assert note.text.startswith("some: no answer is short enough for eval_max_new_tokens: 1")

    def test_which_rows_they_are_follows_the_seed(self, uneven: Rows) -> None:
        one, same, other = (choose_references(uneven, settings(seed=seed), 4) for seed in (1, 1, 2))
        assert one == same
        assert one != other


A, T, C = (1, Kind.BOS), (50, Kind.TEXT), (60, Kind.CALL)
U, H, E = (30, Kind.USER), (40, Kind.THINK), (2, Kind.EOS)
HIDDEN = (51, Kind.TEXT | WITHHELD)
CASES: dict[str, tuple[list[tuple[int, int]], Reference | None]] = {
    "the last answer": ([A, U, T, E, U, T, T, E], Reference(0, 5, 8, False)),
    "the last that calls": ([A, U, C, C, E, U, T, E], Reference(0, 2, 5, True)),
    "with its thought": ([A, U, H, H, T, E], Reference(0, 2, 6, False)),
    "two in a row": ([A, U, T, E, T, E], Reference(0, 4, 6, False)),
    "none that was cut off": ([A, U, T, E, U, T], Reference(0, 2, 4, False)),
    "none that is withheld": (
        [A, U, T, E, U, HIDDEN, (2, Kind.EOS | WITHHELD)],
        Reference(0, 2, 4, False),
    ),
    "nothing without an end": ([A, U, T], None),
}


@pytest.mark.parametrize(("given", "target"), CASES.values(), ids=CASES)
def test_reference_of_a_row(given: Row, target: Reference | None, make_rows: MakeRows) -> None:
    for rule in (LabelRule(), LabelRule(inputs=True)):
        assert find_reference(make_rows([given]), 0, rule) == target


def test_a_thought_that_is_not_learned_is_given(make_rows: MakeRows) -> None:
    rows = make_rows([[A, U, H, H, T, E]])
    assert find_reference(rows, 0, LabelRule(thinking=False)) == Reference(0, 4, 6, False)


def calling(version: str, *calls: tuple[str, str]) -> list[int]:
    """The tokens of an answer with these calls, as the tokenizer writes them."""
    listed = [
        {"id": f"abcdefgh{n}", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    said = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": listed},
    ]
    rendered = render(read_row({"messages": said}, RowFormat()), tokenizer(version))
    ours = rendered.kinds >= Kind.TEXT
    return [int(token) for token in rendered.input_ids[ours]]


@pytest.mark.parametrize("version", ["v7", "v11", "v13", "v15"])
class TestCalls:
    def test_they_are_read_as_the_tokenizer_writes_them(self, version: str) -> None:
        both = calling(version, ("get_weather", '{"city": "Paris"}'), ("tell_time", "{}"))
        assert read_calls(both, tokenizer(version)) == ["get_weather", "tell_time"]
        assert read_calls(both[:3], tokenizer(version)) == []

    def test_they_agree_by_their_names_and_not_by_their_arguments(self, version: str) -> None:
        target = calling(version, ("f", '{"a": 1}'))
        agree = functools.partial(calls_agree, target=target, tokenizer=tokenizer(version))
        assert agree(calling(version, ("f", '{"b": [2, {}]}')))
        assert not agree(calling(version, ("g", '{"a": 1}')))
        assert not agree(calling(version, ("f", "{}"), ("f", "{}")))
        assert not agree([])

    def test_one_that_is_cut_off_is_none(self, version: str) -> None:
        whole = calling(version, ("f", '{"a": "a long text in here"}'))
        assert read_calls(whole[:-3], tokenizer(version)) is None

    def test_arguments_that_are_no_object_are_none(self, version: str) -> None:
        chat = tokenizer(version)
        at = chat.specials.args if version != "v7" else chat.specials.call
        whole = calling(version, ("f", "{}"))
        assert at is not None
        head = whole[: whole.index(at) + 1]
        for text in ("[1]", "3", "{", "", '[{"name": "f"}]', '[{"name": "f", "arguments": 2}]'):
            made = [*head, *(rank + chat.first_text_id for rank in chat.encode_ordinary(text))]
            assert read_calls([*made, 2], chat) is None, text


class TestDrift:
    def run(self, folder: Path, home: Path, rows: Rows) -> Training:
        keys = {"adapter": "lora", "lora_r": 4, "lora_alpha": 64, "lora_target_linear": True}
        return training(home, settings(folder, **keys), rows)

    def test_warned_of_once(self, sure: Path, uneven: Rows, tmp_path: Path) -> None:
        run = self.run(sure, tmp_path, uneven)
        small = open_tokenizer(sure)
        measure = TextMetrics(run.model, run.base.device, {}, run.config, small, tmp_path)
        (before,) = measure.take(0, inside=False)
        assert isinstance(before, Drift)
        assert before.kl == 0.0
        wake_adapter(run.model)
        after, note = measure.take(5, inside=True)
        assert isinstance(after, Drift)
        assert after.kl > 0.5
        assert after.tokens == before.tokens > 300
        assert isinstance(note, Note)
        assert note.level == "warning"
        assert f"{after.kl:.2f} nats a token" in note.text
        assert [type(event) for event in measure.take(9, inside=False)] == [Drift]


def test_default_prompts_are_two_held_out_rows_and_a_general_one(make_rows: MakeRows) -> None:
    said = [*tokenizer().encode_ordinary("How deep is it?")]
    question: Row = [(rank + tokenizer().first_text_id, Kind.USER) for rank in said]
    with_image: Row = [A, (10, Kind.IMAGE), U, T, E]
    rows = make_rows([with_image, [A, *question, T, E, U, T, E], [A, U, T, E], [A, U, U, T, E]])
    config = settings(datasets=[])
    first, second, general = ask_by_default({"some": rows}, tokenizer(), config)
    assert first.text == "How deep is it?"
    assert first.tokens == tuple(token for token, _ in [A, *question])
    assert second.tokens == (A[0], U[0])
    assert general == ask(general_questions()[0], tokenizer(), config)
    assert ask_by_default({}, tokenizer(), config) == [general]


@pytest.mark.parametrize(
    ("model", "effort", "target"),
    [
        ("ministral-3-8b", None, (0.1, 1.0, 512)),
        ("magistral-small-2509", None, (0.7, 0.95, 512)),
        ("mistral-medium-3.5", "none", (0.0, 1.0, 256)),
        ("mistral-medium-3.5", "high", (0.7, 0.95, 512)),
        ("demo-tiny", None, (0.0, 1.0, 256)),
        ("a/folder", None, (0.0, 1.0, 256)),
    ],
)
def test_sampling(model: str, effort: str | None, target: tuple[float, float, int]) -> None:
    keys = {"chat_template_kwargs": {"reasoning_effort": effort}} if effort else {}
    found = sampling_of(settings(model, **keys))
    assert (found.temperature, found.top_p, found.max_tokens) == target


def test_samples_leave_the_rng_state_alone(sure: Path, uneven: Rows, tmp_path: Path) -> None:
    run = training(tmp_path, settings(sure), uneven)
    run.tokenizer = open_tokenizer(sure)
    run.sampling = Sampling(2.0, 1.0, 12)
    prompt = ask("Hello?", run.tokenizer, run.config)
    before = torch.get_rng_state()
    run.sample([prompt, prompt], "before")
    assert torch.equal(torch.get_rng_state(), before)
    run.sampling = Sampling(0.0, 1.0, 12)
    run.sample([prompt], "after")
    events = [recorded.event for recorded in Follower(run.session.run.events).read()]
    first, second, greedy = (event.text for event in events if isinstance(event, Sample))
    assert first == second != greedy
