"""`python -m tests.fuzz NAME --minutes 10`: one target for so long, by atheris where it is here.

Prints how many examples ran. A finding ends it with its traceback and the bytes.
"""

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import SEEDS, TARGETS, examples, small_tekken

_ROUND = 500


def by_hypothesis(name: str, folder: Path, until: float) -> int:
    """How many examples ran."""
    count = 0
    while time.monotonic() < until:

        @seed(time.time_ns())
        @settings(
            max_examples=_ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(examples(name, folder))
        def run(data: bytes) -> None:
            nonlocal count
            count += 1
            TARGETS[name](data, folder)

        run()
    return count


def by_atheris(name: str, folder: Path, minutes: float) -> None:
    """Coverage-guided, from the seeds; it ends the process."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    seeds = SEEDS[name] + ([small_tekken(folder)] if name == "tokenizer" else [])
    for number, content in enumerate(seeds):
        (corpus / str(number)).write_bytes(content)
    atheris.instrument_all()
    limits = [f"-max_total_time={round(60 * minutes)}", "-max_len=300000", "-timeout=60"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], lambda data: TARGETS[name](data, folder))
    atheris.Fuzz()


def main() -> None:
    """Reads the arguments; --hypothesis leaves atheris out."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hypothesis", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if find_spec("atheris") and not asked.hypothesis:
            by_atheris(asked.name, Path(place), asked.minutes)
        count = by_hypothesis(asked.name, Path(place), time.monotonic() + 60 * asked.minutes)
    print(f"{asked.name}: {count:,} examples, no finding")


if __name__ == "__main__":
    main()
