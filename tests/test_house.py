"""The house rules that a reader would otherwise have to check by eye."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("engine", "tui", "presets")
FILE_LINES, FUNCTION_LINES, LOOP_LINES = 700, 60, 120
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "tui", "engine", "tests", "presets", "Makefile"),
    *("constraints.txt", "LICENSE", "CHANGELOG.md", "Dockerfile"),
}
ROOMLESS_TESTS = {"fuzz", "gpu", "install", "research"}
CRUMB_LINES = 40
"""A smaller module with one importer belongs to that one."""
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "pickle.load", "pickle.loads"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.split("\n")[:-1]


@cache
def parsed() -> dict[str, tuple[str, ast.Module]]:
    """Text and tree of each module of ours, by its path."""
    texts = {name_of(path): path.read_text("utf-8") for path in SOURCES}
    return {name: (text, ast.parse(text)) for name, text in texts.items()}


def test_files_and_functions_stay_readable() -> None:
    for name, (text, tree) in parsed().items():
        assert text.count("\n") <= FILE_LINES, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = LOOP_LINES if node.name == "fit" else FUNCTION_LINES
                assert (node.end_lineno or 0) - node.lineno < limit, f"{name}: {node.name}"


def imported(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that runs: a class may name the type of what holds it."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from imported(child)


@cache
def imports() -> dict[str, set[str]]:
    """What each module of ours imports of the others, inside functions too, types left out."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        named = set()
        for node in imported(parsed()[name_of(path)][1]):
            if isinstance(node, ast.Import):
                named |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{each.name}" for each in node.names}
                named |= inner & paths.keys() or {node.module}
        found[module] = named & paths.keys() - {module}
    return found


def reached_from(module: str) -> set[str]:
    found: set[str] = set()
    open_ends = {module}
    while open_ends:
        more = imports()[open_ends.pop()] - found
        found |= more
        open_ends |= more
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    reached = {module: reached_from(module) for module in imports()}
    circles = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in reached
    }
    assert circles == {frozenset()}


def test_a_small_module_has_more_than_one_reader() -> None:
    importers = Counter(other for named in imports().values() for other in named)
    crumbs = set()
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        short = path.read_text("utf-8").count("\n") < CRUMB_LINES
        if short and importers[module] == 1 and not path.stem.startswith("__"):
            crumbs.add(module)
    assert crumbs == set()


def test_nothing_can_run_what_a_file_or_a_config_says() -> None:
    for name, (_, tree) in parsed().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, name
                assert not any(
                    each.arg in ("shell", "trust_remote_code")
                    and not (isinstance(each.value, ast.Constant) and each.value.value is False)
                    for each in node.keywords
                ), name


def test_every_module_says_what_it_decides() -> None:
    for name, (_, tree) in parsed().items():
        assert ast.get_docstring(tree), name


def test_nothing_is_a_stub() -> None:
    for name, (text, _) in parsed().items():
        assert not re.search(r"TODO|FIXME|XXX|NotImplementedError", text), name


def test_every_command_that_a_sentence_names_exists() -> None:
    from engine.cli import build_app

    commands = set(build_app())
    for path in [*SOURCES, ROOT / "README.md", *(ROOT / "presets").rglob("*.yml")]:
        named = set(re.findall(r"`windtunnel ([a-z]+)", path.read_text("utf-8")))
        assert named <= commands, path.name


def test_the_top_level_holds_what_a_newcomer_expects() -> None:
    tops = {path.split("/")[0] for path in tracked()}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_every_threat_names_a_test_that_exists() -> None:
    text = (ROOT / ".github" / "SECURITY.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)((?:::\w+)+)` \|$", row)
        assert named, row
        tests = (ROOT / named[1]).read_text("utf-8")
        for name in named[2].split("::")[1:]:
            assert re.search(rf"^ *(async def|def|class) {name}\b", tests, re.MULTILINE), row


def test_tests_lie_where_their_subject_does() -> None:
    """tests/data and tests/tui/screens exist because engine/data and tui/screens do."""
    for name in tracked():
        if re.fullmatch(r"tests/.*/test_\w+\.py", name):
            room = Path(name).relative_to("tests").parent
            known = (ROOT / "engine" / room).is_dir() or (ROOT / room).is_dir()
            assert known or str(room) in ROOMLESS_TESTS, name


def test_no_test_module_is_imported() -> None:
    """What tests share lies in tests/support."""
    shared = re.compile(r"^\s*(from|import) tests\.[\w.]*\b(test_\w+|conftest)\b", re.MULTILINE)
    for path in (ROOT / "tests").rglob("*.py"):
        assert not shared.search(path.read_text("utf-8")), path


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    home = re.compile(r"(?<![\w.-])/(?:root|home/[a-z]+|Users/\w+)/")
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yml", ".toml", ".txt", "") and path.is_file():
            assert not home.search(path.read_text("utf-8", "replace")), name
