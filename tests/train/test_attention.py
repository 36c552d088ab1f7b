"""Packed rows that are cut apart learn what rows under a mask learn, however many sequences."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from engine.catalog import read_architecture
from engine.errors import UserError
from engine.train.attention import (
    TORCH_VARLEN,
    Segments,
    attend_row_by_row,
    find_segments,
    hand_over_rows,
    pick_attention,
    use_attention,
)
from tests.support.stock import CUT, positions, states, tiny, tokens
from tests.support.tiny import ARCHITECTURES, MISTRAL, assert_same, gradients, settings


def forward_and_backward(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    found = states(model, tokens(), positions())
    found.square().mean().backward()
    return found.detach(), gradients(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_cutting_gives_what_a_mask_gives(name: str, recompute: bool) -> None:
    cut, masked = (tiny(ARCHITECTURES[name], backend) for backend in (CUT, "sdpa"))
    if recompute:
        cut.gradient_checkpointing_enable({"use_reentrant": False})
    ours, theirs = forward_and_backward(cut), forward_and_backward(masked)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert_same(ours[1], theirs[1], 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["mistral", "ministral3", "mistral4"])
def test_a_packed_row_is_as_it_is_alone(name: str) -> None:
    model = tiny(ARCHITECTURES[name], CUT)
    packed = states(model, tokens(), positions())
    alone = states(model, tokens()[:1, 13:33], torch.arange(20)[None])
    torch.testing.assert_close(packed[:1, 13:33], alone, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_slides_inside_each_row() -> None:
    cut, masked = (tiny(MISTRAL, backend, sliding_window=6) for backend in (CUT, "sdpa"))
    whole = tiny(MISTRAL, CUT)
    found, expected = (states(model, tokens(), positions()) for model in (cut, masked))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - states(whole, tokens(), positions())).abs().max() > 0.01


@pytest.mark.parametrize("name", ["mistral", "ministral3", "mistral4"])
def test_text_is_generated_as_without_it(name: str) -> None:
    answers = []
    for backend in (CUT, "sdpa"):
        model = tiny(ARCHITECTURES[name], backend).eval()
        cache, current, found = None, tokens()[:1, :9], []
        for _ in range(5):
            result = model(input_ids=current, past_key_values=cache, use_cache=True)
            cache, current = result.past_key_values, result.logits[:, -1:].argmax(-1)
            found.append(int(current))
        answers.append(found)
    assert answers[0] == answers[1]


def test_the_vision_tower_keeps_its_own_attention_and_a_saved_model_names_none_of_ours() -> None:
    config = tiny(ARCHITECTURES["mistral3 over ministral3"], CUT).config
    assert config.text_config._attn_implementation == TORCH_VARLEN
    assert config.vision_config._attn_implementation == "sdpa"
    assert TORCH_VARLEN not in config.to_json_string()


def see(sequences: Tensor) -> Callable[..., Tensor]:
    """The mask of rows numbered in `sequences`, as transformers composes it."""

    def rule(batch: Tensor, head: int, query: Tensor, key: Tensor) -> Tensor:
        return (sequences[batch, query] == sequences[batch, key]) & (key <= query)

    return rule


def test_rows_begin_where_a_token_may_not_see_the_one_before() -> None:
    rule = see(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    found = find_segments(2, 5, 5, rule, torch.device("cpu"))
    assert found is not None
    assert found.bounds.tolist() == [0, 2, 5, 6, 7, 10]
    assert (found.bounds.dtype, found.longest) == (torch.int32, 3)


def test_no_rows_are_cut_while_a_cache_is_read() -> None:
    rule = see(torch.zeros(1, 9, dtype=torch.int64))
    assert find_segments(1, 1, 9, rule, torch.device("cpu")) is None


def test_a_mask_of_padding_is_an_error_rather_than_ignored() -> None:
    model, mask = tiny(MISTRAL, CUT).model, torch.ones(2, 40, dtype=torch.int64)
    with pytest.raises(ValueError, match="no attention mask"):
        model(input_ids=tokens(), attention_mask=mask, use_cache=False)


def test_flash_attention_gets_where_rows_begin_in_a_batch_of_several_sequences() -> None:
    assert not _is_packed_sequence(positions(), 2), "transformers looks at single sequences only"
    rows = Segments(torch.tensor([0, 13, 33, 40, 65, 80], dtype=torch.int32), 25)
    query, key, value = (torch.randn(2, heads, 40, 8) for heads in (4, 2, 2))

    def kernel(
        module: object, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, **given: Any
    ) -> tuple[Tensor, None]:
        """What FlashAttention computes of the arguments that transformers hands on to it."""
        assert (given["max_length_q"], given["max_length_k"], attention_mask) == (25, 25, None)
        assert given["cu_seq_lens_q"] is given["cu_seq_lens_k"]
        query, key, value = (state.transpose(1, 2).flatten(0, 1) for state in (q, k, v))
        segments = Segments(given["cu_seq_lens_q"], given["max_length_q"])
        return attend_row_by_row(query, key, value, segments).unflatten(0, (2, 40)), None

    attend = hand_over_rows(kernel)
    module: Any = SimpleNamespace()
    found, _ = attend(module, query, key, value, rows, position_ids=positions())
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[1:, :, :25], key[1:, :, :25], value[1:, :, :25], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found[1:, :25], alone.transpose(1, 2))


@pytest.mark.parametrize("backend", [2, 3, 4])
def test_every_flash_attention_gets_the_rows(backend: int) -> None:
    use_attention(transformers.MistralConfig(), "sdpa")
    functions = transformers.AttentionInterface()
    masks = transformers.AttentionMaskInterface()
    assert "hand_over_rows" in functions[f"flash_attention_{backend}"].__qualname__
    assert masks[f"flash_attention_{backend}"] is find_segments


@pytest.mark.parametrize(("asked", "backend"), [(None, "sdpa"), ("eager", "eager")])
def test_a_cpu_gets_what_it_runs_or_the_config_wants(asked: str | None, backend: str) -> None:
    config, device = settings(attn_implementation=asked), torch.device("cpu")
    assert pick_attention(config, read_architecture("demo-tiny"), device).backend == backend


def test_what_cannot_run_here_is_refused_before_anything_loads() -> None:
    asked = settings(attn_implementation="flash_attention_4")
    with pytest.raises(UserError, match="needs a GPU") as caught:
        pick_attention(asked, read_architecture("demo-tiny"), torch.device("cpu"))
    assert "attn_implementation: sdpa" in caught.value.fix
