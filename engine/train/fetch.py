"""Where the base model's files are: a folder, the embedded demo, or the hub's cache.

The only place of the trainer that may reach the network, and only for a model that the config
names. Once the rows are there too, `leave_hub` switches the hub off for the rest of the process.
"""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.catalog import find_model
from engine.catalog.cards import model_names
from engine.config import RunConfig
from engine.errors import UserError, WorkError

FILES = ["*.json", "model*.safetensors", "*tekken*.json", "LICENSE*"]
"""What a run needs of a repository: `consolidated*.safetensors` are the same weights once more."""


def locate_base(config: RunConfig, home: Path) -> Path:
    """The folder with config.json and weights of `config.base_model`; downloads a hub model.

    A relative folder starts at `home`, the config's own. Raises UserError where the model cannot be
    had, with the way to get it.
    """
    name = config.base_model
    local = home / Path(name).expanduser()
    if name in model_names():
        repositories = find_model(name).repositories
        if not repositories:
            from engine.train.demo import make_base

            return make_base(name)
        bf16 = [r for r in repositories if r.checkpoint == "bf16"]
        name = (bf16 or list(repositories))[0].id
    elif local.is_dir():
        return local.resolve()
    return _download(name, config.revision_of_model)


def leave_hub() -> None:
    """Switch the hub off for this process and its children: from now on asking it is an error."""
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def _download(repository: str, revision: str | None) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=FILES, max_workers=4
            )
        )
    except GatedRepoError as error:
        raise UserError(
            f"{repository} may only be downloaded by people who accepted its terms.",
            "The hub refused: the repository is gated and this computer is not logged in to it.",
            f"Accept the terms on huggingface.co/{repository}, then run `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no model {repository}"
            + (f" at revision {revision}." if revision else " on the hub."),
            "It is no folder here, no name of the catalog, and the hub does not know it.",
            "Check the spelling; `windtunnel models` lists the catalog. Private models need "
            "`hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise WorkError(
            f"{repository} could not be downloaded.",
            f"The hub cannot be reached and the files are not in this computer's cache: "
            f"{type(error).__name__}.",
            "Check the connection and start again (the download goes on where it stopped), or "
            "point base_model at a folder.",
        ) from error
    except OSError as error:
        raise WorkError(
            f"{repository} could not be stored.",
            f"The system says: {error.strerror or error}.",
            "Free disk space, or set HF_HOME to a disk that has it.",
        ) from error
