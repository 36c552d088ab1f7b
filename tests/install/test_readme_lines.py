"""Each install line of README in an environment of its own: the commands work from any folder.

`[train]` is taken off the lines: torch is larger than everything else together, and how it is
installed is what `make install` and the resolver show.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.install.resolve import NoIndex, Resolver

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
(BLOCK,) = (each for each in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "uvx" in each)
LINES = [line.partition("  #")[0].strip() for line in BLOCK.splitlines()]
COMMANDS = (
    *("--help", "models", "probe", "demo --help", "explain lora_r"),
    "preview sample:harbour-pilot --model demo-tiny --row 1",
    "recommend --model ministral-3-3b --assume H100",
)
"""Each needs a file of the package that is no Python."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, in a repository of their own."""
    folder = tmp_path_factory.mktemp("newcomer") / "windtunnel"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=newcomer", "-c", "user.email=newcomer@localhost"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "as it is"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def index() -> None:
    try:
        Resolver("Linux x86_64", "3.12").resolve([])
    except NoIndex as error:
        pytest.skip(f"the package index cannot be reached: {error}")


def shell(line: str, cwd: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euc", line],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("line", LINES)
def test_the_line_installs_a_whole_windtunnel(line: str, checkout: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True, upgrade_deps=True)
    places = [tmp_path / "venv" / "bin", tmp_path / "tools", Path(sys.prefix) / "bin"]
    environment = {
        "PATH": os.pathsep.join([*map(str, places), os.environ["PATH"]]),
        "PYTHONPATH": "",
        "UV_TOOL_DIR": str(tmp_path / "uv"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "tools"),
        "UV_PYTHON": sys.executable,
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }
    if line.startswith("uvx"):  # of the wheel that the line before has made
        shell("pip wheel --no-deps --wheel-dir dist .", checkout, environment)
    said = shell(line.replace("[train]", ""), checkout, environment)
    if line.startswith("uvx"):
        assert "recommend" in said
        return
    (empty := tmp_path / "empty").mkdir()
    where = shell("command -v windtunnel", empty, environment).strip()
    assert Path(where).parent in places[:2]
    for command in COMMANDS:
        assert shell(f"windtunnel {command}", empty, environment).strip(), command
    assert not list(empty.iterdir())
