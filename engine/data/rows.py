"""From datasets to rendered rows, one after another: the one path of check, preview and prepare.

What a person previews and what training reads are made by this same generator, so that the two
cannot differ.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.chat.conversation import Conversation, RowFormat, RowProblem
from engine.chat.render import Rendered, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.images import ImageFinder, ImageName, ImageRules
from engine.data.sources import SourceRow, iterate_rows, locate
from engine.data.statistics import BadRow


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row of a dataset and what became of it.

    `number` counts the rows of all datasets from 1, bad ones too. `problem` is None or the reason
    why the later fields are; without a tokenizer `rendered` is None on good rows too.
    """

    number: int
    line: int
    file: str
    dataset: int
    read_bytes: int
    problem: RowProblem | None = None
    conversation: Conversation | None = None
    rendered: Rendered | None = None
    image_names: tuple[ImageName, ...] = ()
    """Paths and URLs that the row, good or bad, named."""

    def bad_row(self, problem: RowProblem) -> BadRow:
        """What is reported of a row that cannot be used."""
        said = (problem.message, problem.what, problem.why, problem.fix)
        return BadRow(self.file, self.number, self.line, *said)


def effective_datasets(
    config: RunConfig, *, reasoning_effort: str | None = None
) -> tuple[DatasetConfig, ...]:
    """The config's datasets with its own `chat_template_kwargs` filled into each.

    A dataset's own value wins over the run's, `reasoning_effort` over both.
    """
    forced = {"reasoning_effort": reasoning_effort} if reasoning_effort else {}
    return tuple(
        with_template_kwargs(dataset, config.chat_template_kwargs or {}, forced)
        for dataset in config.datasets
    )


def with_template_kwargs(
    dataset: DatasetConfig, defaults: Mapping[str, str], forced: Mapping[str, str]
) -> DatasetConfig:
    """`dataset` with `chat_template_kwargs` added below and above its own."""
    merged = {**defaults, **(dataset.chat_template_kwargs or {}), **forced}
    return dataset.model_copy(update={"chat_template_kwargs": merged or None})


def iterate_rendered(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer | None,
    *,
    reasoning_effort: str | None = None,
    skip: int = 0,
    fetch: bool = False,
) -> Iterator[RenderedRow]:
    """Every row of every dataset of a config, in order; the first `skip` are read, not rendered.

    Paths start at `folder`. `reasoning_effort` wins over what config and datasets say; `fetch`
    lets images come from the web. Raises what `iterate_rows` raises, and UserError where
    `image_folder` is none; a bad row is yielded with its problem.
    """
    rules = ImageRules.from_config(config, folder, fetch=fetch)
    tokenizer = adapt_tokenizer(tokenizer, rules) if tokenizer else None
    number = 0
    datasets = effective_datasets(config, reasoning_effort=reasoning_effort)
    for index, dataset in enumerate(datasets):
        row_format = RowFormat.from_config(dataset)
        finder = ImageFinder(index, locate(dataset, folder), rules)
        for source in iterate_rows(dataset, folder):
            number += 1
            if number <= skip:
                continue
            place = (number, source.line, source.file, index, source.read_bytes)
            try:
                conversation = finder.resolve(_read(source, row_format), source.file)
                rendered = (
                    render(conversation, tokenizer, history_thinking=config.history_thinking)
                    if tokenizer
                    else None
                )
            except RowProblem as problem:
                yield RenderedRow(*place, problem=problem, image_names=finder.take_names())
            else:
                names = finder.take_names()
                yield RenderedRow(
                    *place, conversation=conversation, rendered=rendered, image_names=names
                )


def adapt_tokenizer(tokenizer: ChatTokenizer, rules: ImageRules) -> ChatTokenizer:
    """The tokenizer with its images as the rules want them."""
    if tokenizer.image is None:
        return tokenizer
    return replace(tokenizer, image=rules.adapt(tokenizer.image))


def _read(source: SourceRow, row_format: RowFormat) -> Conversation:
    if source.row is None:
        assert source.problem is not None
        raise source.problem
    return read_row(source.row, row_format)
