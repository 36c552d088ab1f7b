"""`demo`: the main job once, on the embedded tiny models, with what it proves and what it does not.

A recipe and its data ship; the outcome is printed as answers and scores.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.cli.drawings import SEEN, UNSEEN, write_drawings
from engine.cli.printing import AsEvents, AsJson, RunsFolder, print_lines
from engine.cli.runs import EventLines, Watch, start
from engine.errors import UserError
from engine.events import Sample, Score
from engine.report.run import state_lines
from engine.runs import Follower, RunFolder
from engine.visible import visible
from engine.wizard.start import create

RECIPES = {
    "text": ("recipes", "demo-tiny", "lora.yml"),
    "qlora": ("recipes", "demo-tiny", "qlora.yml"),
    "vision": ("demo", "vision.yml"),
}
"""Below `presets`. The one with images is no recipe to copy: its dataset is drawn for the run."""
DATASETS = {
    "heldout_pairing": "known wording, new force",
    "heldout_wording": "wording it never saw",
    "new_drawings": f"new drawings (by chance {1 / len(SEEN):.0%})",
    "shuffled_pixels": "the same, their pixels shuffled",
    "unseen_pairs": "colour and shape never seen together",
}
TEXT_OUTCOME = (
    "The base model is tiny and was made for this demo: it learned these",
    "conversations by heart and understands nothing. That is why wordings that it",
    "never saw mostly fail.",
)
VISION_OUTCOME = (
    "The base model is tiny, was made for this demo and had never seen an image. Where",
    f"the pixels are shuffled it can only guess; the last line is {len(UNSEEN)} pairs of a colour",
    "and a shape that no training drawing shows together.",
)


def register(app: cyclopts.App, make_watch: Callable[[], Watch]) -> None:
    """Add the command; `make_watch` makes what shows the run."""

    @app.command
    def demo(
        folder: Annotated[Path | None, Parameter(help="Where the run goes.")] = None,
        /,
        *changes: Annotated[str, Parameter(help="Changes to its config, such as seed=7.")],
        qlora: Annotated[bool, Parameter(help="Hold the frozen weights in 4 bits.")] = False,
        vision: Annotated[
            bool, Parameter(help="Learn to name coloured shapes from images.")
        ] = False,
        as_json: AsJson = False,
        as_events: AsEvents = False,
        home: RunsFolder = None,
    ) -> int:
        """Fine-tune an embedded tiny model on sample conversations, in about a minute.

        No download and no GPU. Three questions are answered before and after; with --vision they
        are about images.
        """
        if folder:
            changes = (*changes, f"output_dir={json.dumps(str(folder.absolute()))}")
        with as_file(files("presets").joinpath(*RECIPES[_kind(qlora, vision)])) as recipe:
            created = create(recipe, changes, home, name="demo")
        if vision:
            write_drawings(created.run.path / "drawings")
        status = start(created, EventLines() if as_events else make_watch())
        result = demo_result(created.run)
        if as_json:
            print(json.dumps(result))
        elif not as_events:
            print("\n".join(describe_demo(result, vision=vision)) if status == 0 else "")
            print_lines(state_lines(created.run))
        return status


def _kind(qlora: bool, vision: bool) -> str:
    if qlora and vision:
        raise UserError(
            "The demo with images trains whole weights.",
            "Its vision tower starts untrained and has to learn, and 4-bit weights are frozen.",
            "Choose --qlora or --vision.",
        )
    return "qlora" if qlora else "vision" if vision else "text"


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


def describe_demo(result: Mapping[str, Any], *, vision: bool) -> Iterator[str]:
    """The demo's outcome for a person, with what it does not prove."""
    for before, after in zip(result["before"], result["after"], strict=False):
        yield ""
        yield visible(f"  {before['prompt']}", one_line=True)
        yield visible(f"    before  {before['text']}", one_line=True)
        yield visible(f"    after   {after['text']}", one_line=True)
    yield ""
    yield "Answers given back word for word:      before   after"
    known = {"train": "drawings" if vision else "conversations"}
    for dataset, score in result["scores"].items():
        trained = f"{known[dataset]} it trained on" if dataset in known else dataset
        words = DATASETS.get(dataset, trained)
        yield f"  {words:<36} {score.get('before', 0):>6.0%}  {score.get('after', 0):>6.0%}"
    yield ""
    yield from VISION_OUTCOME if vision else TEXT_OUTCOME
