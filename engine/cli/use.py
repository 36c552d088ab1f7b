"""What a run has trained, put to use: `generate`, `chat`, `merge`, `push`, `serve-hint`, `compare`.

The commands hold no tensor: a process with torch answers and merges, and here is only what is asked
of it and how the answers are printed.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from engine.catalog import UnknownModel
from engine.child import Child, torch_process
from engine.cli.terminal import HOST, AsJson, CommandHost, Host, RunName, RunsFolder
from engine.config import read_config
from engine.errors import UserError
from engine.interrupt import last_words, wait_for_line
from engine.launch import planned_gpu, require_torch
from engine.plan import best_device, refuse_answering
from engine.runs import RunFolder, find_run
from engine.units import gib
from engine.visible import visible
from engine.wizard.start import find_machine, read_planned

Prompt = Annotated[
    str | None, Parameter(help="The question; without it, or with -, each line of stdin is one.")
]
Base = Annotated[bool, Parameter(help="Let the model from before training answer too.")]
Image = Annotated[Path | None, Parameter(help="A picture that is asked about.")]
System = Annotated[str | None, Parameter(help="A system prompt.")]
_THINKING = re.compile(r"\[THINK\](.*?)\[/THINK\](.*)", re.DOTALL)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Asking:
    """How to ask; what is not given is the model's official setting, or greedy without one."""

    max_tokens: Annotated[int | None, Parameter(help="Longest answer.")] = None
    temperature: Annotated[float | None, Parameter(help="0 takes the likeliest token.")] = None
    top_p: Annotated[float | None, Parameter(help="Share of the likeliest tokens.")] = None
    reasoning_effort: Annotated[str | None, Parameter(help="none or high, where known.")] = None
    seed: Annotated[int | None, Parameter(help="Another answer; the same seed repeats it.")] = None


Anyway = Annotated[bool, Parameter(help="Load the model even where it does not seem to fit.")]


def generate(
    name: RunName,
    /,
    *,
    prompt: Prompt = None,
    base: Base = False,
    system: System = None,
    image: Image = None,
    asking: Asking | None = None,
    anyway: Anyway = False,
    home: RunsFolder = None,
    as_json: AsJson = False,
    host: CommandHost = HOST,
) -> None:
    """Ask what a run has trained: its result, or its newest checkpoint."""
    run = find_run(name, home)
    found = []
    with _open(run, host, anyway) as process:
        trained = _ready(process, as_json)
        for text in _prompts(prompt):
            request = asdict(asking or Asking()) | {"messages": _messages(text, system, image)}
            answers = {}
            for is_base in (True, False) if base else (False,):
                if base and not as_json:
                    print(f"\nbefore: {visible(text)}" if is_base else "\nafter:")
                process.ask(request | {"base": is_base})
                answers["base" if is_base else "tuned"] = _answer(process, as_json)
            tuned = answers["tuned"]
            found.append({"prompt": text, **tuned, "base": answers.get("base")})
    if as_json:
        print(json.dumps({"run": str(run.path), "trained": trained, "answers": found}))


def chat(
    name: RunName,
    /,
    *,
    base: Base = False,
    system: System = None,
    asking: Asking | None = None,
    anyway: Anyway = False,
    home: RunsFolder = None,
    host: CommandHost = HOST,
) -> None:
    """Talk with what a run has trained, turn by turn; ctrl+d leaves. --base: as it was."""
    run = find_run(name, home)
    messages = _system(system)
    with _open(run, host, anyway) as process:
        _ready(process, as_json=False)
        for text in _prompts(None):
            said = [*messages, {"role": "user", "content": text}]
            process.ask(asdict(asking or Asking()) | {"messages": said, "base": base})
            try:
                answer = _answer(process, as_json=False)["text"]
            except UserError as error:
                print(visible(str(error)), file=sys.stderr)
                continue
            if "[TOOL_CALLS]" in answer or not answer.strip():
                print("left out of the history: there are no tools here", file=sys.stderr)
                continue
            messages = [*said, {"role": "assistant", "content": _content(answer)}]


def merge(
    name: RunName,
    /,
    *,
    target: Annotated[Path, Parameter(name=["--out", "-o"], help="A new folder.")],
    home: RunsFolder = None,
    as_json: AsJson = False,
    host: CommandHost = HOST,
) -> None:
    """Put a run's adapter into its base's original weights: a model that needs no adapter.

    Also a QLoRA run is merged into the bfloat16 weights (FP8 ones are converted), never into
    4-bit ones. It needs the disk for a whole model and the memory of its largest matrix.
    """
    run = find_run(name, home)
    arguments = ["merge", str(run.path), str(target.expanduser().absolute())]
    shows = sys.stderr.isatty() and not as_json
    last_words("Nothing was merged, and no folder was made.")
    with torch_process(arguments, {"CUDA_VISIBLE_DEVICES": ""}, host.trainer) as process:
        for record in process.listen(until="merged"):
            _print_note(record)
            if "total" in record and shows:
                done, total = gib(record["done"]), gib(record["total"])
                print(f"\rmerged {done} of {total}  ", end="", file=sys.stderr, flush=True)
    if shows:
        print(file=sys.stderr)
    if as_json:
        print(json.dumps({"run": str(run.path), "merged": record["merged"]}))
        return
    print(f"Merged into the original weights: {visible(record['merged'], one_line=True)}")
    config = read_config(run.config).config
    if config.load_in_4bit or config.load_in_8bit:
        print(
            "The run computed with 4-bit or 8-bit weights: answers can differ a little from "
            "its own. `windtunnel generate` shows those."
        )


def push(
    name: RunName,
    /,
    *,
    to: Annotated[str | None, Parameter(help="Repository, instead of hub_model_id.")] = None,
    home: RunsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Upload a run's finished result to the hub; a repository that it makes is private."""
    from engine.publish.hub import push as upload

    address = upload(find_run(name, home), to)
    print(json.dumps({"url": address}) if as_json else f"Uploaded: {visible(address)}")


def serve_hint(name: RunName, /, *, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Print the commands that serve a run's result with vLLM and llama.cpp, a reason each."""
    from engine.publish.card import as_document, serve_hints

    hints = serve_hints(find_run(name, home))
    if as_json:
        print(json.dumps({"hints": [as_document(hint) for hint in hints]}))
        return
    for hint in hints:
        print(f"# {hint.title}\n{visible(hint.shell())}")
        for flag, why in hint.reasons:
            print(f"#   {flag}: {visible(why, one_line=True)}")
        print()


def compare(
    first: RunName, second: RunName, /, *, home: RunsFolder = None, as_json: AsJson = False
) -> None:
    """Two runs in numbers, where both have learned as many tokens, and what their configs say."""
    from engine.runs.comparison import compare_figures, differences, read_curves

    runs = [find_run(name, home) for name in (first, second)]
    tokens, figures = compare_figures(*(read_curves(run) for run in runs))
    found = differences(runs[0], runs[1])
    if as_json:
        document = {
            "runs": [str(run.path) for run in runs],
            "learned_tokens": tokens,
            "figures": {
                f.name: [None if math.isnan(value) else value for value in (f.first, f.second)]
                for f in figures
            },
            "differences": {key: [a, b] for key, a, b in found.lines},
            "same_keys": found.same,
            "held_out_differs_by": found.held_out,
        }
        print(json.dumps(document))
        return
    for letter, run in zip("AB", runs, strict=True):
        print(f"{letter}  {visible(str(run.path), one_line=True)}")
    print(f"\n{f'at {tokens:,} learned tokens':<34}{'A':>14}{'B':>14}")
    for figure in figures:
        a, b = (
            "-" if math.isnan(value) else f"{value:,.{figure.digits}f}"
            for value in (figure.first, figure.second)
        )
        print(f"{visible(figure.name, one_line=True):<34}{a:>14}{b:>14}")
    if found.held_out:
        where = f"{found.held_out_on} ({', '.join(found.held_out)})"
        print(f"\nHeld out on {where}: a lower held-out loss is not the better run.")
    print(f"\nWhat the configs say differently ({found.same} keys are the same):")
    for key, a, b in found.lines:
        print(visible(f"  {key}: {a} -> {b}", one_line=True))


def _open(run: RunFolder, host: Host, anyway: bool) -> Child:
    """The process that answers.

    Raises UserError where the model does not fit, and where the installed torch cannot use the card
    that is here, unless `anyway`.
    """
    machine = find_machine(None)
    if not anyway:
        device = best_device(machine)
        require_torch(machine, device.uuid)
        with contextlib.suppress(UnknownModel):  # its shape is known only after it is fetched
            config, architecture = read_planned(run.config)
            refuse_answering(config, architecture, device)
    return torch_process(["generate", str(run.path)], planned_gpu(run, machine), host.trainer)


def _ready(process: Child, as_json: bool) -> str:
    """Wait until the model is loaded; returns the folder of what was trained."""
    if not as_json:
        print("loading the model", file=sys.stderr, flush=True)
    for last in process.listen(until="ready"):
        _print_note(last)
    trained = str(last["trained"])
    if not as_json:
        print(visible(f"answers come from {trained}", one_line=True), file=sys.stderr, flush=True)
    return trained


def _print_note(record: Mapping[str, Any]) -> None:
    if "note" in record:
        print(visible(f"! {record['note']}", one_line=True), file=sys.stderr, flush=True)


def _answer(process: Child, as_json: bool) -> dict[str, Any]:
    """One answer, printed while it comes. Raises the UserError of a question that is refused."""
    found: dict[str, Any] = {}
    for record in process.listen(until="end"):
        if "text" in record and not as_json:
            print(visible(record["text"]), end="", flush=True)
        found |= record
    if "refused" in found:
        raise UserError(*(found["refused"][key] for key in ("what", "why", "fix")))
    answer: dict[str, Any] = found["answer"]
    if not as_json:
        print(flush=True)
        if not answer["stopped"]:
            words = f"cut off after {answer['tokens']} tokens; --max-tokens allows more"
            print(words, file=sys.stderr)
    return answer


def _prompts(prompt: str | None) -> Iterator[str]:
    if prompt not in (None, "-"):
        yield str(prompt)
        return
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
            wait_for_line(sys.stdin)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _messages(text: str, system: str | None, image: Path | None) -> list[dict[str, Any]]:
    content: str | list[dict[str, str]] = text
    if image:
        if not image.is_file():
            raise UserError(
                f"There is no picture {visible(str(image), one_line=True)}.",
                "The question was to be about it.",
                "Check the path.",
            )
        path = str(image.absolute())
        content = [{"type": "image", "path": path}, {"type": "text", "text": text}]
    return [*_system(system), {"role": "user", "content": content}]


def _system(prompt: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": prompt}] if prompt else []


def _content(answer: str) -> str | list[dict[str, str]]:
    """An answer as a row holds it: thinking apart, so that it becomes tokens again."""
    found = _THINKING.fullmatch(answer)
    if found is None:
        return answer
    thinking = {"type": "thinking", "thinking": found[1]}
    return [thinking, *([{"type": "text", "text": found[2]}] if found[2] else [])]
