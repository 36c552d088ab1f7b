"""Axolotl's Mistral examples, as people have them, and what we say of each.

tests/golden/config holds one YAML a file and the answer beside it as text. After a wanted change,
`python -m tests.config.test_examples` writes the answers anew: read the difference.
"""

from pathlib import Path

import jsonschema
import pytest

from engine.config import config_schema, parse_config, read_config, write_config
from engine.config.document import load_document
from engine.errors import UserError

FOLDER = Path(__file__).parents[1] / "golden" / "config"
EXAMPLES = sorted(FOLDER.glob("*.yml"))


def answer(path: Path) -> str:
    try:
        file = read_config(path)
    except UserError as error:
        text = f"not read\n{error.what}\n{error.why}\n{error.fix}\n"
        return text.replace(str(path), path.name)
    findings = file.findings()
    refused = any(finding.severity == "error" for finding in findings)
    lines = ["read; train refuses it" if refused else "read; train runs it"]
    lines += [f"{finding.severity}  {finding.sentence()}" for finding in findings]
    return "\n".join(lines) + "\n"


READABLE = [
    path for path in EXAMPLES if not path.with_suffix(".txt").read_text().startswith("not read")
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
class TestEveryExample:
    def test_the_answer_is_the_one_on_file(self, path: Path) -> None:
        assert answer(path) == path.with_suffix(".txt").read_text("utf-8")

    def test_the_schema_for_editors_agrees(self, path: Path) -> None:
        jsonschema.validate(load_document(path).values, config_schema())


@pytest.mark.parametrize("path", READABLE, ids=lambda path: path.stem)
class TestReadExample:
    def test_what_is_read_survives_a_new_file(self, path: Path) -> None:
        config = read_config(path).config
        assert parse_config(write_config(config)).config == config

    def test_an_unchanged_file_is_written_as_it_was(self, path: Path) -> None:
        file = read_config(path)
        assert write_config(file.config, document=file.document) == path.read_text("utf-8")


def test_the_examples_for_one_gpu_run() -> None:
    runs = {path.stem for path in EXAMPLES if answer(path).startswith("read; train runs it")}
    assert runs == {
        "devstral-small-qlora",
        "magistral-small-qlora",
        "magistral-small-think-qlora",
        "magistral-small-vision-qlora",
        "ministral-small-qlora",
        "ministral3-3b-qlora",
        "ministral3-3b-think-qlora",
        "ministral3-3b-vision-qlora",
        "mistral-medium-3_5-qlora-text",
        "mistral-medium-3_5-qlora-vision",
        "mistral-small-3.1-24B-lora",
        "mistral4-qlora-text",
        "mistral4-qlora-vision",
        "voxtral-mini-qlora",
    }


if __name__ == "__main__":
    for example in EXAMPLES:
        example.with_suffix(".txt").write_text(answer(example), "utf-8")
