"""What to do, in one file: Axolotl's YAML keys, checked before anything runs.

It is the left hand of the only hand-over into a run (`config.yml`); `events.py` is the right one.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DatasetConfig(_Section):
    """One source of conversations."""

    path: str
    """A file (.jsonl, .json, .csv, .parquet), a folder of them, or a hub id."""
    type: str = "chat_template"
    split: str | None = None
    revision: str | None = None
    field_messages: str = "messages"
    field_tools: str = "tools"
    message_property_mappings: dict[str, str] | None = None
    """Our key -> the row's key: role, content, thinking, tool_calls, tool_call_id, name."""
    roles: dict[str, list[str]] | None = None
    """Our role -> the names that the rows use for it."""
    message_field_training: str | None = None
    """Key in a message whose false value keeps that message out of the loss."""
    chat_template_kwargs: dict[str, str] | None = None


class RunConfig(_Section):
    """One run."""

    base_model: str
    """Catalog name, hub id or local folder."""
    datasets: tuple[DatasetConfig, ...] = ()
    test_datasets: tuple[DatasetConfig, ...] = ()
    dataset_prepared_path: str | None = None
    val_set_size: float = 0.0
    chat_template_kwargs: dict[str, str] | None = None
    train_on_inputs: bool = False
    train_on_thinking: bool = True
    history_thinking: Literal["keep", "drop"] = "keep"

    adapter: Literal["lora", "qlora"] | None = None
    load_in_4bit: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | str | None = None
    lora_target_linear: bool = True
    unfrozen_parameters: list[str] | None = None

    sequence_len: int = 2048
    sample_packing: bool = True
    eval_sample_packing: bool | None = None
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    max_steps: int | None = None
    optimizer: str = "adamw_torch_fused"
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    learning_rate: float = 2e-4
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    cosine_min_lr_ratio: float = 0.0
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = True
    seed: int = 42

    output_dir: str | None = None
    saves_per_epoch: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    evals_per_epoch: int | None = None
    eval_steps: int | None = None
    sample_prompts: tuple[str, ...] = ()
    resume_from_checkpoint: bool = False
