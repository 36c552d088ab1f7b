"""Which attention code is chosen: by the card's generation, the heads, and what is installed."""

from dataclasses import replace

import pytest

from engine.plan import choose_attention
from tests.plan.machines import card, cpu

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
NONE, TWO, ALL = (), PACKAGES[:1], PACKAGES


def on(name: str, installed: tuple[str, ...], head_dim: int | None = 128):
    device = cpu() if name == "CPU" else card(name)
    stack = {package: "1.0" if package in installed else None for package in PACKAGES}
    return choose_attention(replace(device, stack=stack), head_dim)


@pytest.mark.parametrize(
    ("name", "installed", "backend", "worth_installing"),
    [
        ("CPU", NONE, "sdpa", None),
        ("CPU", ALL, "sdpa", None),
        ("T4", NONE, "sdpa", None),
        ("T4", ALL, "sdpa", None),
        ("A100 80GB", NONE, "sdpa", "flash-attn"),
        ("A100 80GB", ALL, "flash_attention_2", None),
        ("RTX 4090", NONE, "sdpa", "flash-attn"),
        ("RTX 4090", TWO, "flash_attention_2", None),
        ("RTX 4090", ALL, "flash_attention_2", None),
        ("H100", NONE, "sdpa", "flash-attn-3"),
        ("H100", TWO, "flash_attention_2", None),
        ("H100", ALL, "flash_attention_3", None),
        ("H100", ("flash-attn-4",), "sdpa", "flash-attn-3"),
        ("B200", NONE, "sdpa", "flash-attn-4"),
        ("B200", TWO, "flash_attention_2", None),
        ("B200", ALL, "flash_attention_4", None),
        ("RTX 5090", NONE, "sdpa", "flash-attn"),
        ("RTX 5090", ALL, "flash_attention_2", None),
        ("RTX 5090", ("flash-attn-4",), "sdpa", "flash-attn"),
    ],
)
def test_the_fastest_installed_backend_that_suits_the_card(
    name: str, installed: tuple[str, ...], backend: str, worth_installing: str | None
) -> None:
    chosen = on(name, installed)
    assert (chosen.backend, chosen.worth_installing) == (backend, worth_installing)
    assert chosen.reason


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [
        ("CPU", 128, ""),
        ("T4", 128, "FlashAttention 4 needs Hopper or data-centre Blackwell"),
        ("RTX 4090", 128, "FlashAttention 4 needs Hopper or data-centre Blackwell"),
        ("RTX 5090", 128, "FlashAttention 4 needs Hopper or data-centre Blackwell"),
        (
            "H100",
            128,
            "FlashAttention 4 is eligible; on Hopper its backward pass must be built from source",
        ),
        ("H100", 256, "FlashAttention 4 needs heads of one width up to 128"),
        ("B200", 128, "FlashAttention 4 is eligible"),
        ("B200", 129, "FlashAttention 4 needs heads of one width up to 128"),
        ("B200", None, "FlashAttention 4 needs heads of one width up to 128"),
    ],
)
def test_whether_flash_attention_4_is_eligible(name: str, head_dim: int | None, words: str) -> None:
    assert on(name, ALL, head_dim).flash_4 == words


@pytest.mark.parametrize("head_dim", [129, None])
def test_wide_or_uneven_heads_never_get_flash_attention_4(head_dim: int | None) -> None:
    assert on("B200", ALL, head_dim).backend != "flash_attention_4"
    assert on("B200", (), head_dim).worth_installing != "flash-attn-4"


def test_a_card_that_nobody_looked_into_gets_what_torch_brings() -> None:
    assert choose_attention(replace(card("H100"), stack=None), 128).backend == "sdpa"
