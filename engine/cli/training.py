"""`train` and `demo`: a run in the foreground, or one that is started and left alone."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.cli.config_paths import with_absolute_paths
from engine.cli.planning import plan_run
from engine.cli.watch import Watch, watch_to_end
from engine.config import override, read_config, require_supported, write_config
from engine.errors import UserError
from engine.events import Recorded, Sample, Score, format_line
from engine.launch import launch
from engine.runs import Follower, RunFolder, create_run, summarize
from engine.visible import visible

AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON document.")]
AsEvents = Annotated[
    bool, Parameter("--events", negative="", help="Print the run's events as JSON lines.")
]
RunsFolder = Annotated[
    Path | None,
    Parameter("--runs", help="Folder that holds runs/, instead of the default."),
]


class EventLines:
    """Events as they are in events.jsonl, on stdout."""

    def show(self, recorded: Recorded) -> None:
        sys.stdout.buffer.write(format_line(recorded))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        sys.stdout.buffer.flush()


def register(app: cyclopts.App, make_watch: Callable[[], Watch]) -> None:
    """Add the commands; `make_watch` makes what shows a run that stays in the foreground."""
    _add_train(app, make_watch)
    _add_demo(app, make_watch)


def _add_train(app: cyclopts.App, make_watch: Callable[[], Watch]) -> None:
    @app.command
    def train(
        config: Annotated[Path, Parameter(help="YAML file with Axolotl's keys.")],
        /,
        *changes: Annotated[str, Parameter(help="Changes, such as learning_rate=1e-4.")],
        detach: Annotated[
            bool, Parameter(negative="", help="Start it and return; it outlives the terminal.")
        ] = False,
        max_steps: Annotated[
            int | None, Parameter(help="Stop after so many optimizer steps.")
        ] = None,
        anyway: Annotated[
            bool, Parameter(negative="", help="Start even where the estimate does not fit.")
        ] = False,
        as_json: AsJson = False,
        as_events: AsEvents = False,
        home: RunsFolder = None,
    ) -> int:
        """Train what a config says. Exit status 3: it does not fit this machine."""
        if max_steps is not None:
            changes = (*changes, f"max_steps={max_steps}")
        plan = plan_run(config, changes, anyway=anyway)
        created = create(config, changes, home)
        run = created.run
        watch = None if detach else EventLines() if as_events else make_watch()
        status = start(created, watch, plan)
        if as_json:
            print(json.dumps({"run": str(run.path)}))
        elif not as_events:
            print(describe_state(run))
        return status


def _add_demo(app: cyclopts.App, make_watch: Callable[[], Watch]) -> None:
    @app.command
    def demo(
        folder: Annotated[Path | None, Parameter(help="Where the run goes.")] = None,
        /,
        *changes: Annotated[str, Parameter(help="Changes to its config, such as seed=7.")],
        qlora: Annotated[
            bool, Parameter(negative="", help="Hold the frozen weights in 4 bits.")
        ] = False,
        as_json: AsJson = False,
        as_events: AsEvents = False,
        home: RunsFolder = None,
    ) -> int:
        """Fine-tune the embedded tiny model on sample conversations, in about a minute.

        No download and no GPU. Three questions are answered before and after.
        """
        with as_file(files("presets") / "recipes" / "demo-tiny") as recipes:
            recipe = recipes / ("qlora.yml" if qlora else "lora.yml")
            if folder:
                changes = (*changes, f"output_dir={json.dumps(str(folder.absolute()))}")
            created = create(recipe, changes, home, name="demo")
            status = start(created, EventLines() if as_events else make_watch())
        result = demo_result(created.run)
        if as_json:
            print(json.dumps(result))
        elif not as_events:
            print("\n".join(describe_demo(result)) if status == 0 else "")
            print(describe_state(created.run))
        return status


@dataclass(frozen=True, slots=True)
class Created:
    """A run that can be launched."""

    run: RunFolder
    config: str
    """Text of its config.yml."""
    resume: bool
    checkpoint: str | None
    """Name of the checkpoint to go on from, None for the newest."""


def create(
    file: Path, changes: Sequence[str], home: Path | None, name: str | None = None
) -> Created:
    """The run folder for a config file and its changes.

    Paths in the config are relative to its file; in the run folder they are absolute. Raises
    UserError where the config or the folder cannot be used.
    """
    given = read_config(file)
    config = override(given.config, changes) if changes else given.config
    require_supported(config, given.document)
    config = with_absolute_paths(config, file.absolute().parent)
    start_from = config.resume_from_checkpoint
    run = create_run(
        name or run_name(file),
        output_dir=config.output_dir,
        home=home,
        resume=bool(start_from),
    )
    checkpoint = Path(start_from).name if isinstance(start_from, str) else None
    if checkpoint and not (run.checkpoints / checkpoint).is_dir():
        raise UserError(
            f"{visible(str(run.path), one_line=True)} has no checkpoint {visible(checkpoint)}.",
            "resume_from_checkpoint names one of the run's own folder.",
            "Set it to true for the newest, or to the name of one in its checkpoints folder.",
        )
    return Created(run, write_config(config, document=given.document), bool(start_from), checkpoint)


def run_name(file: Path) -> str:
    """A run's name from its config's: what a folder's name cannot hold becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:80] or "run"


def start(created: Created, watch: Watch | None, plan: Mapping[str, object] | None = None) -> int:
    """Launch a created run, detached where nobody watches; returns the exit status."""
    follower = Follower(created.run.events, from_end=True)
    process = launch(
        created.run,
        detach=watch is None,
        config=created.config,
        plan=plan,
        resume=created.resume,
        checkpoint=created.checkpoint,
    )
    return watch_to_end(created.run, process, follower, watch) if watch else 0


def describe_state(run: RunFolder) -> str:
    """Where a run is now, and how to go on with it or what came of it."""
    summary = summarize(run)
    where = visible(str(run.path), one_line=True)
    of = f" of {summary.total_steps}" if summary.total_steps else ""
    match summary.status:
        case "finished":
            results = [folder for folder in (run.adapter, run.model) if folder.is_dir()]
            made = " and ".join(visible(str(folder), one_line=True) for folder in results)
            return f"Finished at step {summary.step}: {made}"
        case "stopped":
            return (
                f"Stopped at step {summary.step}{of}, and saved.\n"
                f"Go on with: windtunnel resume {where}"
            )
        case _:
            return f"It is {summary.status} in {where}"


def demo_result(run: RunFolder) -> dict[str, Any]:
    """What a demo run says of itself: answers and exact-match scores, before and after."""
    answers: dict[str, list[dict[str, str]]] = {"before": [], "after": []}
    scores: dict[str, dict[str, float]] = {}
    follower = Follower(run.events)
    while events := follower.read():
        for event in (recorded.event for recorded in events):
            if isinstance(event, Sample) and event.when in answers:
                answers[event.when].append({"prompt": event.prompt, "text": event.text})
            elif isinstance(event, Score):
                when = "after" if event.step else "before"
                scores.setdefault(event.dataset, {})[when] = event.exact
    return {"run": str(run.path), **answers, "scores": scores}


def describe_demo(result: Mapping[str, Any]) -> Iterator[str]:
    """The demo's outcome for a person, with what it does not prove."""
    for before, after in zip(result["before"], result["after"], strict=False):
        yield ""
        yield visible(f"  {before['prompt']}", one_line=True)
        yield visible(f"    before  {before['text']}", one_line=True)
        yield visible(f"    after   {after['text']}", one_line=True)
    yield ""
    yield "Answers given back word for word:      before   after"
    for dataset, score in result["scores"].items():
        words = DATASETS.get(dataset, dataset)
        yield f"  {words:<35}  {score.get('before', 0):>6.0%}  {score.get('after', 0):>6.0%}"
    yield ""
    yield "The base model is tiny and was made for this demo: it learned these"
    yield "conversations by heart and understands nothing. That is why wordings that it"
    yield "never saw mostly fail."


DATASETS = {
    "train": "conversations it trained on",
    "heldout_pairing": "known wording, new force",
    "heldout_wording": "wording it never saw",
}
