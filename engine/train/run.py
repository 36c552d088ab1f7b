"""One launch of a run, from its folder to its last event: what it needs is fetched, checked against
each other and put together, each with a `phase` event, so that a person sees what is waited for."""

import gc
import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from engine.catalog import read_architecture
from engine.catalog.cards import Sampling, official_sampling
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig, RunConfig, read_config
from engine.data.prepare import default_store, label_rule, prepare
from engine.data.prepared import Indices, Prepared
from engine.data.requests import Progress
from engine.data.sources import config_notes, held_out_sets
from engine.events import Phase, Shortage, Started
from engine.hardware.packages import installed
from engine.pace import every
from engine.plan import remarks
from engine.plan.layout import layout_among, refuse_spread
from engine.plan.trainer import (
    ANSWER_TOKENS,
    CHUNK_BYTES,
    SAMPLE_TOKENS,
    SMALLEST_CHUNK_BYTES,
    refuse_bf16,
    refuse_unread,
    why_float32,
)
from engine.publish.card import find_base
from engine.report.data import file_line, left_out_line, prepared_lines
from engine.train.attention import pick_attention
from engine.train.batches import Rows
from engine.train.checkpoint import trained_parameters
from engine.train.device import (
    as_planned,
    held_memory_bytes,
    name_of,
    pick_device,
    read_device,
    require_planned_device,
)
from engine.train.fetch import leave_hub, locate_base
from engine.train.forward import Model, head_of
from engine.train.generate import ask, ask_about_images, ask_by_default
from engine.train.loop import Training
from engine.train.loss import settle_loss
from engine.train.model import Base
from engine.train.optim import free_paged_state
from engine.train.out_of_memory import (
    LOADING,
    PREPARING,
    OutOfMemory,
    as_error,
    describe,
    is_out_of_memory,
    read_estimate,
    take_rung,
    with_next_rung,
)
from engine.train.ranks import lost_rank, open_ranks, seed_apart
from engine.train.session import PROGRESS_SECONDS, Session
from engine.train.shard import local_bytes
from engine.train.slice_load import load_divided
from engine.train.text_metrics import TextMetrics
from engine.units import counted, gib

logger = logging.getLogger(__name__)
"""What a rank waits for, in its own log."""

PLACES = {
    "load": LOADING,
    "evaluate": "an evaluation",
    "save": "a save",
    "export": "the export",
}
"""Phases in which memory can run out, as a sentence names them."""
LEAST_SHOWN_BYTES = 2**20
"""Of a part of the model, where a rank says what it holds."""
PACKAGES = ("windtunnel", "torch", "transformers", "peft", "bitsandbytes", "mistral_common")


def run(session: Session, *, resume: bool, checkpoint: str | None = None) -> None:
    """Carry out the run of `session`'s folder; returns after its `ended` event.

    Where memory runs out and the config has `auto_fit`, it goes on from the last checkpoint with
    the next change that saves some and alters no result, as often as there is one; of several ranks
    one leaves that to its supervisor, since the others wait for what it did not do. Raises
    UserError and WorkError with the sentence for the person.
    """
    opened = session.ranks.is_alone
    if opened:
        session.ranks = open_ranks(read_config(session.run.config).config)
    device = read_device()
    session.note("warning", require_planned_device(session.run, device))
    while facts := _try(session, resume=resume, checkpoint=checkpoint):
        # Nothing of the failed attempt is alive any more: its frames ended with it.
        gc.collect()
        free_paged_state()
        torch.cuda.empty_cache()
        config = read_config(session.run.config).config
        facts = with_next_rung(facts, config, read_architecture(session.base_folder), device)
        facts = structs.replace(facts, taken=config.auto_fit and bool(facts.changes))
        if not session.ranks.is_alone:
            raise as_error(facts, session.run) from OutOfMemory(facts)
        session.emit(facts)
        if not facts.taken:
            raise as_error(facts, session.run)
        session.note("warning", take_rung(facts, session.run))
        session.fitted |= facts.changes.keys()
        resume, checkpoint = True, None
    if opened:
        session.ranks.close()


def _try(session: Session, *, resume: bool, checkpoint: str | None) -> Shortage | None:
    """Carry the run out; what is known where memory runs out on the way."""
    try:
        _carry_out(session, resume=resume, checkpoint=checkpoint)
    except OutOfMemory as error:
        return error.facts
    except Exception as error:
        if not session.ranks.is_alone and (lost := lost_rank(error)):
            raise lost from error
        if not is_out_of_memory(error) or session.base_folder == session.run.path:
            raise
        where = PLACES.get(session.doing, PREPARING)
        return describe(error, where, held_memory_bytes(pick_device()), session.run)
    return None


def _carry_out(session: Session, *, resume: bool, checkpoint: str | None) -> None:
    file, ranks = read_config(session.run.config), session.ranks
    for finding in file.require_supported():
        session.note("info", finding.sentence())
    config = file.config
    place = as_planned(pick_device())
    refuse_bf16(config, place)
    if why := why_float32(config, place):
        session.note("info", f"The run {why}")
    torch.manual_seed(config.seed)
    session.emit(Phase("model", detail=config.base_model))
    base_of = partial(locate_base, config, session.run.path, session.progress("download"))
    session.base_folder = ranks.once_a_node("the base model", base_of, logger.info)
    architecture = read_architecture(session.base_folder)
    tokenizer = open_tokenizer(config.tokenizer_config or session.base_folder)
    ready = partial(prepare_rows, config, tokenizer, session)
    rows, held_out = ranks.once_a_node("the rows", ready, logger.info)
    parts = [part.prepared for part in (rows, *held_out.values())]
    for prepared in parts:
        refuse_unread(architecture, prepared.image_spec)
    refuse_spread(layout_among(config, ranks.world_size), architecture.table)
    leave_hub()
    for sentence in remarks(config, architecture):
        session.note("warning", sentence)
    images = any("image" in prepared.tokens_by_kind() for prepared in parts)
    attention = pick_attention(config, architecture, pick_device(), images=images)
    session.note("info", f"Attention by {attention.backend}: {attention.reason}")
    config = config.model_copy(update={"attn_implementation": attention.backend})
    session.agree_to_go_on()
    session.emit(Phase("load", detail=config.base_model))
    read = session.progress("load")
    base, model = load_divided(session.base_folder, config, ranks, read, images=images)
    session.note("info", base.report.sentence())
    if base.vision_offloaded:
        session.note("info", "no row has an image: the vision tower stays in RAM")
    seed_apart(config.seed, ranks)
    chunk = read_estimate(session.run).get("loss_chunk_bytes")
    chunk = chunk if chunk in CHUNK_BYTES else SMALLEST_CHUNK_BYTES  # few where there is no plan
    loss, note = settle_loss(config, head_of(model), base.device, chunk)
    session.note("info", note)
    training = Training(
        *(base, model, rows, held_out, config, session, tokenizer),
        TextMetrics(model, base.device, held_out, config, tokenizer, session.run.path, ranks),
        sampling=sampling_of(config),
        loss=loss,
    )
    if resume:
        training.restore(checkpoint)
    if config.sample_packing:
        sequences, fill = training.order.packing()
        bins = counted(sequences, "sequence")
        session.note("info", f"{counted(len(rows), 'row')} packed into {bins}, {fill:.1%} full")
    if not ranks.is_alone:
        _report_ranks(session, model)
    session.emit(_started(session, config, base, training))
    prompts = [ask(text, tokenizer, config) for text in config.sample_prompts]
    if not prompts and config.eval_table_size:
        prompts = ask_by_default(held_out, tokenizer, config)
    training.fit(prompts + ask_about_images(held_out, tokenizer))


def sampling_of(config: RunConfig) -> Sampling:
    """How the run's questions are answered: as the base's makers advise, and not at length."""
    card, _ = find_base(config.base_model)
    effort = (config.chat_template_kwargs or {}).get("reasoning_effort")
    official = official_sampling(config.base_model, effort if isinstance(effort, str) else None)
    thinks = effort == "high" or (card and card.thinking in ("tokens", "text tags"))
    longest = ANSWER_TOKENS if thinks else SAMPLE_TOKENS
    return replace(official, max_tokens=min(official.max_tokens or longest, longest))


def prepare_rows(
    config: RunConfig, tokenizer: ChatTokenizer, session: Session
) -> tuple[Rows, dict[str, Rows]]:
    """The training rows, and the held-out rows of each evaluation set by its name.

    Evaluation sets are `test_datasets`, or the share `val_set_size` of the training rows.
    """
    prepared = _prepare(config, config.datasets, tokenizer, session)
    if session.ranks.is_first:
        prepared.link_into(session.run.data)
    rows = select_rows(prepared, config)
    for note in config_notes(config, session.run.path):
        session.note("info", str(replace(file_line(note), mark="")))
    _report_left_out(session, rows, config)
    for line in prepared_lines(prepared.meta):
        session.note("warning" if line.mark == "!" else "info", f"{line.label}: {line.text}")
    if not config.test_datasets:
        if not config.val_set_size:
            return rows, {}
        kept, held = prepared.split(config.val_set_size, config.seed, rows.chosen)
        return _only(rows, kept), {"validation": _only(rows, held)}
    held_out: dict[str, Rows] = {}
    for dataset in held_out_sets(config, session.run.path):
        name = name_set(dataset, held_out)
        held_out[name] = select_rows(_prepare(config, [dataset], tokenizer, session), config)
        _report_left_out(session, held_out[name], config, f"{name}: ")
    return rows, held_out


def name_set(dataset: DatasetConfig, taken: Container[str]) -> str:
    """What an evaluation set is called: by its file or folder, by its split too, or by number."""
    stem = Path(dataset.path).stem
    ends = ("", f"-{dataset.split}" if dataset.split else "", *(f"-{n}" for n in range(2, 1000)))
    return next(name for end in ends if (name := stem + end) not in taken)


def _report_left_out(session: Session, rows: Rows, config: RunConfig, of: str = "") -> None:
    line = left_out_line(rows.left_out, config.sequence_len)
    if line is not None:
        places = rows.left_out_places()
        text = f"{of}{line.text}{f' ({places})' if places else ''}"
        session.note("warning" if line.mark == "!" else "info", text)


def select_rows(prepared: Prepared, config: RunConfig) -> Rows:
    """The rows that fit the config's length and teach something."""
    chosen = prepared.select(label_rule(config), config.sequence_len, config.excess_length_strategy)
    left_out = prepared.left_out(chosen, config.excess_length_strategy)
    return Rows(prepared, chosen.rows, chosen.lengths, left_out)


def _only(rows: Rows, kept: Indices) -> Rows:
    places = np.searchsorted(rows.chosen, kept)
    return Rows(rows.prepared, rows.chosen[places], rows.lengths[places], rows.left_out)


def _prepare(
    config: RunConfig,
    datasets: Sequence[DatasetConfig],
    tokenizer: ChatTokenizer,
    session: Session,
) -> Prepared:
    due = every(PROGRESS_SECONDS)

    def report(progress: Progress) -> None:
        if due():
            done, total = progress.done_bytes, progress.total_bytes
            session.emit(Phase(progress.phase, done, total, f"bytes, {progress.rows} rows"))

    home = session.run.path
    store = default_store(config, home)
    prepared = prepare(config, home, tokenizer, store, report, datasets=datasets)
    session.note("warning", prepared.repair())
    state = "already prepared" if prepared.reused else "prepared"
    said = f"{counted(len(prepared), 'row')} {state}"
    session.emit(Phase("prepared", len(prepared), len(prepared), said))
    return prepared


def _report_ranks(session: Session, model: Model) -> None:
    """Say how the model lies on the ranks, and what one of them holds of it."""
    ranks = session.ranks
    held = local_bytes(model)
    shown = {part: size for part, size in held.items() if size >= LEAST_SHOWN_BYTES}
    parts = ": " * bool(shown) + ", ".join(f"{part} {gib(size)}" for part, size in shown.items())
    many = f"each of {ranks.replicas} copies" if ranks.replicas > 1 else "one copy"
    session.note(
        "info",
        f"{ranks.world_size} ranks: {many} of the model over {counted(ranks.shards, 'rank')}. "
        f"Each rank holds {gib(sum(held.values()))} of it{parts}.",
    )


def _started(session: Session, config: RunConfig, base: Base, training: Training) -> Started:
    left = training.rows.left_out
    return Started(
        run=session.run.name,
        model=config.base_model,
        method=config.adapter or "full",
        devices=tuple(session.ranks.gather(name_of(base.device))),
        world_size=session.ranks.world_size,
        total_steps=training.order.total_steps,
        trainable_parameters=sum(p.numel() for _, p in trained_parameters(training.model)),
        versions={name: installed(name) or "not installed" for name in PACKAGES},
        rows=left.rows if left else None,
        rows_left_out=left.count if left else None,
    )
