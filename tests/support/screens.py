"""What a screen looks like, as text that a person can read and a test can compare."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.app import App
from textual.pilot import Pilot

GOLDEN = Path(__file__).parents[1] / "golden" / "tui"


def screen_text(app: App[Any]) -> str:
    """The lines of the screen as they stand, without spaces at their ends."""
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in strips) + "\n"


def assert_golden(name: str, text: str) -> None:
    """Compare with tests/golden/tui/NAME.txt; WINDTUNNEL_GOLDEN=write makes it anew."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("WINDTUNNEL_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


async def wait_for(
    pilot: Pilot[Any], condition: Callable[[], object], seconds: float = 60.0
) -> None:
    """Let the app work until the condition holds; fails the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("what the test waits for is not on the screen")
        await pilot.pause(0.02)


async def wait_for_text(pilot: Pilot[Any], text: str) -> None:
    """Let the app work until the screen shows `text`."""
    try:
        await wait_for(pilot, lambda: text in screen_text(pilot.app))
    except AssertionError as error:
        raise AssertionError(f"{text!r} is not on\n{screen_text(pilot.app)}") from error
