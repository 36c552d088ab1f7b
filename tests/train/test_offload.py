"""What waits in RAM for its turn: the same numbers as on the device, and never much at once."""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from engine.train import offload
from engine.train.batches import Rows
from engine.train.checkpoint import export_trained
from engine.train.device import as_planned
from engine.train.evaluate import score
from engine.train.forward import head_module, head_of, hidden_states, unwrapped
from engine.train.generate import generate
from engine.train.model import load_base
from engine.train.offload import Hosted, HostMemory, decoder_layers, head_at_hand
from tests.support import stock
from tests.support.methods import NF4
from tests.support.offloading import (
    BASES,
    EVERYTHING,
    NF4_EXPERTS,
    OFFLOADS,
    PLAIN,
    BeginDeep,
    Residents,
    begun,
    keys_of,
    weights_of_layers,
)
from tests.support.tiny import Models, assert_same, everything, gradients, settings, steps

COMBINATIONS = [
    *(("ministral3", "NF4", name) for name in OFFLOADS),
    ("mistral", "bfloat16", "everything"),
    ("ministral3", "int8", "everything"),
    ("ministral3", "float32", "everything"),
    ("ministral3", "NF4, q_proj alone", "layers"),
    ("mistral4", "NF4 experts", "everything"),
    ("mistral4", "experts", "everything"),
    ("mistral4", "float32", "layers"),
    ("mistral4", "NF4 experts", "layers, all values kept"),
    ("tied", "NF4", "everything"),
    ("seeing", "NF4", "everything"),
]


@pytest.mark.parametrize(("architecture", "base", "name"), COMBINATIONS)
class TestSameNumbers:
    def test_loss_gradients_and_steps(
        self, begin_deep: BeginDeep, uneven: Rows, architecture: str, base: str, name: str
    ) -> None:
        found = []
        for number, keys in enumerate(({}, keys_of(name))):
            run = begin_deep(architecture, str(number), **BASES[base], **keys)
            first = run.gradients(run.order.step(1)), gradients(run.model)
            run.optimizer.zero_grad(set_to_none=True)
            trained = steps(run, 3)
            scored = score(run.model, run.base, uneven, run.config)
            said = generate(run.model, run.base.device, [1, 40, 50], end=-1, max_new_tokens=6)
            again, _ = run.gradients(run.order.step(1))
            found.append((*first, trained, scored, said, again, everything(run)))
        plain, ours = found
        assert all(float(g.norm()) > 0 for g in ours[1].values())
        assert_same(plain[1], ours[1], 0.0, 0.0)
        assert plain[0] == ours[0]
        assert plain[2:] == ours[2:]


class TestLayers:
    @pytest.mark.parametrize(
        ("architecture", "base"),
        [("ministral3", "NF4"), ("ministral3", "int8"), ("mistral4", "NF4 experts")],
    )
    def test_at_most_two_layers(
        self, begin_deep: BeginDeep, uneven: Rows, architecture: str, base: str
    ) -> None:
        keys = BASES[base] | OFFLOADS["layers"]
        run = begin_deep(architecture, **keys)
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

    @pytest.mark.parametrize("name", ["layers", "layers, all values kept"])
    def test_copies_a_pass(
        self, begin_deep: BeginDeep, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        run = begin_deep("ministral3", **NF4, **OFFLOADS[name])
        step = run.order.step(1)
        run.gradients(step)  # leaves the first layer there
        filled: list[Hosted] = []
        original = Hosted.fill

        def fill(self: Hosted) -> None:
            filled.append(self)
            original(self)

        monkeypatch.setattr(Hosted, "fill", fill)
        run.gradients(step)
        copies = Counter(map(id, filled))
        passes = len(step.micros)  # the first and the last layer are there from the one before
        matrices = 7 * 2  # of each the packed weights and their scales
        assert Counter(copies.values()) == {passes: 2 * matrices, 2 * passes: 2 * matrices}

    def test_later_layers_stay(self, begin_deep: BeginDeep) -> None:
        run = begin_deep("ministral3", **NF4, **OFFLOADS["two layers"])
        layers = weights_of_layers(run.model)
        assert [size > 0 for size in Residents(layers).now()] == [False, False, True, True]

    def test_all_matrices_are_moved(self, begin_deep: BeginDeep) -> None:
        run = begin_deep("mistral4", **NF4_EXPERTS, **OFFLOADS["layers"])
        frozen: list[Tensor] = [t for t in run.model.parameters() if not t.requires_grad]
        frozen += [b for b in run.model.buffers() if b.dtype == torch.uint8]
        stayed = sum(t.untyped_storage().nbytes() for t in frozen if t.ndim > 1)
        assert stayed == 2 * head_of(run.model).nbytes, "the tables"

    def test_held_while_loading(self, deep_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        moved: list[int] = []
        original = HostMemory.copy

        def copy(self: HostMemory, tensor: Tensor) -> Tensor:
            moved.append(sum(t.untyped_storage().nbytes() for t in seen) + tensor.nbytes)
            seen.append(tensor)
            return original(self, tensor)

        seen: list[Tensor] = []
        monkeypatch.setattr(HostMemory, "copy", copy)
        folder = deep_model("ministral3")
        load_base(folder, settings(folder, **PLAIN, **NF4, **OFFLOADS["layers"]))
        largest = max(t.nbytes for t in seen)
        assert len(seen) == 4 * 7 * 2
        assert max(moved) < 2 * largest + 4096

    def test_the_report_says_what_is_offloaded(self, deep_model: Models) -> None:
        folder = deep_model("ministral3")
        plain, ours = (
            load_base(folder, settings(folder, **PLAIN, **NF4, **keys)).report
            for keys in ({}, OFFLOADS["layers"])
        )
        assert plain.offloaded_bytes == 0
        assert ours.held_bytes + ours.offloaded_bytes == plain.held_bytes
        assert ours.offloaded_bytes > 0.3 * plain.held_bytes
        assert plain.sentence() == ours.sentence(), "on a CPU it is one memory"


class TestCheckpoints:
    @pytest.mark.parametrize("offloads", [True, "legacy", "hidden_states", None])
    def test_layer_input_leaves_the_device(self, begin_deep: BeginDeep, offloads: Any) -> None:
        run = begin_deep("ministral3", **NF4, activation_offloading=offloads)
        with input_storages(run.model) as found:
            states = hidden_states(run.model, run.order.step(1).micros[0].to(run.base.device))
            alive = [not storage.expired() for storage in found]
            assert alive == [not offloads] * 4
        states.sum().backward()

    def test_freed_with_the_step(self, begin_deep: BeginDeep) -> None:
        run = begin_deep("ministral3", **NF4, **OFFLOADS["checkpoints"])
        made: list[Any] = []
        original = offload._Input.__init__

        def note(self: Any, *args: Any) -> None:
            original(self, *args)
            made.append(weakref.ref(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload._Input, "__init__", note)
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


class TestResult:
    @pytest.mark.parametrize(
        ("architecture", "keys"), [("ministral3", NF4), ("mistral4", NF4_EXPERTS)]
    )
    def test_resume_offloaded(
        self, begin_deep: BeginDeep, architecture: str, keys: dict[str, Any]
    ) -> None:
        keys = keys | {"num_epochs": 4, "lora_dropout": 0.0 if "experts" in str(keys) else 0.1}
        first = begin_deep(architecture, **keys)
        steps(first, 2)
        first.save()
        expected = steps(first, 2)
        second = begin_deep(architecture, **keys, **EVERYTHING)
        second.restore(None)
        assert steps(second, 2) == expected
        assert everything(second) == everything(first)

    def test_loads_in_stock_peft(self, deep_model: Models, uneven: Rows, tmp_path: Path) -> None:
        folder = deep_model("ministral3")
        keys = EVERYTHING | {"peft_autocast_adapter_dtype": False}
        run = begun(tmp_path / "run", folder, uneven, adapter="lora", **keys)
        steps(run, 2)
        row = stock.row_of(uneven, 2)
        with head_at_hand(head_module(run.model)):
            ours = stock.logits_of_ours(run.model, row)
        home = export_trained(run.model, tmp_path, folder, run.config)
        theirs = stock.open_adapter(stock.open_model(folder, stock.FLOAT32), home)
        # PEFT widens the bfloat16 matrices, whose products ours rounds.
        assert stock.distance(ours, stock.logits(theirs, row)) < 0.01


CPU = torch.device("cpu")


class TestTables:
    @pytest.mark.parametrize("architecture", ["ministral3", "tied"])
    def test_when_the_head_is_there(
        self, begin_deep: BeginDeep, uneven: Rows, architecture: str
    ) -> None:
        run = begin_deep(architecture, **NF4, **OFFLOADS["tables"])
        head = head_of(run.model)
        first, last = (decoder_layers(unwrapped(run.model))[k] for k in (0, -1))
        seen: dict[str, bool] = {}

        def note(when: str) -> Callable[..., None]:
            return lambda *_: seen.__setitem__(when, head.untyped_storage().nbytes() > 0)

        last.register_forward_hook(note("forward"))
        last.register_full_backward_pre_hook(note("backward"))
        first.register_full_backward_hook(note("end"))
        run.gradients(run.order.step(1))
        assert seen == {"forward": False, "backward": False, "end": False}
        score(run.model, run.base, uneven, run.config)
        assert seen["forward"]
        assert head.untyped_storage().nbytes() == 0

    def loaded(self, folder: Path) -> Any:
        return load_base(folder, settings(folder, **NF4, **OFFLOADS["tables"])).model

    def test_a_tied_table_is_in_ram_once(self, deep_model: Models) -> None:
        model = self.loaded(deep_model("tied"))
        looked_up = model.get_input_embeddings().weight
        assert looked_up.data_ptr() == model.get_output_embeddings().hosted.host.data_ptr()

    def test_a_head_that_nobody_called_for_is_no_crash(self, deep_model: Models) -> None:
        model = self.loaded(deep_model("ministral3"))
        with pytest.raises(RuntimeError, match="nothing has called for it"):
            model(input_ids=torch.tensor([[1, 40, 50]]))


class TestVisionTower:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> torch.device:
        """A device that is not the CPU and takes any tensor."""
        for module in ("attention", "device"):
            monkeypatch.setattr(f"engine.train.{module}.as_planned", lambda _: as_planned(CPU))
        monkeypatch.setattr("engine.train.model.pick_device", lambda: torch.device("meta"))
        return torch.device("meta")

    @pytest.mark.parametrize(
        ("keys", "images", "offloaded"),
        [
            ({"adapter": "lora"}, False, True),
            ({"adapter": "lora"}, True, False),
            ({"adapter": "lora", "lora_target_modules": r".*vision_tower.*q_proj"}, False, False),
            ({}, False, True),
            ({"unfrozen_parameters": [".*"]}, False, False),
        ],
        ids=str,
    )
    def test_a_tower_that_nothing_uses_never_comes_to_the_device(
        self,
        deep_model: Models,
        device: torch.device,
        keys: dict[str, Any],
        images: bool,
        offloaded: bool,
    ) -> None:
        folder = deep_model("seeing")
        base = load_base(folder, settings(folder, **keys), images=images)
        places: dict[bool, set[torch.device]] = {True: set(), False: set()}
        for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
            places["vision_tower" in name or "multi_modal" in name].add(tensor.device)
        assert places == {False: {device}, True: {CPU if offloaded else device}}
        assert base.vision_offloaded == offloaded

    def test_text_model_has_no_tower(self, deep_model: Models, device: torch.device) -> None:
        folder = deep_model("ministral3")
        assert not load_base(folder, settings(folder), images=False).vision_offloaded

    def test_on_a_cpu_nothing_changes(self, deep_model: Models) -> None:
        folder = deep_model("seeing")
        assert not load_base(folder, settings(folder), images=False).vision_offloaded


class TestHosted:
    def test_it_comes_and_goes_and_stays_the_same_tensor(self) -> None:
        numbers = torch.randn(64, 32)
        parameter = nn.Parameter(numbers.clone())  # as loading makes them
        view = parameter.detach()[3]
        hosted = Hosted(parameter, HostMemory(CPU).copy(parameter))
        for _ in range(2):
            assert (parameter.untyped_storage().nbytes(), hosted.present) == (0, False)
            assert not hosted.host.requires_grad
            hosted.fill()
            assert torch.equal(parameter, numbers)
            assert torch.equal(view, numbers[3])
            hosted.empty()
        assert parameter._version == 0, "or autograd would refuse what it saved"

    def test_a_tensor_that_shares_its_memory_is_refused(self) -> None:
        whole = torch.zeros(64)
        with pytest.raises(ValueError, match="shares its memory"):
            Hosted(whole[:32], whole[:32].clone())

    def test_host_memory_is_cut_without_overlap(self) -> None:
        memory = HostMemory(CPU)
        generator = torch.Generator().manual_seed(0)
        kinds = [torch.uint8, torch.float32, torch.bfloat16, torch.int8]
        tensors = [
            torch.randint(0, 100, (n % 7 + 1, 3 * n + 1), generator=generator).to(kinds[n % 4])
            for n in range(40)
        ]
        copies = [memory.copy(tensor) for tensor in tensors]
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
        assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
        ends = sorted((c.data_ptr(), c.data_ptr() + c.nbytes) for c in copies)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
