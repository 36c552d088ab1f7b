"""Answers token by token: the cache changes their speed and nothing else."""

from pathlib import Path

import pytest
import torch

from engine.catalog import read_architecture
from engine.chat.tokenizer import TokenizerSpec, build_tokenizer
from engine.train.forward import Model
from engine.train.generate import _choose, generate, readable
from engine.train.lora import attach_lora
from engine.train.model import load_base
from tests.support.tiny import settings, wake_adapter

CPU = torch.device("cpu")
PROMPT = [1, 40, 50, 60, 70]
NEVER = -1


def without_cache(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a forward pass over everything before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_with_and_without_a_cache_the_answer_is_the_same(any_model: Path) -> None:
    model = load_base(any_model, settings(any_model)).model
    made = generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=24)
    assert made == without_cache(model.eval(), PROMPT, 24)
    assert len(set(made)) > 1


def test_the_adapter_answers(ministral: Path) -> None:
    base = load_base(ministral, settings(ministral)).model
    plain = generate(base, CPU, PROMPT, end=NEVER, max_new_tokens=12)
    config = settings(ministral, adapter="lora")
    model = attach_lora(base, read_architecture(ministral), config)
    assert generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=12) == plain
    wake_adapter(model)
    made = generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=12)
    assert made == without_cache(model.eval(), PROMPT, 12)
    assert made != plain


def test_it_works_in_the_middle_of_a_checkpointed_training(ministral: Path) -> None:
    base = load_base(ministral, settings(ministral)).model
    plain = generate(base, CPU, PROMPT, end=NEVER, max_new_tokens=6)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.train()
    assert generate(base, CPU, PROMPT, end=NEVER, max_new_tokens=6) == plain
    assert base.training


def test_it_stops_with_the_end_token(ministral: Path) -> None:
    model = load_base(ministral, settings(ministral)).model
    long = generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=12)
    end = long[4]
    short = generate(model, CPU, PROMPT, end=end, max_new_tokens=12)
    assert short == long[: long.index(end) + 1]


class TestChoosing:
    LOGITS = torch.tensor([0.2, 0.5, 0.3]).log()

    def drawn(self, temperature: float, top_p: float) -> set[int]:
        torch.manual_seed(0)
        return {_choose(self.LOGITS, temperature, top_p) for _ in range(200)}

    def test_at_temperature_0_it_is_the_likeliest(self) -> None:
        assert self.drawn(0.0, 1.0) == {1}

    @pytest.mark.parametrize(("top_p", "possible"), [(1.0, {0, 1, 2}), (0.7, {1, 2}), (0.4, {1})])
    def test_top_p_keeps_the_fewest_that_reach_it(self, top_p: float, possible: set[int]) -> None:
        assert self.drawn(1.0, top_p) == possible

    def test_a_low_temperature_sharpens_and_a_seed_repeats(self, ministral: Path) -> None:
        model = load_base(ministral, settings(ministral)).model
        made = []
        for seed, temperature in ((1, 1.0), (1, 1.0), (2, 1.0), (3, 1e-4)):
            torch.manual_seed(seed)
            made.append(
                generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=12, temperature=temperature)
            )
        assert made[0] == made[1] != made[2]
        assert made[3] == generate(model, CPU, PROMPT, end=NEVER, max_new_tokens=12)


def test_the_answer_is_read_with_its_control_tokens_and_without_its_end() -> None:
    tokenizer = build_tokenizer(TokenizerSpec("v13", think=True))
    inner = tokenizer.tekken
    think = inner.get_special_token("[THINK]")
    words = inner.encode("Tide is out", bos=False, eos=False)
    assert readable([think, *words, tokenizer.specials.eos], tokenizer) == "[THINK]Tide is out"
