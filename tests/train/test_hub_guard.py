"""A trainer runs only code that was installed, and asks the network for nothing.

Tried in a process of its own: an importable `kernels` package is what makes transformers and
bitsandbytes fetch compiled code, and a web server in place of the hub counts what is asked of it.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from engine.config import write_config
from engine.train.batches import Rows
from engine.train.run import run
from tests.support.tiny import UNEVEN, open_session, settings, write_rows

REPOSITORY = Path(__file__).parents[2]
KERNELS = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
WORK = """
import os
import sys
import urllib.request
from pathlib import Path
import engine.train
import transformers.utils
import huggingface_hub
from engine.train.evaluate import score
from engine.train.fetch import leave_hub
from engine.train.generate import generate
from engine.train.checkpoint import export_trained
from tests.support.tiny import MINISTRAL3, UNEVEN, settings, training, write_model, write_rows

home = Path(sys.argv[1])
try:
    import kernels
except ImportError:
    print("kernels: blocked")
print("transformers sees kernels:", transformers.utils.is_kernels_available())
base = write_model(home / "base", MINISTRAL3)
rows = write_rows(home / "rows", UNEVEN)
for name, keys in (("full", {}), ("qlora", {"adapter": "qlora", "load_in_4bit": True})):
    config = settings(base, **keys)
    run = training(home / name, config, rows)
    run.step(1, run.order.step(1))
    run.save()
    score(run.model, run.base, rows, config)
    generate(run.model, run.base.device, [1, 40], end=2, max_new_tokens=3)
    # PEFT asks the hub about a base that is no folder here, or no longer one.
    if name == "qlora":
        run.model.peft_config["default"].base_model_name_or_path = "someone/tuned"
    export_trained(run.model, home / name, base, config)
    print("trained:", name)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/the-work-is-done")
huggingface_hub.file_exists("someone/asked", "config.json")
leave_hub()
try:
    huggingface_hub.file_exists("someone/later", "config.json")
except huggingface_hub.errors.OfflineModeIsEnabled:
    print("the hub: switched off")
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has nothing: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/the-work-is-done" else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        do_GET = do_POST = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_no_kernel_import_and_no_hub_request(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, asked = hub
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS)
    (site / "kernels-0.13.0.dist-info").mkdir()
    (site / "kernels-0.13.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.13.0\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "USE_HUB"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]),
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "kernels: blocked",
        "transformers sees kernels: False",
        "trained: full",
        "trained: qlora",
        "the hub: switched off",
    ]
    assert not (site / "kernels" / "imported").exists()
    assert asked[0] == "/the-work-is-done"
    # What the work does last shows that asking before would have been seen.
    assert any("someone/asked" in path for path in asked[1:])
    assert not any("someone/later" in path for path in asked)

    subprocess.run([sys.executable, "-c", "import kernels"], env=environment, check=True)
    assert (site / "kernels" / "imported").exists()


class Reached(Exception):
    """As far as the test goes."""


def test_when_hub_is_left(tmp_path: Path, ministral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows on the hub are read by a child, which inherits the environment.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    def read_rows(*_: object) -> tuple[Rows, dict[str, Rows]]:
        seen.append((os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE))
        return write_rows(tmp_path / "rows", UNEVEN), {}

    def load(*_: object, **__: object) -> None:
        seen.append((os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE))
        raise Reached

    monkeypatch.setattr("engine.train.run.open_tokenizer", lambda _: None)
    monkeypatch.setattr("engine.train.run.prepare_rows", read_rows)
    monkeypatch.setattr("engine.train.run.load_base", load)
    session = open_session(tmp_path)
    session.run.config.write_text(write_config(settings(ministral)))
    with pytest.raises(Reached):
        run(session, resume=False)
    assert seen == [("0", False), ("1", True)]
