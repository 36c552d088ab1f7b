"""The keys of the conversations: where they are, how their rows are read, what is learned of them.

`DatasetConfig` is one entry of `datasets`; the rest holds for all of them.
"""

from typing import Annotated, Literal

from pydantic import Field

from engine.config.section import Amount, Count, Section


class DatasetConfig(Section):
    """One source of conversations."""

    path: str
    """A file (.jsonl, .json, .csv, .parquet), a folder of them, a folder of images with captions,
    a hub id, or sample:NAME for one that comes with Windtunnel."""
    type: str = "chat_template"
    """Shape of the rows. chat_template: conversations, a list of messages with role and
    content; the only shape that is trained."""
    name: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str | None = None
    """Part of a hub dataset, such as train. Absent: train."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. A commit makes a rerun read the same rows."""
    data_files: list[str] | str | None = None
    """Files to read inside the folder or hub dataset. Absent: all."""
    field_messages: str = "messages"
    """Column that holds the list of messages; ShareGPT rows use conversations."""
    field_tools: str = "tools"
    """Column that holds the tool definitions."""
    field_image: str | None = None
    """Column that holds the row's image or images. Absent: images, image, or in a table of
    questions and answers also a column such as image_id that holds one."""
    field_question: str | None = None
    """Column of the question, in a table without messages. Absent: question, instruction or
    prompt."""
    field_answer: str | None = None
    """Column of the answer, in a table without messages. Absent: answer, output, response or
    completion, and beside an image also caption or text."""
    message_property_mappings: dict[str, str] | None = None
    """Our key -> the row's key: role, content, thinking (also reasoning, reasoning_content),
    tool_calls, tool_call_id, name, weight. Rows with from and value need
    {role: from, content: value}."""
    roles: dict[str, list[str]] | None = None
    """Our role (system, user, assistant, tool) -> the names that the rows use for it."""
    message_field_training: str | None = None
    """Key in a message whose false value keeps that message out of the loss."""
    chat_template_kwargs: dict[str, str] | None = None
    """Settings of the rendering for this source alone, such as {reasoning_effort: high}; they
    win over the run's own chat_template_kwargs. (Axolotl ignores them here.)"""
    trust_remote_code: bool | None = None
    """Run Python that a dataset repository ships. Refused when true."""

    def always_written(self) -> tuple[str, ...]:
        return ("path", "type")


class DataKeys(Section):
    """Data."""

    datasets: tuple[DatasetConfig, ...] = ()
    """The conversations to learn from: one or more sources, shuffled together."""
    test_datasets: tuple[DatasetConfig, ...] = ()
    """Conversations that are only evaluated, never learned. Instead of val_set_size."""
    val_set_size: Amount = 0.0
    """Rows held out of datasets for the evaluation: below 1 a share (0.05 is usual), 2 and
    above a number of rows, 0 none. Without any, memorising cannot be seen."""
    dataset_prepared_path: str | None = None
    """Folder of the tokenized rows, so that an unchanged dataset is tokenized once. Absent: the
    user's cache folder, shared by all runs."""
    skip_prepare_dataset: bool | None = None
    """Tokenize while training. Rows are always prepared first, so that they can be previewed."""
    remove_unused_columns: bool | None = None
    """Drop columns that training does not read. Only the columns that are needed are read."""
    image_folder: str | None = None
    """Folder in which image paths of rows are looked up after the dataset's own folder. No image
    is read outside the two. Absent: the config's folder."""
    image_size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """Longest side of an image in pixels, where it is below the model's own limit: fewer tokens an
    image. Of [width, height] the larger counts: images keep their shape and are not padded."""
    image_resize_algorithm: Literal["bilinear", "bicubic", "lanczos"] | None = None
    """How images are resized. Absent: bicubic."""


class LearningKeys(Section):
    """What is learned."""

    chat_template_kwargs: dict[str, str] | None = None
    """Settings of the rendering: {reasoning_effort: none} or {reasoning_effort: high} for
    models that think on request."""
    train_on_inputs: bool = False
    """Learn the user's, system's and tools' messages too, not only the assistant's. Rarely
    wanted: the model then learns to write questions."""
    train_on_thinking: bool = True
    """Learn the assistant's thinking ([THINK] ... [/THINK]). False: it is read as context, and
    only the answer after it is learned."""
    history_thinking: Literal["keep", "drop"] = "keep"
    """Thinking of the earlier answers of a conversation: keep shows it to the later turns, drop
    leaves it out, as most chat programs do."""


class SequenceKeys(Section):
    """Sequences."""

    sequence_len: Count = 512
    """Longest row in tokens; memory grows with it. 2048 suits most conversations; look at the
    lengths that `windtunnel check` prints."""
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to rows longer than sequence_len: drop leaves them out (and counts them),
    truncate cuts them at the end, raise refuses the dataset."""
    sample_packing: bool = False
    """Put several rows into one sequence of sequence_len tokens, so that none is wasted on
    padding: the same loss, several times faster on short rows. Rows never see each other."""
    eval_sample_packing: bool | None = Field(default=None)
    """The same for the evaluation. Absent: as sample_packing."""
