"""README.md of an adapter or a merged model: what a hub and its readers want to know of it.

Written from facts alone; a sentence stands only where the run has a figure for it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.publish.facts import ResultFacts, read_facts, shared_config
from engine.publish.serve import serve_model
from engine.runs import RunFolder
from engine.visible import visible

Kind = Literal["adapter", "model", "merged"]
_LICENCES = {"Apache 2.0": "apache-2.0", "MIT": "mit"}
"""Catalog's words -> the hub's identifiers."""


def write_card(run: RunFolder, target: Path) -> Path:
    """Write README.md of the result in `target`, an adapter or a whole model of `run`; returns it.

    Raises UserError where the run's config cannot be read and OSError where there is no room.
    """
    facts = read_facts(run)
    kind: Kind = "merged"
    if facts.config.adapter is None:
        kind = "model"
    elif (target / "adapter_config.json").is_file():
        kind = "adapter"
    path = target / "README.md"
    path.write_text("\n".join(describe(facts, kind)) + "\n", "utf-8")
    return path


def describe(facts: ResultFacts, kind: Kind) -> Iterator[str]:
    """The card's lines."""
    yield from _front_matter(facts, kind)
    name, base = visible(facts.name, one_line=True), visible(facts.base_name, one_line=True)
    method = {"adapter": "adapter", "model": "full fine-tune", "merged": "fine-tune"}[kind]
    yield f"# {name}"
    yield ""
    yield f"A {_method(facts)} {method} of `{base}`, made with Windtunnel."
    if kind == "merged":
        yield "The adapter is merged into the weights: nothing else is needed to use it."
    yield from _training(facts)
    yield from _figures(facts)
    yield from _answers(facts)
    yield from _use(facts, kind)
    yield from ("", "## Config", "", *_fenced(shared_config(facts.config).rstrip(), "yaml"))


def _method(facts: ResultFacts) -> str:
    return {"lora": "LoRA", "qlora": "QLoRA"}.get(facts.config.adapter or "", "whole-weight")


def _front_matter(facts: ResultFacts, kind: Kind) -> Iterator[str]:
    yield "---"
    if facts.base_id:
        yield f"base_model: {facts.base_id}"
        yield f"base_model_relation: {'adapter' if kind == 'adapter' else 'finetune'}"
    yield f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"
    if facts.card:
        licence = facts.card.licence
        yield f"license: {_LICENCES.get(licence, 'other')}"
        if licence not in _LICENCES:
            yield f"license_name: {re.sub(r'[^a-z0-9]+', '-', licence.lower())}"
            if facts.base_id:
                yield f"license_link: https://huggingface.co/{facts.base_id}"
        sees = "vision" in facts.card.modalities
        yield f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}"
    tags = ["windtunnel", "mistral", *([facts.config.adapter] if facts.config.adapter else [])]
    yield from ("tags:", *(f"- {tag}" for tag in tags))
    yield from ("---", "")


def _training(facts: ResultFacts) -> Iterator[str]:
    yield from ("", "## Training", "")
    if facts.rows:
        kinds = ", ".join(f"{count:,} {name}" for name, count in facts.kinds.items() if count)
        yield f"- {facts.rows:,} rows; tokens by kind: {kinds}"
    curves = facts.curves
    if curves.steps:
        last = curves.steps[-1]
        yield (
            f"- {last.step:,} optimizer steps over {last.epoch:.2f} epochs; "
            f"{curves.learned_tokens:,} learned tokens in all"
        )
        yield f"- peak memory {last.peak_memory_bytes / 2**30:.1f} GiB"
    if curves.started:
        yield f"- {curves.started.trainable_parameters:,} parameters were trained"
        versions = curves.started.versions.items()
        known = [f"{name} {number}" for name, number in versions if number[:1].isdigit()]
        yield f"- {visible(', '.join(known), one_line=True)}"
    if not (facts.rows or curves.steps or curves.started):
        yield "The run's records are gone; only its config is left."


def _figures(facts: ResultFacts) -> Iterator[str]:
    rows: list[tuple[str, str]] = []
    curves = facts.curves
    for word, step in zip(("first", "last"), (*curves.steps[:1], *curves.steps[-1:]), strict=False):
        rows.append((f"training loss, {word} step", f"{step.loss:.4f}"))
    for word, event in (
        ("before", curves.evals[0] if curves.evals else None),
        ("lowest", curves.best),
        ("last", curves.evals[-1] if curves.evals else None),
    ):
        if event:
            rows.append((f"held-out loss, {word} (step {event.step})", f"{event.loss:.4f}"))
    for dataset, scores in curves.scores.items():
        for when, score in scores.items():
            name = visible(dataset, one_line=True)
            what = f"`{name}` exact answers {when} ({score.rows} rows)"
            rows.append((what, f"{score.exact:.1%}"))
    if rows:
        yield from ("", "## Figures", "", "Losses are nats a learned token.", "")
        yield from ("| figure | value |", "|---|---:|")
        yield from (f"| {name.replace('|', ' ')} | {value} |" for name, value in rows)


def _answers(facts: ResultFacts) -> Iterator[str]:
    asked = facts.config.sample_prompts  # other prompts are rows
    shown = {p: pair for p, pair in facts.curves.answers.items() if p in asked and "after" in pair}
    if shown:
        yield from ("", "## Answers before and after")
    for prompt, answers in shown.items():
        yield from ("", *_fenced(prompt))
        for when in ("before", "after"):
            if when in answers:
                yield from ("", f"{when.capitalize()}:", "", *_fenced(answers[when]))


def _use(facts: ResultFacts, kind: Kind) -> Iterator[str]:
    base = facts.base_id or "PATH-OF-THE-BASE-MODEL"
    seeing = facts.card is not None and "vision" in facts.card.modalities
    wide = seeing or (facts.card is not None and facts.card.config.get("model_type") == "mistral4")
    loader = "AutoModelForImageTextToText" if wide else "AutoModelForCausalLM"
    code = ["from mistral_common.tokens.tokenizers.mistral import MistralTokenizer"]
    code.append(f"from transformers import {loader}")
    if kind == "adapter":
        code.append("from peft import PeftModel")
    source = base if kind == "adapter" else "PATH-OF-THIS-FOLDER"
    code += ["", f'model = {loader}.from_pretrained("{source}", dtype="auto", device_map="auto")']
    if kind == "adapter":
        code.append('model = PeftModel.from_pretrained(model, "PATH-OF-THIS-FOLDER")')
    code.append('tokenizer = MistralTokenizer.from_file("PATH-OF-THIS-FOLDER/tekken.json")')
    yield from ("", "## Use", "", *_fenced("\n".join(code), "python"), "")
    hint = serve_model(facts, "PATH-OF-THIS-FOLDER", merged=kind != "adapter")
    if hint:
        yield from ("With vLLM:", "", *_fenced(hint.shell(), "sh"))
    else:
        yield "vLLM does not serve this kind of adapter: merge it first (`windtunnel merge`)."


def _fenced(text: str, language: str = "text") -> list[str]:
    """A code block that no text can end: its fence is longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *visible(text).split("\n"), fence]
