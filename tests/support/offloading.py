"""Runs with something in RAM: models deep enough for turns, the keys, and what is on the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.train.batches import Rows
from engine.train.forward import unwrapped
from engine.train.loop import Training
from engine.train.offload import decoder_layers, movable_tensors
from tests.support.methods import NF4, ON_EXPERTS
from tests.support.tiny import (
    MINISTRAL3,
    MISTRAL,
    MISTRAL4,
    settings,
    training,
    wake_adapter,
    with_vision,
)

FOUR: dict[str, Any] = {"num_hidden_layers": 4}
DEEP_MODELS = {
    "mistral": MISTRAL | FOUR,
    "ministral3": MINISTRAL3 | FOUR,
    "mistral4": MISTRAL4 | FOUR,
    "tied": MINISTRAL3 | FOUR | {"tie_word_embeddings": True},
    "seeing": with_vision(MINISTRAL3 | FOUR),
}
NF4_EXPERTS = NF4 | ON_EXPERTS | {"quantize_moe_experts": True}
BASES: dict[str, dict[str, Any]] = {
    "float32": {"adapter": "lora"},
    "bfloat16": {"adapter": "lora", "bf16": True},
    "int8": {"adapter": "lora", "bf16": True, "load_in_8bit": True},
    "NF4": NF4,
    "NF4 experts": NF4_EXPERTS,
    "experts": {"adapter": "lora"} | ON_EXPERTS,
    "NF4, q_proj alone": NF4 | {"lora_target_modules": ["q_proj"]},
}
PACKED = {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 2}
PLAIN: dict[str, Any] = {"gradient_checkpointing": True, "learning_rate": 0.01} | PACKED
OFFLOADS: dict[str, dict[str, Any]] = {
    "checkpoints": {"activation_offloading": True},
    "layers": {"layer_offloading": True},
    "layers, all values kept": {"layer_offloading": True, "gradient_checkpointing": False},
    "two layers": {"layer_offloading": True, "offloaded_layers": 2},
    "tables": {"offload_embeddings": True},
}
EVERYTHING = OFFLOADS["checkpoints"] | OFFLOADS["layers"] | OFFLOADS["tables"]


def begun(home: Path, folder: Path, rows: Rows, **keys: Any) -> Training:
    run = training(home, settings(folder, **(PLAIN | keys)), rows)
    wake_adapter(run.model)
    return run


BeginDeep: TypeAlias = Callable[..., Training]
"""The same by the model's name in `DEEP_MODELS` and the folder's, if any."""


def weights_of_layers(model: Any) -> list[list[Tensor]]:
    """Of each layer, what `layer_offloading` moves."""
    found = []
    for layer in decoder_layers(unwrapped(model)):
        held: list[Tensor] = []
        for module in layer.modules():
            names = [n for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
            names += [name for name in ("gate_up_proj", "down_proj") if hasattr(module, name)]
            for name in names:
                own = getattr(module, name)
                # What an adapter wraps is found inside it; a linear layer is a module of its own.
                if isinstance(own, Tensor) or type(own).__name__.startswith("Grouped"):
                    held += movable_tensors(module, name)
            if type(module).__name__ == "LoraGrouped":
                held += movable_tensors(module, "base_layer")
        found.append(list({id(t): t for t in held}.values()))
    return found


class Residents(TorchDispatchMode):
    """Notes, at every operation, how many layers have a weight in memory and how many bytes."""

    def __init__(self, layers: list[list[Tensor]]) -> None:
        super().__init__()
        self.layers = layers
        self.most = self.most_bytes = 0

    def now(self) -> list[int]:
        """The bytes of each layer."""
        return [sum(t.untyped_storage().nbytes() for t in tensors) for tensors in self.layers]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        held = self.now()
        self.most = max(self.most, sum(size > 0 for size in held))
        self.most_bytes = max(self.most_bytes, sum(held))
        return result


def keys_of(name: str) -> dict[str, Any]:
    return EVERYTHING if name == "everything" else OFFLOADS[name]
