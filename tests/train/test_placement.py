"""Tables in RAM, a tower that nothing looks through, and tensors whose memory comes and goes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine.train.batches import Rows
from engine.train.device import as_planned
from engine.train.evaluate import score
from engine.train.forward import head_of, unwrapped
from engine.train.model import load_base
from engine.train.offload import Hosted, HostMemory, decoder_layers
from tests.support.methods import NF4
from tests.support.offloading import OFFLOADS, BeginDeep
from tests.support.tiny import Models, settings

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

    def test_a_tied_table_is_in_ram_once(self, deep_model: Models) -> None:
        folder = deep_model("tied")
        model: Any = load_base(folder, settings(folder, **NF4, **OFFLOADS["tables"])).model
        looked_up = model.get_input_embeddings().weight
        assert looked_up.data_ptr() == model.get_output_embeddings().hosted.host.data_ptr()

    def test_a_head_that_nobody_called_for_is_no_crash(self, deep_model: Models) -> None:
        folder = deep_model("ministral3")
        model: Any = load_base(folder, settings(folder, **NF4, **OFFLOADS["tables"])).model
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
