"""Real architectures at toy size and hand-made rows: what the trainer's tests train.

Everything lies on disk as a real model and real prepared arrays do, so that the tests go through
the trainer's own loading; only the numbers are random and few. Widths are multiples of 64, which
4-bit blocks need. A row of 40 tokens passes two of the windows in which Ministral 3 scales its
queries by their position.
"""

import json
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.chat.conversation import Conversation
from engine.chat.render import Kind, Rendered
from engine.config import RunConfig
from engine.data.arrays import ArrayWriter, Interval, block_of
from engine.data.prepared import Prepared
from engine.data.rows import RenderedRow
from engine.errors import UserError
from engine.events import EventWriter
from engine.runs import ControlReader, RunFolder, StopSignals
from engine.train.batches import Rows
from engine.train.checkpoint import trained_parameters, trained_tensors
from engine.train.forward import Model, half_precision, unwrapped
from engine.train.loop import Training
from engine.train.lora import put_on_training
from engine.train.model import Base, load_base
from engine.train.moments import optimizer_slices
from engine.train.ranks import LONE, Ranks
from engine.train.session import Session

VOCABULARY = 192
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size): wide enough for every path to matter
    "pad_token_id": 11,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 256,
    "llama_4_scaling_beta": 0.1,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | TEXT
MINISTRAL3 = {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "rope_parameters": YARN,
} | TEXT
MISTRAL4 = {
    "architectures": ["Mistral4ForCausalLM"],
    "model_type": "mistral4",
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
} | {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}


def with_vision(text: Mapping[str, Any]) -> dict[str, Any]:
    """The same language model inside Mistral 3, with a vision tower beside it."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {k: v for k, v in text.items() if k != "architectures"},
        "vision_config": VISION,
        "tie_word_embeddings": False,
    }


ARCHITECTURES = {
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "mistral3 over mistral": with_vision(MISTRAL),
    "mistral3 over ministral3": with_vision(MINISTRAL3),
    "mistral4": MISTRAL4,
    "mistral3 over mistral4": with_vision(MISTRAL4),
}


WIDE = MINISTRAL3 | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""Wide enough that the layers, not the odd small tensor, decide."""
IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


def write_model(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """A model of random weights as transformers saves it."""
    model_class = getattr(transformers, config["architectures"][0])
    torch.manual_seed(seed)
    model = model_class(model_class.config_class.from_dict(dict(config)))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **keys: object) -> None:
    """Change keys of the model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_weights(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replace tensors of the model's file, add new ones, or take those given as None out."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {"format": "pt"})


def settings(base: Path | str = "base", **keys: Any) -> RunConfig:
    """A config in float32 for rows of at most 128 tokens."""
    defaults = {"base_model": str(base), "bf16": False, "sequence_len": 128, "seed": 5}
    return RunConfig.model_validate(defaults | keys)


Row = list[tuple[int, Kind]]
Models = Callable[[str], Path]
MakeRows = Callable[[list[Row]], Rows]


def row(question_tokens: int, answer_tokens: int, seed: int) -> Row:
    """<s>, a question of random ids, an answer of random ids, </s>."""
    ids = np.random.default_rng(seed).integers(20, VOCABULARY, question_tokens + answer_tokens)
    kinds = [Kind.USER] * question_tokens + [Kind.TEXT] * answer_tokens
    middle = zip(ids.tolist(), kinds, strict=True)
    return [(1, Kind.BOS), *middle, (2, Kind.EOS)]


UNEVEN = [
    row(q, a, n)
    for n, (q, a) in enumerate(
        [(3, 1), (20, 2), (4, 30), (9, 12), (1, 1), (14, 25), (6, 3), (2, 19)]
    )
]
"""Eight rows of 5 to 41 tokens with 2 to 31 learned ones."""


def write_rows(folder: Path, rows: Sequence[Row]) -> Rows:
    """The rows as prepared arrays, read back; each whole and in this order."""
    writer = ArrayWriter(folder, Interval())
    for number, pairs in enumerate(rows, start=1):
        rendered = Rendered(
            np.array([token for token, _ in pairs], np.uint32),
            np.array([kind for _, kind in pairs], np.uint8),
            np.zeros(len(pairs), np.int32),
        )
        row = RenderedRow(number, number, "rows.jsonl", 0, 0, None, Conversation(()), rendered)
        writer.add(block_of([row]))
    writer.finish("by hand")
    prepared = Prepared(folder)
    return Rows(prepared, np.arange(len(prepared), dtype=np.int64), prepared.lengths)


def training(
    folder: Path, config: RunConfig, rows: Rows, held_out: Mapping[str, Rows] | None = None
) -> Training:
    """The trainer of a run in `folder`, on the model that the config names, before step 1."""
    base = load_base(Path(config.base_model), config)
    torch.manual_seed(config.seed)
    model = put_on_training(base, Path(config.base_model), config)
    model.train()
    return assemble(folder, base, model, config, rows, held_out)


Begin: TypeAlias = Callable[..., Training]
"""A run on Ministral 3 and the uneven rows, by its folder's name, if any, and its config's keys."""


def assemble(
    folder: Path,
    base: Base,
    model: Model,
    config: RunConfig,
    rows: Rows,
    held_out: Mapping[str, Rows] | None = None,
) -> Training:
    """The same around a model that is there already. It asks no sample prompts."""
    session = open_session(folder)
    session.base_folder = Path(config.base_model)
    return Training(base, model, rows, held_out or {}, config, session, tokenizer=None)  # type: ignore[arg-type]


def open_session(folder: Path, ranks: Ranks = LONE) -> Session:
    """A session of the run in `folder`, which listens to no signal."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    control = ControlReader(run.control)
    return Session(run, EventWriter(run.events), control, StopSignals(), ranks=ranks)


def flip(path: Path, at: float = 0.5, bit: int = 0) -> None:
    """Another value of one bit of a file, `at` a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)


def gradients(model: Model) -> dict[str, torch.Tensor]:
    """A copy of every gradient, by parameter."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def wake_adapter(model: Model, seed: int = 1) -> None:
    """Give the adapter's B matrices values: as they start, they are zero and A gets no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    values = distribute_tensor(values, mesh, placements, src_data_rank=None)
                parameter.copy_(values)


@contextmanager
def files_at_most(limit_bytes: int) -> Iterator[None]:
    """A full disk: inside, the system lets no file grow beyond `limit_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(run: Training, count: int) -> list[tuple[float, float]]:
    """Take `count` steps from where the run is; returns each loss and a random number after it."""
    found: list[tuple[float, float]] = []
    for number, batch in run.order.steps(run.position.step):
        if len(found) == count:
            break
        before = torch.get_rng_state()
        loss, _ = run.gradients(batch)
        run.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(before)
        run.step(number, batch)
        found.append((loss, float(torch.rand(()))))
    return found


def moved(run: Training, count: int) -> set[str]:
    """Names, in the base, of the parameters that a run's first `count` steps change."""
    before = {n: p.detach().clone() for n, p in unwrapped(run.model).named_parameters()}
    for number, batch in islice(run.order.steps(0), count):
        run.step(number, batch)
    after = unwrapped(run.model).named_parameters()
    return {name for name, parameter in after if not torch.equal(parameter, before[name])}


def everything(run: Training) -> dict[str, Any]:
    """All that has to survive, bit for bit."""
    slices, values = optimizer_slices(list(trained_parameters(run.model)), run.optimizer, LONE)
    tensors = {name: own.tensor for name, own in slices.items()}
    tensors |= {f"weight {name}": t.clone() for name, t in trained_tensors(run.model).items()}
    bits = {name: (t.dtype, tuple(t.shape), bytes_of(t)) for name, t in tensors.items()}
    return bits | values


def logits(model: Any) -> torch.Tensor:
    """In the arithmetic of a run: bfloat16 weights under autocast."""
    with torch.no_grad(), half_precision(model):
        found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def assert_same(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """The same names, and tensors that are equal but for the last bits."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=name)


def refused(folder: Path, **keys: Any) -> UserError:
    """The error with which the folder's model is not loaded."""
    with pytest.raises(UserError) as caught:
        load_base(folder, settings(folder, **keys))
    return caught.value


def adapted(folder: Path, home: Path, rows: Rows, seed: int = 1, **keys: Any) -> Training:
    """A run whose adapter acts."""
    run = training(home, settings(folder, **({"adapter": "lora"} | keys)), rows)
    wake_adapter(run.model, seed)
    return run


def assert_resumes(home: Path, config: RunConfig, rows: Rows, saved: int) -> None:
    """A run that is saved after some steps and goes on ends as one that never stopped."""
    whole = training(home / "whole", config, rows)
    for number, batch in whole.order.steps(0):
        whole.step(number, batch)
    first = training(home / "cut", config, rows)
    for number in range(1, saved + 1):
        first.step(number, first.order.step(number))
    first.save()
    second = training(home / "cut", config, rows)
    second.restore(None)
    for number, batch in second.order.steps(second.position.step):
        second.step(number, batch)
    ours, theirs = trained_tensors(second.model), trained_tensors(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def learn_by_heart(home: Path, base: Path, given: Sequence[Row]) -> Training:
    """A run that has seen the rows until the model knows them."""
    keys = {"max_steps": 60, "learning_rate": 0.004, "warmup_steps": 5}
    config = settings(base, micro_batch_size=len(given), **keys)
    run = training(home / "run", config, write_rows(home / "rows", given))
    for number, batch in run.order.steps(0):
        run.step(number, batch)
    return run


def describe(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model folder without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Its numbers, of any type."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
