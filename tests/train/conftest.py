from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# First, because it decides what transformers may load.
import engine.train  # noqa: F401
from engine.train.batches import Rows
from engine.train.loop import Training
from tests.support.offloading import DEEP_MODELS, BeginDeep, begun
from tests.support.pictured_rows import MIXED, seeing, write_pictured
from tests.support.rank_group import RankGroup
from tests.support.tiny import (
    ARCHITECTURES,
    UNEVEN,
    Begin,
    MakeRows,
    Models,
    settings,
    training,
    write_model,
    write_rows,
)
from tests.support.trainers import Workshop

torch.set_num_threads(1)  # toy shapes: a second thread only waits


def written(home: Path, config_of: Callable[[str], dict[str, Any]]) -> Models:
    """Model folders by name; each is made once and never changed."""

    def folder(name: str) -> Path:
        path = home / name.replace(" ", "-")
        return path if path.exists() else write_model(path, config_of(name))

    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model, by its name in `ARCHITECTURES`."""
    return written(tmp_path_factory.mktemp("models"), ARCHITECTURES.__getitem__)


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a model that sees the images of `mixed`, by the name of its text model."""
    home = tmp_path_factory.mktemp("seeing")
    return written(home, lambda name: seeing(ARCHITECTURES[name]))


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a model of four layers, by its name in `DEEP_MODELS`."""
    return written(tmp_path_factory.mktemp("deep"), DEEP_MODELS.__getitem__)


@pytest.fixture
def begin_deep(deep_model: Models, uneven: Rows, tmp_path: Path) -> BeginDeep:
    """Begins a run on a deep model, its adapter awake, in the test's folder or in one inside it."""
    return lambda name, home="", **keys: begun(tmp_path / home, deep_model(name), uneven, **keys)


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest, model_folder: Models) -> Path:
    """Each architecture's folder in turn."""
    return model_folder(request.param)


@pytest.fixture
def ministral(model_folder: Models) -> Path:
    """The folder of a text-only Ministral 3."""
    return model_folder("ministral3")


@pytest.fixture
def begin(ministral: Path, uneven: Rows, tmp_path: Path) -> Begin:
    """Begins a run in the test's folder, or in one inside it."""

    def begun(home: str = "", **keys: Any) -> Training:
        return training(tmp_path / home, settings(ministral, **keys), uneven)

    return begun


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Eight rows with 2 to 31 learned tokens."""
    return write_rows(tmp_path_factory.mktemp("rows") / "uneven", UNEVEN)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Five rows with five images of five sizes; one row is text."""
    return write_pictured(tmp_path_factory.mktemp("rows") / "mixed", MIXED)


@pytest.fixture
def make_rows(tmp_path: Path) -> MakeRows:
    """Rows of one's own, as prepared arrays."""
    made = iter(range(1000))
    return lambda rows: write_rows(tmp_path / f"rows-{next(made)}", rows)


@pytest.fixture(scope="module")
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Runs as processes of their own, with the keys that the test's module calls `KEYS`."""
    return Workshop(tmp_path_factory.mktemp("workshop"), request.module.KEYS)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankGroup]:
    """Two ranks over gloo, started when the first case is asked for."""
    group = RankGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankGroup]:
    """Four of them, for slow tests."""
    group = RankGroup(4)
    yield group
    group.close()
