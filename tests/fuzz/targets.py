"""One target for each kind of file that people bring: any bytes give a result or a sentence.

What a target lets out is a finding. Its seed is kept in SEEDS, which the default tests run.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from engine.catalog import TokenizerSpec
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer, write_tekken
from engine.config import DatasetConfig, parse_config, write_config
from engine.data.rows import iterate_rendered
from engine.errors import UserError
from engine.events import Recorded, format_line
from engine.report.run import headline
from engine.runs import RunFolder
from engine.runs.comparison import compare_figures, read_curves
from engine.runs.history import History
from engine.runs.summary import Follower, summarize
from tests.support.data import about, chat, config_of
from tests.support.tokenizers import SPECS, tokenizer_of
from tests.support.written_runs import step_event

NASTY: tuple[Any, ...] = (
    *(None, True, "", [], {}, 0, -1, 2**63, 10**400, 1e308, float("inf"), float("nan")),
    *("\x1b[31m", "\ud800", "../../etc/passwd", "http://[::1/", "file:///dev/zero", "x" * 5000),
    *("((a+)+)+!", "__import__('os')", [[[[[]]]]], {"a": {"b": {}}}, "1" * 5000),
)


def read_config_text(data: bytes, folder: Path) -> None:
    """Read, written and read again it is the same config."""
    try:
        config = parse_config(data.decode("utf-8", "replace")).config
        assert parse_config(write_config(config)).config == config
    except UserError as error:
        str(error)


def read_rows(data: bytes, folder: Path) -> None:
    """Rows, with images, rendered; nothing is fetched."""
    (folder / "rows.jsonl").write_bytes(data)
    config = config_of(DatasetConfig(path="rows.jsonl"))
    try:
        for row in iterate_rendered(config, folder, seeing()):
            str(row.problem)
    except UserError as error:
        str(error)


def read_events(data: bytes, folder: Path) -> None:
    """Everything that is told of a run, from its events."""
    run = RunFolder(folder)
    run.events.write_bytes(data)
    summarize(run)
    curves = read_curves(run)
    compare_figures(curves, curves)
    history, follower = History(), Follower(run.events)
    while events := follower.read():
        history.add(events)
    for status in ("running", "paused", "finished", "stopped", "failed", "lost", None):
        headline(history, status, 2e9)


def read_tokenizer(data: bytes, folder: Path) -> None:
    """A tokenizer file, and a text."""
    (folder / "tekken.json").write_bytes(data)
    try:
        tokenizer = open_tokenizer(folder)
        list(tokenizer.pieces(tokenizer.encode_ordinary("Hello,  world 12")))
    except UserError as error:
        str(error)


@cache
def seeing() -> ChatTokenizer:
    return tokenizer_of(SPECS["v13"])


@cache
def small_tekken(folder: Path) -> bytes:
    """A whole file of 2,000 tokens."""
    path = folder / "tekken_seed.json"
    write_tekken(TokenizerSpec("v13", think=True, image=(14, 1540, 2)), path)
    content = json.loads(path.read_text("utf-8"))
    path.unlink()
    content["vocab"] = content["vocab"][:2000]
    content["config"]["default_vocab_size"] = 3000
    return json.dumps(content).encode()


def _line(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


CONFIG: dict[str, Any] = {
    "base_model": "ministral-3-3b",
    "adapter": "lora",
    "lora_r": 8,
    "lora_target_modules": ["q_proj"],
    "learning_rate": 1e-4,
    "hub_model_id": "you/model",
    "datasets": [{"path": "rows.jsonl", "roles": {"user": ["human"]}}],
    "overrides_of_model_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ROW = about("cat.png", "http://a.example/b.png", "data:image/png;base64,AAAA", tools=[TOOL])
EVENTS = [json.loads(format_line(Recorded(seq, 1e9 + seq, step_event(seq)))) for seq in (1, 2)]

SEEDS: dict[str, list[bytes]] = {
    "config": [
        json.dumps(CONFIG).encode(),
        b"base_model: x\n? '" + b"9" * 5000 + b"'\n: 1\n",
        b"base_model: x\nmicro_batch_size: 1" + b"0" * 400,
        b"base_model: a/" + b"b" * 300,
    ],
    "rows": [
        _line(ROW, chat("Hello?")),
        _line(about("http://[::1/"), about("http://a:99999/x"), about("\ud800"), about("file://")),
    ],
    "events": [
        _line(*EVENTS),
        _line(EVENTS[0], EVENTS[1] | {"tokens": 10**400}),
        _line(EVENTS[0], EVENTS[1] | {"loss": 1e308, "seconds": 1e38}),
        _line(EVENTS[0] | {"time": 1e300}),
        _line(EVENTS[0] | {"step": 0}),
        b"",
    ],
    "tokenizer": [
        json.dumps({"config": {"version": "v13", "default_num_special_tokens": 2**63}}).encode()
    ],
}
TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "config": read_config_text,
    "rows": read_rows,
    "events": read_events,
    "tokenizer": read_tokenizer,
}


def examples(name: str, folder: Path) -> st.SearchStrategy[bytes]:
    """Seeds with a few of their values or bytes replaced, and bytes of no meaning."""
    seeds = SEEDS[name] + ([small_tekken(folder)] if name == "tokenizer" else [])
    return st.one_of(
        st.sampled_from(seeds).flatmap(_with_nasty_values),
        st.sampled_from(seeds).flatmap(_with_other_bytes),
        st.binary(max_size=200),
    )


def _with_nasty_values(seed: bytes) -> st.SearchStrategy[bytes]:
    try:
        lines = [json.loads(line) for line in seed.splitlines()]
    except ValueError:
        return st.just(seed)
    places = [(n, path) for n, line in enumerate(lines) for path in _paths(line)]
    changes = st.lists(st.tuples(st.sampled_from(places), st.sampled_from(NASTY)), max_size=4)
    return changes.map(partial(_changed, seed)) if places else st.just(seed)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of the first members of lists only: a vocabulary has thousands that are alike."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3])
    below = [
        each
        for key, inner in inside
        for each in ((*path, key), *(_paths(inner, (*path, key)) if _has(inner) else ()))
    ]
    return below


def _has(value: object) -> bool:
    return isinstance(value, dict | list)


def _changed(seed: bytes, changes: list[tuple[tuple[int, tuple[Any, ...]], Any]]) -> bytes:
    lines = [json.loads(line) for line in seed.splitlines()]
    for (number, path), value in changes:
        place = lines[number]
        for key in path[:-1]:
            usable = isinstance(place, dict) and key in place
            usable = usable or (isinstance(place, list) and isinstance(key, int))
            place = place[key] if usable and (isinstance(place, dict) or key < len(place)) else None
        if isinstance(place, dict) or (isinstance(place, list) and path[-1] in range(len(place))):
            place[path[-1]] = deepcopy(value)
    return _line(*lines)


def _with_other_bytes(seed: bytes) -> st.SearchStrategy[bytes]:
    def change(places: list[tuple[int, int]]) -> bytes:
        found = bytearray(seed)
        for place, byte in places:
            if found:
                found[place % len(found)] = byte
        return bytes(found)

    place = st.integers(0, max(0, len(seed) - 1))
    return st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=5).map(change)
