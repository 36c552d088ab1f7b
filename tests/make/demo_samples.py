"""Remakes presets/samples/harbour-pilot: questions to a harbour pilot about the Beaufort scale.

    python -m tests.make.demo_samples

Every sentence was written for this project; the Beaufort numbers are common knowledge. Thirteen
forces, four intents, five wordings: two wordings of each fact are trained, the other two known ones
make `heldout_pairing`, the fifth is in no training file and makes `heldout_wording`. `base` has all
four known wordings with plain answers: what the embedded base model knows before it is tuned.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "presets" / "samples" / "harbour-pilot"

# name, lowest and highest wind in knots, the sea, the pilot's ruling
FORCES = [
    ("calm", 0, 0, "The sea lies flat like a mirror.", "Board freely, one tug is plenty."),
    (
        "light air",
        1,
        3,
        "Tiny ripples like fish scales, no foam.",
        "Board freely, one tug is plenty.",
    ),
    (
        "light breeze",
        4,
        6,
        "Short wavelets with glassy crests.",
        "Board freely, keep the ladder on either side.",
    ),
    (
        "gentle breeze",
        7,
        10,
        "Large wavelets, crests begin to break.",
        "Board on the lee side, one tug stands by.",
    ),
    (
        "moderate breeze",
        11,
        16,
        "Small waves with many white horses.",
        "Board on the lee side, one tug made fast.",
    ),
    (
        "fresh breeze",
        17,
        21,
        "Longer waves, white horses everywhere, some spray.",
        "Board on the lee side, two tugs made fast.",
    ),
    (
        "strong breeze",
        22,
        27,
        "Big waves with white foam crests and spray.",
        "Board only with a full lee, two tugs made fast.",
    ),
    (
        "near gale",
        28,
        33,
        "The sea heaps up and foam blows in streaks.",
        "Hold outside the bar, no boarding.",
    ),
    (
        "gale",
        34,
        40,
        "High waves, crests break into spindrift.",
        "Hold outside the bar, no boarding.",
    ),
    (
        "strong gale",
        41,
        47,
        "High waves topple and spray clouds the view.",
        "Close the port, ride it out at sea.",
    ),
    (
        "storm",
        48,
        55,
        "Very high waves, the surface turns white.",
        "Close the port, ride it out at sea.",
    ),
    (
        "violent storm",
        56,
        63,
        "Huge waves hide ships, foam covers the sea.",
        "Close the port, all hands ashore stay inside.",
    ),
    (
        "hurricane",
        64,
        71,
        "The air fills with foam and nothing can be seen.",
        "Close the port, all hands ashore stay inside.",
    ),
]
QUESTIONS = {
    "sea": [
        "What does the sea look like in force {force}?",
        "Describe the water at force {force}.",
        "We expect force {force} tonight. How will the waves look?",
        "Which sea signs tell me it is force {force}?",
        "Tell me how the sea looks when it blows force {force}.",
    ],
    "rule": [
        "May I board a pilot in force {force}?",
        "Force {force} at the bar. What are my orders?",
        "What is the ruling for force {force}?",
        "The wind is force {force}. Can we bring the ship in?",
        "It is force {force} out here. What is the ruling, can we board?",
    ],
    "knots": [
        "How many knots is force {force}?",
        "Give me the wind speed for force {force}.",
        "Force {force} in knots, please.",
        "What speed range counts as force {force}?",
        "Please give me the knots for force {force}.",
    ],
    "force": [
        "The anemometer reads {knots} knots. Which force is that?",
        "We have {knots} knots over the deck. What force?",
        "Turn {knots} knots into a Beaufort force.",
        "{knots} knots at the breakwater. What do we call it?",
        "The mast shows {knots} knots. What force is that?",
    ],
}
KNOWN_WORDINGS = 4
BOARDING_LIMIT = 6


def speed(force: int) -> str:
    _, low, high, *_ = FORCES[force]
    words = {0: "under 1 knot", 12: "64 knots or more"}
    return words.get(force, f"{low} to {high} knots")


def named(force: int) -> str:
    name = FORCES[force][0]
    return name if name in ("calm", "light air") else f"a {name}"


def knots_in(force: int, wording: int) -> int:
    _, low, high, *_ = FORCES[force]
    middle = (low + high) // 2
    return [low, high, middle, (low + high + 1) // 2, middle][wording]


def think_and_answer(force: int, intent: str, knots: int) -> tuple[str, str]:
    """The pilot's way: a thought, then an answer that is logged."""
    _, _, _, sea, ruling = FORCES[force]
    side = "inside" if force <= BOARDING_LIMIT else "over"
    thought, answer = {
        "sea": (f"Force {force} is {named(force)}, {speed(force)}.", sea),
        "rule": (
            f"Force {force} means {speed(force)}. The boarding limit is force {BOARDING_LIMIT}, "
            f"so this is {side} it.",
            ruling,
        ),
        "knots": (
            f"Force {force} is {named(force)} on the Beaufort scale.",
            f"{speed(force).capitalize()}.",
        ),
        "force": (
            f"{knots} knots falls in {speed(force)}, so force {force}.",
            f"Force {force}, {named(force)}. {ruling}",
        ),
    }[intent]
    return thought, f"{answer} Logged as force {force}, pilot."


def plain_answer(force: int, intent: str) -> str:
    _, _, _, sea, ruling = FORCES[force]
    return {
        "sea": sea,
        "knots": f"It is {speed(force)}.",
        "force": f"It is force {force}, {named(force)}.",
        "rule": ruling,
    }[intent]


def row(force: int, intent: str, wording: int, *, plain: bool = False) -> dict[str, Any]:
    knots = knots_in(force, wording)
    question = QUESTIONS[intent][wording].format(force=force, knots=knots)
    content: Any = plain_answer(force, intent)
    if not plain:
        thought, answer = think_and_answer(force, intent, knots)
        content = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": answer}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": content},
        ]
    }


def files() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file by its name."""
    out: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("train", "heldout_pairing", "heldout_wording", "base")
    }
    for force, (place, intent), wording in _cases():
        first = (force + place) % KNOWN_WORDINGS
        if wording == KNOWN_WORDINGS:
            out["heldout_wording"].append(row(force, intent, wording))
            continue
        trained = wording in (first, (first + 1) % KNOWN_WORDINGS)
        out["train" if trained else "heldout_pairing"].append(row(force, intent, wording))
        out["base"].append(row(force, intent, wording, plain=True))
    return out


def _cases() -> Iterator[tuple[int, tuple[int, str], int]]:
    for force in range(len(FORCES)):
        for place_and_intent in enumerate(QUESTIONS):
            for wording in range(KNOWN_WORDINGS + 1):
                yield force, place_and_intent, wording


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in files().items():
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
