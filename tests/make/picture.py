"""Remakes the picture of the README: the wizard's own Train page, drawn by the app as SVG.

`python -m tests.make.picture RUN` shows a run that has been trained, such as the demo's.
"""

import asyncio
import sys
from pathlib import Path

from engine.runs import find_run
from tui.app import WindtunnelApp

PICTURE = Path(__file__).parents[1] / "golden" / "wizard.svg"
SIZE = (100, 32)
SECONDS_TO_DRAW = 3.0


async def draw(name: str) -> str:
    """The SVG of a run's page."""
    app = WindtunnelApp(run=find_run(name))
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause(SECONDS_TO_DRAW)
        return app.export_screenshot(title=f"windtunnel watch {name}")


def main() -> None:
    """Write the picture of the run that the command line names."""
    PICTURE.write_text(asyncio.run(draw(sys.argv[1])), "utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
