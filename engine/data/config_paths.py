"""Paths in a config, made to mean the same from any folder.

What a person writes is relative to the file that they write it in; a run folder is elsewhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.catalog import model_names
from engine.config import RunConfig


def with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """The same config with paths that mean the same from any folder."""

    def absolute(path: str) -> str:
        # os.path, unlike pathlib, answers a name that no file system can hold with False.
        place = os.path.join(folder, os.path.expanduser(path))
        return os.path.realpath(place) if path and os.path.exists(place) else path

    def model(name: str) -> str:
        return name if name in model_names() else absolute(name)

    def rows(datasets: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(d.model_copy(update={"path": absolute(d.path)}) for d in datasets)

    changed: dict[str, Any] = {
        "base_model": model(config.base_model),
        "datasets": rows(config.datasets),
        "test_datasets": rows(config.test_datasets),
    }
    if config.lora_model_dir:
        changed["lora_model_dir"] = absolute(config.lora_model_dir)
    if config.tokenizer_config:
        changed["tokenizer_config"] = model(config.tokenizer_config)
    for key in ("output_dir", "dataset_prepared_path"):
        if value := getattr(config, key):
            changed[key] = os.path.realpath(os.path.join(folder, os.path.expanduser(value)))
    # Absent it is the folder of the config, which a copy elsewhere must still name.
    image_folder = os.path.expanduser(config.image_folder or "")
    changed["image_folder"] = os.path.realpath(os.path.join(folder, image_folder))
    return config.model_copy(update=changed)
