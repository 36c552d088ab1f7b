"""Every package that the code imports is named in pyproject.toml."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OWN = {"engine", "tui", "presets"}
BROUGHT_BY = {
    "flash_attn": "flash-attn",  # this one and the next are not on every computer with the tests
    "cut_cross_entropy": "cut-cross-entropy",
    "pydantic_core": "pydantic",  # which wants one exact version of it
}
"""Modules whose package is not looked up."""


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["fa2"], *extras["fa4"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    known = packages_distributions()
    unnamed = {
        (str(path.relative_to(ROOT)), name)
        for folder in OWN
        for path in (ROOT / folder).rglob("*.py")
        for name in _imported(path.read_text("utf-8"))
        if name not in sys.stdlib_module_names
        and name not in OWN
        and not declared
        & {canonicalize_name(n) for n in (*known.get(name, ()), BROUGHT_BY.get(name, name))}
    }
    assert not unnamed
