"""`demo`: the main job once, on the embedded tiny models, with what it proves and what it does not.

A recipe and its data ship. The pictures of `--vision` are drawn anew from a seed, so that the demo
takes the way of any dataset with images; its sets decide what the scores mean.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import Parameter

from engine.cli.runs import NOT_BEGUN, start
from engine.cli.terminal import (
    HOST,
    AsEvents,
    AsJson,
    CommandHost,
    EventLines,
    RunsFolder,
    print_lines,
)
from engine.errors import UserError
from engine.events import Sample, Score
from engine.interrupt import last_words
from engine.report.run import state_lines
from engine.runs import Follower, RunFolder
from engine.visible import visible
from engine.wizard.start import create

if TYPE_CHECKING:
    from PIL.Image import Image


SIDE = 56
"""Pixels: two rows of two image tokens, the fewest that still tell where a thing is."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ((120, 140, 160), (150, 150, 130), (110, 120, 120), (170, 160, 170))
Pair: TypeAlias = tuple[str, str]
"""A colour and a shape."""
UNSEEN: tuple[Pair, ...] = (
    ("red", "cross"),
    ("green", "triangle"),
    ("blue", "circle"),
    ("yellow", "square"),
)
"""Pairs of which no drawing is trained, though each colour and each shape is."""
SEEN: tuple[Pair, ...] = tuple(
    pair
    for pair in ((colour, shape) for colour in COLOURS for shape in SHAPES)
    if pair not in UNSEEN
)
QUESTION = "What is drawn here?"
TRAINED, HELD_OUT = 1200, 100
"""Drawings that are trained, and those of each held-out set: as many of every pair."""
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


def demo(
    folder: Annotated[Path | None, Parameter(help="Where the run goes.")] = None,
    /,
    *changes: Annotated[str, Parameter(help="Changes to its config, such as seed=7.")],
    qlora: Annotated[bool, Parameter(help="Hold the frozen weights in 4 bits.")] = False,
    vision: Annotated[bool, Parameter(help="Learn to name coloured shapes from images.")] = False,
    as_json: AsJson = False,
    as_events: AsEvents = False,
    home: RunsFolder = None,
    host: CommandHost = HOST,
) -> int:
    """Fine-tune an embedded tiny model on sample conversations, in about a minute.

    No download and no GPU. Three questions are answered before and after; with --vision they
    are about images.
    """
    last_words(NOT_BEGUN)
    if folder:
        changes = (*changes, f"output_dir={json.dumps(str(folder.absolute()))}")
    with as_file(files("presets").joinpath(*RECIPES[_kind(qlora, vision)])) as recipe:
        created = create(recipe, changes, home, name="demo")
    if vision:
        write_drawings(created.run.path / "drawings")
    watch = EventLines() if as_events else host.make_watch()
    status = start(created, watch, host)
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


def write_drawings(folder: Path, seed: int = 0) -> None:
    """Write the sets of the vision demo below `folder`, each a JSONL file and its PNG images.

    `train`; `new_drawings` of the same pairs; `shuffled_pixels`, the same conversations with all
    pixels of all their drawings mixed, so that none shows anything; `unseen_pairs`.
    """
    pairs = random.Random(seed)
    train = list(_draw_all(SEEN, TRAINED, pairs))
    new = list(_draw_all(SEEN, HELD_OUT, pairs))
    unseen = list(_draw_all(UNSEEN, HELD_OUT, pairs))
    shuffled = [
        (pair, image)
        for (pair, _), image in zip(new, shuffle_pixels([i for _, i in new], seed), strict=True)
    ]
    for name, drawings in (
        ("train", train),
        ("new_drawings", new),
        ("shuffled_pixels", shuffled),
        ("unseen_pairs", unseen),
    ):
        _write_set(folder, name, drawings)


def _draw_all(
    pairs: Sequence[Pair], count: int, rng: random.Random
) -> Iterator[tuple[Pair, "Image"]]:
    """`count` drawings that take the pairs in turn, in an order of their own."""
    drawn = [(pairs[n % len(pairs)]) for n in range(count)]
    rng.shuffle(drawn)
    for pair in drawn:
        yield pair, draw(*pair, rng)


def draw(colour: str, shape: str, rng: random.Random) -> "Image":
    """One large shape near the middle; its size, place, shade and background vary."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), rng.choice(BACKGROUNDS))
    canvas = ImageDraw.Draw(image)
    radius = rng.uniform(0.30, 0.42) * SIDE
    x, y = (SIDE / 2 + rng.uniform(-0.06, 0.06) * SIDE for _ in range(2))
    red, green, blue = (min(255, max(0, v + rng.randint(-15, 15))) for v in COLOURS[colour])
    fill = (red, green, blue)
    whole = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(whole, fill)
    elif shape == "square":
        canvas.rectangle(whole, fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill)
    else:
        arm = 0.35 * radius
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill)
    return image


def shuffle_pixels(images: Sequence["Image"], seed: int) -> Iterator["Image"]:
    """As many images of the same pixels, each at a place drawn from all places of all of them."""
    import numpy as np
    from PIL import Image

    pixels = np.stack([np.asarray(image) for image in images])
    flat = pixels.reshape(-1, 3)
    mixed = np.random.default_rng(seed).permutation(flat).reshape(pixels.shape)
    return (Image.fromarray(values) for values in mixed)


def _write_set(folder: Path, name: str, drawings: Iterable[tuple[Pair, "Image"]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as rows:
        for number, ((colour, shape), image) in enumerate(drawings, start=1):
            file = f"{name}/{number:04}.png"
            image.save(folder / file)
            content = [
                {"type": "image_url", "image_url": {"url": file}},
                {"type": "text", "text": QUESTION},
            ]
            answer = f"A {colour} {shape}."
            row = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            rows.write(json.dumps({"messages": row}) + "\n")
