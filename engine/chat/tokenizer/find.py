"""Which tokenizer a model's name, folder or hub id stands for.

A tekken file wins wherever there is one: in a folder, or in the hub cache of this computer. Only
a catalog name without a file is answered from its card, and only a hub id that is neither cached
nor in the catalog is fetched, its tokenizer file alone.
"""

import logging
import os
from pathlib import Path
from typing import NoReturn

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from engine.catalog import ModelCard, find_model, list_models
from engine.chat.tokenizer.build import TokenizerSpec, build_tokenizer
from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer, assemble
from engine.chat.tokenizer_file import HUB_ID, TEKKEN, check_file, find_in_folder
from engine.errors import UserError, WorkError
from engine.visible import visible


def open_tokenizer(model: str | Path, folder: Path | None = None) -> ChatTokenizer:
    """The tokenizer of a catalog name, a folder, a tekken file or a hub id.

    Relative paths start at `folder`, else at the working directory. A catalog name means the
    catalog even where a folder has the same name; `./name` means the folder. Raises UserError
    where there is none, where its file is damaged and where `check_tokenizer` does; WorkError
    where a hub id cannot be fetched.
    """
    name = str(model)
    cards = {} if isinstance(model, Path) else {card.name: card for card in list_models()}
    if name in cards:
        return _open_card(cards[name])
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    path = os.path.join(folder or "", os.path.expanduser(name))
    if os.path.isdir(path):
        return _open_folder(Path(path))
    if os.path.isfile(path):
        return _open_file(Path(path))
    if isinstance(model, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return _open_hub_id(name)
    if isinstance(model, Path) or os.sep in name or name.startswith((".", "~")):
        raise UserError(
            f"There is no {visible(name, one_line=True)}.",
            "The tokenizer was to be read from there.",
            "Check the path, or name a model that `windtunnel models` lists.",
        )
    return _open_card(find_model(name))


def _open_card(card: ModelCard) -> ChatTokenizer:
    for repository in card.repositories:
        cached = _find_in_cache(repository.id)
        if cached is not None:
            return _open_file(cached)
    return build_tokenizer(spec_of(card))


def spec_of(card: ModelCard) -> TokenizerSpec:
    """What the catalog says of a model's tokenizer."""
    said = card.tokenizer
    return TokenizerSpec(said.version, said.think, said.image, said.settings)


def _open_hub_id(repo_id: str) -> ChatTokenizer:
    cached = _find_in_cache(repo_id)
    if cached is not None:
        return _open_file(cached)
    for card in list_models():
        if any(repository.id == repo_id for repository in card.repositories):
            return _open_card(card)
    return _open_file(_fetch(repo_id))


def _find_in_cache(repo_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, TEKKEN)
    return Path(found) if isinstance(found, str) else None


def _fetch(repo_id: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    # Its warnings, one a retry, would stand before the three sentences.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(repo_id, TEKKEN))
    except errors.GatedRepoError as error:
        raise WorkError(
            f"{repo_id} asks for a login.",
            "Its owner wants you to accept conditions before anything is downloaded.",
            f"Accept them at https://huggingface.co/{repo_id}, then run `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no model {repo_id} on the hub.",
            "It does not exist, or it is private and you are not logged in.",
            "Check the spelling, or run `hf auth login`.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WorkError(
            f"The tokenizer of {repo_id} is not on this computer.",
            "The hub could not be reached or did not answer, or HF_HUB_OFFLINE is set.",
            f"Try again online, or copy the model's {TEKKEN} here and name its folder.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{repo_id} has no {TEKKEN}.",
            "Only Tekken tokenizers are read: sentencepiece ones (Mistral 7B, Mixtral) are not"
            " supported.",
            "Choose a repository of Mistral's that has the file, or name a folder that holds it.",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise WorkError(
            f"The tokenizer of {repo_id} could not be fetched.",
            f"{visible(str(error).splitlines()[0], one_line=True)}.",
            f"Try again later, or copy the model's {TEKKEN} here and name its folder.",
        ) from error


def _open_folder(folder: Path) -> ChatTokenizer:
    file = find_in_folder(folder)
    if file is None:
        raise UserError(
            f"{visible(str(folder), one_line=True)} has no {TEKKEN}.",
            "It has no tokenizer file at all.",
            f"Copy {TEKKEN} from the model's page on the hub into the folder.",
        )
    return _open_file(file)


def _open_file(path: Path) -> ChatTokenizer:
    check_file(path)
    try:
        return assemble(Tekkenizer.from_file(path))
    # mistral-common asserts, and reads keys, of whatever JSON the file holds.
    except (
        *(AssertionError, AttributeError, IndexError, KeyError, OSError, RecursionError),
        *(TypeError, ValueError),
    ) as error:
        _refuse_damaged(path, error)


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    first_line = (str(error).splitlines() or [""])[0][:200]
    raise UserError(
        f"{visible(str(path), one_line=True)} is not a whole Tekken tokenizer.",
        f"Reading it ended in {type(error).__name__}: {visible(first_line, one_line=True)}.",
        "Download the file again, or name the folder that holds the model's tekken.json.",
    ) from error
