"""A config as a job of NeMo AutoModel 0.7, which cuts a model along its layers too (TP x PP).

What AutoModel does otherwise than it seems stands in the YAML as a comment, and what it would do
wrongly is refused. Names of its classes are constants here: no value of a config is a `_target_`.
Its source was read at 0.7.0, whose own loader takes the YAML in tests/cli/test_automodel.py.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Final

from engine.catalog import Architecture
from engine.cluster.job import Allocation, Job
from engine.cluster.slurm import (
    MEETING,
    Places,
    missing_model,
    missing_program,
    offline,
    require_plain,
)
from engine.config import DatasetConfig, RunConfig
from engine.config.document import comment_lines, entry, with_reason
from engine.errors import UserError
from engine.hub_id import is_hub_id
from engine.plan.layout import Layout
from engine.plan.targets import choose_targets, trainable_names
from engine.units import counted
from engine.visible import visible

VERSION: Final = "0.7"
VARIABLE: Final = "AUTOMODEL_ENV"
"""Names its environment to the script where the export did not."""
MICROBATCH: Final = 1
"""Sequences that pass the pipeline together."""
DENSE: Final = ("ministral3", "mistral")
"""Language models whose matrices its plan of tensor parallelism cuts."""
_COLUMNS: Final = {
    "field_image": "image_id",
    "field_question": "question",
    "field_answer": "answer",
}
_CARRIED: Final = """
    base_model revision_of_model datasets processor_type sequence_len seed micro_batch_size
    gradient_accumulation_steps gradient_checkpointing num_epochs max_steps learning_rate
    lr_scheduler cosine_min_lr_ratio warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2
    adam_epsilon output_dir max_grad_norm bf16 unfrozen_parameters adapter lora_r lora_alpha
    lora_dropout lora_target_modules lora_target_linear save_steps save_strategy save_total_limit
    wandb_project wandb_name wandb_entity use_wandb dp_shard_size dp_replicate_size
    tensor_parallel_size fsdp_config fsdp_version gradient_checkpointing_kwargs
    tokenizer_use_mistral_common skip_prepare_dataset remove_unused_columns plugins sample_packing
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Over how many ranks the matrices, the layers and the rows are divided."""

    tensor: int
    pipeline: int
    data: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def words(self) -> str:
        """TP 8 x PP 8."""
        data = f" x DP {self.data}" if self.data > 1 else ""
        return f"TP {self.tensor} x PP {self.pipeline}{data}"

    @property
    def idle_share(self) -> float:
        """Of a step's time in a pipeline without interleaving: its filling and its draining, with
        as few microbatches as it has stages."""
        return (self.pipeline - 1) / (2 * self.pipeline - 1)


def choose_grid(
    architecture: Architecture, ranks: int, gpus_per_node: int, tensor: int, pipeline: int
) -> Grid:
    """The grid of so many ranks: matrices inside a node, layers over nodes; 0 leaves it open.

    Raises UserError for a model that it cannot cut so.
    """
    text: Mapping[str, Any] = architecture.config.get("text_config", architecture.config)
    if text["model_type"] not in DENSE:
        raise UserError(
            f"{visible(architecture.name, one_line=True)} is not cut along its matrices.",
            f"AutoModel {VERSION} has no plan of tensor parallelism for its attention and experts.",
            "Train it here: expert_parallel_size spreads its experts over GPUs.",
        )
    heads, layers = text["num_key_value_heads"], text["num_hidden_layers"]
    tensor = tensor or max(n for n in range(1, gpus_per_node + 1) if not (heads % n or ranks % n))
    rest = ranks // tensor
    pipeline = pipeline or max(n for n in range(1, layers + 1) if not (layers % n or rest % n))
    grid = Grid(tensor, pipeline, max(1, rest // pipeline))
    if heads % tensor or layers % pipeline or grid.ranks != ranks:
        raise UserError(
            f"{grid.words()} does not fit {counted(ranks, 'rank')} and this model.",
            f"TP divides its {heads} heads of keys, PP its {layers} layers, and TP x PP the ranks.",
            "Leave --tensor and --pipeline out for a grid that does.",
        )
    return grid


def refuse_job(config: RunConfig, layout: Layout, grid: Grid) -> None:
    """Raises UserError for what AutoModel would do wrongly or not at all."""
    if config.load_in_4bit or config.load_in_8bit:
        raise UserError(
            "The weights are quantized.",
            f"AutoModel {VERSION} does not cut quantized weights over a pipeline.",
            "Write adapter=lora load_in_4bit=false load_in_8bit=false, or train it here.",
        )
    if config.sample_packing:
        raise UserError(
            "sample_packing is true.",
            "AutoModel counts a step in rows, and pads each to sequence_len: it would be another"
            " batch.",
            "Write sample_packing=false, and the rows of a step in gradient_accumulation_steps.",
        )
    if config.train_on_inputs:
        raise UserError(
            "train_on_inputs is true.",
            "AutoModel's rows of questions and answers learn the answer alone.",
            "Remove it, or train it here.",
        )
    if config.num_epochs % 1 and config.max_steps is None:
        raise UserError(
            f"num_epochs is {config.num_epochs:g}.",
            "AutoModel counts whole epochs.",
            "Write a whole number, or max_steps.",
        )
    batch, least = batch_size(config, layout), grid.pipeline * MICROBATCH * grid.data
    if batch % least:
        more = -(-batch // least) * least
        need = counted(more, "sequence")
        raise UserError(
            f"A step of {counted(batch, 'sequence')} does not fill {grid.words()}.",
            f"Each of its {grid.data} copies takes as many at once as it has stages, so a step is a"
            f" multiple of {least}.",
            f"Make it {need}: micro_batch_size x gradient_accumulation_steps x"
            f" {layout.readers} ranks of the config.",
        )


def batch_size(config: RunConfig, layout: Layout) -> int:
    """Sequences of an optimizer step: the same as of our own run."""
    return config.micro_batch_size * config.gradient_accumulation_steps * layout.readers


def left_out(config: RunConfig) -> list[str]:
    """Keys of the config that the job does not have."""
    uncounted = {"warmup_ratio"} if config.warmup_ratio and not config.max_steps else set()
    return sorted(set(config.file_values()) - {*_CARRIED.split()} | uncounted)


def _dataset(config: RunConfig) -> DatasetConfig:
    """The one dataset. Raises UserError for what none of its readers takes."""
    found = config.datasets[0] if len(config.datasets) == 1 else None
    columns = {key: getattr(found, key) for key in _COLUMNS} if found else {}
    if found is None or any(columns[key] not in (None, name) for key, name in _COLUMNS.items()):
        raise UserError(
            "AutoModel has no reader for these rows.",
            "Of tables of pictures it reads one, with the columns image_id, question and answer.",
            "Name one such table under datasets, as mmoukouba/MedPix-VQA is, or train it here.",
        )
    if config.processor_type is None:
        raise UserError(
            "The config does not say that its rows have images.",
            "Exported are jobs that learn from images; text is trained here on as many GPUs.",
            "Add processor_type=AutoProcessor, or train it here: --to slurm.",
        )
    return found


def _source(architecture: Architecture) -> str:
    """The weights that its own loader reads best: the catalog's FP8 where there are some."""
    card = architecture.card
    fp8 = [each.id for each in card.repositories if each.checkpoint == "fp8"] if card else []
    return fp8[0] if fp8 else architecture.name


def _plain(text: str) -> str:
    """A text that its loader leaves as it is. Raises UserError for one that it would replace."""
    if "$" in text:
        raise UserError(
            f"{visible(text, one_line=True)} holds a $.",
            "AutoModel puts a variable of the environment in its place.",
            "Use a name without one.",
        )
    return text


def _frozen(config: RunConfig, architecture: Architecture) -> tuple[dict[str, Any], str]:
    """`freeze_config` of a full fine-tune, and why."""
    table = architecture.table
    trained = trainable_names(table, config)
    moves: dict[str, set[bool]] = {}
    for row in table.parameters:
        if not row.tied:
            moves.setdefault(row.group, set()).add(row.name in trained)
    if any(len(both) > 1 for both in moves.values()) or False in moves["mlp"] | moves["attention"]:
        raise UserError(
            "unfrozen_parameters trains a part of a group of weights.",
            "AutoModel is told what is frozen by module: tower, projector, embedding, head.",
            "Train the language model whole: remove unfrozen_parameters.",
        )
    modules = {"projector": "multi_modal_projector", "embedding": "embed_tokens", "head": "lm_head"}
    selectors = [
        {"glob": f"*{module}"} for group, module in modules.items() if moves.get(group) == {False}
    ]
    keys: dict[str, Any] = {"freeze_vision_tower": moves.get("vision") == {False}}
    if selectors:
        keys["freeze_modules"] = selectors
    why = (
        "freeze_vision_tower leaves the projector alone, so that is named as a module;"
        " freeze_embeddings, of NVIDIA's recipes, did nothing and is refused by 0.7"
    )
    return keys, why


def _adapter(config: RunConfig, architecture: Architecture) -> dict[str, Any]:
    """`peft`. Raises UserError where its patterns would reach other modules than the config's."""
    table = architecture.table
    names = choose_targets(table, config)
    endings = sorted({name.rpartition(".")[2] for name in names})
    reached = {
        row.module
        for row in table.parameters
        if ".layers." in row.module
        and row.group not in ("vision", "projector")
        and row.module.rpartition(".")[2] in endings
    }
    if reached != set(names):
        raise UserError(
            "The adapter is on some layers, or beyond the language model.",
            "AutoModel is told modules by the ends of their names.",
            "Name endings in lora_target_modules, such as [q_proj, v_proj].",
        )
    return {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "target_modules": [f"*language_model.layers.*.{ending}" for ending in endings],
        "dim": config.lora_r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
    }


Section = tuple[str, Any, str]
"""A key of the file, its value, and why it is so."""


def automodel_yaml(
    config: RunConfig, architecture: Architecture, layout: Layout, grid: Grid, run: Path
) -> str:
    """The text of the file. Raises UserError for a config that cannot be exported."""
    refuse_job(config, layout, grid)
    dropped = left_out(config)
    head = [
        f"NeMo AutoModel {VERSION}: {grid.words()}, {counted(grid.ranks, 'GPU')}. Written by"
        " Windtunnel; each value with what it guards against.",
        "AutoModel finds an answer's tokens by searching for its text: a row in which it is not"
        " found teaches nothing, with a warning in the log. `windtunnel preview` shows what should"
        " be learned.",
        "Rows that are held out are not evaluated: 0.7 does not validate a pipeline.",
    ]
    if dropped:
        head.append(f"Not carried over: {', '.join(dropped)}.")
    lines = [line for sentence in head for line in comment_lines(sentence)]
    for key, value, why in _sections(config, architecture, layout, grid, run):
        lines.append("")
        lines += _lines(key, value, why)
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any, why: str, indent: int = 0) -> Iterator[str]:
    """A mapping with a line for each of its keys; a value that is a pair has its own reason."""
    if isinstance(value, tuple):
        value, why = value
    if not isinstance(value, Mapping):
        yield from with_reason(entry(key, value, indent), why, indent)
        return
    yield from with_reason([f"{' ' * indent}{key}:"], why, indent)
    for name, inner in value.items():
        yield from _lines(name, inner, "", indent + 2)


def _sections(
    config: RunConfig, architecture: Architecture, layout: Layout, grid: Grid, run: Path
) -> Iterator[Section]:
    source = _plain(_source(architecture))
    yield "recipe", "FinetuneRecipeForVLM", ""
    yield "step_scheduler", _steps(config, layout, grid), ""
    wait = (60, "minutes: the first load of 128B takes more than NCCL's ten")
    yield "dist_env", {"backend": "nccl", "timeout_minutes": wait}, ""
    rng = "nemo_automodel.components.training.rng.StatefulRNG"
    yield "rng", {"_target_": rng, "seed": config.seed, "ranked": True}, ""
    why = (
        "FP8 on the disk; each rank makes its own part 16-bit"
        if source != architecture.name or architecture.checkpoint == "fp8"
        else ""
    )
    moved = "steps smaller than bfloat16 can tell are lost; products stay in bfloat16"
    model = {
        "_target_": "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained",
        "pretrained_model_name_or_path": (source, why),
        "torch_dtype": ("bfloat16", "frozen") if config.adapter else ("float32", moved),
        "attn_implementation": ("eager", "as NVIDIA ran this model"),
    }
    yield "model", model, ""
    processor = {"_target_": "transformers.AutoProcessor.from_pretrained"}
    yield "processor", processor | {"pretrained_model_name_or_path": source}, ""
    yield "checkpoint", _checkpoints(config, run), "NVIDIA's recipe saves nothing: enabled is false"
    yield "distributed", _distributed(config, grid), ""
    if config.adapter:
        yield "peft", _adapter(config, architecture), ""
    else:
        yield "freeze_config", *_frozen(config, architecture)
    loss = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"
    yield "loss_fn", {"_target_": loss}, ""
    yield from _rows(config)
    optimizer = {
        "_target_": "torch.optim.AdamW",
        "lr": config.learning_rate,
        "betas": [config.adam_beta1, config.adam_beta2],
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    yield "optimizer", optimizer, "states in float32"
    yield "lr_scheduler", _rate(config), ""
    yield "clip_grad_norm", {"max_norm": config.max_grad_norm}, ""
    if config.wandb_project and config.use_wandb is not False:
        names = {"project": config.wandb_project, "entity": config.wandb_entity}
        names |= {"name": config.wandb_name}
        given = {key: _plain(value) for key, value in names.items() if value}
        yield "wandb", given, "WANDB_API_KEY comes from the environment"


def _steps(config: RunConfig, layout: Layout, grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {
        "global_batch_size": (batch_size(config, layout), "as many sequences as our own run"),
        "local_batch_size": (
            grid.pipeline * MICROBATCH,
            "one a stage is the least; more would leave it idle for less of the time",
        ),
        "num_epochs": max(1, int(config.num_epochs)),
    }
    if config.max_steps:
        found["max_steps"] = config.max_steps
    if config.save_steps:
        found["ckpt_every_steps"] = config.save_steps
    signals = ["SIGTERM", "SIGUSR1"]
    return found | {"preemption_signal": (signals, "SIGUSR1 is Slurm's, before the time limit")}


def _checkpoints(config: RunConfig, run: Path) -> dict[str, Any]:
    return {
        "enabled": True,
        "checkpoint_dir": _plain(str(run / "checkpoints")),
        "model_save_format": "safetensors",
        "save_consolidated": ("final", "one model, as it was loaded, at the end"),
        "max_recent_checkpoints": config.save_total_limit,
    }


def _distributed(config: RunConfig, grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {
        "strategy": "fsdp2",
        "dp_size": (None, "what the others leave"),
        "tp_size": (grid.tensor, "inside a node"),
        "pp_size": (grid.pipeline, "over nodes"),
        "cp_size": 1,
        "ep_size": 1,
        "sequence_parallel": (False, "cut states do not pass from stage to stage"),
        "activation_checkpointing": bool(config.gradient_checkpointing),
        "defer_fsdp_grad_sync": (False, "as NVIDIA ran this model"),
    }
    if grid.pipeline > 1:
        found["pipeline"] = {
            "pp_schedule": "1f1b",
            "pp_microbatch_size": MICROBATCH,
            "scale_grads_in_schedule": (False, "the loss counts tokens of the whole step"),
        }
    return found


def _rows(config: RunConfig) -> Iterator[Section]:
    dataset = _dataset(config)
    reader = "nemo_automodel.components.datasets.vlm.datasets.make_medpix_dataset"
    split = _plain(dataset.split or "train")
    keys = {"_target_": reader, "path_or_dataset": _plain(dataset.path), "split": split}
    yield "dataset", keys, "columns image_id, question and answer"
    collate = "nemo_automodel.components.datasets.vlm.collate_fns.default_collate_fn"
    loader = {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
        "num_workers": 2,
        "pin_memory": True,
        "drop_last": (True, "a pipeline takes full batches alone"),
        "collate_fn": {
            "_target_": collate,
            "max_length": (config.sequence_len, "every row is padded to it"),
            "drop_overlong": (True, "a row that is cut has lost its answer"),
        },
    }
    yield "dataloader", loader, ""


def _rate(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"lr_decay_style": config.lr_scheduler}
    if config.lr_scheduler == "cosine":
        found["min_lr"] = float(f"{config.learning_rate * config.cosine_min_lr_ratio:.6g}")
    steps = config.warmup_steps
    if steps is None and config.max_steps:
        steps = round((config.warmup_ratio or 0) * config.max_steps)
    if steps is not None:
        found["lr_warmup_steps"] = steps
    return found


def not_there(
    config: RunConfig, architecture: Architecture, places: Places, settled: bool
) -> Iterator[UserError]:
    """What of programs, model and rows the nodes would miss, each with what brings it."""
    if settled:
        yield from missing_program("torchrun", places)
    elif not os.environ.get(VARIABLE):
        yield UserError(
            f"No environment with NeMo AutoModel {VERSION} is named.",
            "It asks for other versions of transformers than Windtunnel, and cannot share ours.",
            f"Make one where the nodes see it, with `pip install nemo-automodel[vlm]=={VERSION}.*`,"
            " and name it: --environment DIR",
        )
    source = _source(architecture)
    if is_hub_id(source) and not Path(source).exists():
        yield from missing_model(source, config.revision_of_model, places)
    dataset = _dataset(config)
    kept = [_letters(folder.name) for folder in (places.cache / "datasets").glob("*___*")]
    if is_hub_id(dataset.path) and _letters(dataset.path) not in kept:
        reads = f"load_dataset({dataset.path!r}, split={dataset.split or 'train'!r})"
        program = f"from datasets import load_dataset; {reads}"
        yield UserError(
            f"{dataset.path} is not in the shared cache.",
            f"{places.cache} has no rows of it, and the nodes fetch nothing.",
            "Read it here once, with AutoModel's environment: HF_HOME="
            f"{quote(str(places.cache))} python -c {quote(program)}",
        )


def _letters(name: str) -> str:
    """A name as `datasets` and the hub have it in common."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def automodel_job(
    name: str, allocation: Allocation, places: Places, log: Path, grid: Grid, settled: bool
) -> Job:
    """The job of a YAML at `places.config`; where the environment is not `settled`, the script asks
    for it by a variable."""
    require_plain(log)
    variables = offline(places)
    if not settled:
        asked = f"${{{VARIABLE}:?set it to the environment that holds nemo-automodel}}"
        variables["PATH"] = (f'"{asked}/bin:$PATH"', "an environment of its own: it pins its stack")
    if grid.tensor > 1:
        why = "products and messages of tensor parallelism start in their order"
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = ("1", why)
    program = _NODE.format(gpus=allocation.gpus_per_node)
    return Job(
        name=name,
        title=f"NeMo AutoModel {VERSION} trains {places.config.name} on {allocation.words()}.",
        allocation=allocation,
        log=log,
        saves=places.run / "checkpoints" / "LATEST",
        variables=variables,
        before=(f"config={quote(str(places.config))}", *MEETING),
        notes=(
            "# torchrun would die of the signal, so that its workers alone are told.",
            "# shellcheck disable=SC2016  # the node itself puts in what is quoted",
        ),
        command=(f'bash -c \'{program}\' node "$host:$port" "$config"',),
        repeats_at="true",
    )


_NODE: Final = """
torchrun --nnodes="$SLURM_NNODES" --nproc-per-node={gpus} --rdzv-backend=c10d \\
  --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" --rdzv-endpoint="$1" \\
  -m nemo_automodel.cli.app "$2" &
agent=$!
trap "pkill -USR1 -P $agent" USR1
wait "$agent"
status=$?
while kill -0 "$agent" 2>/dev/null; do
  wait "$agent"
  status=$?
done
exit "$status"
"""
