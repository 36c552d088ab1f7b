"""What waits in RAM for its turn: the same numbers as on the device, and never much at once."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine.train.batches import Rows
from engine.train.evaluate import score
from engine.train.forward import head_of, hidden_states, unwrapped
from engine.train.generate import generate
from engine.train.loop import Training
from engine.train.model import load_base
from engine.train.offload import decoder_layers
from engine.train.offload.layers import movable_tensors
from engine.train.offload.transfer import HostMemory
from tests.train.test_checkpoint import everything, steps
from tests.train.test_first_step import NF4, ON_EXPERTS
from tests.train.tiny import (
    MINISTRAL3,
    MISTRAL,
    MISTRAL4,
    gradients,
    settings,
    training,
    wake_adapter,
    with_vision,
    write_model,
)

DEEP: dict[str, Any] = {"num_hidden_layers": 4}
FOLDERS = {
    "mistral": MISTRAL | DEEP,
    "ministral3": MINISTRAL3 | DEEP,
    "mistral4": MISTRAL4 | DEEP,
    "tied": MINISTRAL3 | DEEP | {"tie_word_embeddings": True},
    "seeing": with_vision(MINISTRAL3 | DEEP),
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
    "two layers": {"layer_offloading": True, "offloaded_layers": 2},
    "tables": {"offload_embeddings": True},
}
EVERYTHING = OFFLOADS["checkpoints"] | OFFLOADS["layers"] | OFFLOADS["tables"]
COMBINATIONS = [
    *(("ministral3", "NF4", name) for name in OFFLOADS),
    ("mistral", "bfloat16", "everything"),
    ("ministral3", "int8", "everything"),
    ("ministral3", "float32", "everything"),
    ("ministral3", "NF4, q_proj alone", "layers"),
    ("mistral4", "NF4 experts", "everything"),
    ("mistral4", "experts", "everything"),
    ("mistral4", "float32", "layers"),
    ("tied", "NF4", "everything"),
    ("seeing", "NF4", "everything"),
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of four layers, by its name in `FOLDERS`."""
    home = tmp_path_factory.mktemp("deep")

    def folder(name: str) -> Path:
        path = home / name
        return path if path.exists() else write_model(path, FOLDERS[name])

    return folder


def begun(home: Path, folder: Path, rows: Rows, **keys: Any) -> Training:
    run = training(home, settings(folder, **(PLAIN | keys)), rows)
    wake_adapter(run.model)
    return run


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


@pytest.mark.parametrize(("architecture", "base", "name"), COMBINATIONS)
class TestSameNumbers:
    def test_of_a_loss_and_of_every_gradient_and_of_every_step(
        self,
        deep: Callable[[str], Path],
        uneven: Rows,
        tmp_path: Path,
        architecture: str,
        base: str,
        name: str,
    ) -> None:
        found = []
        for number, keys in enumerate(({}, keys_of(name))):
            run = begun(tmp_path / str(number), deep(architecture), uneven, **BASES[base], **keys)
            first = run.gradients(run.order.step(1)), gradients(run.model)
            run.optimizer.zero_grad(set_to_none=True)
            trained = steps(run, 3)
            scored = score(run.model, run.base, uneven, run.config)
            said = generate(run.model, run.base.device, [1, 40, 50], end=-1, max_new_tokens=6)
            again, _ = run.gradients(run.order.step(1))
            found.append((*first, trained, scored, said, again, everything(run)))
        plain, ours = found
        assert plain[1].keys() == ours[1].keys()
        assert all(float(g.norm()) > 0 for g in ours[1].values())
        assert all(torch.equal(plain[1][n], ours[1][n]) for n in ours[1])
        assert plain[0] == ours[0]
        assert plain[2:] == ours[2:]


class TestLayers:
    @pytest.mark.parametrize(
        ("architecture", "base"),
        [("ministral3", "NF4"), ("ministral3", "int8"), ("mistral4", "NF4 experts")],
    )
    def test_no_more_than_two_are_ever_there(
        self,
        deep: Callable[[str], Path],
        uneven: Rows,
        tmp_path: Path,
        architecture: str,
        base: str,
    ) -> None:
        keys = BASES[base] | OFFLOADS["layers"]
        run = begun(tmp_path, deep(architecture), uneven, **keys)
        layers = weights_of_layers(run.model)
        whole = [sum(t.nbytes for t in tensors) for tensors in layers]
        residents = Residents(layers)
        assert residents.now() == [0, 0, 0, 0], "loading leaves none there"
        with residents:
            steps(run, 2)
            assert residents.most == 2
            score(run.model, run.base, uneven, run.config)
            generate(run.model, run.base.device, [1, 40, 50], end=-1, max_new_tokens=3)
        assert residents.most == 2
        assert residents.most_bytes == 2 * whole[0]

    def test_those_behind_the_first_n_stay(
        self, deep: Callable[[str], Path], uneven: Rows, tmp_path: Path
    ) -> None:
        run = begun(tmp_path, deep("ministral3"), uneven, **NF4, **OFFLOADS["two layers"])
        layers = weights_of_layers(run.model)
        assert [size > 0 for size in Residents(layers).now()] == [False, False, True, True]

    def test_a_layers_matrices_are_all_moved(
        self, deep: Callable[[str], Path], uneven: Rows, tmp_path: Path
    ) -> None:
        run = begun(tmp_path, deep("mistral4"), uneven, **NF4_EXPERTS, **OFFLOADS["layers"])
        frozen = [t for t in run.model.parameters() if not t.requires_grad]
        frozen += [b for b in run.model.buffers() if b.dtype == torch.uint8]
        stayed = sum(t.untyped_storage().nbytes() for t in frozen if t.ndim > 1)
        tables = sum(2 * t.nbytes for t in (head_of(run.model),))
        assert stayed == tables

    def test_loading_never_holds_more_than_one_layers_matrix(
        self, deep: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved: list[int] = []
        original = HostMemory.copy

        def copy(self: HostMemory, tensor: Tensor) -> Tensor:
            moved.append(sum(t.untyped_storage().nbytes() for t in seen) + tensor.nbytes)
            seen.append(tensor)
            return original(self, tensor)

        seen: list[Tensor] = []
        monkeypatch.setattr(HostMemory, "copy", copy)
        folder = deep("ministral3")
        load_base(folder, settings(folder, **PLAIN, **NF4, **OFFLOADS["layers"]))
        largest = max(t.nbytes for t in seen)
        assert len(seen) == 4 * 7 * 2
        assert max(moved) < 2 * largest + 4096

    def test_the_report_says_what_waits(self, deep: Callable[[str], Path]) -> None:
        folder = deep("ministral3")
        plain, ours = (
            load_base(folder, settings(folder, **PLAIN, **NF4, **keys)).report
            for keys in ({}, OFFLOADS["layers"])
        )
        assert plain.waiting_bytes == 0
        assert ours.held_bytes + ours.waiting_bytes == plain.held_bytes
        assert ours.waiting_bytes > 0.3 * plain.held_bytes
        assert plain.sentence() == ours.sentence(), "on a CPU it is one memory"


class TestCheckpoints:
    @pytest.mark.parametrize("offloads", [True, "legacy", "hidden_states", None])
    def test_a_layers_input_leaves_the_device_after_its_forward_pass(
        self, deep: Callable[[str], Path], uneven: Rows, tmp_path: Path, offloads: Any
    ) -> None:
        run = begun(tmp_path, deep("ministral3"), uneven, **NF4, activation_offloading=offloads)
        with input_storages(run.model) as found:
            states = hidden_states(run.model, run.order.step(1).micros[0].to(run.base.device))
            alive = [not storage.expired() for storage in found]
            # The first one's is the embedding's output, to which autograd itself holds on.
            assert alive == [True, *[not offloads] * 3]
        states.sum().backward()

    def test_what_waits_is_freed_with_the_step(
        self, deep: Callable[[str], Path], uneven: Rows, tmp_path: Path
    ) -> None:
        from engine.train.offload import checkpoints

        run = begun(tmp_path, deep("ministral3"), uneven, **NF4, **OFFLOADS["checkpoints"])
        made: list[Any] = []
        original = checkpoints._Input.__init__

        def note(self: Any, *args: Any) -> None:
            original(self, *args)
            made.append(weakref.ref(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints._Input, "__init__", note)
            run.gradients(run.order.step(1))
        assert len(made) == 4 * len(run.order.step(1).micros)
        assert not any(ref() for ref in made)


@contextmanager
def input_storages(model: Any) -> Iterator[list[Any]]:
    """The storage of every decoder layer's input, held weakly."""
    found: list[Any] = []

    def note(_module: nn.Module, inputs: Any) -> None:
        found.append(StorageWeakRef(inputs[0].untyped_storage()))

    hooks = [layer.register_forward_pre_hook(note) for layer in decoder_layers(unwrapped(model))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
