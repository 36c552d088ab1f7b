"""A result as others use it: README.md of an adapter or a merged model, and how it is served.

Written from the run's own facts; a sentence stands only where the run has a figure for it, and
nobody reads a row, a path or a name of this machine. Facts of vLLM and llama.cpp are kept here and
nowhere else.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.catalog import ModelCard, find_card
from engine.config import RunConfig, read_config, write_config
from engine.data.prepared import Prepared
from engine.errors import UserError
from engine.files import write_whole
from engine.hub_id import is_hub_id
from engine.runs import RunFolder
from engine.runs.comparison import Curves, read_curves
from engine.visible import visible


@dataclass(slots=True)
class ResultFacts:
    """What a card and a server's command line are made from."""

    name: str
    config: RunConfig
    card: ModelCard | None
    """Of the base model, where the catalog has it."""
    base_id: str | None
    """The base's hub id; None where it is a folder of this computer or made on the spot."""
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Tokens of the training set by their kind."""
    curves: Curves = field(default_factory=Curves)

    @property
    def base_name(self) -> str:
        """What to call the base: its hub id, its catalog name or the name of its folder."""
        return self.base_id or Path(self.config.base_model).name


def read_facts(run: RunFolder) -> ResultFacts:
    """Gather a run's facts from its config, its arrays and its events; what is missing is left out.

    Raises UserError where its config cannot be read.
    """
    config = read_config(run.config).config
    card, base_id = find_base(config.base_model)
    facts = ResultFacts(run.name, config, card, base_id, curves=read_curves(run))
    try:
        prepared = Prepared(run.data)
        facts.rows, facts.kinds = len(prepared), prepared.tokens_by_kind()
    except (UserError, OSError):  # a result outlives its data
        pass
    return facts


def find_base(base_model: str) -> tuple[ModelCard | None, str | None]:
    """The catalog's card of a base model, and the hub id that stands for it."""
    if card := find_card(base_model):
        return card, card.hub_id if base_model == card.name else base_model
    is_id = is_hub_id(base_model) and not Path(base_model).exists()
    return None, base_model if is_id else None


def shared_config(config: RunConfig) -> str:
    """The config as YAML without this computer's paths: of each, the last name is kept."""
    values: dict[str, Any] = _without_paths(config.model_dump(mode="json", exclude_unset=True))
    for key in ("output_dir", "dataset_prepared_path", "image_folder"):
        values.pop(key, None)
    return write_config(RunConfig.model_validate(values))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be, as in vLLM's LoRAConfig."""


@dataclass(frozen=True, slots=True)
class Hint:
    """One way to serve."""

    title: str
    steps: tuple[tuple[str, ...], ...]
    """Commands in their order, each as its words."""
    reasons: tuple[tuple[str, str], ...]
    """Flag, and why it is there."""

    def shell(self) -> str:
        """The commands as lines for a shell, one flag a line."""
        return "\n".join(_lines(step) for step in self.steps)


def serve_hints(run: RunFolder) -> list[Hint]:
    """How to serve a run: with vLLM, beside its base where that works, and with llama.cpp.

    Raises UserError where the run's config cannot be read.
    """
    facts = read_facts(run)
    merged = run.path / "merged" if facts.config.adapter else run.model
    merge = ("windtunnel", "merge", str(run.path), "-o", str(merged))
    steps: tuple[tuple[str, ...], ...] = (merge,) if facts.config.adapter else ()
    hints = []
    if facts.config.adapter:
        beside = serve_model(facts, str(run.adapter), merged=False)
        if beside:
            hints.append(beside)
    whole = serve_model(facts, str(merged), merged=True)
    assert whole is not None
    hints.append(Hint(whole.title, (*steps, *whole.steps), whole.reasons))
    hints.append(_llama_cpp(facts, steps, merged))
    return hints


def serve_model(facts: ResultFacts, folder: str, *, merged: bool) -> Hint | None:
    """The vLLM command for a result in `folder`; None for an adapter that vLLM refuses."""
    if not merged and why_not_beside(facts):
        return None
    flags: list[tuple[str, str | None, str]] = []
    if not merged:
        rank = next(r for r in VLLM_RANKS if r >= facts.config.lora_r)
        flags += [
            ("--enable-lora", None, "the adapter is applied to the base while it answers"),
            ("--lora-modules", f"{facts.name}={folder}", "requests name the model by this name"),
            ("--max-lora-rank", str(rank), "vLLM reserves room for 16 unless it is told more"),
        ]
    else:
        flags.append(("--served-model-name", facts.name, "requests name the model by this name"))
    flags += _format_flags(facts)
    rope = _overridden_rope(facts.config)
    if rope and not merged:
        why = "the positions of the training; the base's own config.json says otherwise"
        flags.append(("--hf-overrides", json.dumps(rope), why))
    model = folder if merged else facts.base_id or facts.config.base_model
    words = [w for flag, value, _ in flags for w in (flag, *([value] if value else []))]
    reasons = tuple((flag, why) for flag, _, why in flags)
    title = "vLLM, merged into one model" if merged else "vLLM, the adapter beside its base"
    if facts.config.adapter is None:
        title = "vLLM"
    return Hint(title, (("vllm", "serve", model, *words),), reasons)


def why_not_beside(facts: ResultFacts) -> str | None:
    """Why vLLM cannot serve this adapter beside its base; None where it can."""
    config = facts.config
    if facts.base_id is None and facts.card is not None:
        return "the base model is made on this computer and lies in no folder of its own"
    if config.peft_use_dora:
        return "vLLM does not serve DoRA adapters"
    if config.lora_modules_to_save:
        return "vLLM does not serve adapters with whole modules in them (lora_modules_to_save)"
    if config.lora_target_parameters:
        return "vLLM does not serve adapters on expert stacks of this layout"
    if config.lora_r > VLLM_RANKS[-1]:
        return f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}"
    return None


def _overridden_rope(config: RunConfig) -> dict[str, object]:
    """What a run took instead of its base's `rope_parameters`, as transformers is told it."""
    given = config.overrides_of_model_config or {}
    return {key: given[key] for key in ("rope_parameters", "text_config") if key in given}


def _format_flags(facts: ResultFacts) -> Iterator[tuple[str, str | None, str]]:
    yield "--tokenizer-mode", "mistral", "tekken.json by mistral-common: the tokens of the training"
    yield (
        "--config-format",
        "hf",
        "the weights that were trained are those of config.json, not those of params.json",
    )
    yield "--load-format", "safetensors", "for the same reason: not the consolidated files"
    yield "--tool-call-parser", "mistral", "reads [TOOL_CALLS]"
    yield "--enable-auto-tool-choice", None, "the model decides when to call a tool"
    card = facts.card
    if card and card.thinking in ("tokens", "effort"):
        yield "--reasoning-parser", "mistral", "gives what is between [THINK] and [/THINK] apart"
    if card and "vision" in card.modalities:
        images = 4 if facts.kinds.get("image") else 0
        why = "images a request" if images else "it was trained on text: no room for images is kept"
        yield "--limit-mm-per-prompt", json.dumps({"image": images}), why


def _llama_cpp(facts: ResultFacts, steps: tuple[tuple[str, ...], ...], merged: Path) -> Hint:
    file = f"{facts.name}.gguf"
    convert = ("python", "convert_hf_to_gguf.py", str(merged), "--outfile", file)
    return Hint(
        "llama.cpp",
        (
            *steps,
            (*convert, "--outtype", "bf16"),
            ("llama-server", "-m", file),
        ),
        (
            ("convert_hf_to_gguf.py", "comes with llama.cpp, which reads only its own format"),
            ("--outtype", "the precision of the merged weights; llama-quantize makes it smaller"),
            (
                "llama-server",
                "formats conversations by itself: hold one answer against `windtunnel generate`",
            ),
        ),
    )


def _lines(words: tuple[str, ...]) -> str:
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and len(words) > 6:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)


def as_document(hint: Hint) -> dict[str, Any]:
    """A hint as `serve-hint --json` prints it."""
    reasons = [{"flag": flag, "why": why} for flag, why in hint.reasons]
    steps = [list(step) for step in hint.steps]
    return {"title": hint.title, "commands": steps, "shell": hint.shell(), "reasons": reasons}


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
    write_whole(path, ("\n".join(describe(facts, kind)) + "\n").encode())
    return path


def describe(facts: ResultFacts, kind: Kind) -> Iterator[str]:
    yield from _front_matter(facts, kind)
    name, base = visible(facts.name, one_line=True), visible(facts.base_name, one_line=True)
    method = {"adapter": "adapter", "model": "full fine-tune", "merged": "fine-tune"}[kind]
    yield f"# {name}"
    yield ""
    adapter = {"lora": "LoRA", "qlora": "QLoRA"}.get(facts.config.adapter or "", "whole-weight")
    yield f"A {adapter} {method} of `{base}`, made with Windtunnel."
    if kind == "merged":
        yield "The adapter is merged into the weights: nothing else is needed to use it."
    yield from _training(facts)
    yield from _figures(facts)
    yield from _answers(facts)
    yield from _use(facts, kind)
    yield from ("", "## Config", "", *_fenced(shared_config(facts.config).rstrip(), "yaml"))


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
