"""Downloads of a base model, from a web server that speaks as the hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import WorkError
from engine.train.fetch import refuse_full_disk

REPOSITORY = Path(__file__).parents[2]
COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "tekken.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4096,
    "consolidated.safetensors": b"the same weights once more",
}
WORK = """
import json, sys
from pathlib import Path
from engine.config import RunConfig
from engine.errors import UserError
from engine.train import fetch

reported = []
try:
    config = RunConfig(base_model=sys.argv[1])
    folder = fetch.locate_base(config, Path.cwd(), lambda *bytes: reported.append(bytes))
    files = sorted(path.name for path in folder.iterdir())
    size = (folder / "model.safetensors").stat().st_size
    print(json.dumps({"files": files, "size": size, "reported": reported}))
except UserError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__, "reported": reported}))
"""


@dataclass
class Hub:
    """What the server answers, and what it was asked for."""

    address: str = ""
    refusal: tuple[int, str] | None = None
    cut_after_bytes: int | None = None
    """The weights' connection ends there."""
    pause_seconds: float = 0.0
    """In the middle of the weights."""
    said_bytes: int | None = None
    """Size of the weights as the hub has it."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, range."""

    def weights_asked(self) -> list[str]:
        """The ranges in which the weights were fetched."""
        return [r for method, path, r in self.asked if method == "GET" and "model.safe" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, asked = self.hub, self.headers.get("Range", "")
        hub.asked.append((self.command, self.path, asked))
        if hub.refusal:
            self.answer(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
        elif "/tree/" in self.path:
            self.answer(200, json.dumps([_entry(name) for name in FILES]).encode())
        elif self.path.startswith("/api/"):
            self.answer(200, json.dumps({"id": "some/model", "sha": COMMIT}).encode())
        else:
            content = FILES[self.path.rpartition("/")[2]]
            start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", asked)) else 0
            headers = {"ETag": f'"{_sha(content)}"', "X-Repo-Commit": COMMIT}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206 if start else 200, content[start:], headers)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        said = self.hub.said_bytes if len(content) > 1000 else None
        self.send_header("Content-Length", str(said or len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(content) > 1000 and self.hub.pause_seconds:
            self.wfile.write(content[:400_000])
            time.sleep(self.hub.pause_seconds)
            content = content[400_000:]
        self.wfile.write(content[: self.hub.cut_after_bytes] if len(content) > 1000 else content)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str) -> dict[str, object]:
    size = len(FILES[name])
    return {"type": "file", "path": name, "size": size, "oid": _sha(FILES[name])[:40]}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": found}))
    found.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def locate(tmp_path: Path, hub: Hub) -> Callable[..., dict[str, Any]]:
    """Locate a model in a process of its own, whose cache stays from call to call."""

    def run(model: str = "some/model", **environment: str) -> dict[str, Any]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        clean |= {
            "PYTHONPATH": str(REPOSITORY),
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", WORK, model],
            env=clean | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def test_what_a_run_needs_is_fetched_once(hub: Hub, locate: Callable[..., dict[str, Any]]) -> None:
    expected = sorted(set(FILES) - {"consolidated.safetensors"})
    for _ in range(2):
        found = locate()
        assert found["files"] == expected
        assert found["size"] == len(FILES["model.safetensors"])
    assert len(hub.weights_asked()) == 1


def test_progress_is_reported_in_bytes(hub: Hub, locate: Callable[..., dict[str, Any]]) -> None:
    hub.pause_seconds = 1.5
    total = sum(len(content) for name, content in FILES.items() if "consolidated" not in name)
    reported = locate()["reported"]
    assert reported == sorted(reported)
    assert {whole for _, whole in reported} == {total}
    assert any(0 < done < total for done, _ in reported)


@pytest.mark.slow
def test_broken_connection_keeps_files(hub: Hub, locate: Callable[..., dict[str, Any]]) -> None:
    hub.cut_after_bytes = 300_000
    found = locate()
    assert found["kind"] == "WorkError"
    assert "broke off" in found["error"]
    begun, hub.cut_after_bytes = len(hub.asked), None
    assert locate()["size"] == len(FILES["model.safetensors"])
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked[begun:] if method == "GET"}
    assert fetched & FILES.keys() == {"model.safetensors"}


def test_a_model_that_is_here_needs_no_hub(hub: Hub, locate: Callable[..., dict[str, Any]]) -> None:
    first = locate()
    assert locate(HF_HUB_OFFLINE="1")["files"] == first["files"]
    assert locate(HF_ENDPOINT="http://127.0.0.1:9")["files"] == first["files"]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "people who accepted its terms"),
        (404, "RepoNotFound", "There is no model some/model"),
        (404, "RevisionNotFound", "There is no model some/model"),
        (500, "", "could not be downloaded"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(
    status: int, code: str, sentence: str, hub: Hub, locate: Callable[..., dict[str, Any]]
) -> None:
    hub.refusal = (status, code)
    assert sentence in locate()["error"]


def test_an_unreachable_hub_is_explained(locate: Callable[..., dict[str, Any]]) -> None:
    found = locate(HF_ENDPOINT="http://127.0.0.1:9")
    assert "could not be downloaded" in found["error"]


class TestRoom:
    def test_a_download_that_cannot_fit_does_not_begin(self, tmp_path: Path) -> None:
        with pytest.raises(WorkError) as caught:
            refuse_full_disk("some/model", 2**60, tmp_path / "not" / "made" / "yet")
        assert "1,073,741,824.0 GiB are still to be downloaded" in caught.value.why
        assert str(tmp_path) in caught.value.why

    def test_nothing_to_fetch_always_fits(self, tmp_path: Path) -> None:
        refuse_full_disk("some/model", 0, tmp_path)

    def test_asked_before_weights(self, hub: Hub, locate: Callable[..., dict[str, Any]]) -> None:
        hub.said_bytes = 2**60
        assert "does not fit on the disk" in locate()["error"]
        assert hub.weights_asked() == []
