"""Rows, configs and prepared folders that the tests of data share."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import DatasetConfig, RunConfig
from tui.plain import Dialogue


def config_of(*datasets: DatasetConfig, **keys: object) -> RunConfig:
    """A config of these datasets, whose model is of no matter."""
    return RunConfig.model_validate({"base_model": "any", "datasets": datasets, **keys})


def chat(question: str, answer: str = "Fine.") -> dict[str, Any]:
    """A row with one question and one answer."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def about(*names: object, **columns: object) -> dict[str, Any]:
    """A row that asks about images by their names."""
    chunks = [{"type": "image", "path": name} for name in names]
    content = [*chunks, {"type": "text", "text": "What is it?"}]
    asked, answered = chat("", "A cat.")["messages"]
    return {"messages": [asked | {"content": content}, answered], **columns}


def write_rows(path: Path, *rows: object) -> Path:
    """The file, with a row a line; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def content(folder: Path, *names: str) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {name: files[name] for name in names} if names else files


def killed_child(work: Callable[[], object]) -> None:
    """Runs `work` in a forked child that must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


class Conversation:
    """A person who gives prepared answers and then ctrl+d; everything that they read."""

    def __init__(self, *answers: str) -> None:
        self._answers = iter(answers)
        self.lines: list[str] = []
        self.dialogue = Dialogue(self._read, self.lines.append)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def _read(self, prompt: str) -> str:
        answer = next(self._answers, None)
        self.lines.append(prompt + (answer or ""))
        if answer is None:
            raise EOFError
        return answer

    def headings(self) -> list[str]:
        return [line.split("  ")[1].split(":")[0] for line in self.lines if " of 6  " in line]
