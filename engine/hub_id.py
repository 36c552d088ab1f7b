"""Names of repositories on the hub, told from folders and from what no hub takes.

The rules are huggingface_hub's (`validate_repo_id`), which asks for a slow import and is asked only
when something is fetched or sent: a name that it refuses would be found out after the training.
"""

import re

_REPOSITORY = re.compile(r"(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_HUB = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?")
REPOSITORY_NAMES = (
    "The hub's names are you/your-model: each at most 96 letters, digits, dots, dashes and"
    " underscores, with a letter or digit at both ends, without `..`, `--` and `.git`."
)

MODEL_FILES = ["*.json", "model*.safetensors", "*tekken*.json", "LICENSE*"]
"""What a run needs of a model's: `consolidated*.safetensors` are the same weights once more."""


def is_repository_name(text: str) -> bool:
    """Whether a repository may have this name, with its owner or without."""
    forbidden = "--" in text or ".." in text or text.endswith(".git")
    return not forbidden and _REPOSITORY.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether it is the name of a repository with its owner: owner/name."""
    return "/" in text and is_repository_name(text)


def hub_id_in(address: str) -> str | None:
    """The hub id in the web address of a repository's page; None in any other text."""
    page = _HUB.match(address)
    name = "/".join(address[page.end() :].split("/")[:2]) if page else ""
    return name if is_hub_id(name) else None
