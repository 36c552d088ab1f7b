"""Commands that serve a result, with a reason for every flag.

Facts of vLLM and llama.cpp are kept here and nowhere else. An adapter of a kind that vLLM refuses
gets the commands for a merged folder instead.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.publish.facts import ResultFacts, read_facts
from engine.runs import RunFolder

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
