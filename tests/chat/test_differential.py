"""The renderer, with and without images, against mistral-common and a scan of control tokens."""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers import image as stock

from engine.chat.conversation import RowFormat, RowProblem
from engine.chat.images import grid
from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, Rendered, labels, render, truncate
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig
from tests.support import oracle
from tests.support.exact import render_exact
from tests.support.pictures import png
from tests.support.strategies import NON_LATIN, efforts, rows
from tests.support.tokenizers import ANSWER, SPECS, USER, Tokenizers, tokenizer_of

# Markers in texts stay texts, as in mistral-common.
AS_WRITTEN = RowFormat(DatasetConfig(path=".", read_markers=False, split_thinking=False))
FEATURES = ("tools and results", "thinking", "several system prompts", "non-Latin text")


def thinks(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    chunks = content if isinstance(content, list) else []
    return "reasoning" in str(message.keys()) or any(
        chunk["type"] == "thinking" for chunk in chunks
    )


def features(row: Mapping[str, Any]) -> list[str]:
    messages = row["messages"]
    has = (
        "tools" in row and any(message["role"] == "tool" for message in messages),
        any(map(thinks, messages)),
        sum(message["role"] in ("system", "developer") for message in messages) > 1,
        any(text in str(messages) for text in NON_LATIN),
    )
    return [feature for feature, present in zip(FEATURES, has, strict=True) if present]


def compare(row: dict[str, Any], effort: str | None, tokenizer: ChatTokenizer) -> Rendered | None:
    """Holds one row to both oracles; None where mistral-common refuses it, and we must too."""
    written = effort or ("high" if any(map(thinks, row["messages"])) else None)
    asked = {"reasoning_effort": written} if tokenizer.efforts else {}
    expected = oracle.encode(row | asked, tokenizer)
    row = row | ({"reasoning_effort": effort} if tokenizer.efforts else {})
    if expected is None:
        with pytest.raises(RowProblem):
            render(read_row(row, AS_WRITTEN), tokenizer)
        return None
    conversation = read_row(row, AS_WRITTEN)
    fast, exact = render(conversation, tokenizer), render_exact(conversation, tokenizer)
    assert fast.input_ids.tolist() == expected
    # The ids do not say that a text of v3's user is the system prompt; `exact` does.
    kinds = np.where(fast.kinds == Kind.SYSTEM, Kind.USER, fast.kinds)
    kinds = kinds if tokenizer.version == "v3" else fast.kinds
    assert kinds.tolist() == oracle.scan(expected, tokenizer).tolist()
    learned = labels(fast.input_ids, fast.kinds, LabelRule()).tolist()
    assert learned == oracle.scan_labels(expected, tokenizer)
    for name in ("input_ids", "kinds", "sources"):
        one, other = getattr(fast, name), getattr(exact, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert fast.images == exact.images
    return fast


def compare_many(tokenizers: Tokenizers, examples: int) -> dict[str, Counter[str]]:
    """How many conversations of each version mistral-common took, and with which features."""
    counts: dict[str, Counter[str]] = {version: Counter() for version in SPECS}

    @settings(
        max_examples=examples,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(row=rows(), effort=efforts)
    def compare_one(row: dict[str, Any], effort: str | None) -> None:
        for version in SPECS:
            if compare(row, effort, tokenizers[version]):
                counts[version].update(["all", *features(row)])

    compare_one()
    for version, count in counts.items():
        print(version, dict(count))
    return counts


def test_ids_kinds_sources_and_labels_equal_both_oracles(tokenizers: Tokenizers) -> None:
    counts = compare_many(tokenizers, examples=400)
    total = sum(counts.values(), Counter())
    print("all versions", dict(total))
    assert total["all"] >= 1200
    assert all(total[feature] >= 150 for feature in FEATURES)


@pytest.mark.slow
def test_conversations_of_every_version_equal_both_oracles(tokenizers: Tokenizers) -> None:
    for version, count in compare_many(tokenizers, examples=4000).items():
        assert count["all"] >= 2000
        for feature in FEATURES:
            # v3 to v11 have no thinking tokens: mistral-common refuses it there, and so do we.
            assert count[feature] >= 300 or (
                feature == "thinking" and version in ("v3", "v7", "v11")
            )


SEEING = {version: replace(spec, image=(14, 1540, 2)) for version, spec in SPECS.items()}
SIZES = ((20, 20), (60, 40), (29, 90), (2100, 1299), (3000, 2))


@pytest.fixture(scope="module")
def seeing() -> Iterator[Tokenizers]:
    """Tokenizers that read images, in every version.

    mistral-common makes pixels with OpenCV, which is not installed, and tokens without.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "transform_image", lambda image, size: np.empty(0))
        yield Tokenizers(SEEING)


def shown(size: tuple[int, int]) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(*size)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*chunks: object) -> dict[str, Any]:
    return {"messages": [USER | {"content": list(chunks)}, ANSWER]}


def rendered(row: dict[str, Any], tokenizer: ChatTokenizer) -> Rendered:
    return render(read_row(row, RowFormat()), tokenizer)


chunks = st.lists(
    st.one_of(
        st.sampled_from(SIZES).map(shown),
        st.sampled_from(("", "What?", "[IMG]", "a\n", "東京")).map(said),
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def rows_with_images(draw: Any) -> dict[str, Any]:
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


def test_ids_and_kinds_equal_mistral_commons(seeing: Tokenizers) -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(rows_with_images())
    def compare_one(row: dict[str, Any]) -> None:
        for version in SEEING:
            found = compare(row, None, seeing[version])
            if found is None:
                continue
            is_image = np.isin(found.input_ids, (10, 12, 13))
            assert np.array_equal((found.kinds & 0x7F) == Kind.IMAGE, is_image)
            assert sum(image.tokens for image in found.images) == is_image.sum()
            counts[version] += bool(found.images)

    compare_one()
    assert all(counts[version] >= 12 for version in SEEING), counts


def test_nothing_of_an_image_is_ever_learned(seeing: Tokenizers) -> None:
    row = ask(shown((60, 40)), said("What?"))
    found = rendered(row, seeing["v13"])
    for rule in (LabelRule(), LabelRule(inputs=True)):
        learned = labels(found.input_ids, found.kinds, rule)
        assert (learned[np.isin(found.input_ids, (10, 12, 13))] == IGNORED_LABEL).all()


def test_the_run_is_rows_that_end_with_a_break_and_an_end(seeing: Tokenizers) -> None:
    found = rendered(ask(shown((60, 40))), seeing["v13"])
    run = found.input_ids[(found.kinds == Kind.IMAGE)].tolist()
    assert run == [10, 10, 10, 12, 10, 10, 10, 13]
    assert [(image.rows, image.columns) for image in found.images] == [(2, 3)]


def test_a_smaller_limit_makes_a_smaller_grid_in_both_renderers(seeing: Tokenizers) -> None:
    tokenizer = seeing["v15"]
    assert tokenizer.image is not None
    spec = replace(tokenizer.image, longest=280)
    small = replace(tokenizer, image=spec)
    conversation = read_row(ask(shown((2100, 1299))), RowFormat())
    fast, exact = render(conversation, small), render_exact(conversation, small)
    assert (fast.images[0].rows, fast.images[0].columns) == grid(2100, 1299, spec) == (7, 10)
    assert np.array_equal(fast.input_ids, exact.input_ids)


def test_a_cut_keeps_whole_images_and_their_files(seeing: Tokenizers) -> None:
    first, second = shown((60, 40)), shown((20, 20))
    row = ask(first)
    row["messages"] += ask(said("and"), second, said("this?"))["messages"]
    whole = rendered(row, seeing["v13"])
    assert len(whole.images) == 2
    for limit in range(1, len(whole) + 1):
        cut = truncate(whole, limit)
        if cut is not None:
            ends = int((cut.input_ids == 13).sum())
            assert len(cut.images) == ends
            assert sum(image.tokens for image in cut.images) == (cut.kinds == Kind.IMAGE).sum()


def test_a_text_model_refuses_an_image() -> None:
    tokenizer = tokenizer_of(replace(SPECS["v13"], image=None))
    with pytest.raises(RowProblem) as caught:
        rendered(ask(shown((20, 20))), tokenizer)
    assert caught.value.what == "The message has an image, and this model reads only text."
    assert caught.value.message == 0


def test_results_with_images_came_with_v15(seeing: Tokenizers) -> None:
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
    found = render(conversation, seeing["v15"])
    assert len(found.images) == 1
    assert labels(found.input_ids, found.kinds, LabelRule())[-1] == seeing["v15"].specials.eos
    with pytest.raises(RowProblem, match="came with v15"):
        render(conversation, seeing["v13"])
