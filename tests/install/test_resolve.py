"""The resolver's check tells what cannot be installed from an index that cannot be reached."""

from pathlib import Path

import pytest

from tests.install import resolve
from tests.install.resolve import CONSTRAINTS


@pytest.mark.slow
def test_a_pin_that_torch_contradicts_and_one_that_is_missing_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "constraints.txt"
    text = CONSTRAINTS.read_text("utf-8").replace("triton==3.7.1", "triton==3.9.0")
    wrong.write_text(text.replace("tqdm==", "# tqdm=="), "utf-8")
    monkeypatch.setattr(resolve, "SYSTEMS", {"Linux x86_64": "x86_64-manylinux_2_28"})
    monkeypatch.setattr(resolve, "PYTHONS", ("3.12",))
    status = resolve.main(wrong)
    said = capsys.readouterr().out
    if "cannot be reached" in said:
        pytest.skip(said)
    assert status == 1
    assert "Linux x86_64 3.12 train, " in said
    assert "triton" in said
    assert "constraints.txt does not pin tqdm." in said


@pytest.mark.parametrize(
    "environment",
    [{"UV_OFFLINE": "1"}, {"HTTPS_PROXY": "http://127.0.0.1:9", "UV_HTTP_RETRIES": "0"}],
    ids=["offline", "refused"],
)
def test_an_index_out_of_reach_is_said_and_is_no_fault(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve.main() == 0
    assert "The package index cannot be reached" in capsys.readouterr().out
