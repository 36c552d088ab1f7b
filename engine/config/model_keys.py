"""The keys that choose the model, what is read of it, and what is trained beside or in it."""

from typing import Literal

from pydantic import Field

from engine.config.section import Below1, Count, Section, Whole


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
    """AutoProcessor turns on image training in Axolotl."""
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
