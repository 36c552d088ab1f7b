"""Regular expressions that a file brings, held against names in a process that can be ended.

A short one can take longer than anybody waits (`(([a-z]+)+)+!` on a name of forty letters), and
Python's re, whose reading is what PEFT and the configs mean, cannot be told to stop. So it runs in
a child with a limit of processor time and memory: this file, which is why it imports nothing of
ours.
"""

import json
import re
import sys
from functools import lru_cache
from typing import Literal, TypeAlias

How: TypeAlias = Literal["whole", "start", "part"]
"""Against the whole name, its start, or the start of any of its parts after a dot."""

LIMIT_LETTERS = 2000
LIMIT_SECONDS = 1
"""Of processor time; a table of ten thousand names takes some hundredths."""
_LIMIT_BYTES = 2**29
# Where nothing counts processor time, and on a computer that is busy with something else.
_PATIENCE_SECONDS = 60.0


# What is most often written has no repeat inside another, and needs no child.
_PLAIN = re.compile(r"[\w.-]*(?:\.\*)?")


class PatternError(ValueError):
    """Why a pattern is none, or is not waited for: one sentence."""


def find_matches(pattern: str, names: tuple[str, ...] = (), how: How = "whole") -> tuple[str, ...]:
    """Those of `names` that a pattern matches. Raises PatternError, without names too."""
    found = _ask(pattern, names, how)
    if isinstance(found, str):
        raise PatternError(found)
    return found


# A plan is made at every keystroke of the wizard; what is not waited for is remembered too.
@lru_cache(maxsize=256)
def _ask(pattern: str, names: tuple[str, ...], how: How) -> tuple[str, ...] | str:
    # Imported here: the child needs none of it, and starts in half the time.
    import subprocess

    if len(pattern) > LIMIT_LETTERS:
        return f"It has {len(pattern):,} letters, and at most {LIMIT_LETTERS:,} are read."
    if _PLAIN.fullmatch(pattern):
        plain = re.compile(pattern)
        return tuple(name for name in names if _match(plain, name, how))
    too_long = (
        f"Python's re module needs more than {LIMIT_SECONDS} s for it, or too much memory:"
        " mostly repeats inside repeats, such as (a+)+."
    )
    asked = json.dumps({"pattern": pattern, "names": names, "how": how})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=asked.encode(),
            capture_output=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return too_long
    if done.returncode:
        return too_long
    answer = json.loads(done.stdout)
    return answer if isinstance(answer, str) else tuple(names[index] for index in answer)


def _match(pattern: re.Pattern[str], name: str, how: How) -> bool:
    if how == "whole":
        return pattern.fullmatch(name) is not None
    if how == "start":
        return pattern.match(name) is not None
    return any(pattern.match(name, dot.end()) for dot in re.finditer(r"\.", name))


def main() -> None:
    """The child: reads what is asked, answers with the places of the names or with a sentence."""
    import resource

    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_BYTES, _LIMIT_BYTES))
    try:
        pattern = re.compile(asked["pattern"])
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps(f"Python's re module says: {error}."))
        return
    names = enumerate(asked["names"])
    print(json.dumps([index for index, name in names if _match(pattern, name, asked["how"])]))


if __name__ == "__main__":
    main()
