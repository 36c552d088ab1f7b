import asyncio
import inspect
import os
import signal
import tempfile
from importlib.util import find_spec

import pytest

from tests.fakes.nvml import nvml as nvml
from tests.fakes.nvml import nvml_library as nvml_library

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
