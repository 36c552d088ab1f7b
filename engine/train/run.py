"""One launch of a run, from its folder to the first step and to the last event.

Apart from `loop`, which knows only steps: here the pieces are fetched, checked against each other
and put together, each with a `phase` event, so that a person sees what is waited for.
"""

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from engine.catalog import read_architecture
from engine.chat.messages import RowFormat, read_row
from engine.chat.render import LabelRule, learned, render
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig, RunConfig, read_config
from engine.data.pack import Indices
from engine.data.prepare import Progress, default_store, label_rule, prepare
from engine.data.prepared import Prepared
from engine.events import Note, Phase, Started
from engine.train.batches import Rows
from engine.train.fetch import leave_hub, locate_base
from engine.train.forward import Model, use_checkpointing
from engine.train.loop import Prompt, Training
from engine.train.lora import attach_lora, choose_trained
from engine.train.model import Base, load_base
from engine.train.session import Session
from engine.train.weights import trained_parameters

PROGRESS_SECONDS = 0.5
"""Between two words on tokenizing."""
PACKAGES = ("windtunnel", "torch", "transformers", "peft", "bitsandbytes", "mistral_common")


def run(session: Session, *, resume: bool, checkpoint: str | None = None) -> None:
    """Carry out the run of `session`'s folder; returns after its `ended` event.

    Raises UserError and WorkError with the sentence for the person.
    """
    file = read_config(session.run.config)
    for finding in file.require_supported():
        session.emit(Note("info", finding.sentence()))
    config = file.config
    torch.manual_seed(config.seed)
    session.emit(Phase("model", detail=config.base_model))
    session.base_folder = locate_base(config, session.run.path)
    tokenizer = open_tokenizer(config.tokenizer_config or session.base_folder)
    rows, held_out = prepare_rows(config, tokenizer, session)
    leave_hub()
    session.emit(Phase("load", detail=config.base_model))
    base = load_base(session.base_folder, config)
    torch.manual_seed(config.seed)  # the adapter's first values do not depend on what was loaded
    model = put_on_training(base, session.base_folder, config)
    training = Training(base, model, rows, held_out, config, session, tokenizer)
    if resume:
        training.restore(checkpoint)
    if config.sample_packing:
        sequences, fill = training.order.packing()
        words = f"{len(rows)} rows packed into {sequences} sequences, {fill:.1%} full"
        session.emit(Note("info", words))
    session.emit(_started(session, config, base, training))
    training.fit([ask(text, tokenizer, config) for text in config.sample_prompts])


def put_on_training(base: Base, folder: Path, config: RunConfig) -> Model:
    """The model as it trains: an adapter on frozen weights, or the chosen weights free."""
    if config.gradient_checkpointing:
        use_checkpointing(base.model)
    if config.adapter is None:
        return choose_trained(base.model, config)
    return attach_lora(base.model, read_architecture(folder), config)


def prepare_rows(
    config: RunConfig, tokenizer: ChatTokenizer, session: Session
) -> tuple[Rows, dict[str, Rows]]:
    """The training rows, and the held-out rows of each evaluation set by its name.

    Evaluation sets are `test_datasets`, or the share `val_set_size` of the training rows.
    """
    prepared = _prepare(config, config.datasets, tokenizer, session)
    prepared.link_into(session.run.data)
    rows = select_rows(prepared, config)
    if not config.test_datasets:
        if not config.val_set_size:
            return rows, {}
        kept, held = prepared.split(config.val_set_size, config.seed, rows.chosen)
        return _only(rows, kept), {"validation": _only(rows, held)}
    held_out = {}
    for dataset in config.test_datasets:
        name = Path(dataset.path).stem
        held_out[name] = select_rows(_prepare(config, [dataset], tokenizer, session), config)
    return rows, held_out


def select_rows(prepared: Prepared, config: RunConfig) -> Rows:
    """The rows that fit the config's length and teach something."""
    chosen = prepared.select(label_rule(config), config.sequence_len, config.excess_length_strategy)
    return Rows(prepared, chosen.rows, chosen.lengths)


def _only(rows: Rows, kept: Indices) -> Rows:
    places = np.searchsorted(rows.chosen, kept)
    return Rows(rows.prepared, rows.chosen[places], rows.lengths[places])


def _prepare(
    config: RunConfig,
    datasets: Sequence[DatasetConfig],
    tokenizer: ChatTokenizer,
    session: Session,
) -> Prepared:
    next_word = 0.0

    def tell(progress: Progress) -> None:
        nonlocal next_word
        if time.monotonic() >= next_word:
            next_word = time.monotonic() + PROGRESS_SECONDS
            done, total = progress.done_bytes, progress.total_bytes
            session.emit(Phase(progress.phase, done, total, f"bytes, {progress.rows} rows"))

    home = session.run.path
    store = default_store(config, home)
    prepared = prepare(config, home, tokenizer, store, tell, datasets=datasets)
    words = "already prepared" if prepared.reused else "prepared"
    session.emit(Phase("prepared", len(prepared), len(prepared), f"{len(prepared)} rows {words}"))
    return prepared


def ask(text: str, tokenizer: ChatTokenizer, config: RunConfig) -> Prompt:
    """A question as the model sees it: everything up to where its answer begins."""
    row = {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "."}],
        **(config.chat_template_kwargs or {}),
    }
    first = config.datasets[0] if config.datasets else DatasetConfig(path=".")
    row_format = RowFormat.from_config(DatasetConfig(path=first.path))
    rendered = render(read_row(row, row_format), tokenizer)
    begins = int(np.flatnonzero(learned(rendered.kinds, LabelRule()))[0])
    return Prompt(text, tuple(rendered.input_ids[:begins].tolist()))


def _started(session: Session, config: RunConfig, base: Base, training: Training) -> Started:
    return Started(
        run=session.run.name,
        model=config.base_model,
        method=config.adapter or "full",
        devices=(_device_name(base.device),),
        world_size=1,
        total_steps=training.order.total_steps,
        trainable_parameters=sum(p.numel() for _, p in trained_parameters(training.model)),
        versions={name: _version(name) for name in PACKAGES},
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
