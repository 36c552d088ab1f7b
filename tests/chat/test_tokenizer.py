"""Tokenizers made in memory, read from files, found by name, fetched from a hub."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from engine.catalog import list_models
from engine.chat.tokenizer import TokenizerSpec, build_tokenizer, open_tokenizer, write_tekken
from engine.errors import UserError
from tests.chat.conftest import SPECS, Tokenizers

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v15 tokenizer as a file."""
    path = tmp_path_factory.mktemp("model") / "tekken.json"
    write_tekken(SPECS["v15"], path)
    return path


def damaged(tekken: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the file with keys replaced; a key that becomes None is gone."""
    data = json.loads(tekken.read_text(encoding="utf-8")) | changes
    path = folder / "tekken.json"
    kept = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


def test_a_written_file_is_the_tokenizer_that_was_built(
    tekken: Path, tokenizers: Tokenizers
) -> None:
    opened = open_tokenizer(str(tekken.parent))
    assert opened.fingerprint == tokenizers["v15"].fingerprint
    assert (opened.version, opened.efforts, opened.default_effort) == (
        "v15",
        ("none", "high"),
        "none",
    )
    assert opened.specials == tokenizers["v15"].specials
    assert opened.vocabulary_size == 131072
    assert MistralTokenizer.from_file(tekken).version.value == "v15"


def test_fingerprints_tell_tokenizers_apart(tokenizers: Tokenizers) -> None:
    assert len({tokenizers[version].fingerprint for version in SPECS}) == len(SPECS)
    no_image = build_tokenizer(replace(SPECS["v13"], image=None))
    assert no_image.fingerprint != tokenizers["v13"].fingerprint


def test_control_tokens_have_the_ids_of_the_published_files(tokenizers: Tokenizers) -> None:
    special = tokenizers["v15"].specials
    assert (special.bos, special.eos, special.inst, special.end_inst, special.call) == (
        1,
        2,
        3,
        4,
        9,
    )
    assert (special.args, special.call_id, special.think, special.end_think) == (32, 33, 34, 35)
    assert (special.settings, special.end_settings) == (36, 37)
    assert tokenizers["v13"].specials.settings is None
    assert tokenizers["v11"].specials.think is None
    assert tokenizers["v7"].specials.args is None


def test_text_has_the_ids_of_the_published_vocabulary(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v15"]
    ids = [rank + tokenizer.first_text_id for rank in tokenizer.encode_ordinary("Hello, world!")]
    assert [tokenizer.specials.bos, *ids] == [1, 22177, 1044, 4304, 1033]


def test_repeated_texts_have_the_same_ranks(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v13"]
    assert list(tokenizer.encode_repeated("Be brief.")) == tokenizer.encode_ordinary("Be brief.")


def test_pieces_are_safe_and_show_a_character_once(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v13"]
    text = " 漢\n\x1b[0m\u202e👩"
    ids = [rank + tokenizer.first_text_id for rank in tokenizer.encode_ordinary(text)]
    pieces = list(tokenizer.pieces([*ids, tokenizer.specials.think]))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == " 漢␊␛[0m⟨U+202E⟩👩[THINK]"
    cut = list(tokenizer.pieces([*ids[-2:-1], tokenizer.specials.eos]))
    assert len(cut) == 2
    assert cut[1] == "</s>"
    assert "<" in tokenizer.piece(ids[-1])


def test_a_name_of_the_catalog_opens_by_its_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("demo-tiny", "mistral-small-4"):
        card = next(card for card in list_models() if card.name == name)
        opened = open_tokenizer(name)
        assert opened.version == card.tokenizer.version
        assert opened.thinks is card.tokenizer.think
        assert bool(opened.efforts) is card.tokenizer.settings


def test_a_hub_id_of_the_catalog_needs_no_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    card = next(card for card in list_models() if card.repositories)
    assert open_tokenizer(card.repositories[0].id).version == card.tokenizer.version


def test_a_file_in_the_hub_cache_wins_over_the_catalog(
    tekken: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = next(
        card for card in list_models() if card.tokenizer.version == "v13" and card.repositories
    )
    repository = tmp_path / f"models--{card.repositories[0].id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "tekken.json").symlink_to(tekken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_tokenizer(card.name).version == "v15"


def test_a_folder_without_a_tekken_file_names_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer file at all"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"It has tokenizer\.json"):
        open_tokenizer(tmp_path)


def test_a_folder_with_several_tekken_files_asks_which(tekken: Path, tmp_path: Path) -> None:
    for name in ("tekken_a.json", "tekken_b.json"):
        (tmp_path / name).symlink_to(tekken)
    with pytest.raises(UserError, match=r"tekken_a\.json, tekken_b\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match=r"tekken\.json is not a whole"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"config": {"version": "v99"}}', '{"config": 5}', "[" * 100_000],
)
def test_a_damaged_file_is_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a whole Tekken tokenizer"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    "changes",
    [{"vocab": []}, {"special_tokens": None}, {"model_settings_builder": None}, {"config": {}}],
)
def test_a_file_that_lacks_a_part_is_a_sentence(
    changes: dict[str, Any], tekken: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not a whole Tekken tokenizer"):
        open_tokenizer(damaged(tekken, tmp_path, **changes))


def test_a_tokenizer_older_than_v7_is_refused(tmp_path: Path) -> None:
    write_tekken(TokenizerSpec("v3"), tmp_path / "tekken.json")
    with pytest.raises(UserError, match=r"is v3\."):
        open_tokenizer(tmp_path)


def test_a_file_is_only_written_under_a_name_that_others_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no name for a Tekken file"):
        write_tekken(SPECS["v13"], tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["./missing", "~/missing/model", "no-such-model"])
def test_a_name_that_stands_for_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="There is no"):
        open_tokenizer(name)


class Hub(BaseHTTPRequestHandler):
    """A hub with one gated model, one without the file, one that fails, and nothing else."""

    ANSWERS = {  # noqa: RUF012 - the base class fixes the shape
        "gated": (403, "GatedRepo"),
        "other": (404, "EntryNotFound"),
        "missing": (404, "RepoNotFound"),
        "broken": (500, ""),
    }

    def do_HEAD(self) -> None:
        status, code = self.ANSWERS.get(self.path.split("/")[2], (404, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Nothing: a test's output is for the test."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


OPEN_ALL = """
import sys
from engine.chat.tokenizer import open_tokenizer
from engine.errors import UserError
for repo_id in sys.argv[1:]:
    try:
        open_tokenizer(repo_id)
    except UserError as error:
        print(error.exit_status, error.what)
"""


def open_all(*repo_ids: str, **environment: str) -> list[str]:
    """What opening each hub id says, in a process of its own: the hub's address is read once."""
    run = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, *repo_ids],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert "Retry" not in run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow  # the hub library tries an address that does not answer for half a minute
def test_what_a_hub_refuses_is_a_sentence(hub: str, tmp_path: Path) -> None:
    said = open_all(
        *("org/gated", "org/other", "org/missing", "org/broken"),
        HF_ENDPOINT=hub,
        HF_HOME=str(tmp_path),
    )
    assert said == [
        "1 org/gated asks for a login.",
        "2 org/other has no tekken.json.",
        "2 There is no model org/missing on the hub.",
        "1 The tokenizer of org/broken is not on this computer.",
    ]


@pytest.mark.slow
def test_offline_is_a_sentence(tmp_path: Path) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert open_all("org/model", HF_HOME=str(tmp_path), **environment) == [
            "1 The tokenizer of org/model is not on this computer."
        ]


def test_a_think_token_before_v13_does_not_make_a_tokenizer_think() -> None:
    tokenizer = build_tokenizer(TokenizerSpec("v11", think=True))
    assert not tokenizer.thinks
