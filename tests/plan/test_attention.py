"""Which attention code is chosen or refused: by the card, the heads, the rows, what is there."""

from dataclasses import replace

import pytest

from engine.errors import UserError
from engine.hardware import attention_backends
from engine.plan import Device, Heads, Place, Task, choose_attention, heads_of, recommend
from engine.plan.attention import find_backend, follow_attention, needs_mask, task_of, why_not
from tests.support.machines import MODELS, card, config, cpu, model

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
NONE, TWO, FOUR, ALL = (), PACKAGES[:1], PACKAGES[2:], PACKAGES
DENSE = Heads("ministral3", 128, 128)
TEXT = Task(DENSE)
TORCH = "flash_attention_torch"


def device(name: str, installed: tuple[str, ...] = ALL) -> Device:
    found = cpu() if name == "CPU" else card(name)
    stack = {package: "1.0" if package in installed else None for package in PACKAGES}
    return replace(found, stack=stack, planned=False)


@pytest.mark.parametrize(
    ("name", "installed", "backend", "worth_installing"),
    [
        ("CPU", NONE, "sdpa", None),
        ("CPU", ALL, "sdpa", None),
        ("T4", NONE, TORCH, None),
        ("T4", ALL, TORCH, None),
        ("A100 80GB", NONE, TORCH, None),  # flash-attn would be the algorithm that PyTorch has
        ("A100 80GB", ALL, "flash_attention_2", None),
        ("A100 80GB", FOUR, TORCH, None),
        ("RTX 4090", NONE, TORCH, None),
        ("RTX 4090", TWO, "flash_attention_2", None),
        ("RTX 4090", ALL, "flash_attention_2", None),
        ("H100", NONE, TORCH, "flash-attn-4"),
        ("H100", TWO, "flash_attention_2", None),  # both at once overwrite each other
        ("H100", FOUR, "flash_attention_4", None),
        ("H100", ("flash-attn-3",), "flash_attention_3", "flash-attn-4"),
        ("H100", ALL, "flash_attention_3", None),
        ("B200", NONE, TORCH, "flash-attn-4"),
        ("B200", TWO, "flash_attention_2", None),
        ("B200", FOUR, "flash_attention_4", None),
        ("B200", ALL, "flash_attention_2", None),
        ("RTX 5090", NONE, TORCH, None),
        ("RTX 5090", FOUR, "flash_attention_4", None),
        ("RTX 5090", ALL, "flash_attention_2", None),
        ("24 GB", NONE, TORCH, None),
    ],
)
def test_the_best_installed_backend_that_suits_the_card(
    name: str, installed: tuple[str, ...], backend: str, worth_installing: str | None
) -> None:
    chosen = choose_attention(device(name, installed), TEXT)
    assert (chosen.backend, chosen.worth_installing) == (backend, worth_installing)
    assert chosen.reason


@pytest.mark.parametrize("name", ["T4", "RTX 4090", "H100", "B200", "RTX 5090", "24 GB"])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("model_name", MODELS)
def test_packed_rows_need_no_mask_on_a_gpu(
    name: str, half: bool, images: bool, model_name: str
) -> None:
    task = Task(heads_of(model(model_name)), images, half)
    for installed in (NONE, TWO, FOUR, ALL):
        chosen = choose_attention(device(name, installed), task)
        assert find_backend(chosen.backend).packing == "cut"
        assert why_not(chosen.backend, device(name, installed), task) is None


@pytest.mark.parametrize(
    ("name", "task", "verdict"),
    [
        ("T4", TEXT, "is not eligible: it needs Hopper or newer to train"),
        ("RTX 4090", TEXT, "is not eligible: it trains from Hopper on"),
        ("RTX 5090", TEXT, "is eligible: both passes are in its wheel, by Ampere's instructions"),
        ("H100", TEXT, "is eligible: made for Hopper, both passes are in its wheel"),
        ("B200", TEXT, "is eligible: made for this Blackwell card"),
        ("B200", Task(DENSE, images=True), "is not eligible: training with images"),
        ("B200", Task(DENSE, half=False), "is not eligible: it computes in 16-bit numbers only"),
        ("H100", Task(Heads("mistral", 256, 256)), "is eligible"),
        ("B200", Task(Heads("mistral", 256, 256)), "is eligible"),
        ("B200", Task(Heads("mistral", 160, 160)), "is not eligible: its heads are up to 128"),
        ("RTX 5090", Task(Heads("mistral", 256, 256)), "is not eligible: its heads are up to 128"),
        # transformers widens the values' heads to the queries'.
        ("H100", Task(Heads("mistral4", 192, 128)), "is eligible"),
        ("B200", Task(Heads("mistral4", 192, 128)), "is not eligible: its heads are up to 128"),
        ("B200", Task(Heads("mistral4", 128, 64)), "is eligible"),
        ("H100", Task(replace(DENSE, dropout=0.1)), "is not eligible: it has no dropout, and this"),
    ],
)
def test_whether_flash_attention_4_is_eligible(name: str, task: Task, verdict: str) -> None:
    gpu = device(name, FOUR)
    assert choose_attention(gpu, task).flash_4.startswith(f"FlashAttention 4 {verdict}")
    assert ("not eligible" in verdict) == bool(why_not("flash_attention_4", gpu, task))


def test_a_model_of_another_family_is_not_guessed_at() -> None:
    llama = Task(Heads("llama", 128, 128))
    reason = why_not("flash_attention_4", device("B200"), llama)
    assert reason == "FlashAttention 4: it does not know llama."


def test_a_card_newer_than_the_table_gets_what_torch_brings() -> None:
    newer = replace(device("B200"), compute_capability=(14, 0))
    assert choose_attention(newer, TEXT).backend == TORCH


def test_two_packages_that_overwrite_each_other_are_not_used_as_if_both_were_whole() -> None:
    both = device("H100", ("flash-attn", "flash-attn-4"))
    assert choose_attention(both, TEXT).backend == "flash_attention_2"
    reason = why_not("flash_attention_4", both, TEXT)
    assert reason == (
        "FlashAttention 4 may be broken: flash-attn is installed too, with files of the same name."
    )


def test_nobody_is_sent_for_a_package_that_no_index_has() -> None:
    backends = attention_backends().values()
    assert [backend.name for backend in backends if not backend.on_index] == ["flash_attention_3"]
    for backend in backends:
        assert backend.on_index or not any(card.worth_installing for card in backend.cards)
    reason = why_not("flash_attention_3", device("H100", NONE), TEXT)
    assert reason == "FlashAttention 3 is not installed and on no package index."


@pytest.mark.parametrize(
    ("backend", "name", "installed", "task", "why", "instead"),
    [
        ("flash_attention_4", "RTX 4090", ALL, TEXT, "no backward pass", "flash_attention_2"),
        (
            *("flash_attention_4", "RTX 5090", ALL, TEXT, "flash-attn is installed"),
            "flash_attention_2",
        ),
        ("flash_attention_4", "B200", NONE, TEXT, "package flash-attn-4", TORCH),
        ("flash_attention_4", "B200", ALL, Task(DENSE, True), "images", "flash_attention_2"),
        ("flash_attention_3", "A100 80GB", NONE, TEXT, "does not run on", TORCH),
        ("flash_attention_2", "T4", ALL, TEXT, "does not run on", TORCH),
        ("flash_attention_2", "H100", ALL, Task(DENSE, half=False), "16-bit", TORCH),
        ("flash_attention_3", "CPU", ALL, TEXT, "needs a GPU", "sdpa"),
        ("flex_attention", "T4", ALL, TEXT, "does not run on", TORCH),
    ],
)
def test_a_wrong_request_is_refused_with_what_to_use_instead(
    backend: str, name: str, installed: tuple[str, ...], task: Task, why: str, instead: str
) -> None:
    with pytest.raises(UserError) as caught:
        follow_attention(backend, device(name, installed), task)
    assert why in caught.value.why
    assert f"Write attn_implementation: {instead} (" in caught.value.fix
    assert follow_attention(instead, device(name, installed), task).backend == instead


@pytest.mark.parametrize(
    ("name", "task", "instead"),
    [("H100", TEXT, TORCH), ("H100", Task(DENSE, images=True), TORCH), ("CPU", TEXT, "sdpa")],
)
def test_flash_attention_2_of_pytorch_stands_in_for_it(name: str, task: Task, instead: str) -> None:
    chosen = follow_attention("flash_attention_2", device(name, NONE), task)
    assert chosen.backend == instead
    assert "computes the same" in chosen.reason


def test_what_a_mask_costs_follows_the_table() -> None:
    gpu, computer = device("H100"), device("CPU")
    assert [needs_mask(name, gpu) for name in (None, "sdpa", "eager", TORCH, "xformers")] == [
        *(False, True, True),
        *(False, False),
    ]
    assert needs_mask(None, computer)


def test_heads_come_from_the_language_model() -> None:
    assert heads_of(model("mistral-small-4")) == Heads("mistral4", 128, 128)
    assert heads_of(model("mistral-medium-3.5")) == Heads("ministral3", 128, 128)
    assert heads_of(model("magistral-small-2506")) == Heads("mistral", 128, 128)


def test_a_run_is_in_float32_where_its_config_or_its_card_says_so() -> None:
    architecture, ampere = model("ministral-3-3b"), device("A100 80GB")
    halves = [
        task_of(config(bf16=bf16), architecture, place).half
        for place in (ampere, device("T4"))
        for bf16 in ("auto", False)
    ]
    assert halves == [True, False, False, False]
    assert task_of(config(processor_type="AutoProcessor"), architecture, ampere).images
    assert not task_of(config(processor_type="AutoProcessor"), architecture, ampere, False).images
    advice = recommend(Place(architecture, ampere), fixed={"bf16": False})
    assert advice.attention.backend == TORCH, "FlashAttention 2 computes in 16 bits only"


def test_every_row_of_the_table_says_where_it_is_from() -> None:
    backends = attention_backends()
    assert [name for name, backend in backends.items() if backend.cpu] == ["sdpa", "eager"]
    for backend in backends.values():
        assert backend.vision or (backend.vision_reason and backend.vision_source)
        for support in backend.cards:
            assert support.source.startswith("https://")
            assert support.first <= support.last
            assert support.reason


def test_a_card_that_nobody_looked_into_gets_what_torch_brings() -> None:
    assert choose_attention(replace(card("H100"), stack=None), TEXT).backend == TORCH
