"""Downloads of a base model from a server that speaks as the hub does; the demo's bases.

And the guards of a trainer: it runs only code that was installed, and asks the network for nothing.
Tried in a process of its own: an importable `kernels` package is what makes transformers and
bitsandbytes fetch compiled code.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from engine.catalog import find_model
from engine.catalog.rows import module_table
from engine.chat.tokenizer import open_tokenizer
from engine.config import write_config
from engine.errors import WorkError
from engine.train import fetch
from engine.train.batches import Rows
from engine.train.fetch import EMBEDDING, SPREAD, draw_embedding, refuse_full_disk, write_base
from engine.train.forward import head_of
from engine.train.generate import generate
from engine.train.model import load_base
from engine.train.run import run as run_training
from tests.support.tiny import UNEVEN, files_at_most, open_session, settings, write_rows

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

for model in sys.argv[1:]:
    reported = []
    try:
        config = RunConfig(base_model=model)
        folder = fetch.locate_base(config, Path.cwd(), lambda *bytes: reported.append(bytes))
        files = sorted(path.name for path in folder.iterdir())
        size = (folder / "model.safetensors").stat().st_size
        print(json.dumps({"files": files, "size": size, "reported": reported}))
    except UserError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""

NOBODY = "http://127.0.0.1:9"
Locate: TypeAlias = Callable[..., list[dict[str, Any]]]


@dataclass
class Hub:
    """What the server answers, and what it was asked for."""

    address: str = ""
    refusal: tuple[int, str] | None = None
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Refusals by the model's name."""
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
        named = [answer for name, answer in hub.refused.items() if name in self.path]
        if refusal := next(iter(named), hub.refusal):
            self.answer(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
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


def clean_environment(hub: Hub, home: Path, *path: Path) -> dict[str, str]:
    """A process's, whose hub is ours and whose cache is in `home`."""
    found = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "USE_HUB"))}
    return found | {
        "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY])),
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def printed(environment: dict[str, str], folder: Path, *words: str) -> list[str]:
    """The lines of a Python process that knows no other environment."""
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def locate(tmp_path: Path, hub: Hub) -> Locate:
    """Locate models in a process of its own, whose cache stays from call to call."""

    def run(*models: str, **environment: str) -> list[dict[str, Any]]:
        words = ("-c", WORK, *(models or ["some/model"]))
        lines = printed(clean_environment(hub, tmp_path) | environment, tmp_path, *words)
        return [json.loads(line) for line in lines]

    return run


def test_what_a_run_needs_is_fetched_once_and_needs_no_hub_then(hub: Hub, locate: Locate) -> None:
    expected = sorted(set(FILES) - {"consolidated.safetensors"})
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOBODY}):
        for found in locate("some/model", "some/model", **environment):
            assert found["files"] == expected
            assert found["size"] == len(FILES["model.safetensors"])
    assert len(hub.weights_asked()) == 1


def test_progress_is_reported_in_bytes(hub: Hub, locate: Locate) -> None:
    hub.pause_seconds = 1.5
    total = sum(len(content) for name, content in FILES.items() if "consolidated" not in name)
    reported = locate()[0]["reported"]
    assert reported == sorted(reported)
    assert {whole for _, whole in reported} == {total}
    assert any(0 < done < total for done, _ in reported)


@pytest.mark.slow
def test_broken_connection_keeps_files(hub: Hub, locate: Locate) -> None:
    hub.cut_after_bytes = 300_000
    (found,) = locate()
    assert found["kind"] == "WorkError"
    assert "broke off" in found["error"]
    begun, hub.cut_after_bytes = len(hub.asked), None
    assert locate()[0]["size"] == len(FILES["model.safetensors"])
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked[begun:] if method == "GET"}
    assert fetched & FILES.keys() == {"model.safetensors"}


REFUSALS = {
    "some/gated": (403, "GatedRepo", "people who accepted its terms"),
    "some/absent": (404, "RepoNotFound", "There is no model some/absent"),
    "some/old": (404, "RevisionNotFound", "There is no model some/old"),
    "some/broken": (500, "", "could not be downloaded"),
}


def test_a_refusal_of_the_hub_is_explained(hub: Hub, locate: Locate) -> None:
    hub.refused = {name: (status, code) for name, (status, code, _) in REFUSALS.items()}
    found = locate(*REFUSALS)
    for (name, (_, _, sentence)), each in zip(REFUSALS.items(), found, strict=True):
        assert sentence in each["error"], name


def test_an_unreachable_hub_is_explained(locate: Locate) -> None:
    (found,) = locate(HF_ENDPOINT=NOBODY)
    assert "could not be downloaded" in found["error"]


class TestRoom:
    def test_a_download_that_cannot_fit_does_not_begin(self, tmp_path: Path) -> None:
        with pytest.raises(WorkError) as caught:
            refuse_full_disk("some/model", 2**60, tmp_path / "not" / "made" / "yet")
        assert "1,073,741,824.0 GiB are still to be downloaded" in caught.value.why
        assert str(tmp_path) in caught.value.why

    def test_nothing_to_fetch_always_fits(self, tmp_path: Path) -> None:
        refuse_full_disk("some/model", 0, tmp_path)

    def test_asked_before_weights(self, hub: Hub, locate: Locate) -> None:
        hub.said_bytes = 2**60
        assert "does not fit on the disk" in locate()[0]["error"]
        assert hub.weights_asked() == []


CONFIG = find_model("demo-tiny").config


def random_layers(seed: int) -> dict[str, Tensor]:
    """Layers that learned nothing, as they are shipped: bfloat16, without embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: (torch.randn(p.shape, generator=generator) * 0.06).to(torch.bfloat16)
        for p in module_table(CONFIG).parameters
        if p.name != EMBEDDING and not p.tied
    }


class TestEmbedding:
    @pytest.mark.parametrize(
        ("rows", "width", "seed", "digest"),
        [
            (64, 128, 0, "bc9bcb2fc7d4ec2933e97599b7cc81eefff0c2849623954e3a78d0ed53f0ed1a"),
            # More than one block, and a block that does not end where a row of 128 would.
            (9000, 3, 7, "f95e3aa16f8526f2bd9dc403b3a519d3bed1e8887f68b86f3cc839955a6e84b4"),
        ],
    )
    def test_every_bit_is_as_it_was(self, rows: int, width: int, seed: int, digest: str) -> None:
        drawn = draw_embedding(rows, width, seed).numpy().astype("<f4")
        assert hashlib.sha256(drawn.tobytes()).hexdigest() == digest

    def test_each_number_is_a_sum_of_hashed_bytes(self) -> None:
        scale = np.float32(SPREAD / math.sqrt(8 * (256**2 - 1) / 12))
        drawn = draw_embedding(8, 16, seed=3).flatten().tolist()
        for counter, number in enumerate(drawn):
            eight = splitmix64(counter, 3).to_bytes(8, "little")
            assert number == float(np.float32(sum(eight) - 1020) * scale)

    def test_it_is_nearly_normal_with_the_stated_spread(self) -> None:
        drawn = draw_embedding(8192, 128)
        assert abs(drawn.mean().item()) < 0.001
        assert drawn.std().item() == pytest.approx(SPREAD, rel=0.002)
        inside = [(drawn.abs() < k * SPREAD).float().mean().item() for k in (1, 2, 3)]
        assert inside == pytest.approx([0.683, 0.954, 0.997], abs=0.01)

    def test_the_vocabulary_decides_nothing_of_the_first_rows(self) -> None:
        assert torch.equal(draw_embedding(100, 128), draw_embedding(9000, 128)[:100])


def splitmix64(counter: int, seed: int) -> int:
    """Steele, Lea and Flood 2014, in whole numbers of Python."""
    all_bits = 2**64 - 1
    state = (counter + 0x9E3779B97F4A7C15 * (2 * seed + 1)) & all_bits
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & all_bits
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & all_bits
    return state ^ (state >> 31)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that is emptied in the end: a base has 90 MB."""
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(cache: Path) -> Path:
    return write_base("demo-tiny", random_layers(0), cache)


class TestFolder:
    def test_it_is_a_model_with_the_real_vocabulary(self, base: Path) -> None:
        tokenizer = open_tokenizer(base)
        model = load_base(base, settings(base)).model
        assert type(model).__name__ == "Ministral3ForCausalLM"
        assert head_of(model).shape == (131072, 128)
        assert head_of(model) is model.get_input_embeddings().weight
        assert torch.equal(head_of(model)[:64], draw_embedding(64, 128))
        layers = random_layers(0)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], layers[name].float()) for name in layers)
        ids = tokenizer.tekken.encode("Tide", bos=True, eos=False)
        made = generate(model, torch.device("cpu"), ids, end=-1, max_new_tokens=3)
        assert len(made) == 3

    def test_it_is_written_once(self, base: Path, cache: Path) -> None:
        before = (base / "model.safetensors").stat()
        assert write_base("demo-tiny", random_layers(0), cache) == base
        assert (base / "model.safetensors").stat() == before
        assert [path.name for path in cache.iterdir()] == [base.name]

    def test_the_weights_hold_the_embedding_once(self, base: Path) -> None:
        assert set(load_file(base / "model.safetensors")) == {EMBEDDING, *random_layers(0)}


class TestWriting:
    """With a vocabulary of 500 words, so that a base is made in no time."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "draw_embedding", lambda rows, width: draw_embedding(500, width))
        monkeypatch.setattr(fetch, "write_tekken", lambda spec, path: path.write_text("words"))

    def test_all_of_it_names_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one_bit = random_layers(0)
        next(iter(one_bit.values())).view(torch.int16).flatten()[0] ^= 1
        layers = (random_layers(0), random_layers(1), one_bit)
        made = [write_base("demo-tiny", each, tmp_path) for each in layers]
        assert write_base("demo-tiny", random_layers(0), tmp_path) == made[0]
        for name, value in (("SEED", 1), ("SPREAD", 0.5)):
            monkeypatch.setattr(fetch, name, value)
            made.append(write_base("demo-tiny", random_layers(0), tmp_path))
        assert len(set(made)) == 5
        assert set(tmp_path.iterdir()) == set(made)

    def test_a_full_disk_is_a_sentence_and_leaves_nothing(self, tmp_path: Path) -> None:
        with files_at_most(10_000), pytest.raises(WorkError, match="could not be written") as error:
            write_base("demo-tiny", random_layers(0), tmp_path)
        assert "File too large" in error.value.why
        assert not list(tmp_path.iterdir())

    def test_a_cache_that_is_a_file_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("")
        with pytest.raises(WorkError, match="could not be written"):
            write_base("demo-tiny", random_layers(0), tmp_path / "cache")

    def test_two_at_once_share_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def finish_elsewhere(spec: object, path: Path) -> None:
            path.write_text("words")
            other = path.parent.with_name(path.parent.stem.removeprefix("."))
            shutil.copytree(path.parent, other)

        monkeypatch.setattr(fetch, "write_tekken", finish_elsewhere)
        base = write_base("demo-tiny", random_layers(0), tmp_path)
        assert sorted(os.listdir(base)) == ["config.json", "model.safetensors", "tekken.json"]
        assert list(tmp_path.iterdir()) == [base]


KERNELS = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
TRAINING = """
import os
import sys
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen
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
with suppress(HTTPError):
    urlopen(os.environ["HF_ENDPOINT"] + "/the-work-is-done")
huggingface_hub.file_exists("someone/asked", "config.json")
leave_hub()
try:
    huggingface_hub.file_exists("someone/later", "config.json")
except huggingface_hub.errors.OfflineModeIsEnabled:
    print("the hub: switched off")
"""


def test_no_kernel_import_and_no_hub_request(tmp_path: Path, hub: Hub) -> None:
    hub.refusal = (404, "EntryNotFound")
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS)
    (site / "kernels-0.13.0.dist-info").mkdir()
    (site / "kernels-0.13.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.13.0\n")
    environment = clean_environment(hub, tmp_path, site)
    assert printed(environment, tmp_path, "-c", TRAINING, str(tmp_path)) == [
        *("kernels: blocked", "transformers sees kernels: False", "trained: full"),
        *("trained: qlora", "the hub: switched off"),
    ]
    assert not (site / "kernels" / "imported").exists()
    asked = [path for _, path, _ in hub.asked]
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
    monkeypatch.setattr("engine.train.run.load_divided", load)
    session = open_session(tmp_path)
    session.run.config.write_text(write_config(settings(ministral)))
    with pytest.raises(Reached):
        run_training(session, resume=False)
    assert seen == [("0", False), ("1", True)]
