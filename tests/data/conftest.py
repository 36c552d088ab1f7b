import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.chat.tokenizer import ChatTokenizer, TokenizerSpec, write_tekken
from tests.support.tokenizers import tokenizer_of


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return tokenizer_of(TokenizerSpec("v13", think=True))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that holds only a tokenizer file."""
    folder = tmp_path_factory.mktemp("model")
    write_tekken(TokenizerSpec("v13", think=True), folder / "tekken.json")
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def without_privileges() -> None:
    """Skips where file modes do not bind."""
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
