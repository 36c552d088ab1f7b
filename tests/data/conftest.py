import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engine.catalog import TokenizerSpec
from engine.chat.tokenizer import ChatTokenizer, write_tekken
from tests.support.data import write_rows
from tests.support.tokenizers import tokenizer_of


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return tokenizer_of(TokenizerSpec("v13", think=True))


@pytest.fixture(scope="session")
def seeing() -> ChatTokenizer:
    """The same for a model that reads images."""
    return tokenizer_of(TokenizerSpec("v13", think=True, image=(14, 1540, 2)))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that holds only a tokenizer file."""
    folder = tmp_path_factory.mktemp("model")
    write_tekken(TokenizerSpec("v13", think=True), folder / "tekken.json")
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        return write_rows(tmp_path / name, *(f"{json.dumps(row)}\n" for row in rows))

    return write


@pytest.fixture
def without_privileges() -> None:
    """Skips where file modes do not bind."""
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
