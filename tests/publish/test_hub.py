"""A result goes to a private repository; what the hub answers never fails a run."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.config import read_config
from engine.events import Note
from engine.publish.hub import publish_result
from engine.runs import RunFolder
from tests.support.written_runs import write_run


class Hub:
    """As much of the hub as an upload of small files needs; it keeps what it is sent."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.refuses = refuses
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if refuses:
                    self._answer(403, {"error": "You may not write here."})
                elif self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    self._answer(200, {"url": f"{hub.address}/me/pilot"})
                elif self.path.endswith("/preupload/main"):
                    files = json.loads(body)["files"]
                    entries = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                    self._answer(200, {"files": entries})
                elif "/commit/main" in self.path:
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            hub.files.append(entry["value"]["path"])
                    self._answer(
                        200,
                        {"commitUrl": f"{hub.address}/me/pilot/commit/1", "commitOid": "1" * 40},
                    )
                else:
                    self._answer(200, {})

            def do_GET(self) -> None:
                sha = {"sha": "1" * 40, "id": "me/pilot", "siblings": []}
                self._answer(200, sha)

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("X-Error-Message", str(content.get("error", "")))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(params=[False, True], ids=["open", "refusing"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(refuses=request.param)
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as a trainer is after it has its rows
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = write_run(tmp_path / "pilot", hub_model_id="me/pilot")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    return run


def test_a_finished_run_uploads_or_says_how_to_repeat_it(hub: Hub, run: RunFolder) -> None:
    events = list(publish_result(run, run.adapter, read_config(run.config).config))
    note = events[-1]
    assert isinstance(note, Note)
    if hub.refuses:
        assert note.level == "warning"
        assert f"windtunnel push {run.path}" in note.text
        assert "You may not write here" in note.text
        return
    assert note.level == "info", note.text
    made = hub.created[0]  # the client's newer releases say it in another word
    assert made.get("private") is True or made.get("visibility") == "private"
    assert sorted(hub.files) == ["README.md", "adapter_config.json"]
