"""The base model, from its folder to a module that is safe to train.

Apart from `lora` because loading is where a checkpoint can be silently wrong: the class comes from
config.json's own `architectures`, and a weight that is missing or left over is refused, never
randomly initialised.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from engine.catalog import read_architecture
from engine.config import RunConfig
from engine.errors import UserError
from engine.train.quantize import keep_gradients_on_cpu, nf4


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model and how it was loaded."""

    model: PreTrainedModel
    dtype: torch.dtype
    """Type of the weights that are not quantized, and of the arithmetic."""
    device: torch.device


def pick_device() -> torch.device:
    """The first visible CUDA card, else this computer's CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """`bf16: auto` is bfloat16 where the card has it and float32 on a CPU, which emulates it."""
    if config.bf16 == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fits else torch.float32
    return torch.bfloat16 if config.bf16 else torch.float32


def load_base(folder: Path, config: RunConfig) -> Base:
    """Load the model of `folder` as the config asks: float32, bfloat16 or NF4.

    Raises UserError when the architecture is not one of Mistral's, when the checkpoint is
    quantized already or cannot be read, or when its weights and the architecture's do not match
    one to one.
    """
    device = pick_device()
    dtype = pick_dtype(config, device)
    architecture = read_architecture(folder)
    model_class = getattr(transformers, architecture.class_name)
    # Not from the file: there a stranger may choose kernels; here those keys are gone.
    settings = model_class.config_class.from_dict(dict(architecture.config))
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(
            f"The weights in {folder} are quantized already.",
            "This trainer quantizes bfloat16 weights itself and would train on wrong numbers here.",
            "Point `base_model` at the model's BF16 repository or folder.",
        )
    options: dict[str, Any] = {"quantization_config": nf4(dtype)} if config.load_in_4bit else {}
    options["attn_implementation"] = pick_attention(config, device)
    model, report = _read_weights(
        model_class, folder, config=settings, dtype=dtype, device_map={"": device}, **options
    )
    refuse_mismatch(folder, report, tied=bool(settings.tie_word_embeddings))
    if config.load_in_4bit and device.type == "cpu":
        keep_gradients_on_cpu(model)
    return Base(model, dtype, device)


def _read_weights(
    model_class: Any, folder: Path, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of what did not match."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter beside a model.",
            "transformers would load the base that the adapter names, not the weights that lie "
            "there.",
            "Merge the adapter, or move adapter_config.json out of the folder.",
        )
    try:
        model, report = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused with the rest
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The weights in {folder} cannot be read.",
            f"{str(error).splitlines()[0].rstrip('.')}.",
            "Download the model again, as safetensors files.",
        ) from error
    except ImportError as error:
        raise UserError(
            "The model cannot be loaded as the config asks.",
            f"{str(error).splitlines()[0].rstrip('.')}.",
            "Remove attn_implementation, so that an installed one is chosen, or install what is "
            "missing.",
        ) from error
    return model, report


def pick_attention(config: RunConfig, device: torch.device) -> str:
    """The config's backend, else FlashAttention 2 where it is installed, else PyTorch's own."""
    if config.attn_implementation:
        return config.attn_implementation
    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def refuse_mismatch(folder: Path, report: dict[str, Any], *, tied: bool) -> None:
    """Refuse weights that the file lacks, and weights of the file that the model has no place for.

    transformers only warns: a missing weight is trained from noise, and a left-over "scale" means
    8-bit numbers read without their scale (measured: 5,675 times too large).
    """
    missing = {name for name in report["missing_keys"] if not (tied and "lm_head" in name)}
    problems = {
        "lacks weights that the model needs": sorted(missing),
        "holds weights that the model has no place for": sorted(report["unexpected_keys"]),
        "holds weights of another shape": sorted(name for name, *_ in report["mismatched_keys"]),
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise UserError(
                f"The checkpoint in {folder} {problem}: {shown}.",
                "Training on it would train a broken model without a warning.",
                "Download it again, or point `base_model` at a complete bfloat16 checkpoint.",
            )
