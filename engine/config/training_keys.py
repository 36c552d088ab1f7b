"""The keys of the training itself: steps, learning rate, precision, memory, several GPUs."""

from typing import Literal

from pydantic import Field

from engine.config.section import Amount, Below1, Count, Fraction, Positive, Section, Whole

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
    the same): its state in 8 bits, a quarter of that memory; adamw_torch_8bit: likewise, for
    sharded weights; the paged ones also move the state to the computer's RAM when the GPU is
    full."""
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
    """A DeepSpeed configuration."""
    fsdp_version: Whole | None = None
    """Version of FSDP; 2 is the living one."""
    fsdp_config: dict[str, object] | None = None
    """How FSDP shards the model over GPUs."""
    qlora_sharded_model_loading: bool | None = None
    """Load 4-bit weights shard by shard under FSDP."""
    dp_shard_size: Count | None = None
    """GPUs over which one copy of the model is sharded."""
    dp_replicate_size: Count | None = None
    """Copies of the model that learn side by side."""
    tensor_parallel_size: Count | None = None
    """GPUs that share each matrix."""
    context_parallel_size: Count | None = None
    """GPUs that share each sequence."""
    expert_parallel_size: Count | None = None
    """GPUs over which the experts are spread."""
    ddp_find_unused_parameters: bool | None = None
    """Look for parameters without a gradient in every step; costs time, changes nothing here."""
