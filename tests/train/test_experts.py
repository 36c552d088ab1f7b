"""The experts of Mistral 4 as grouped linear layers: transformers' numbers at a quarter of the
memory."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Mistral4Config, Mistral4ForCausalLM
from transformers.models.mistral4.modeling_mistral4 import Mistral4Experts
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.train.batches import Rows
from engine.train.checkpoint import export_trained, load_trained, save_trained, trained_tensors
from engine.train.experts import (
    Experts,
    GroupedLinear,
    GroupedNF4,
    GroupedStack,
    Groups,
    LoraGrouped,
    balance_loss,
    balance_weight,
    expert_modules,
    grouped_linear,
    replace_experts,
    stock_names,
    watch_routers,
)
from engine.train.loop import Training
from tests.support.stock import norm_of, stock_model, stock_step, take_nf4_experts
from tests.support.tiny import (
    MISTRAL4,
    Models,
    adapted,
    assert_resumes,
    assert_same,
    gradients,
    logits,
    settings,
    training,
    wake_adapter,
)

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
    def test_its_numbers_are_of_stock_with_the_weights_it_holds(self, dtype: torch.dtype) -> None:
        expected = forward_and_gradient(stock_experts(dtype), dtype)
        rounded = forward_and_gradient(dequantized(stock_experts(dtype)), dtype)
        for form, theirs in ((GroupedStack, expected), (GroupedNF4, rounded)):
            found = forward_and_gradient(ours(stock_experts(dtype), form), dtype)
            assert all(map(torch.equal, found, theirs))
        assert not torch.equal(expected[0], rounded[0])

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
        assert all(map(torch.equal, before, after))

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
        read: list[weakref.ref[Tensor]] = []
        most = 0

        def matrices() -> Iterator[Tensor]:
            nonlocal most
            for _ in range(5):
                matrix = torch.randn(64, 128)
                read.append(weakref.ref(matrix))
                most = max(most, sum(ref() is not None for ref in read))
                yield matrix

        form(5, 128, 64, torch.float32).take(matrices(), CPU)
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


@pytest.fixture
def tiny_model() -> Mistral4ForCausalLM:
    torch.manual_seed(0)
    return Mistral4ForCausalLM(Mistral4Config.from_dict(MISTRAL4))


class TestReplacing:
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
        self, tiny_model: Mistral4ForCausalLM, keys: dict[str, Any], form: type[GroupedLinear]
    ) -> None:
        assert replace_experts(tiny_model, settings(**keys), torch.bfloat16) == 2
        names = [
            f"model.layers.{n}.mlp.experts.{m}_proj" for n in (0, 1) for m in ("gate_up", "down")
        ]
        assert list(expert_modules(tiny_model)) == names
        found = [tiny_model.get_submodule(name) for name in names]
        assert {type(module) for module in found} == {form}
        assert {module.dtype for module in found} == {torch.bfloat16}

    @pytest.mark.parametrize(
        "keys",
        [{}, {"adapter": "lora"}, {"adapter": "qlora", "load_in_4bit": True}],
        ids=["full", "lora", "only the linears in 4 bits"],
    )
    def test_others_stay_stock(self, tiny_model: Mistral4ForCausalLM, keys: dict[str, Any]) -> None:
        assert replace_experts(tiny_model, settings(**keys), torch.bfloat16) == 0
        assert not expert_modules(tiny_model)


class TestBalance:
    @pytest.mark.parametrize("padding", [0, 5])
    def test_it_is_as_transformers(self, tiny_model: Mistral4ForCausalLM, padding: int) -> None:
        ids = torch.randint(20, 192, (2, 13), generator=torch.Generator().manual_seed(0))
        real = torch.ones(ids.shape, dtype=torch.bool)
        real[1, len(real[1]) - padding :] = False
        with watch_routers(tiny_model) as routings:
            tiny_model.model(input_ids=ids, use_cache=False)
        assert len(routings) == 2
        logits: Any = tuple(logits for logits, _ in routings)
        expected = load_balancing_loss_func(logits, 8, 2, real.long())
        assert balance_loss(routings, real).item() == pytest.approx(expected.item(), rel=1e-6)
        assert balance_loss(routings, real).item() > 2.0

    def test_what_is_recomputed_is_not_counted_again(self, tiny_model: Mistral4ForCausalLM) -> None:
        found = []
        ids = torch.arange(20, 60)[None]
        for recompute in (False, True):
            if recompute:
                tiny_model.activation_checkpointing_enable(
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )
            tiny_model.train().zero_grad()
            with watch_routers(tiny_model) as routings:
                tiny_model.model(input_ids=ids, use_cache=False)
            balance_loss(routings, torch.ones_like(ids, dtype=torch.bool)).backward()
            assert len(routings) == 2
            found.append(gradients(tiny_model))
        assert "model.layers.0.mlp.gate.weight" in found[0]
        assert_same(found[0], found[1], 1.3e-6, 1e-5)

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


PROJECTIONS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEARS = r"model\..*layers\.\d+\.(self_attn|mlp\.shared_experts)\.\w+_(proj|mqa)"
LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_target_modules": LINEARS,
    "lora_target_parameters": PROJECTIONS,
    "lora_r": 4,
    "lora_alpha": 8,
    "gradient_accumulation_steps": 64,
    "micro_batch_size": 3,
    "sample_packing": True,
    "sequence_len": 64,
    "max_grad_norm": 1e9,
}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}
NO_EXPERTS: dict[str, Any] = {"lora_target_parameters": None}
NAMES = ("mistral4", "mistral3 over mistral4")


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, model_folder: Models) -> Path:
    return model_folder(request.param)


@pytest.fixture
def text_base(model_folder: Models) -> Path:
    return model_folder("mistral4")


def stock_peft(run: Training, base: Path, home: Path, model: Any = None) -> Any:
    """The run's adapter, saved and opened by stock PEFT on stock transformers."""
    folder = export_trained(run.model, home, base, run.config)
    return peft.PeftModel.from_pretrained(
        stock_model(base) if model is None else model, str(folder), is_trainable=True
    )


def as_stock(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gradients under stock PEFT's names."""
    names = stock_names(model)
    parts = [(name.partition(".lora_"), tensor) for name, tensor in found.items()]
    return {names.get(m, m) + dot + rest: tensor for (m, dot, rest), tensor in parts}


class TestTheAdaptedLayer:
    @pytest.mark.parametrize("rank", [1, 3, 4, 8, 12])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", [GroupedStack, GroupedNF4])
    def test_merged_matrix(self, form: type[GroupedLinear], dtype: torch.dtype, rank: int) -> None:
        torch.manual_seed(0)
        base = form(4, 64, 128, dtype)
        base.take(iter(torch.randn(4, 128, 64) * 0.1), torch.device("cpu"))
        config = peft.LoraConfig(r=rank, lora_alpha=5)
        layer: Any = LoraGrouped(base, "default", config, r=rank, lora_alpha=5)
        wake_adapter(layer)
        experts = torch.tensor([0] * 5 + [1] * 3 + [3] * 9)
        rows = torch.randn(17, 64).to(dtype)
        a, b = (factor.detach().float() for factor in layer.factors("default"))
        merged = torch.stack([base.matrix(e).float() for e in range(4)]) + 5 / rank * (b @ a)
        expected = torch.einsum("soi,si->so", merged[experts], rows.float())
        found = layer(rows, Groups(experts, 4))
        assert found.dtype == dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.01)
        assert (found - base(rows, Groups(experts, 4))).norm() > 0.05 * found.norm()


class TestTheStep:
    def test_is_pefts_on_single_samples(self, base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(base, tmp_path, uneven, **LORA)
        stock = stock_peft(run, base, tmp_path)
        run.model.train()
        loss, norm = run.gradients(run.order.step(1))
        theirs, expected = stock_step(stock, uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert norm == pytest.approx(norm_of(expected), rel=1e-5)
        assert_same(as_stock(gradients(run.model), run.model), expected)

    @pytest.mark.parametrize("keys", [LORA, QLORA], ids=["lora", "qlora"])
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("experts", [True, False])
    def test_every_matrix_learns_and_recomputing_changes_nothing(
        self, base: Path, uneven: Rows, tmp_path: Path, keys: Any, bf16: bool, experts: bool
    ) -> None:
        keys = keys | {"bf16": bf16} | ({} if experts else NO_EXPERTS)
        found = []
        for switch in (False, True):
            run = adapted(
                base, tmp_path / str(switch), uneven, gradient_checkpointing=switch, **keys
            )
            found.append((run.gradients(run.order.step(1)), gradients(run.model)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        assert_same(found[0][1], found[1][1], 1e-6, 1e-6)
        assert len(found[0][1]) == 2 * 2 * (10 if experts else 8)
        assert all(gradient.abs().max() > 0 for gradient in found[0][1].values())
        assert {parameter.dtype for parameter in run.parameters} == {torch.float32}

    def test_evaluation_before_it(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(text_base, tmp_path, uneven, **QLORA | {"bf16": True})
        before = run.gradients(run.order.step(1)), gradients(run.model)
        run.model.zero_grad()
        logits(run.model)
        run.model.train()
        after = run.gradients(run.order.step(1)), gradients(run.model)
        assert before[0] == after[0]
        assert_same(before[1], after[1], 0.0, 0.0)

    def test_nf4_is_dequantized_stock(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        keys = QLORA | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["self_attn", "mlp"]}}
        run = adapted(text_base, tmp_path, uneven, **keys)
        assert sum(isinstance(module, GroupedNF4) for module in run.model.modules()) == 4
        stock = stock_model(text_base)
        take_nf4_experts(stock, run.model)
        opened = stock_peft(run, text_base, tmp_path, stock)
        run.model.train()
        loss, _ = run.gradients(run.order.step(1))
        theirs, expected = stock_step(opened, uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert_same(as_stock(gradients(run.model), run.model), expected)


class TestTheFile:
    @pytest.mark.parametrize(
        "keys",
        [
            {},
            {"lora_target_parameters": "mlp.experts.down_proj"},
            {"lora_target_parameters": ["mlp.experts.gate_up_proj"]},
            {"lora_target_parameters": ["layers.1.mlp.experts.gate_up_proj", PROJECTIONS[1]]},
            {"lora_target_modules": None},
            {"lora_target_modules": ["o_proj"], "peft_use_rslora": True},
        ],
        ids=str,
    )
    def test_stock_peft_answers_alike(
        self, base: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        run = adapted(base, tmp_path, uneven, **LORA | keys)
        stock = stock_peft(run, base, tmp_path)
        plain = logits(stock_model(base))
        torch.testing.assert_close(logits(stock), logits(run.model), rtol=1e-5, atol=1e-5)
        assert (plain - logits(stock)).abs().max() > 0.1
        names = {n.replace(".default", "") for n, _ in stock.named_parameters() if "lora_" in n}
        assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == names

    def test_bfloat16_base_answers_alike(self, base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(base, tmp_path, uneven, **LORA | {"bf16": True})
        stock = stock_peft(run, base, tmp_path, stock_model(base, torch.bfloat16))
        ours, theirs = (m.float().log_softmax(-1) for m in (logits(run.model), logits(stock)))
        # Both round to 8 bits, at other places.
        assert (
            torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") < 1e-3
        )
        assert (ours - theirs).norm() / theirs.norm() < 0.01

    def test_its_config_is_stock_pefts(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(text_base, tmp_path, uneven, **QLORA)
        folder = export_trained(run.model, tmp_path, text_base, run.config)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_parameters"] == sorted(PROJECTIONS)
        assert "experts.gate_up" not in str(config["target_modules"])
        assert config["lora_dropout"] == 0

    def test_it_comes_back_bit_for_bit(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        first = adapted(text_base, tmp_path / "one", uneven, seed=1, **QLORA)
        second = adapted(text_base, tmp_path / "two", uneven, seed=2, **QLORA)
        save_trained(first.model, tmp_path, first.config)
        load_trained(second.model, tmp_path)
        ours, theirs = trained_tensors(first.model), trained_tensors(second.model)
        assert len(ours) == 40
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(logits(first.model), logits(second.model))

    def test_resume_repeats_the_steps(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        keys = QLORA | {"gradient_accumulation_steps": 1, "learning_rate": 0.01, "max_steps": 2}
        assert_resumes(tmp_path, settings(text_base, **keys), uneven, saved=1)


class TestUse:
    def test_without_it_is_the_base(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(text_base, tmp_path, uneven, **LORA)
        with run.model.disable_adapter():
            found = logits(run.model)
        torch.testing.assert_close(found, logits(stock_model(text_base)), rtol=1e-5, atol=1e-5)

    def test_full_fine_tune_is_stock(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        run = training(tmp_path, settings(text_base, learning_rate=0.01), uneven)
        assert any(isinstance(module, Mistral4Experts) for module in run.model.modules())
        run.step(1, run.order.step(1))
        folder = export_trained(run.model, tmp_path, text_base, run.config)
        torch.testing.assert_close(
            logits(stock_model(folder)), logits(run.model), rtol=1e-5, atol=1e-5
        )


class TestTheRoutersBalance:
    def test_added_to_the_gradient(self, text_base: Path, uneven: Rows, tmp_path: Path) -> None:
        asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
        keys = {"gradient_accumulation_steps": 1, "micro_batch_size": 8, "max_grad_norm": 1e9}
        run = training(
            tmp_path, settings(text_base, overrides_of_model_config=asked, **keys), uneven
        )
        batch = run.order.step(1)
        loss, norm = run.gradients(batch)
        tensors = batch.micros[0].tensors
        stock = stock_model(text_base)
        ids = tensors["input_ids"]
        inner = stock.model(input_ids=ids, output_router_logits=True, use_cache=False)
        labels = tensors["labels"].roll(-1, 1)
        labels[:, -1] = -100
        entropy = nn.functional.cross_entropy(
            stock.lm_head(inner.last_hidden_state).flatten(0, 1), labels.flatten()
        )
        balance = load_balancing_loss_func(inner.router_logits, 8, 2, (ids != 11).long())
        (entropy + 0.5 * balance).backward()
        assert loss == pytest.approx(entropy.item(), rel=1e-5)
        assert norm == pytest.approx(norm_of(gradients(stock)), rel=1e-5)
        plain = training(tmp_path / "plain", settings(text_base, **keys), uneven)
        assert plain.gradients(batch)[1] != pytest.approx(norm, rel=1e-3)
