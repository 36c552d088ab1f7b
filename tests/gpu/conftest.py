"""Where these tests run: on a card, or in CI on a stand-in of one; and the report of a card."""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.support.card import Card

WHOLE_MODELS = [f"test_{part}.py" for part in ("attention", "fit", "offload", "process", "steps")]
collect_ignore = [] if find_spec("transformers") and find_spec("peft") else WHOLE_MODELS
"""Without them kernels are tested all the same."""
BUDGET_SECONDS = 360
"""A test that would begin later is skipped: `make gpu` is for six minutes."""
REPORT_VARIABLE = "WINDTUNNEL_GPU_REPORT"
"""The folder in which a report is left, presets/measured by `make gpu`."""
PACKAGES = (
    *("windtunnel", "torch", "transformers", "peft", "bitsandbytes", "triton"),
    *("cut-cross-entropy", "flash-attn", "flash-attn-3", "flash-attn-4"),
)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """Both; `-m gpu` chooses the real one."""
    if request.param == "stand-in":
        from tests.fakes import card as fake  # it reads what torch before 2.12 lacks

        yield Card(False, (9, 0), fake.UUID, fake.card)
        return
    found = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if capability < (7, 5):
        pytest.skip(f"this card has capability {capability}, the oldest that counts is 7.5")

    @contextmanager
    def here() -> Iterator[None]:
        with patch.object(torch.cuda, "is_available", lambda: found):
            yield

    with patch.object(torch.cuda, "is_available", lambda: False):
        yield Card(True, capability, str(properties.uuid), here)
    torch.cuda.empty_cache()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA card")
    started = item.config.stash.setdefault(_STARTED, time.monotonic())
    if item.get_closest_marker("gpu") and time.monotonic() - started > BUDGET_SECONDS:
        pytest.skip(f"the {BUDGET_SECONDS} seconds of these tests are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    told = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    if told and item.get_closest_marker("gpu"):
        why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        figures = "; ".join(f"{name} {value}" for name, value in item.user_properties)
        words = " ".join(filter(None, (why.removeprefix("Skipped: "), figures)))
        lines = item.config.stash.setdefault(_LINES, [])
        name = item.nodeid.removeprefix("tests/gpu/").replace("|", "/")
        lines.append(f"| {name} | {report.outcome} | {report.duration:.1f} | {words} |")
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    lines, folder = session.config.stash.get(_LINES, []), os.environ.get(REPORT_VARIABLE)
    if not (lines and folder and torch.cuda.is_available()):
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = torch.cuda.get_device_name(0)
    path = Path(folder) / f"tests-{name.lower().replace(' ', '-')}-{today}.md"
    path.write_text("\n".join([*_head(name, today), *lines, ""]), "utf-8")
    print(f"\nreport: {path}")


def _head(name: str, today: str) -> list[str]:
    properties = torch.cuda.get_device_properties(0)
    versions = {package: _version(package) for package in PACKAGES}
    found = ", ".join(f"{package} {has}" for package, has in versions.items() if has)
    lacking = ", ".join(package for package, has in versions.items() if not has)
    return [
        f"# tests/gpu on {name}, {today}",
        "",
        f"Capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} "
        f"GiB, driver {_driver()}, CUDA {torch.version.cuda}. {found}. Not installed: {lacking}.",
        *(
            ["", f"Not run for lack of transformers or peft: {', '.join(collect_ignore)}."]
            if collect_ignore
            else []
        ),
        "",
        "| test | outcome | seconds | what it found |",
        "|---|---|---|---|",
    ]


def _driver() -> str:
    from engine.hardware import read_machine

    return read_machine().driver_version or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_STARTED = pytest.StashKey[float]()
_LINES = pytest.StashKey[list[str]]()
