import asyncio
import inspect
import os
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.runs import RunFolder, create_run
from tests.fakes.nvml import nvml as nvml
from tests.fakes.nvml import nvml_library as nvml_library
from tests.fakes.processes import kill_all_in

# Without the extra [train] everything else is still tested.
collect_ignore = [] if find_spec("torch") else ["train", "gpu", "research", "plan/test_loss.py"]

# What is started by nohup ignores hangups, what a shell starts with `&` ignores ctrl+c, and so
# would every process that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_LOOP = asyncio.Runner()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test may be a coroutine; one loop runs all of them, as one worker process serves them."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    _LOOP.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(autouse=True, scope="session")
def no_figures_of_this_computer() -> None:
    """What somebody has measured here with `windtunnel fit` beats the formula, and not in tests."""
    os.environ["WINDTUNNEL_MEASURED"] = os.path.join(
        tempfile.gettempdir(), "windtunnel-measured-none"
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home for runs of a test's own: a person's runs are never touched."""
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    yield tmp_path / "home"
    kill_all_in(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test, in which it works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home: Path) -> RunFolder:
    return create_run("first")
