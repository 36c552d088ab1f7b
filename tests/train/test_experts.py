"""The experts of Mistral 4 as grouped linear layers: transformers' numbers at a quarter of the
memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import Mistral4Config, Mistral4ForCausalLM
from transformers.models.mistral4.modeling_mistral4 import Mistral4Experts
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.train.experts import (
    Experts,
    GroupedLinear,
    GroupedNF4,
    GroupedStack,
    Groups,
    balance_loss,
    balance_weight,
    expert_modules,
    grouped_linear,
    replace_experts,
    watch_routers,
)
from tests.support.tiny import MISTRAL4, settings

CPU = torch.device("cpu")
TOKENS, EXPERTS, CHOSEN = 37, 8, 2
ADAPTED = {"adapter": "lora", "lora_target_parameters": ["mlp.experts.gate_up_proj"]}
QUANTIZED = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "quantize_moe_experts": True,
    "lora_target_modules": ["o_proj"],
}


def stock_experts(dtype: torch.dtype = torch.float32, **sizes: Any) -> Mistral4Experts:
    """transformers' layer, not square in any way, with random weights."""
    config = Mistral4Config(
        hidden_size=64, moe_intermediate_size=128, n_routed_experts=EXPERTS, **sizes
    )
    config._experts_implementation = "grouped_mm"
    layer = Mistral4Experts(config)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def ours(stock: Mistral4Experts, form: type[GroupedLinear]) -> Experts:
    """Our layer, filled with the same weights."""
    dtype = stock.gate_up_proj.dtype
    layer = Experts(stock, form, dtype)
    layer.gate_up_proj.take(iter(stock.gate_up_proj.detach()), CPU)
    layer.down_proj.take(iter(stock.down_proj.detach()), CPU)
    return layer


def dequantized(stock: Mistral4Experts) -> Mistral4Experts:
    """transformers' layer with the weights that NF4 leaves of its own."""
    with torch.no_grad():
        for parameter in stock.parameters():
            for e, matrix in enumerate(parameter):
                packed, state = quantize_4bit(
                    matrix.clone(), compress_statistics=True, quant_type="nf4"
                )
                parameter[e] = dequantize_4bit(packed, state)
    return stock


def routed(dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, each token's experts (one expert idle), and their weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, 64, generator=generator).to(dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, 3] = -1.0
    weights, chosen = scores.softmax(-1).topk(CHOSEN)
    return hidden.requires_grad_(), chosen, weights


def forward_and_gradient(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden, chosen, weights = routed(dtype)
    output = layer(hidden, chosen, weights)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype))
    assert hidden.grad is not None
    return output.detach(), hidden.grad


DTYPES = [torch.float32, torch.bfloat16]


class TestTheLayer:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_plain_experts_are_transformers_own(self, dtype: torch.dtype) -> None:
        stock = stock_experts(dtype)
        expected, expected_gradient = forward_and_gradient(stock, dtype)
        output, gradient = forward_and_gradient(ours(stock, GroupedStack), dtype)
        assert torch.equal(output, expected)
        assert torch.equal(gradient, expected_gradient)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nf4_experts_are_stock_with_dequantized_weights(self, dtype: torch.dtype) -> None:
        layer = ours(stock_experts(dtype), GroupedNF4)
        output, gradient = forward_and_gradient(layer, dtype)
        expected, expected_gradient = forward_and_gradient(dequantized(stock_experts(dtype)), dtype)
        assert torch.equal(output, expected)
        assert torch.equal(gradient, expected_gradient)
        assert not torch.equal(output, forward_and_gradient(stock_experts(dtype), dtype)[0])

    def test_it_agrees_with_the_loop_that_is_transformers_reference(self) -> None:
        stock = stock_experts()
        output, _ = forward_and_gradient(ours(stock, GroupedStack), torch.float32)
        stock.config._experts_implementation = "eager"
        expected, _ = forward_and_gradient(stock, torch.float32)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)

    def test_one_token_is_enough(self) -> None:
        stock = stock_experts()
        hidden, chosen, weights = (tensor[:1] for tensor in routed())
        for form in (GroupedStack, GroupedNF4):
            assert ours(stock, form)(hidden, chosen, weights).shape == (1, 64)

    def test_an_evaluation_before_a_step_leaves_its_gradient_as_it_is(self) -> None:
        layer = ours(stock_experts(torch.bfloat16), GroupedNF4)
        before = forward_and_gradient(layer, torch.bfloat16)
        layer.eval()
        with torch.no_grad():
            layer(*routed(torch.bfloat16, seed=2))
        layer.train()
        after = forward_and_gradient(layer, torch.bfloat16)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])

    def test_autograd_keeps_packed_weights_only(self) -> None:
        layer = ours(stock_experts(), GroupedNF4)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(*routed())
        assert max(tensor.numel() for tensor in kept) == TOKENS * CHOSEN * 128
        assert not any(tensor.shape in ((256, 64), (64, 128)) for tensor in kept)


class TestStorage:
    def test_nf4_takes_the_planned_bytes(self) -> None:
        layer = GroupedNF4(4, 512, 1024, torch.bfloat16)
        layer.take(iter(torch.randn(4, 1024, 512)), CPU)
        held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
        assert held / (4 * 1024 * 512) < 0.52
        assert not list(layer.parameters())

    @pytest.mark.parametrize("form", [GroupedStack, GroupedNF4])
    def test_matrices_are_taken_one_by_one(self, form: type[GroupedLinear]) -> None:
        alive = 0
        most = 0

        class Counted(Tensor):
            def __del__(self) -> None:
                nonlocal alive
                alive -= 1

        def read() -> Iterator[Tensor]:
            nonlocal alive, most
            for _ in range(5):
                alive += 1
                most = max(most, alive)
                yield torch.randn(64, 128).as_subclass(Counted)

        form(5, 128, 64, torch.float32).take(read(), CPU)
        assert most <= 2

    @pytest.mark.parametrize("form", [GroupedStack, GroupedNF4])
    @pytest.mark.parametrize("shape", [(3, 64, 128), (5, 64, 128), (4, 128, 64)])
    def test_wrong_shapes_refused(self, form: type[GroupedLinear], shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="matri"):
            form(4, 128, 64, torch.float32).take(iter(torch.randn(shape)), CPU)

    @pytest.mark.parametrize("form", [GroupedStack, GroupedNF4])
    def test_before_they_are_taken_they_have_no_memory(self, form: type[GroupedLinear]) -> None:
        layer = form(128, 4096, 4096, torch.bfloat16)
        assert layer.device == torch.device("meta")
        assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize("width", [64, 60])
def test_a_product_that_the_kernel_cannot_do_is_a_loop(width: int) -> None:
    rows, weight = torch.randn(10, width), torch.randn(4, 6, width)
    experts = torch.tensor([0] * 3 + [2] * 4 + [3] * 3)
    expected = torch.stack([weight[e] @ row for row, e in zip(rows, experts, strict=True)])
    found = grouped_linear(rows, weight, Groups(experts, 4))
    torch.testing.assert_close(found, expected)


class TestReplacing:
    @pytest.fixture
    def model(self) -> Mistral4ForCausalLM:
        with torch.device("meta"):
            return Mistral4ForCausalLM(Mistral4Config.from_dict(MISTRAL4))

    @pytest.mark.parametrize(
        ("keys", "form"),
        [
            (QUANTIZED, GroupedNF4),
            (QUANTIZED | {"lora_target_parameters": "mlp.experts.down_proj"}, GroupedNF4),
            (ADAPTED, GroupedStack),
            (ADAPTED | {"adapter": "qlora", "load_in_4bit": True}, GroupedStack),
        ],
    )
    def test_quantized_or_adapted_experts_are_ours(
        self, model: Mistral4ForCausalLM, keys: dict[str, Any], form: type[GroupedLinear]
    ) -> None:
        assert replace_experts(model, settings(**keys), torch.bfloat16) == 2
        names = [
            f"model.layers.{n}.mlp.experts.{m}_proj" for n in (0, 1) for m in ("gate_up", "down")
        ]
        assert list(expert_modules(model)) == names
        found = [model.get_submodule(name) for name in names]
        assert {type(module) for module in found} == {form}
        assert {module.dtype for module in found} == {torch.bfloat16}

    @pytest.mark.parametrize(
        "keys",
        [{}, {"adapter": "lora"}, {"adapter": "qlora", "load_in_4bit": True}],
        ids=["full", "lora", "only the linears in 4 bits"],
    )
    def test_others_stay_stock(self, model: Mistral4ForCausalLM, keys: dict[str, Any]) -> None:
        assert replace_experts(model, settings(**keys), torch.bfloat16) == 0
        assert not expert_modules(model)


class TestBalance:
    @pytest.fixture
    def model(self) -> Mistral4ForCausalLM:
        torch.manual_seed(0)
        return Mistral4ForCausalLM(Mistral4Config.from_dict(MISTRAL4))

    @pytest.mark.parametrize("padding", [0, 5])
    def test_it_is_transformers_formula(self, model: Mistral4ForCausalLM, padding: int) -> None:
        ids = torch.randint(20, 192, (2, 13), generator=torch.Generator().manual_seed(0))
        real = torch.ones(ids.shape, dtype=torch.bool)
        real[1, len(real[1]) - padding :] = False
        with watch_routers(model) as routings:
            model.model(input_ids=ids, use_cache=False)
        assert len(routings) == 2
        logits: Any = tuple(logits for logits, _ in routings)
        expected = load_balancing_loss_func(logits, 8, 2, real.long())
        assert balance_loss(routings, real).item() == pytest.approx(expected.item(), rel=1e-6)
        assert balance_loss(routings, real).item() > 2.0

    def test_what_is_recomputed_is_not_counted_again(self, model: Mistral4ForCausalLM) -> None:
        found = []
        ids = torch.arange(20, 60)[None]
        for recompute in (False, True):
            if recompute:
                model.activation_checkpointing_enable(
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )
            model.train().zero_grad()
            with watch_routers(model) as routings:
                model.model(input_ids=ids, use_cache=False)
            balance_loss(routings, torch.ones_like(ids, dtype=torch.bool)).backward()
            assert len(routings) == 2
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert "model.layers.0.mlp.gate.weight" in found[0]
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name])

    @pytest.mark.parametrize(
        ("overrides", "weight"),
        [
            (None, 0.0),
            ({"router_aux_loss_coef": 0.5}, 0.0),
            ({"output_router_logits": False, "router_aux_loss_coef": 0.5}, 0.0),
            ({"output_router_logits": True}, 0.001),
            ({"output_router_logits": True, "router_aux_loss_coef": 0.5}, 0.5),
        ],
    )
    def test_off_until_asked_for(self, overrides: dict[str, object] | None, weight: float) -> None:
        assert balance_weight(settings(overrides_of_model_config=overrides)) == weight
