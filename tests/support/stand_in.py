"""A page of the wizard over a real draft and a real worker process.

One worker process serves all tests of a session, as a tokenizer takes seconds to open.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from textual.pilot import Pilot

from engine.config import DatasetConfig
from engine.data.requests import Answer, Progress, Request
from engine.plan import Device
from engine.units import GIB
from engine.wizard.draft import Draft
from engine.wizard.reading import DataWorker
from tests.support.screens import screen_text
from tui.app import WindtunnelApp
from tui.page import Page

SAMPLE = "sample:harbour-pilot"


def draft_on(
    model: str = "demo-tiny", dataset: DatasetConfig | None = None, **changes: object
) -> Draft:
    """A draft for a card of 24 GiB."""
    card = Device("RTX 4090", "cuda", 24 * GIB, 22 * GIB, (8, 9))
    return Draft(device=card, model=model, dataset=dataset, changes=changes)


class Beyond(Page):
    """The page before or after the one that is tested."""

    STEP = "Review"


class KeptWorker(DataWorker):
    """Outlives the apps that use it, and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Request[Any]] = []

    async def ask(
        self, request: Request[Answer], progress: Callable[[Progress], None] | None = None
    ) -> Answer:
        self.asked.append(request)
        return await super().ask(request, progress)

    async def close(self) -> None:
        """The process ends with the tests, whose pipe it reads."""


WORKER = KeptWorker()


class Screen:
    """The app as a person sees and uses it."""

    def __init__(self, app: WindtunnelApp, pilot: Pilot[int]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def went_on(self) -> bool:
        return isinstance(self.app.screen, Beyond)

    @property
    def text(self) -> str:
        return screen_text(self.app)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        for letter in text:
            await self.pilot.press("slash" if letter == "/" else letter)
        await self.pilot.pause()

    async def until(self, condition: str | Callable[[], bool], seconds: float = 30) -> None:
        """Waits for a text on the screen, or for a condition."""
        for _ in range(int(seconds / 0.02)):
            if condition in self.text if isinstance(condition, str) else condition():
                await self.pilot.pause()
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{condition} never came:\n{self.text}")


@asynccontextmanager
async def opened(
    draft: Draft, page: str, size: tuple[int, int] = (80, 24)
) -> AsyncIterator[Screen]:
    """`page` of an app over `draft`; the pages around it are empty ones."""
    others = {name: Beyond for name in ("Model", "Data", "Preview", "Plan") if name != page}
    app = WindtunnelApp(draft, start=page, pages=others)
    app._data_worker = WORKER
    async with app.run_test(size=size) as pilot:
        yield Screen(app, pilot)
