"""Answers token by token: the cache changes their speed and nothing else."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import TokenizerSpec, read_architecture
from engine.chat.tokenizer import build_tokenizer, open_tokenizer, write_tekken
from engine.config import write_config
from engine.errors import UserError, WorkError
from engine.runs import RunFolder
from engine.train.batches import Rows
from engine.train.forward import Model
from engine.train.generate import Answering, Request, _choose, ask, generate, readable, serve
from engine.train.lora import attach_lora
from engine.train.model import load_base
from tests.support.pictured_rows import SPEC, picture, seeing
from tests.support.tiny import (
    MISTRAL,
    edit_config,
    flip,
    settings,
    training,
    wake_adapter,
    write_model,
)
from tests.support.trainers import VOCABULARY, small_tekken

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


QUESTION = {"role": "user", "content": "Hello there"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, MISTRAL | {"vocab_size": VOCABULARY})
    (folder / "tekken.json").write_text(small_tekken(), "utf-8")
    return folder


@pytest.fixture
def trained(base: Path, uneven: Rows, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run whose weights were moved, saved or finished."""

    def make(finish: bool = True, begun: bool = True, **keys: Any) -> RunFolder:
        config = settings(base, **({"adapter": "lora", "learning_rate": 0.05} | keys))
        run = training(tmp_path / "run", config, uneven)
        if begun:
            if config.adapter:
                wake_adapter(run.model)
            run.step(1, run.order.step(1))
            run.position.step = 1
            run.save()
        else:
            run.restore("step-1")
        if finish:
            run.finish([])
        folder = RunFolder(tmp_path / "run")
        folder.config.write_text(write_config(config))
        return folder

    return make


def answers(run: RunFolder, *requests: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    serve(run, [json.dumps(request) for request in requests], lambda r: lines.append(dict(r)))
    return lines


def asked(**keys: Any) -> dict[str, Any]:
    return {"messages": [QUESTION], "max_tokens": 12} | keys


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "only saved"])
@pytest.mark.parametrize("adapter", ["lora", None], ids=["adapter", "full"])
def test_the_answer_is_that_of_the_trained_model_and_base_is_the_one_before(
    adapter: str | None, finish: bool, trained: Callable[..., RunFolder], base: Path
) -> None:
    run = trained(finish, adapter=adapter)
    lines = answers(run, asked(), asked(base=True), asked())
    tuned, before, again = (each["answer"]["text"] for each in lines if "answer" in each)
    assert tuned == again
    assert tuned != before
    config = settings(base)
    from engine.train.model import load_base

    tokenizer = open_tokenizer(base)
    plain = generate(
        load_base(base, config).model,
        load_base(base, config).device,
        ask("Hello there", tokenizer, config).tokens,
        end=2,
        max_new_tokens=12,
    )
    from engine.train.generate import readable

    assert before == readable(plain, tokenizer)


def test_pieces_add_up_and_a_letter_is_never_cut(trained: Callable[..., RunFolder]) -> None:
    lines = answers(trained(), asked(max_tokens=40, temperature=1.0, seed=4))
    pieces = [each["text"] for each in lines if "text" in each]
    answer = next(each["answer"] for each in lines if "answer" in each)
    assert len(pieces) > 5
    assert "".join(pieces) == answer["text"]
    assert answer["tokens"] == 40
    assert answer["stopped"] is False


def test_seed_decides_the_answer(trained: Callable[..., RunFolder]) -> None:
    hot = {"temperature": 2.0, "top_p": 1.0}
    run = trained()
    lines = answers(run, *(asked(**hot, seed=seed) for seed in (1, 1, 2)))
    first, same, other = (each["answer"]["text"] for each in lines if "answer" in each)
    assert first == same != other


def test_a_model_without_a_card_is_asked_greedily(trained: Callable[..., RunFolder]) -> None:
    lines = answers(trained(), asked())
    answer = next(each["answer"] for each in lines if "answer" in each)
    assert (answer["temperature"], answer["top_p"], answer["max_tokens"]) == (0.0, 1.0, 12)


def test_prompt_is_rendered_as_in_training(trained: Callable[..., RunFolder], base: Path) -> None:
    answering = Answering(trained())
    expected = ask("Hello there", answering.tokenizer, settings(base)).tokens
    assert answering.prompt(Request([QUESTION])).tokens == expected
    system = {"role": "system", "content": "Be brief."}
    turns = [system, QUESTION, {"role": "assistant", "content": "Hi."}, QUESTION]
    longer = answering.prompt(Request(turns)).tokens
    text = "".join(answering.tokenizer.piece(token) for token in longer)
    assert text.index("Be brief.") < text.index("Hi.")
    assert text.endswith("[/INST]")


def test_bad_conversation_is_refused_next_answered(trained: Callable[..., RunFolder]) -> None:
    lines = answers(trained(), asked(messages=[{"role": "robot", "content": "x"}]), asked())
    assert "refused" in lines[1]
    assert lines[1]["refused"]["fix"]
    assert lines[2] == {"end": True}
    assert any("answer" in each for each in lines)


@pytest.mark.parametrize("adapter", ["lora", None])
def test_a_damaged_result_is_refused_and_written_again_as_the_advice_says(
    trained: Callable[..., RunFolder], adapter: str | None
) -> None:
    run = trained(adapter=adapter)
    result = run.adapter if adapter else run.model
    weights = next(result.glob("*model.safetensors"))
    whole = weights.read_bytes()
    flip(weights)
    with pytest.raises(WorkError, match=f"finished {result.name} of run is damaged") as caught:
        Answering(run)
    assert weights.name in caught.value.why
    assert f"`windtunnel resume {run.path} --from step-1`" in caught.value.fix
    again = trained(adapter=adapter, begun=False)
    assert again == run
    assert weights.read_bytes() == whole
    assert Answering(run).trained == result


def test_a_damaged_checkpoint_is_said_the_older_answers(trained: Callable[..., RunFolder]) -> None:
    run = trained(finish=False)
    shutil.copytree(run.checkpoints / "step-1", run.checkpoints / "step-2")
    (run.checkpoints / "LATEST").write_text("step-2")
    first, second, *_ = answers(run, asked())
    assert first == {"note": "step-2 is damaged and passed over: it holds step 1"}
    assert second["trained"].endswith("step-1")


def test_a_run_that_saved_nothing_says_so(base: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(write_config(settings(base, adapter="lora")))
    with pytest.raises(UserError, match="saved nothing yet"):
        Answering(run)


def test_a_picture_is_seen(uneven: Rows, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", seeing(MISTRAL | {"vocab_size": 131072}))
    edit_config(base, spatial_merge_size=SPEC.merge)
    spec = TokenizerSpec("v13", think=True, image=(SPEC.patch, SPEC.longest, SPEC.merge))
    write_tekken(spec, base / "tekken.json")
    config = settings(base, adapter="lora", learning_rate=0.05)
    run = training(tmp_path / "run", config, uneven)
    wake_adapter(run.model)
    run.finish([])
    folder = RunFolder(tmp_path / "run")
    folder.config.write_text(write_config(config))
    found = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.png"
        path.write_bytes(picture(60, 40, seed).content)
        chunks = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is it?"}]
        request = asked(messages=[{"role": "user", "content": chunks}], max_tokens=6)
        found.append(next(e["answer"] for e in answers(folder, request) if "answer" in e))
    assert found[0]["prompt_tokens"] == found[1]["prompt_tokens"]
    assert found[0]["text"] != found[1]["text"]
