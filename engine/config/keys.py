"""Every key of a run's config, unjudged: type, default and meaning, in the order of a written file.

A new key is a field here, and acts where it is read.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _refuse_bool(value: object) -> object:
    """`lora_r: true` would be rank 1, because Python counts with True."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "not a number")
    return value


LARGEST_WHOLE = 10**12
"""No run has so many of anything."""


def _refuse_huge(value: int) -> int:
    """10^400 is a whole number, and no float."""
    if value > LARGEST_WHOLE:
        raise PydanticCustomError("huge_number", "beyond all that is counted")
    return value


_number = BeforeValidator(_refuse_bool)
_in_range = AfterValidator(_refuse_huge)

Whole = Annotated[int, Field(ge=0), _number, _in_range]
"""A whole number that may be 0."""
Count = Annotated[int, Field(ge=1), _number, _in_range]
Amount = Annotated[float, Field(ge=0), _number]
Positive = Annotated[float, Field(gt=0), _number]
Fraction = Annotated[float, Field(ge=0, le=1), _number]
Below1 = Annotated[float, Field(ge=0, lt=1), _number]


class Section(BaseModel):
    """Keys that belong together; every key says in its docstring what it does."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        defer_build=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def is_default(self, key: str) -> bool:
        """Whether a file need not name `key`; its default may depend on the other values here."""
        field = type(self).model_fields[key]
        if field.is_required():
            return False
        default = field.get_default(call_default_factory=True, validated_data=self.__dict__)
        return bool(getattr(self, key) == default)

    def file_value(self, key: str) -> Any:
        """The value of `key` as YAML has it: lists and mappings, None for an empty tuple."""
        value = getattr(self, key)
        if not isinstance(value, tuple):
            return value
        return [item.file_values() if isinstance(item, Section) else item for item in value] or None

    def file_values(self) -> dict[str, Any]:
        """What a file must name of this section."""
        return {
            key: self.file_value(key)
            for key in type(self).model_fields
            if key in self.always_written() or not self.is_default(key)
        }

    def always_written(self) -> tuple[str, ...]:
        """Keys that a file names even with their default."""
        return ()


class ModelKeys(Section):
    """Model."""

    base_model: str
    """The model to start from: a catalog name (ministral-3-3b), a hub id
    (mistralai/Ministral-3-3B-Instruct-2512) or a local folder with config.json."""
    revision_of_model: str | None = None
    """Branch, tag or commit of a hub model; also written model_revision. Absent: the newest.
    A commit makes a rerun read the same weights."""
    tokenizer_config: str | None = None
    """Another folder or hub id to take the tokenizer from. Absent: base_model's own, which is
    the one that its weights were trained with."""
    tokenizer_use_mistral_common: bool | None = None
    """Tokenize with mistral-common. Windtunnel always does; Axolotl needs `true` here for
    Mistral models, so it stays in a file that both tools read."""
    processor_type: str | None = None
    """AutoProcessor turns on image training in Axolotl. Here images in the rows are trained without
    it; where the rows are not counted, a plan takes them to have images by it."""
    trust_remote_code: bool | None = None
    """Run Python that a model repository ships. Refused when true: Windtunnel knows the
    architectures that it trains and never runs downloaded code."""
    overrides_of_model_config: dict[str, object] | None = None
    """Values that replace those of the model's config.json; also written model_config. Taken are
    output_router_logits and router_aux_loss_coef, and `rope_parameters` as a whole, under
    `text_config` where the model reads images."""
    model_quantization_config: str | None = None
    """How an already quantized checkpoint is read. FineGrainedFP8Config is FP8, which Windtunnel
    tells from the files and converts while loading, so this key changes nothing."""


class DatasetConfig(Section):
    """One source of conversations."""

    path: str
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, also with .gz or .zst, .parquet, .arrow), a
    folder of them or one that save_to_disk wrote, a folder of images with captions, a hub id, or
    sample:NAME for one that comes with Windtunnel."""
    type: str = "chat_template"
    """Shape of the rows. chat_template: conversations, a list of messages with role and
    content; the only shape that is trained."""
    name: str | None = None
    """Configuration (subset) of a hub dataset; of a folder, the folder in it."""
    split: str | None = None
    """Part of a hub dataset, or of a folder whose files or folders are named train, validation and
    test. Absent: train; in a folder whose files name no split, all of them."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. A commit makes a rerun read the same rows."""
    data_files: list[str] | str | None = None
    """Files to read inside the folder or hub dataset, also as data/*.parquet. Absent: those of the
    split."""
    field_messages: str = "messages"
    """Column that holds the list of messages; ShareGPT rows use conversations."""
    field_tools: str = "tools"
    """Column that holds the tool definitions. Absent: tools, available_tools or functions."""
    field_system: str | None = None
    """Column that holds the system prompt. Absent: system, system_prompt or another usual name."""
    field_context: str | None = None
    """Column of a text that stands before the question, in a table without messages. Absent:
    context, passage, article, document or another usual name."""
    field_choices: str | None = None
    """Column of the options of a question, in a table without messages: they are listed after it,
    and the answer may name one by its index, from 0, or its letter. Absent: choices, options or
    endings."""
    field_thinking: str | None = None
    """Column of the thinking before the answer, in a table; in messages, their key for it. Absent:
    thinking, reasoning, reasoning_content, Complex_CoT or another usual name."""
    field_label: str | None = None
    """Column that judges the row's answer, as in KTO data: rows where it is false are left out."""
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
    split_thinking: bool | None = None
    """Whether thinking that an answer marks in its text, as <think>...</think>, is read as
    thinking. Absent: where the answer begins with it. true: wherever it stands. false: it stays
    text."""
    read_markers: bool = True
    """Read calls, tools, results, prompts and ends of text that rows spell out (<tool_call>,
    <tools>, [INST], </s>) as what they stand for. false: they stay text."""
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
    """Conversations that are only evaluated, never learned. Instead of val_set_size. A folder of
    splits without `split`: validation, else test."""
    val_set_size: Amount = 0.0
    """Rows held out of datasets for the evaluation: below 1 a share (0.05 is usual), 2 and
    above a number of rows, 0 none. Without any, memorising cannot be seen."""
    dataset_prepared_path: str | None = None
    """Folder of the tokenized rows, so that an unchanged dataset is tokenized once. Absent: the
    user's cache folder, shared by all runs."""
    dataset_num_proc: Count | None = None
    """Processes that check and tokenize the rows, at most. Absent: one a core. Fewer where the data
    is small or memory is short; what they make is the same."""
    skip_prepare_dataset: bool | None = None
    """Tokenize while training. Rows are always prepared first, so that they can be previewed."""
    remove_unused_columns: bool | None = None
    """Drop columns that training does not read. Only the columns that are needed are read."""
    image_folder: str | None = None
    """Folder in which image paths of rows are looked up after the dataset's own folder. No image
    is read outside the two. Absent: the config's folder."""
    allow_private_image_hosts: bool = False
    """Fetch images of rows from this computer and private networks too, and through the proxies
    that the environment names. Left out, only the public internet is asked: the URLs in a
    stranger's rows could reach what only this computer can."""
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


class AdapterKeys(Section):
    """Adapter."""

    adapter: Literal["lora", "qlora"] | None = None
    """What is trained. lora: two small matrices beside each frozen one; qlora: the same with
    the frozen weights in 4 bits, about a quarter of the memory; absent: every weight (a full
    fine-tune, roughly 8 times the memory of lora)."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4-bit NF4 with double quantization. Goes with adapter: qlora."""
    load_in_8bit: bool = False
    """Hold the frozen weights in 8 bits (LLM.int8()): half the memory of 16, and closer to them
    than 4. Goes with adapter: lora."""
    bnb_config_kwargs: dict[str, object] | None = None
    """Settings of the quantized format. llm_int8_skip_modules: [vision_tower] lists the modules
    that stay in 16 bits beside the head; absent, those are the vision tower and its projector."""
    quantize_moe_experts: bool = False
    """Quantize the experts of a mixture-of-experts model while they load."""
    lora_r: Count = 16
    """Rank of the adapter: how much it can hold. 16 or 32 suit small data; 8 is enough for tone
    and format, 64 and more for new facts. Memory grows in proportion."""
    lora_alpha: Count = Field(
        default_factory=lambda data: 2 * data["lora_r"],
        json_schema_extra={"default_words": "twice lora_r"},
    )
    """Strength of the adapter: its output is scaled by lora_alpha / lora_r. One or two times
    lora_r is usual; raising it acts like a higher learning rate."""
    lora_dropout: Below1 = 0.0
    """Share of the adapter's input that is dropped at random while training. 0 is usual, and
    the fused kernels need it; 0.05 can help when rows are few."""
    peft_use_rslora: bool = False
    """Scale the adapter by lora_alpha / sqrt(lora_r) instead (rsLoRA), which keeps ranks above 64
    learning as fast as small ones."""
    peft_use_dora: bool = False
    """Learn the length of every output's weights beside their direction (DoRA). Slower: each pass
    builds the adapter's whole matrix."""
    peft_init_lora_weights: bool | str = True
    """First values of the adapter's A matrices: true, uniform as PEFT does it, or gaussian. B
    starts at zero either way, so that a run starts from the untouched model."""
    peft_autocast_adapter_dtype: bool | None = None
    """false: the adapter is held in bfloat16 instead of float32, which saves 4 bytes of each of
    its numbers, weight and gradient; its steps are rounded at random, so that small ones are not
    lost on average."""
    peft_layers_to_transform: list[Whole] | Whole | None = None
    """Numbers of the layers that get an adapter, from 0. Absent: all."""
    lora_target_modules: list[str] | str | None = None
    """Which matrices get an adapter. A list matches by the end of the name ([q_proj, v_proj]);
    one text is a regular expression that must match the whole name; one that spells vision_tower
    or multi_modal_projector reaches there too. Absent: see lora_target_linear."""
    lora_target_parameters: list[str] | str | None = None
    """Fused expert tensors that get an adapter, by the end of the name, such as
    mlp.experts.gate_up_proj."""
    lora_target_linear: bool = Field(
        default_factory=lambda data: (
            data["lora_target_modules"] is None
            and data["lora_target_parameters"] is None
            and not data["quantize_moe_experts"]
        ),
        json_schema_extra={"default_words": "true unless other targets are named"},
    )
    """Put an adapter on every linear layer of the language model. Usual: adapters on attention
    alone learn less, even with as many parameters."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapter: embed_tokens and lm_head. They take as much memory
    as in a full fine-tune, and are worth it only for tokens that the model does not know."""
    lora_model_dir: str | None = None
    """Folder of an adapter to go on from: its weights are the first ones of this run's adapter,
    which must be of the same rank on the same matrices."""
    lora_mlp_kernel: bool | None = None
    """Fused kernel for the MLP's adapters: same result, less memory."""
    lora_qkv_kernel: bool | None = None
    """Fused kernel for the adapters of queries, keys and values: same result, less memory."""
    lora_o_kernel: bool | None = None
    """Fused kernel for the adapters of the attention output: same result, less memory."""
    unfrozen_parameters: list[str] | None = None
    """Full fine-tune only: regular expressions of the parameters to train; the others stay as
    they are. Each is held against the start of a name, else of a part of it (embed_tokens finds
    model.embed_tokens.weight). Absent: the whole language model, without the vision tower and
    its projector."""


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


Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
]
AttentionBackend = Literal[
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flash_attention_torch",
    "flex_attention",
    "xformers",
    "varlen",
    "sage",
    "fp8",
]


class OptimizationKeys(Section):
    """Optimization."""

    micro_batch_size: Count = 1
    """Sequences that one GPU works on at once. More is faster until memory is full."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches that are summed before the weights move. Sequences in a step:
    micro_batch_size x gradient_accumulation_steps x GPUs; 8 to 32 is usual with adapters."""
    num_epochs: Positive = 1.0
    """How often the whole dataset is learned. 1 to 3 is usual; more memorises."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, even inside the first epoch."""
    optimizer: Optimizer = "adamw_torch_fused"
    """AdamW in different coats. adamw_torch_fused: exact and fast; adamw_bnb_8bit (adamw_8bit is
    the same): its state in 8 bits, a quarter of that memory; adamw_torch_8bit: likewise, as
    Axolotl wants it beside fsdp_config; the paged ones also move the state to the computer's RAM
    when the GPU is full."""
    learning_rate: Positive = Field(
        default_factory=lambda data: 2e-5 if data["adapter"] is None else 2e-4,
        json_schema_extra={"default_words": "0.0002 with an adapter, 0.00002 without"},
    )
    """Size of a step. 2e-4 is the usual start with adapters (1e-4 for models above 70B), 1e-5
    to 2e-5 for a full fine-tune. Too high: the loss jumps; too low: it hardly falls."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+: the adapter's B matrices learn so many times faster than its A matrices; 16 is what
    its authors use. Absent: all alike."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup: along a cosine, in a line, not at all."""
    cosine_min_lr_ratio: Fraction = 0.0
    """Where the cosine ends, as a share of learning_rate."""
    warmup_steps: Whole | None = None
    """Steps in which the learning rate rises from 0. Absent: see warmup_ratio."""
    warmup_ratio: Below1 | None = None
    """The same as a share of all steps; 0.05 to 0.1 is usual. With neither key: 0.03, at most
    100 steps."""
    weight_decay: Amount = 0.0
    """Pull of the trained weights towards 0 in every step; 0.01 is usual."""
    adam_beta1: Below1 = 0.9
    """AdamW: how long gradients are remembered."""
    adam_beta2: Below1 = 0.999
    """AdamW: how long squared gradients are remembered."""
    adam_epsilon: Positive = 1e-8
    """AdamW: keeps the division by the squared gradients finite."""
    max_grad_norm: Positive = 1.0
    """Gradients longer than this are shortened to it, which tames single bad batches."""
    loss_watchdog_threshold: Positive | None = None
    """Stop when the loss stays above this, and say which rows it came from."""
    loss_watchdog_patience: Count | None = None
    """Steps in a row above loss_watchdog_threshold after which the run stops. Absent: 3."""
    seed: Whole = 42
    """Start of all random numbers: the same seed, data and machine give the same run."""


class MemoryKeys(Section):
    """Precision and memory."""

    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16: half the memory of float32, same range. auto: where the GPU can
    (Ampere and newer), float32 on older ones, where true is refused; false: float32."""
    gradient_checkpointing: bool | Literal["offload", "offload_disk"] = False
    """Compute the layers a second time in the backward pass instead of keeping their
    intermediate values: about a third slower, a fraction of the memory. Usual for models from
    3B on."""
    checkpointed_layers: Count | None = None
    """With gradient_checkpointing: how many of the layers are computed a second time, from the
    first on; the others keep their intermediate values, which the backward pass frees first. The
    same result: more memory, less time. Absent: all."""
    gradient_checkpointing_kwargs: dict[str, object] | None = None
    """{use_reentrant: false} or true: how the second computation is done; same result."""
    activation_offloading: bool | Literal["legacy", "disk", "hidden_states"] | None = None
    """Keep what gradient_checkpointing keeps in this computer's RAM, and fetch each layer's part
    back before it is needed: the same result, a little slower, and long rows cost the GPU little.
    true, legacy and hidden_states are the same here."""
    layer_offloading: bool | None = None
    """Keep the frozen weights of the language model's layers in this computer's RAM, and bring
    each layer to the GPU while the one before it computes: the same result and room for a larger
    model, slower where the GPU waits for the copy."""
    offloaded_layers: Count | None = None
    """With layer_offloading: how many of the layers, from the first on; the others stay on the
    GPU. Absent: all."""
    offload_embeddings: bool = False
    """Keep the embedding and the head in this computer's RAM: a batch's rows of the one are
    looked up there, and the other is brought to the GPU for the loss alone. The same result, a
    little slower."""
    auto_fit: bool = False
    """After running out of memory, change the config by the next step that saves some and changes
    no result, say so, and go on from the last checkpoint."""
    attn_implementation: AttentionBackend | None = None
    """The attention code. Absent: the best that is installed and that this GPU runs. sdpa runs
    everywhere; flash_attention_2 needs Ampere or newer."""
    plugins: list[str] | None = None
    """Axolotl's plugins by class name. CutCrossEntropyPlugin is understood: its kernel computes the
    loss, where this GPU can; without it Windtunnel does, never with the full logits either."""
    cut_cross_entropy: bool | None = None
    """Switch of CutCrossEntropyPlugin, a kernel for the loss: saves up to 100 MiB more, but its
    gradients are ten times less exact and no run repeats another's numbers. Absent: on where the
    plugin is named."""


class DistributedKeys(Section):
    """Several GPUs."""

    deepspeed: str | dict[str, object] | None = None
    """A DeepSpeed configuration. fsdp_config does the same here."""
    fsdp_version: Whole | None = None
    """Version of FSDP; 2 is the living one."""
    fsdp_config: dict[str, object] | None = None
    """Shard the model over GPUs (FSDP2): each holds a part of the weights, gradients and optimizer
    state, and gathers a layer while it computes. Over dp_shard_size of them, else over all."""
    qlora_sharded_model_loading: bool | None = None
    """Load 4-bit weights shard by shard under FSDP."""
    dp_shard_size: Count | None = None
    """GPUs over which one copy of the model is sharded; 1: each has a whole one. On a computer
    without a GPU so many processes, to try a run."""
    dp_replicate_size: Count | None = None
    """Copies of the model that learn side by side, each from rows of its own. GPUs of a run:
    dp_shard_size x dp_replicate_size. With neither key nor fsdp_config: one on each GPU."""
    tensor_parallel_size: Count | None = None
    """GPUs that share each matrix."""
    context_parallel_size: Count | None = None
    """GPUs that share each sequence."""
    expert_parallel_size: Count | None = None
    """GPUs of a copy over which experts are spread, a divisor of dp_shard_size: tokens go to the
    GPU that has their expert, and come back, where otherwise each layer's experts are gathered."""
    max_restarts: Whole = 0
    """How often a run in several processes goes on from its last save by itself after one of them
    has died; 0: it ends and says why."""
    ddp_find_unused_parameters: bool | None = None
    """Look for parameters without a gradient in every step; costs time, changes nothing here."""


class OutputKeys(Section):
    """Output."""

    output_dir: str | None = None
    """The run's folder. Absent: runs/<name> in the folder of all runs."""
    saves_per_epoch: Count | None = None
    """Saves in each epoch. With neither this nor save_steps: one."""
    save_steps: Count | None = None
    """Optimizer steps between two saves."""
    save_strategy: Literal["steps", "epoch", "no", "best"] | None = None
    """When to save: steps goes with save_steps, epoch is once an epoch."""
    save_total_limit: Count = 4
    """Saves that are kept; the newest and the best are never removed."""
    load_best_model_at_end: bool | None = None
    """End with the save of the lowest evaluation loss instead of the last. Both are kept."""
    evals_per_epoch: Count | None = None
    """Evaluations in each epoch, besides the one before the first step."""
    eval_steps: Count | None = None
    """Optimizer steps between two evaluations."""
    eval_train_rows: Whole = 0
    """Training rows that are scored beside the held-out ones, before and after, under the name
    `train`: how much better it does on what it has seen tells learning from memorising."""
    eval_table_size: Whole = 8
    """Held-out answers that the model writes by itself before and after training (a quarter of
    them at evaluations in between): how many stop by themselves, are as long as the reference, are
    exact, call the right function. 0: none, and no question is asked but sample_prompts."""
    eval_max_new_tokens: Count = 128
    """Longest of those answers, in tokens. Rows with longer references are left out of them."""
    eval_drift: bool = True
    """Measure at every evaluation how far the model has moved from its base on two dozen general
    questions that come with Windtunnel: what a fine-tune forgets shows there."""
    eval_strategy: Literal["steps", "epoch", "no"] | None = None
    """When to evaluate: steps goes with eval_steps, epoch is once an epoch."""
    sample_prompts: tuple[str, ...] = ()
    """Questions answered by the model before, during and after training, so that a person sees
    the difference. Absent: two of the held-out rows, and a general one."""
    resume_from_checkpoint: bool | str = False
    """True: go on from the newest save in output_dir. A path: from that save."""
    hub_model_id: str | None = None
    """Hub id to upload the finished adapter or model to, as you/your-model; it is made private
    where it is not there. Nothing is uploaded while training, and a failed upload never fails
    a run."""


class TrackerKeys(Section):
    """Trackers."""

    wandb_project: str | None = None
    """Weights & Biases: project."""
    wandb_entity: str | None = None
    """Weights & Biases: team."""
    wandb_name: str | None = None
    """Weights & Biases: name of the run."""
    wandb_run_id: str | None = None
    """Weights & Biases: id of the run."""
    wandb_mode: str | None = None
    """Weights & Biases: online, offline or disabled."""
    wandb_watch: str | None = None
    """Weights & Biases: what to watch in the model."""
    wandb_log_model: str | None = None
    """Weights & Biases: whether to upload the model."""
    use_wandb: bool | None = None
    """Send figures to Weights & Biases."""
    use_tensorboard: bool | None = None
    """Write figures for TensorBoard."""
    use_trackio: bool | None = None
    """Send figures to Trackio."""


# pydantic collects the fields from the last base to the first, and a default may read the fields
# before it (learning_rate reads adapter): hence the reverse of a written file.
class RunKeys(
    TrackerKeys,
    OutputKeys,
    DistributedKeys,
    MemoryKeys,
    OptimizationKeys,
    SequenceKeys,
    AdapterKeys,
    LearningKeys,
    DataKeys,
    ModelKeys,
):
    """The keys of one run."""

    def always_written(self) -> tuple[str, ...]:
        """Those for which Axolotl, which shares the format, has no default or another one."""
        keys: tuple[str, ...] = ("base_model", "learning_rate")
        if self.adapter:
            keys += ("lora_r", "lora_alpha")
            keys += ("lora_target_linear",) if self.lora_target_linear else ()
        return keys


SECTIONS: tuple[type[Section], ...] = tuple(reversed(RunKeys.__bases__))
"""In the order of the written file."""


def section_title(section: type[Section]) -> str:
    """Its heading in a written file: its docstring without the full stop."""
    return (section.__doc__ or "").removesuffix(".")
