"""Keys of Axolotl 0.21 that are no fields here, and names that other tools use for ours.

Separate because it is data: the names let an error say what a key is, instead of guessing a typo.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Renamed(NamedTuple):
    """An older spelling: the key it became, and the value that `true` stands for, if any."""

    key: str
    value: str | None = None


RENAMED: Mapping[str, Renamed] = MappingProxyType(
    {
        "flash_attention": Renamed("attn_implementation", "flash_attention_2"),
        "sdp_attention": Renamed("attn_implementation", "sdpa"),
        "flex_attention": Renamed("attn_implementation", "flex_attention"),
        "xformers_attention": Renamed("attn_implementation", "xformers"),
        "sage_attention": Renamed("attn_implementation", "sage"),
        "eager_attention": Renamed("attn_implementation", "eager"),
        "bfloat16": Renamed("bf16"),
        "float16": Renamed("fp16"),
        "model_config": Renamed("overrides_of_model_config"),
        "model_kwargs": Renamed("overrides_of_model_kwargs"),
        "model_revision": Renamed("revision_of_model"),
        "type_of_model": Renamed("model_type"),
        "evaluation_strategy": Renamed("eval_strategy"),
        "dataset_processes": Renamed("dataset_num_proc"),
        "noisy_embedding_alpha": Renamed("neftune_noise_alpha"),
        "sequence_parallel_degree": Renamed("context_parallel_size"),
    }
)

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "model": "base_model",
        "model_name": "base_model",
        "model_name_or_path": "base_model",
        "model_id": "base_model",
        "data": "datasets",
        "dataset": "datasets",
        "train_data": "datasets",
        "eval_dataset": "test_datasets",
        "lora_rank": "lora_r",
        "rank": "lora_r",
        "r": "lora_r",
        "alpha": "lora_alpha",
        "target_modules": "lora_target_modules",
        "lora_target": "lora_target_modules",
        "quantization_bit": "load_in_4bit",
        "finetuning_type": "adapter",
        "method": "adapter",
        "lr": "learning_rate",
        "lr_scheduler_type": "lr_scheduler",
        "optim": "optimizer",
        "epochs": "num_epochs",
        "num_train_epochs": "num_epochs",
        "per_device_train_batch_size": "micro_batch_size",
        "train_batch_size": "micro_batch_size",
        "grad_accum": "gradient_accumulation_steps",
        "max_seq_length": "sequence_len",
        "max_seq_len": "sequence_len",
        "max_length": "sequence_len",
        "cutoff_len": "sequence_len",
        "seq_len": "sequence_len",
        "packing": "sample_packing",
        "attention": "attn_implementation",
        "gradient_clipping": "max_grad_norm",
        "max_norm": "max_grad_norm",
        "val_size": "val_set_size",
        "validation_split": "val_set_size",
        "save_dir": "output_dir",
        "run_dir": "output_dir",
        "thinking": "train_on_thinking",
        "prompts": "sample_prompts",
        "file": "path",
        "messages": "field_messages",
        "tools": "field_tools",
    }
)
"""Names that Hugging Face's trainers and other tools use, for the suggestion in an error."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS = _names(
    """
    auto_find_batch_size axolotl_config_path base_model_config comet_experiment_config
    comet_experiment_key comet_mode comet_online comet_project_name comet_workspace
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_keep_in_memory ddp ddp_broadcast_buffers ddp_bucket_cap_mb ddp_timeout
    deepcompile device device_map eval_on_start experimental_skip_move_to_device
    fa_varlen_kwargs_in_collator flash_attn_cross_entropy flash_attn_fuse_mlp
    flash_attn_rms_norm flex_attn_compile_kwargs fused_attn_kernel gc_collect_steps gc_steps
    generate_samples generation_do_sample generation_max_new_tokens generation_prompt_ratio
    generation_temperature generation_top_k generation_top_p gpu_memory_limit gradio_max_new_tokens
    gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title
    greater_is_better heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_revision
    include_tkps include_tokens_per_second is_falcon_derived_model is_llama_derived_model
    is_mistral_derived_model is_preprocess is_qwen_derived_model liger_cross_entropy
    liger_fused_linear_cross_entropy liger_glu_activation liger_kernel_impl liger_layer_norm
    liger_rms_norm liger_rope liger_swiglu logging_nan_inf_filter lora_embedding_kernel
    lora_on_cpu low_cpu_mem_usage max_memory merge_lora merge_method metric_for_best_model
    mlflow_experiment_name mlflow_run_name mlflow_tracking_uri multipack_real_batches
    num_dataset_shards_to_save num_generation_samples otel_metrics_host otel_metrics_port
    pad_to_multiple_of preprocess_iterable profiler_steps profiler_steps_start
    push_dataset_to_hub ray_run_name resources_per_worker ring_attn_func
    sample_packing_bin_size sample_packing_eff_est sample_packing_group_size
    sample_packing_mp_start_method save_safetensors sdpa_varlen strict
    sync_profiler_start_step sync_profiler_steps tiled_mlp tiled_mlp_num_shards
    tiled_mlp_use_original_mlp tokenizer_legacy tokenizer_save_jinja_files tokenizer_use_fast
    torch_compile_backend torch_compile_mode torch_compile_options torch_compile_regional
    torch_empty_cache_steps total_num_tokens total_supervised_tokens trackio_project_name
    trackio_run_name trackio_space_id use_comet use_mlflow use_otel_metrics
    chunked_cross_entropy chunked_cross_entropy_num_chunks cut_cross_entropy_accum_c_fp32
    cut_cross_entropy_c_grad_chunk_size
    """
)
"""They change where a run is computed or reported, not what is learned: noted and left out."""

CHANGING = _names(
    """
    accelerator_config adam_beta3 adam_epsilon2 balance_labels batch_flattening bench_dataset
    bench_split center_rewards_coefficient cls_model_config cpo_alpha curriculum_sampling
    dataloader_drop_last dataset_shard_idx dataset_shard_num diffusion_lm dion_lr dion_momentum
    dion_rank_fraction dion_rank_multiple_of do_bench_eval do_causal_lm_eval dpo_beta
    dpo_generate_during_eval dpo_label_smoothing dpo_ld_alpha dpo_loss_type dpo_loss_weights
    dpo_norm_loss dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting
    dynamic_checkpoint eaft_alpha eaft_k ebft embedding_lr embedding_lr_scale
    embeddings_skip_upcast eval_causal_lm_metrics
    experts_implementation export fix_untrained_tokens flash_attn_d512 flash_optimum float32
    fp32_norm_classes fp32_norms fp8_config fp8_enable_fsdp_float8_all_gather freeze_mm_modules
    fsdp_final_state_dict_type full_determinism gemma4_hybrid_attn_impl gptq
    jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps
    kd_alpha kd_ce_alpha kd_temperature kd_trainer kto_desirable_weight kto_undesirable_weight
    label_balance_window_optim_steps large_head_attention
    liger_use_token_scaling lisa_layers_attribute lisa_n_layers lisa_step_interval
    llama4_linearized_experts local_rank lora_alpha_pattern lora_fan_in_fan_out
    lora_fp32_gradients lora_rank_pattern loraplus_lr_embedding
    lr_div_factor lr_groups lr_quadratic_warmup max_packed_sequence_len max_prompt_len
    mean_resizing_embeddings mixlora_expert_lora_alpha mixlora_expert_lora_dropout
    mixlora_expert_lora_r mixlora_jitter_noise mixlora_num_experts mixlora_router_aux_loss_coef
    mixlora_router_init_range mixlora_top_k model_quantization_config_kwargs num_labels
    nvfp4_merge_aware optim_target_modules peft
    peft_ensure_weight_tying peft_layer_replication peft_layers_pattern
    peft_trainable_token_indices
    ple_cpu_offload pose_max_context_len pose_num_chunks pose_split_on_token_ids
    precompute_ref_log_probs pretrain_multipack_attn pretrain_multipack_buffer_size
    pretraining_sample_concatenation process_reward_model processor_kwargs qat qgalore_cos_threshold
    qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
    qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap
    quantization ray_num_workers reinit_weights relora relora_cpu_offload relora_prune_method
    relora_prune_ratio resize_token_embeddings_to_32x reward_model rl_beta rope_scaling rpo_alpha
    s2_attention sample_packing_sequentially scaling_softmax_bias scaling_softmax_factor
    selective_checkpointing shrink_embeddings shuffle_before_merging_datasets simpo_gamma
    spectrum_model_name spectrum_top_fraction streaming_multipack_buffer_size torchdistx_path
    trainer_cls trl use_dft use_eaft use_onebitllms use_pose use_ray vllm world_size
    """
)
"""They change what is learned or how: refused, because ignoring them would train something else."""

DATASET_CHANGING = _names(
    """
    conversation field field_human field_model input_format input_transform logprobs_field
    preprocess_shards shards shards_idx temperature
    """
)
"""The same for the keys of a dataset."""
