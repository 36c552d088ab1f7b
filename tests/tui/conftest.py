"""Every test of the wizard has a home for runs of its own, and clocks that read UTC."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import textual.app
import textual.pilot
from textual._context import active_app
from textual.app import App
from textual.pilot import Pilot, WaitForScreenTimeout


@pytest.fixture(autouse=True)
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    return home


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_an_idle_processor() -> Iterator[None]:
    """After a key Textual waits until the whole process rests, 20 ms at the least and a second
    where a thread counts in the background: a third of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (textual.app, textual.pilot):
            patch.setattr(module, "wait_for_idle", until_nothing_is_queued)
        yield


async def until_nothing_is_queued(*_: float) -> None:
    """Until every widget has done what it was sent and what that led to, and it is drawn."""
    app = active_app.get()
    with contextlib.suppress(WaitForScreenTimeout):  # a key that waits for a thread or a process
        for _round in range(20):  # a bar that moves is never done
            await Pilot(app)._wait_for_screen(0.5)
            app.screen._on_timer_update()
            await asyncio.sleep(0)
            if not is_busy(app):
                return


def is_busy(app: App[Any]) -> bool:
    screen = app.screen
    pumps = [app, *screen.walk_children(with_self=True)]
    queued = any(not pump._message_queue.empty() or pump._next_callbacks for pump in pumps)
    return bool(queued or screen._callbacks or screen._layout_required or screen._dirty_widgets)
