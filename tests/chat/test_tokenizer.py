"""Tokenizers made in memory, read from files, found by name, fetched from a hub."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from engine.catalog import TokenizerSpec, list_models
from engine.chat.tokenizer import build_tokenizer, open_tokenizer, write_tekken
from engine.chat.tokenizer_file import check_tokenizer
from engine.errors import UserError
from tests.support.tokenizers import SPECS, Tokenizers

PUBLISHED = Path(mistral_common.__file__).parent / "data"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v15 tokenizer as a file."""
    path = tmp_path_factory.mktemp("model") / "tekken.json"
    write_tekken(SPECS["v15"], path)
    return path


@pytest.fixture(scope="module")
def short(tekken: Path) -> dict[str, Any]:
    """What is in it, with the first 1,000 pieces of text alone: it opens a hundred times faster."""
    data = json.loads(tekken.read_text("utf-8"))
    data["vocab"] = data["vocab"][:1000]
    data["config"] |= {"num_vocab_tokens": 1000, "default_vocab_size": 2000}
    return data


def written(folder: Path, data: dict[str, Any], **changes: Any) -> Path:
    """A tekken.json with keys replaced; a key that becomes None is gone."""
    path = folder / "tekken.json"
    path.write_text(json.dumps({k: v for k, v in (data | changes).items() if v is not None}))
    return path


def test_written_file_is_the_tokenizer_that_was_built(tekken: Path, tokenizers: Tokenizers) -> None:
    opened = open_tokenizer(str(tekken.parent))
    assert opened.fingerprint == tokenizers["v15"].fingerprint
    assert (opened.version, opened.efforts) == ("v15", ("none", "high"))
    assert opened.default_effort == "none"
    assert opened.specials == tokenizers["v15"].specials
    assert opened.vocabulary_size == 131072
    assert MistralTokenizer.from_file(tekken).version.value == "v15"


def test_fingerprints_tell_tokenizers_apart(tokenizers: Tokenizers) -> None:
    assert len({tokenizers[version].fingerprint for version in SPECS}) == len(SPECS)
    no_image = build_tokenizer(replace(SPECS["v13"], image=None))
    assert no_image.fingerprint != tokenizers["v13"].fingerprint


def test_control_tokens_have_the_ids_of_the_published_files(tokenizers: Tokenizers) -> None:
    special = tokenizers["v15"].specials
    assert (special.bos, special.eos, special.inst, special.end_inst) == (1, 2, 3, 4)
    assert special.call == 9
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
    think = tokenizer.specials.think
    assert think is not None
    pieces = list(tokenizer.pieces([*ids, think]))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == " 漢␊␛[0m⟨U+202E⟩👩[THINK]"
    cut = list(tokenizer.pieces([*ids[-2:-1], tokenizer.specials.eos]))
    assert len(cut) == 2
    assert cut[1] == "</s>"
    assert "<" in tokenizer.piece(ids[-1])


def test_catalog_name_opens_by_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("demo-tiny", "mistral-small-4"):
        card = next(card for card in list_models() if card.name == name)
        opened = open_tokenizer(name)
        assert opened.version == card.tokenizer.version
        assert opened.thinks is card.tokenizer.think
        assert bool(opened.efforts) is card.tokenizer.settings


def test_catalog_hub_id_needs_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    card = next(card for card in list_models() if card.repositories)
    assert open_tokenizer(card.repositories[0].id).version == card.tokenizer.version


def test_cached_file_wins(tekken: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    ["", "{", "[]", "{}", '{"config": {"version": "v7"}}', '{"config": 5}', "[" * 100_000],
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
def test_incomplete_file_is_refused(changes: dict[str, Any], short: Any, tmp_path: Path) -> None:
    assert open_tokenizer(written(tmp_path, short)).version == "v15"
    with pytest.raises(UserError, match="not a whole Tekken tokenizer"):
        open_tokenizer(written(tmp_path, short, **changes))


@pytest.mark.parametrize("pattern", ["", "(a)*"])
def test_a_pattern_that_makes_empty_pieces_is_a_sentence(
    pattern: str, short: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = short["config"] | {"pattern": pattern}
    with pytest.raises(UserError, match="makes empty pieces of a text"):
        open_tokenizer(written(tmp_path, short, config=config))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("config", "default_num_special_tokens", value) for value in (2**63, 10**400, -1, 2**20)),
        *(("config", "default_vocab_size", value) for value in (2**63, 0, "3000")),
        *(("config", "num_vocab_tokens", 2**31), ("config", "pattern", "x" * 20_000)),
        *(("image", "max_image_size", 2**40), ("image", "image_patch_size", 0)),
        ("image", "spatial_merge_size", 10**9),
    ],
)
def test_a_size_of_no_tokenizer_is_refused_before_anybody_counts_to_it(
    section: str, key: str, value: object, tmp_path: Path
) -> None:
    sizes = {"default_vocab_size": 3000, "default_num_special_tokens": 1000}
    content: dict[str, dict[str, object]] = {
        "config": {"version": "v13", "pattern": "a", **sizes},
        "image": {"image_patch_size": 14, "max_image_size": 1540},
    }
    content[section][key] = value
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=rf"at `\$\.{section}\.{key}`|Number out of range"):
        open_tokenizer(path)


@pytest.mark.parametrize("token", ["[ARGS]", "[CALL_ID]", "[MODEL_SETTINGS]", "[IMG_END]"])
def test_a_file_without_a_control_token_is_refused(token: str, short: Any, tmp_path: Path) -> None:
    tokens = [
        each | {"token_str": f"<other_{n}>"} if each["token_str"] == token else each
        for n, each in enumerate(short["special_tokens"])
    ]
    with pytest.raises(UserError, match="not a whole Tekken tokenizer"):
        open_tokenizer(written(tmp_path, short, special_tokens=tokens))


def test_the_published_file_of_mistral_nemo_is_the_v3_that_is_built(tokenizers: Tokenizers) -> None:
    # Of July 2024, as it lies beside the weights of Mistral Nemo.
    published = open_tokenizer(PUBLISHED / "tekken_240718.json")
    assert published.version == "v3"
    assert published.fingerprint == tokenizers["v3"].fingerprint
    assert published.specials == tokenizers["v3"].specials


@pytest.mark.parametrize("version", ["v1", "v2", "v16", "v99"])
def test_another_version_is_refused_by_its_name(version: str, short: Any, tmp_path: Path) -> None:
    config = short["config"] | {"version": version}
    # A program may sort the keys: then the version stands behind the vocabulary.
    later = tmp_path / "sorted"
    later.mkdir()
    for place in (
        written(tmp_path, {"config": config} | short, config=config),
        written(later, {"vocab": short["vocab"], "config": config}),
    ):
        for ask in (open_tokenizer, check_tokenizer):
            with pytest.raises(UserError, match=rf"is {version}\.") as caught:
                ask(place)
            assert "exactly for v3, v7, v11, v13 and v15" in caught.value.why


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tokenizer.model", "x_240323.model.v3"])
def test_a_sentencepiece_tokenizer_is_refused(name: str, short: Any, tmp_path: Path) -> None:
    shutil.copyfile(PUBLISHED / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    for place in (tmp_path, tmp_path / name):
        for ask in (open_tokenizer, check_tokenizer):
            with pytest.raises(UserError, match="a sentencepiece one") as caught:
                ask(place)
            assert "(Mistral 7B, Mixtral) are not supported" in caught.value.why
    # Where Mistral's Tekken lies beside it, that is the tokenizer.
    assert open_tokenizer(written(tmp_path, short).parent).version == "v15"
    check_tokenizer(tmp_path)


def test_what_is_not_here_is_not_refused_before_it_is_opened(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "missing", "org/model", "ministral-3-8b", "no-such-model"):
        check_tokenizer(name)
    written(tmp_path, {})
    check_tokenizer(tmp_path)


@pytest.mark.parametrize("repository", ["mistralai/Mistral-7B-v0.3", "catalog"])
def test_no_sentencepiece(repository: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = next(card for card in list_models() if card.repositories).repositories[0].id
    name = listed if repository == "catalog" else repository
    snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (snapshot / "config.json").write_text("{}")
    check_tokenizer(name)
    (snapshot / "tokenizer.json").write_text("{}")
    check_tokenizer(name)  # a tekken.json may be in the repository
    (snapshot / "tokenizer.model.v3").write_bytes(b"")
    if name == listed:
        check_tokenizer(name)  # the catalog knows its tokenizer
        return
    with pytest.raises(UserError, match="a sentencepiece one"):
        check_tokenizer(name)


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
from engine.chat.tokenizer_file import check_tokenizer
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


def test_the_list_of_all_pieces_is_made_when_it_is_asked_for(tokenizers: Tokenizers) -> None:
    tekken = tokenizers["v13"].tekken
    assert not any(tekken._vocab)
    pieces = tekken.vocab()
    assert len(pieces) == tekken.n_words
    assert (pieces[1], pieces[-1]) == ("<s>", tekken.id_to_piece(tekken.n_words - 1))
    assert len(set(pieces)) > 100_000
