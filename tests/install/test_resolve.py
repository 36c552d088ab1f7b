"""The resolver's check tells what cannot be installed from an index that cannot be reached."""

from pathlib import Path

import pytest

from tests.install.resolve import CONSTRAINTS, NoIndex, Resolver, Unresolvable, main


def test_a_pin_that_torch_contradicts_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "constraints.txt"
    text = CONSTRAINTS.read_text("utf-8")
    wrong.write_text(text.replace("triton==3.7.1", "triton==3.9.0"), "utf-8")
    assert wrong.read_text("utf-8") != text
    try:
        with pytest.raises(Unresolvable, match="triton"):
            Resolver("Linux x86_64", "3.12", wrong).resolve(["train"])
    except NoIndex as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.mark.parametrize(
    "environment",
    [
        {"UV_OFFLINE": "1"},
        {"HTTPS_PROXY": "http://127.0.0.1:9", "UV_HTTP_RETRIES": "0"},
    ],
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
    assert main() == 0
    assert "The package index cannot be reached" in capsys.readouterr().out
