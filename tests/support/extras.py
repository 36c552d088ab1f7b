"""Which tests need more than the base install."""

from importlib.util import find_spec

import pytest

needs_trainer = pytest.mark.skipif(
    find_spec("torch") is None, reason="needs the training stack: pip install 'windtunnel[train]'"
)
