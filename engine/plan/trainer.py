"""The trainer's own numbers and rules, which the plan counts with and the trainer runs by.

How a run computes its loss (in chunks of logits, and how large, or by cut-cross-entropy), in which
type, which layers it quantizes, and how much it takes in hand at once.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.device import BF16_CAPABILITY, Device
from engine.units import GIB
from engine.visible import visible

if TYPE_CHECKING:
    from engine.chat.images import ImageSpec

MIB = 2**20

SAMPLE_TOKENS = 256
"""Longest answer to a question of the run: enough for a first look, and what a model that never
stops costs."""
ANSWER_TOKENS = 2 * SAMPLE_TOKENS
"""The same where a thought comes before it."""
WIDENED_NUMBERS = 2**24
"""bfloat16 weights that a step has in float32 at once: 128 MiB with their gradients."""
PIECE_BYTES = 64 * MIB
"""Of a tensor that is saved or read back, what is in RAM at once; nothing more on the device."""
PATCHES_AT_ONCE = 4096
"""Patches that go through the vision tower together, where one image has no more: their mask takes
at most 64 MiB. A larger image goes alone, under a mask of its own patches squared."""
BUCKET_NUMBERS = 2**27
"""Gradients that replicas add up in one collective, in float32: 512 MiB."""
PROCESS_BYTES = int(0.75 * GIB)
"""On a CPU, a process with torch, transformers and peft before it loads a model."""
QUANTIZED_NEVER = ("vision_tower", "multi_modal_projector")
"""What stays in the base precision unless the config says otherwise."""

IMAGE_TOKEN = 10
"""`[IMG]` of every Tekken vocabulary: the model puts one merged patch in each one's place."""

CHUNK_BYTES = (512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB)
"""Float32 logits of one chunk, the best first: 1,024 rows at a vocabulary of 131,072. Each
chunk reads the whole head twice, so 128 rows keep a card waiting for its memory; 512 rows keep it
computing."""
SMALLEST_CHUNK_BYTES = CHUNK_BYTES[-1]
"""Where room is short, on a CPU, and of every evaluation, whose figures thus depend on no plan. On
two cores 8 MiB took 1.5 times as long and 128 MiB 0.92 times (336 learned tokens, width 128)."""
PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"

PRICE = (
    "gradients of the states are added up in bfloat16: off by 2.2 % instead of 0.2 %, and not"
    " repeatable"
)
"""Of cut-cross-entropy, simulated in torch at a vocabulary of 131,072 and a width of 1,024: it
rounds each of 1,024 additions to a number, in an order that locks decide."""


def names_cut_loss(config: RunConfig) -> bool:
    """Whether `config` asks for cut-cross-entropy, which Axolotl's plugin of that name is."""
    if config.cut_cross_entropy is not None:
        return config.cut_cross_entropy
    return any(name.rpartition(".")[2] == "CutCrossEntropyPlugin" for name in config.plugins or ())


def chunk_rows(chunk_bytes: int, vocabulary: int) -> int:
    """States whose float32 logits one chunk holds; one at least."""
    return max(1, chunk_bytes // (4 * vocabulary))


def kept_modules(config: RunConfig) -> tuple[str, ...]:
    """What of a model stays in the base precision; the head always does."""
    named = (config.bnb_config_kwargs or {}).get("llm_int8_skip_modules")
    return ("lm_head", *(map(str, named) if isinstance(named, list) else QUANTIZED_NEVER))


def is_kept(module: str, kept: tuple[str, ...]) -> bool:
    """Whether `module`, a qualified name, is one of `kept` or lies in one.

    An entry is one or more whole parts of the name, anywhere in it: `vision_tower`, `layers.0`.
    transformers 5.23 wants the start or the end of the name, so that `vision_tower` skips nothing.
    """
    return any(f".{entry}." in f".{module}." for entry in kept)


def computes_in_bf16(config: RunConfig, device: Device) -> bool:
    """Whether a run computes in bfloat16; `bf16: auto` is float32 where it would be emulated."""
    return device.computes_bf16 if config.bf16 == "auto" else bool(config.bf16)


def base_bytes_of(config: RunConfig, device: Device) -> int:
    """Of one weight that is not quantized."""
    return 2 if computes_in_bf16(config, device) else 4


def why_float32(config: RunConfig, device: Device) -> str | None:
    """Why a run on a card computes in float32 although its config leaves that open, or None."""
    if device.kind != "cuda" or config.bf16 != "auto" or device.computes_bf16:
        return None
    return (
        f"computes in float32: bfloat16 begins with compute capability {_version(BF16_CAPABILITY)},"
        f" and {visible(device.name, one_line=True)} has {_version(device.compute_capability)}"
    )


def refuse_bf16(config: RunConfig, device: Device) -> None:
    """Raises UserError where a config asks for bfloat16 on a card that would emulate it."""
    if device.kind == "cuda" and config.bf16 is True and not device.computes_bf16:
        name = visible(device.name, one_line=True)
        raise UserError(
            f"bf16: true cannot be used on {name}.",
            f"It has compute capability {_version(device.compute_capability)}, and bfloat16 begins"
            f" with {_version(BF16_CAPABILITY)}: it would be emulated, and kernels fail there.",
            "Write bf16: auto, which is float32 on this card and bfloat16 on newer ones.",
        )


def refuse_other_formats(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that were quantized in another way than FP8, and a folder of two models."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter beside a model.",
            "Only the model's own weights would be read, and nothing says that they are meant.",
            "Merge the adapter, or move adapter_config.json out of the folder.",
        )
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if method != "fp8":
            shown = f" with {visible(method, one_line=True)}" if isinstance(method, str) else ""
            raise UserError(
                f"The weights in {folder} are quantized already{shown}.",
                "This trainer reads bfloat16 and FP8 weights and quantizes them itself; others "
                "would be trained on wrong numbers.",
                "Point `base_model` at the model's BF16 or FP8 repository or folder.",
            )


def refuse_unread(architecture: Architecture, spec: "ImageSpec | None") -> None:
    """Refuse rows with images for a model that would not read them as they are tokenized.

    `spec` is that of the rows' images, None where they have none.
    Raises UserError for a text model, and where the tokenizer's patches are not the model's.
    """
    if spec is None:
        return
    config = architecture.config
    vision = config.get("vision_config")
    if not vision:
        raise UserError(
            "The dataset has images, and this model reads none.",
            f"{architecture.class_name} has no vision tower.",
            "Choose a model that reads images (`windtunnel models` lists them), or leave out the "
            "rows with images.",
        )
    patch, merge = vision.get("patch_size", 16), config.get("spatial_merge_size", 2)
    token = config.get("image_token_index", config.get("image_token_id", IMAGE_TOKEN))
    if (patch, merge, token) != (spec.patch, spec.merge, IMAGE_TOKEN):
        raise UserError(
            "The tokenizer and the model do not cut images alike.",
            f"The tokenizer makes a token of {spec.merge} x {spec.merge} patches of {spec.patch} "
            f"pixels with the id {IMAGE_TOKEN}, the model of {merge} x {merge} patches of {patch} "
            f"with the id {token}.",
            "Use the tokenizer that came with the model.",
        )
    largest, side = vision.get("image_size", 1024), patch * merge
    if math.ceil(spec.longest / side) * side > largest:
        raise UserError(
            f"The tokenizer makes images of up to {spec.longest} pixels a side.",
            f"The model's vision tower has positions for {largest} and would repeat them.",
            f"Write image_size: {largest // side * side} into the config, or use the tokenizer "
            "that came with the model.",
        )


def _version(capability: tuple[int, int] | None) -> str:
    return "{}.{}".format(*capability or BF16_CAPABILITY)
