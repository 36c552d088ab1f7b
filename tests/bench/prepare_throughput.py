"""Rows a CPU second of `prepare`, against two other ways to the same ids and labels.

Run with `python -m tests.bench.prepare_throughput`. Six figures for conversations of 1, 3, 6 and
12 turns, of about the same length in all:

- json: a line of the file parsed, by the standard library;
- read: a parsed row to our messages, everything in it looked at;
- path: a parsed row to ids and labels in memory, our reader and renderer;
- prepare: the whole of it, from a JSONL file to arrays on disk;
- encode: mistral-common's `encode_chat_completion`, which gives ids and no labels;
- double: labels by comparing encodings, as Axolotl's chat_template strategy does where a tokenizer
  gives no offsets: one encode of the row, and for every answer one of the row up to it and one
  with a dummy in its place (2k + 1 encodes of k answers).

Every row's ids and labels are asserted equal before anything is timed. Repetitions take turns, and
the fastest counts, because a busy machine only ever adds time.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.request import ChatCompletionRequest

from engine.catalog import TokenizerSpec
from engine.chat.conversation import RowFormat
from engine.chat.render import LabelRule, labels, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer, build_tokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import prepare
from engine.data.prepared import Prepared
from tests.support.oracle import mistral_of

TURNS = (1, 3, 6, 12)
WORDS_A_ROW = 800
DUMMY = "[[dummy_message]]"
# Axolotl learns an end of sequence only this close behind the answer.
EOS_WITHIN_TOKENS = 3
TEXT = (
    "the river carries slow water past a mill and every lamp in town answers with its own small"
    " light while someone counts invoices gradients harbour tickets Straße naïveté ответ 东京 42"
)
WORDS = TEXT.split()
ROW_FORMAT = RowFormat()

Row = dict[str, Any]
IdsAndLabels = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows a CPU second, by way, for conversations of so many turns."""

    turns: int
    mean_tokens: float
    json: float
    read: float
    path: float
    prepare: float
    encode: float
    double: float


def conversation(rng: random.Random, turns: int) -> Row:
    """A system prompt and `turns` questions and answers of plain words."""

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    messages = [{"role": "system", "content": words(WORDS_A_ROW // 20)}]
    for _ in range(turns):
        messages.append({"role": "user", "content": words(WORDS_A_ROW // (3 * turns))})
        messages.append({"role": "assistant", "content": words(2 * WORDS_A_ROW // (3 * turns))})
    return {"messages": messages}


def our_path(row: Row, tokenizer: ChatTokenizer) -> IdsAndLabels:
    rendered = render(read_row(row, ROW_FORMAT), tokenizer)
    learned = labels(rendered.input_ids, rendered.kinds, LabelRule())
    return rendered.input_ids, learned


def encode(messages: list[dict[str, Any]], tokenizer: ChatTokenizer) -> list[int]:
    request: Any = ChatCompletionRequest.from_openai(messages)
    return mistral_of(tokenizer).encode_chat_completion(request).tokens


def double_tokenization(row: Row, tokenizer: ChatTokenizer) -> IdsAndLabels:
    messages, eos = row["messages"], tokenizer.specials.eos
    ids = encode(messages, tokenizer)
    found = [-100] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        with_dummy = encode([*messages[:index], {"role": "assistant", "content": DUMMY}], tokenizer)
        with_answer = encode(messages[: index + 1], tokenizer)
        start, end = differing_span(with_dummy, with_answer)
        found[start:end] = ids[start:end]
        at = ids.index(eos, end)
        if at - end < EOS_WITHIN_TOKENS:
            found[at] = ids[at]
    return ids, found


def differing_span(dummy: list[int], full: list[int]) -> tuple[int, int]:
    """Where `full` differs from `dummy`, counted from both ends."""
    shorter = min(len(dummy), len(full))
    start = next(at for at in range(shorter) if dummy[at] != full[at])
    same = next(back for back in range(shorter) if dummy[-1 - back] != full[-1 - back])
    return start, len(full) - same


def assert_equal(rows: list[Row], prepared: Prepared, tokenizer: ChatTokenizer) -> None:
    """Ids of all four ways, and labels of the three that give them, row for row."""
    for index, row in enumerate(rows):
        ids, found = (list(map(int, values)) for values in our_path(row, tokenizer))
        assert encode(row["messages"], tokenizer) == ids
        assert double_tokenization(row, tokenizer) == (ids, found)
        stored = prepared.rendered(index)
        assert stored.input_ids.tolist() == ids
        assert labels(stored.input_ids, stored.kinds, LabelRule()).tolist() == found


def measure(turns: int, count: int, repetitions: int, tokenizer: ChatTokenizer) -> Measured:
    """Figures of `count` rows; raises AssertionError where a way gives other ids or labels."""
    rng = random.Random(turns)
    rows = [conversation(rng, turns) for _ in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = RunConfig(base_model="any", datasets=(DatasetConfig(path=str(data)),))
        stores = iter(range(repetitions + 1))

        def prepare_anew() -> Prepared:
            return prepare(config, folder, tokenizer, folder / f"store-{next(stores)}")

        assert_equal(rows, prepare_anew(), tokenizer)
        lines = data.read_bytes().splitlines()
        ways: dict[str, Callable[[], object]] = {
            "json": lambda: [json.loads(line) for line in lines],
            "read": lambda: [read_row(row, ROW_FORMAT) for row in rows],
            "path": lambda: [our_path(row, tokenizer) for row in rows],
            "prepare": prepare_anew,
            "encode": lambda: [encode(row["messages"], tokenizer) for row in rows],
            "double": lambda: [double_tokenization(row, tokenizer) for row in rows],
        }
        fastest = dict.fromkeys(ways, float("inf"))
        for _ in range(repetitions):
            for way, work in ways.items():
                start = time.process_time()
                work()
                fastest[way] = min(fastest[way], time.process_time() - start)
    tokens = sum(len(our_path(row, tokenizer)[0]) for row in rows) / count
    return Measured(turns, tokens, **{way: count / fastest[way] for way in ways})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--version", default="v13", help="tokenizer version: v11, v13 or v15")
    options = parser.parse_args()
    tokenizer = build_tokenizer(TokenizerSpec(options.version, settings=options.version == "v15"))
    print(f"rows a CPU second, {options.rows} rows, tokenizer {options.version}")
    print(
        "turns  tokens |   json    read    path prepare  encode  double"
        " | json/read path/encode path/double prepare/double"
    )
    for turns in TURNS:
        found = measure(turns, options.rows, options.repetitions, tokenizer)
        print(
            f"{turns:5} {found.mean_tokens:7.0f} | {found.json:6.0f} {found.read:7.0f}"
            f" {found.path:7.0f} {found.prepare:7.0f} {found.encode:7.0f} {found.double:7.0f}"
            f" | {found.json / found.read:8.1f}x {found.path / found.encode:10.1f}x"
            f" {found.path / found.double:10.1f}x {found.prepare / found.double:13.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
