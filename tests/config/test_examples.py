"""Axolotl's Mistral examples and the configs of its documents, and what we say of each.

tests/golden/config holds one YAML a file and the answer beside it as text. Each folder of
tests/golden/documented holds a config.yml, the rows it names, and what becomes of them in
expected.txt: what kind of run it is, what is said of its keys, and every row as the model sees it,
with what is learned between ‹ and ›. After a wanted change, `python -m tests.config.test_examples`
writes the answers anew: read the difference.
"""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.catalog import find_repository
from engine.chat.render import Kind, learned
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig, config_schema, parse_config, read_config, write_config
from engine.config.document import load_document
from engine.data.prepare import label_rule, prepare
from engine.data.preview import preview_entry, preview_row, row_text
from engine.data.rows import iterate_rendered
from engine.errors import UserError
from tests.support.tokenizers import tokenizer_of

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


def test_the_examples_that_run() -> None:
    runs = {path.stem for path in EXAMPLES if answer(path).startswith("read; train runs it")}
    assert runs == {
        *("devstral-small-qlora", "magistral-small-fsdp-qlora", "magistral-small-qlora"),
        *("magistral-small-think-qlora", "magistral-small-vision-qlora", "ministral-small-qlora"),
        *("ministral3-3b-qlora", "ministral3-3b-think-qlora", "ministral3-3b-vision-qlora"),
        *("mistral-medium-3_5-qlora-text", "mistral-medium-3_5-qlora-vision"),
        *("mistral-small-3.1-24B-lora", "mistral4-qlora-text", "mistral4-qlora-vision"),
        "voxtral-mini-qlora",
    }


DOCUMENTED = Path(__file__).parents[1] / "golden" / "documented"
CASES = sorted(path.parent for path in DOCUMENTED.glob("*/config.yml"))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def model_tokenizer(base_model: str) -> ChatTokenizer:
    """The tokenizer of a repository, made as the catalog says it is."""
    found = find_repository(base_model)
    assert found is not None
    return tokenizer_of(found[0].tokenizer)


def entries(config: RunConfig, case: Path) -> list[dict[str, Any]]:
    """Every row as `windtunnel preview` shows it."""
    tokenizer = model_tokenizer(config.base_model)
    rows = iterate_rendered(config, case, tokenizer)
    return [preview_entry(preview_row(row, tokenizer), label_rule(config)) for row in rows]


def shown(case: Path) -> str:
    file = read_config(case / "config.yml")
    config = file.config
    attention = config.attn_implementation or "chosen for the card"
    lines = [f"method: {config.adapter or 'full fine-tune'}; attention: {attention}"]
    lines += [finding.sentence() for finding in file.findings()]
    tokenizer = model_tokenizer(config.base_model)
    for row in iterate_rendered(config, case, tokenizer):
        text = row_text(preview_row(row, tokenizer), label_rule(config), underline=False)
        lines += ["", text]
    return "\n".join(lines) + "\n"


@each_case
class TestEachCase:
    def test_it_does_what_its_text_says(self, case: Path) -> None:
        assert shown(case) == (case / "expected.txt").read_text("utf-8")

    def test_training_is_not_refused(self, case: Path) -> None:
        read_config(case / "config.yml").require_supported()

    def test_the_preview_shows_the_trained_arrays(self, case: Path, tmp_path: Path) -> None:
        config = read_config(case / "config.yml").config
        prepared = prepare(config, case, model_tokenizer(config.base_model), tmp_path)
        shown = entries(config, case)
        assert len(prepared) == len(shown)
        for index, entry in enumerate(shown):
            kinds = prepared.kinds(index)
            assert prepared.ids(index).tolist() == entry["input_ids"]
            assert [Kind(int(kind)).word for kind in kinds] == entry["kinds"]
            carried = [label != -100 for label in entry["labels"]]
            assert learned(kinds, label_rule(config)).tolist() == carried

    def test_only_the_answers_are_learned(self, case: Path) -> None:
        config = read_config(case / "config.yml").config
        for entry in entries(config, case):
            carried = {
                kind
                for kind, label in zip(entry["kinds"], entry["labels"], strict=True)
                if label != -100
            }
            assert carried
            assert carried <= {"think", "text", "eos"}


def pieces_of(name: str, row: int) -> list[str]:
    """The pieces of one row of a case."""
    case = DOCUMENTED / name
    config = read_config(case / "config.yml").config
    ids = entries(config, case)[row]["input_ids"]
    return list(model_tokenizer(config.base_model).pieces(ids))


@pytest.mark.parametrize("name", ["small-4-effort-by-dataset", "small-4-vision-effort"])
def test_an_effort_under_a_dataset_reaches_its_rows(name: str) -> None:
    text = "".join(pieces_of(name, 0))
    assert '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]' in text


def test_an_effort_under_a_dataset_reaches_no_other_datasets_rows() -> None:
    texts = ["".join(pieces_of("small-4-effort-by-dataset", row)) for row in range(3)]
    assert ['"high"' in text for text in texts] == [True, True, False]
    assert '"none"' in texts[2]


@pytest.mark.parametrize(
    "name", ["small-4-effort-by-dataset", "magistral-thinking-chunks", "medium-3.5-legacy-flags"]
)
def test_thinking_is_learned_between_its_tokens(name: str) -> None:
    case = DOCUMENTED / name
    config = read_config(case / "config.yml").config
    entry = entries(config, case)[0]
    pieces = pieces_of(name, 0)
    opened, closed = (
        max(at for at, piece in enumerate(pieces) if piece == token)
        for token in ("[THINK]", "[/THINK]")
    )
    assert opened < closed
    assert all(label != -100 for label in entry["labels"][opened : closed + 1])


if __name__ == "__main__":
    for example in EXAMPLES:
        example.with_suffix(".txt").write_text(answer(example), "utf-8")
    for folder in CASES:
        (folder / "expected.txt").write_text(shown(folder), "utf-8")
