"""FlashAttention as if installed: its modules lead to the stand-ins of `kernels`."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import import_utils

from tests.fakes.packages import package

FLASH = {
    "flash_attention_2": ("flash-attn", "2.8.3"),
    "flash_attention_4": ("flash-attn-4", "4.0.0b36"),
}
KERNELS = {
    "flash-attn": {
        "__init__": "from tests.fakes.kernels import flash_varlen as flash_attn_varlen_func\n"
        "flash_attn_func = flash_attn_with_kvcache = None\n",
        "bert_padding": "pad_input = unpad_input = None\n",
    },
    "flash-attn-4": {
        "cute/__init__": "from tests.fakes.kernels import cute_varlen as flash_attn_varlen_func\n"
        "flash_attn_func = None\n"
    },
}


def install(folder: Path, name: str, version: str, modules: Mapping[str, str]) -> None:
    """Lay a package `flash_attn` of distribution `name` into `folder`, as pip would."""
    for module, text in modules.items():
        path = folder / "flash_attn" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    package(folder, name, version)
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    (metadata / "top_level.txt").write_text("flash_attn\n", "utf-8")


def forget(patch: pytest.MonkeyPatch) -> None:
    """Let transformers look again for what is installed."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.bert_padding"):
        patch.delitem(sys.modules, name, raising=False)
    for name in (*("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"),
                 *("_flash_with_kvcache_fn", "_process_flash_kwargs_fn"),
                 *("_process_with_kvcache_kwargs_fn", "_pad_fn", "_unpad_fn")):  # fmt: skip
        patch.setattr(flash, name, None)
    importlib.invalidate_caches()
    for function in vars(import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
