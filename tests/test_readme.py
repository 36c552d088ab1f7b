"""What README tells a newcomer to type exists and works."""

import re
import subprocess
from pathlib import Path

import pytest

from engine.catalog import model_names
from engine.cli import main
from engine.config import parse_config
from tests.fakes.processes import run_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SAMPLE = ROOT / "presets" / "samples" / "harbour-pilot" / "train.jsonl"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def windtunnel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "engine", *arguments, cwd=cwd)


def test_every_make_target_it_names_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_every_command_it_names_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    table = re.findall(r"^\| `windtunnel ([^`|]*)`((?:, `[^`]*`)*)", README, re.MULTILINE)
    words = {first.split()[0] for first, _ in table}
    words |= {more.split()[0] for _, rest in table for more in re.findall(r"`([a-z][^`]*)`", rest)}
    assert {"demo", "train", "preview", "resume", "explain"} <= words
    for word in sorted(words):
        assert main([word, "--help"]) == 0
        assert f"windtunnel {word}" in capsys.readouterr().out


def test_its_config_is_valid_and_supported() -> None:
    (text,) = blocks("yaml")
    file = parse_config(text)
    assert [finding for finding in file.findings() if finding.severity == "error"] == []


def test_its_first_steps_run_on_real_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(SAMPLE.read_bytes())
    (lines,) = [block for block in blocks("sh") if "windtunnel check" in block]
    for line in lines.splitlines():
        if not line.startswith("windtunnel train"):
            done = windtunnel(*line.split()[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
    assert parse_config((tmp_path / "my-run.yml").read_text("utf-8")).config.datasets


def test_its_picture_is_the_wizard_s_own() -> None:
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert "windtunnel" in (ROOT / picture).read_text("utf-8")


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_catalog_is_in_its_table(name: str) -> None:
    size = name.removeprefix("ministral-3").removeprefix("magistral-small")
    assert f"`{name}`" in README or f"`{size}`" in README
