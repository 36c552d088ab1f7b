"""Images rendered: ids equal to mistral-common's, kinds, order, truncation and refusals."""

import base64
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers import image as stock

from engine.catalog import TokenizerSpec
from engine.chat.conversation import RowFormat, RowProblem
from engine.chat.images import grid
from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, labels, render, truncate
from engine.chat.row import read_row
from tests.support import oracle
from tests.support.exact import render_exact
from tests.support.pictures import png
from tests.support.tokenizers import SPECS as PLAIN
from tests.support.tokenizers import Tokenizers, tokenizer_of

SPECS = {version: replace(spec, image=(14, 1540, 2)) for version, spec in PLAIN.items()}
SIZES = ((20, 20), (60, 40), (29, 90), (2100, 1299), (3000, 2))
ANSWER = {"role": "assistant", "content": "A cat."}


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers(SPECS)


@pytest.fixture(scope="module", autouse=True)
def no_pixels():
    """mistral-common makes pixels with OpenCV, which is not installed, and tokens without."""
    patch = pytest.MonkeyPatch()
    patch.setattr(stock, "transform_image", lambda image, size: np.empty(0))
    yield
    patch.undo()


def shown(size: tuple[int, int]) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(*size)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*chunks: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(chunks)}, ANSWER]}


chunks = st.lists(
    st.one_of(
        st.sampled_from(SIZES).map(shown),
        st.sampled_from(("", "What?", "[IMG]", "a\n", "東京")).map(said),
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.sampled_from(("Look well.", "")))})
    for turn in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.sampled_from((1, 1, 2)))):
            messages.append({"role": "user", "content": draw(st.one_of(chunks, st.just("q")))})
        if draw(st.sampled_from((False, False, True))):
            ids = [f"call{turn}{index}abc" for index in range(2)]
            function = {"name": "look", "arguments": "{}"}
            calls = [{"id": each, "type": "function", "function": function} for each in ids]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            for each in draw(st.permutations(ids)):
                content = draw(st.one_of(chunks, st.just("seen")))
                messages.append({"role": "tool", "tool_call_id": each, "content": content})
        messages.append(ANSWER)
    return {"messages": messages}


def test_ids_and_kinds_equal_mistral_commons(tokenizers: Tokenizers) -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(rows())
    def compare(row: dict[str, Any]) -> None:
        for version in SPECS:
            tokenizer = tokenizers[version]
            expected = oracle.encode(row, tokenizer)
            if expected is None:
                with pytest.raises(RowProblem):
                    render(read_row(row, RowFormat()), tokenizer)
                continue
            conversation = read_row(row, RowFormat())
            fast, exact = render(conversation, tokenizer), render_exact(conversation, tokenizer)
            assert fast.input_ids.tolist() == exact.input_ids.tolist() == expected
            assert np.array_equal(fast.kinds, exact.kinds)
            assert np.array_equal(fast.sources, exact.sources)
            assert fast.images == exact.images
            is_image = np.isin(expected, (10, 12, 13))
            assert np.array_equal((fast.kinds & 0x7F) == Kind.IMAGE, is_image)
            assert sum(image.tokens for image in fast.images) == is_image.sum()
            counts[version] += bool(fast.images)

    compare()
    assert all(counts[version] >= 12 for version in SPECS), counts


def test_nothing_of_an_image_is_ever_learned(tokenizers: Tokenizers) -> None:
    row = ask(shown((60, 40)), said("What?"))
    found = render(read_row(row, RowFormat()), tokenizers["v13"])
    for rule in (LabelRule(), LabelRule(inputs=True)):
        learned = labels(found.input_ids, found.kinds, rule)
        assert (learned[np.isin(found.input_ids, (10, 12, 13))] == IGNORED_LABEL).all()


def test_the_run_is_rows_that_end_with_a_break_and_an_end(tokenizers: Tokenizers) -> None:
    found = render(read_row(ask(shown((60, 40))), RowFormat()), tokenizers["v13"])
    run = found.input_ids[(found.kinds == Kind.IMAGE)].tolist()
    assert run == [10, 10, 10, 12, 10, 10, 10, 13]
    assert [(image.rows, image.columns) for image in found.images] == [(2, 3)]


def test_a_smaller_limit_makes_a_smaller_grid_in_both_renderers(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v15"]
    assert tokenizer.image is not None
    spec = replace(tokenizer.image, longest=280)
    small = replace(tokenizer, image=spec)
    conversation = read_row(ask(shown((2100, 1299))), RowFormat())
    fast, exact = render(conversation, small), render_exact(conversation, small)
    assert (fast.images[0].rows, fast.images[0].columns) == grid(2100, 1299, spec) == (7, 10)
    assert np.array_equal(fast.input_ids, exact.input_ids)


def test_a_cut_keeps_whole_images_and_their_files(tokenizers: Tokenizers) -> None:
    first, second = shown((60, 40)), shown((20, 20))
    row = ask(first)
    row["messages"] += ask(said("and"), second, said("this?"))["messages"]
    whole = render(read_row(row, RowFormat()), tokenizers["v13"])
    assert len(whole.images) == 2
    for limit in range(1, len(whole) + 1):
        cut = truncate(whole, limit)
        if cut is not None:
            ends = int((cut.input_ids == 13).sum())
            assert len(cut.images) == ends
            assert sum(image.tokens for image in cut.images) == (cut.kinds == Kind.IMAGE).sum()


def test_a_text_model_refuses_an_image() -> None:
    tokenizer = tokenizer_of(TokenizerSpec("v13", think=True))
    with pytest.raises(RowProblem) as caught:
        render(read_row(ask(shown((20, 20))), RowFormat()), tokenizer)
    assert caught.value.what == "The message has an image, and this model reads only text."
    assert caught.value.message == 0


def test_results_with_images_came_with_v15(tokenizers: Tokenizers) -> None:
    call = {"id": "abcdefghi", "function": {"name": "look", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": [shown((20, 20))]},
            ANSWER,
        ]
    }
    conversation = read_row(row, RowFormat())
    found = render(conversation, tokenizers["v15"])
    assert len(found.images) == 1
    assert labels(found.input_ids, found.kinds, LabelRule())[-1] == tokenizers["v15"].specials.eos
    with pytest.raises(RowProblem, match="came with v15"):
        render(conversation, tokenizers["v13"])
