"""`models --assume`: what each model of the catalog needs on a card that one does not have."""

import json
import os
import subprocess
import sys

import pytest

from engine.catalog import model_names
from engine.cli import main


def models(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def test_every_model_has_a_verdict_and_a_size_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = models(capsys, "--assume", "RTX 4090").splitlines()
    assert lines[0] == "RTX 4090 can give 22.8 GiB"
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert {*model_names()} - {"demo-tiny-vision"} <= set(rows)
    assert " ✓ fits " in rows["magistral-small-2509"]
    assert " qlora " in rows["magistral-small-2509"]
    assert " qlora, RAM " in rows["mistral-medium-3.5"]
    assert not any("not trained yet" in line for line in lines)


def test_json_has_a_plan_beside_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(models(capsys, "--json"))
    printed = json.loads(models(capsys, "--assume", "24 GB", "--json"))
    assert printed["device"]["planned"]
    assert [m["name"] for m in printed["models"]] == [m["name"] for m in plain["models"]]
    for before, model in zip(plain["models"], printed["models"], strict=True):
        plan = model.pop("plan")
        assert model == before
        assert plan["verdict"] in ("fits", "tight", "does not fit")
        assert plan["method"] in ("lora", "qlora", "full")
        assert plan["device_bytes"] > 0
        assert plan["not_trained"] is None


def test_an_output_that_knows_ascii_alone_gets_numbers_for_other_letters() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine", "models", "--assume", "RTX 4090"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\\u2713 fits" in done.stdout
