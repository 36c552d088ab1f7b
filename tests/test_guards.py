"""Each guard against silent failure has a test that fails when the guard is taken out.

A row names a file, the text that guards, what stands there without the guard, and the test. The
test runs on a copy of the code with the guard taken out and has to fail there; on the copy as it
is, all of them pass.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("engine", "presets", "tests", "tui", "pyproject.toml")
LIMIT_SECONDS = 600
EQUIVALENCE = "tests/train/test_equivalence.py"
APART = f"{EQUIVALENCE}::TestWhatKeepsPackedRowsApart"
ALONE = f"{APART}::test_the_path_of_the_trainer_sees_every_row_alone"
FIRST_TOKEN = f"{EQUIVALENCE}::TestMaskedTokens"
FP8 = "tests/train/test_quantize.py::TestRefused"
TARGETS = "tests/plan/test_targets.py"
LORA = "tests/train/test_lora.py"
MODEL = "tests/train/test_model.py"
ATTENTION = "tests/train/test_attention.py"
RANKS = "tests/train/test_ranks.py"
LOSS = "tests/train/test_loss.py"
VISION = "tests/train/test_vision.py"
ARCHITECTURE = "tests/catalog/test_architecture.py"
SECONDS = "tests/train/test_loop.py"
DAMAGE = "tests/train/test_checkpoint.py::TestDamage"
REUSE = "tests/data/test_prepare.py::TestReuse"
MERGE = "tests/train/test_merge.py"
SYNCED = f"{MERGE}::TestMerged::test_every_file_is_on_the_disk_before_the_folder_has_its_name"
COLUMNS = "tests/chat/test_columns.py"
SAVING = "tests/train/test_plan_sizes.py"


@dataclass(frozen=True, slots=True)
class Guard:
    """What may not be taken out unnoticed."""

    file: str
    text: str
    without: str
    """What stands in the text's place when the guard is gone."""
    test: str


GUARDS = {
    "a flipped bit in a checkpoint": Guard(
        "engine/train/seal.py",
        "            if compare and digest(folder / name) != saved:",
        "            if False:",
        f"{DAMAGE}::test_damage_is_skipped",
    ),
    "another step in state.json": Guard(
        "engine/train/seal.py",
        "        if has_digest and _with_digest(state) == written:",
        "        if has_digest:",
        f"{DAMAGE}::test_an_odd_state_is_damage",
    ),
    "LATEST stays in its own folder": Guard(
        "engine/runs/folder.py",
        '    return name if name in list_checkpoints(folder) else ""',
        "    return name",
        f"{DAMAGE}::test_a_mark_that_names_none_of_its_own_is_said",
    ),
    "a resume to losses that are no number": Guard(
        "engine/wizard/verify.py",
        "    if not (math.isfinite(a) and math.isfinite(b)):",
        "    if False:",
        "tests/wizard/test_verify.py::test_a_number_that_is_none_equals_only_another_one",
    ),
    "an evaluation after a resume counts": Guard(
        "engine/wizard/verify.py",
        "_difference(_of_evals(self.again, SAVED), _of_evals(self.resumed))",
        "0.0",
        "tests/wizard/test_verify.py::test_an_evaluation_after_the_resume_counts",
    ),
    "a flipped bit in prepared rows": Guard(
        "engine/data/prepare.py",
        'damaged = changed_file(store / job.key) or ""',
        'damaged = ""',
        f"{REUSE}::test_one_flipped_bit_is_told_and_made_good",
    ),
    "prepared rows without digests": Guard(
        "engine/data/prepare.py",
        "    return (folder / SUMS).is_file()",
        "    return True",
        f"{REUSE}::test_arrays_without_digests_are_made_again",
    ),
    "a file that changes while it is prepared": Guard(
        "engine/data/prepare.py",
        "        if _stamps(job.locations) != job.stamps:",
        "        if False:",
        "tests/data/test_prepare.py::TestInterruption"
        "::test_a_file_that_changes_while_it_is_read_is_refused",
    ),
    "a changed adapter is not merged": Guard(
        "engine/train/checkpoint.py",
        "        require_unchanged(run, exported)\n",
        "",
        f"{MERGE}::TestRefused::test_a_changed_adapter_is_refused_until_the_change_is_owned",
    ),
    "a finished result is on the disk before it has its name": Guard(
        "engine/train/checkpoint.py",
        "        sync_all(partial)\n        if target.is_symlink():",
        "        if target.is_symlink():",
        SYNCED,
    ),
    "a merged model is on the disk before it has its name": Guard(
        "engine/train/merge.py", "        sync_all(partial)\n", "", SYNCED
    ),
    "rows in another order than before a stop": Guard(
        "engine/train/loop.py",
        "        if position.fingerprint != self.position.fingerprint:",
        "        if False:",
        "tests/train/test_process_resume.py::test_changed_rows_are_refused",
    ),
    "a value changed between stop and resume is noted": Guard(
        "engine/train/loop.py",
        "            self.session.note(level, change)",
        "            pass",
        "tests/train/test_process_resume.py"
        "::test_what_was_changed_between_stop_and_resume_is_noted",
    ),
    "an estimate refuses weights that a run refuses": Guard(
        "engine/wizard/start.py",
        "    refuse_other_formats(architecture.folder or Path(config.base_model), ",
        "    (lambda *_: None)(architecture.folder, ",
        "tests/cli/test_runs.py::TestDryRun::test_sees_what_a_run_would_stumble_over",
    ),
    "rejected answers are not taught": Guard(
        "engine/chat/row.py",
        "    columns.refuse_judged()\n",
        "",
        f"{COLUMNS}::test_preferences_are_refused_with_the_keys_that_learn_the_good_answers",
    ),
    "a column that nothing reads is reported": Guard(
        "engine/chat/row.py",
        "    unread = columns.unread(messages)",
        "    unread: dict[str, object] = {}",
        f"{COLUMNS}::test_what_no_rule_reads_is_kept_to_be_told",
    ),
    "held-out files are not learned": Guard(
        "engine/data/folders.py",
        "    return Chosen(\n        files[wanted],",
        "    return Chosen(\n        tuple(path for paths in files.values() for path in paths),",
        "tests/data/test_folders.py::test_splits_are_never_mixed_and_those_not_learned_are_named",
    ),
    "images are asked of the public internet alone": Guard(
        "engine/data/web_images.py",
        "if self._private or is_public(each)]",
        "if True]",
        "tests/data/test_web_images.py::TestAddresses::test_none_of_their_spellings_is_asked",
    ),
    "no tensor of more numbers than bitsandbytes counts": Guard(
        "engine/train/quantize.py",
        "    if weight.numel() > MOST_NUMBERS:\n",
        "    if weight.numel() < 0:\n",
        "tests/train/test_quantize.py::test_more_numbers_than_its_kernels_count_are_refused",
    ),
    "a plan for a card that torch cannot use": Guard(
        "engine/train/run.py",
        'session.note("warning", require_planned_device(session.run, device))',
        'session.note("warning", None)',
        "tests/train/test_process_ends.py::test_a_plan_for_a_card_never_ends_on_the_processor",
    ),
    "bfloat16 only where it is the card's own": Guard(
        "engine/train/device.py",
        "is_bf16_supported(including_emulation=False)",
        "is_bf16_supported()",
        "tests/train/test_device.py::test_torch_agrees",
    ),
    "float32 on a card keeps no scores": Guard(
        "engine/train/attention.py",
        'return query.device.type == "cuda" and query.dtype == torch.float32',
        "return False",
        "tests/train/test_device.py::test_float32_on_a_card_gets_a_head_of_keys_for_each_of_queries",
    ),
    "a config.json whose numbers are not its model's": Guard(
        "engine/plan/remarks.py",
        "        _other_than_its_makers(config, architecture),\n",
        "",
        "tests/catalog/test_architecture.py::test_the_first_config_of_medium_is_mended",
    ),
    "an override of the rotation that is built": Guard(
        "engine/train/model.py",
        "with_overrides(read_architecture(folder), config.overrides_of_model_config)",
        "read_architecture(folder)",
        f"{MODEL}::TestWhatIsLoaded::test_an_override_of_its_rotation_is_what_is_built",
    ),
    "no attention mask with packed rows": Guard(
        "engine/train/forward.py",
        'position_ids=batch["position_ids"],',
        'position_ids=batch["position_ids"],\n'
        '            attention_mask=torch.ones_like(batch["input_ids"]),',
        ALONE,
    ),
    "no cache with packed rows": Guard(
        "engine/train/forward.py", "use_cache=False,", "use_cache=True,", ALONE
    ),
    "positions begin anew with every row": Guard(
        "engine/train/batches.py",
        "positions.append(np.arange(len(tokens), dtype=np.int64))",
        "begun = sum(map(len, positions))\n"
        "            positions.append(np.arange(begun, begun + len(tokens), dtype=np.int64))",
        ALONE,
    ),
    "no row predicts the next one": Guard(
        "engine/train/batches.py",
        "answers[0] = IGNORED_LABEL",
        "pass",
        f"{FIRST_TOKEN}::test_rows_do_not_leak",
    ),
    "4-bit weights are not repacked on a CPU": Guard(
        "engine/train/quantize.py",
        "module.support_avx512bf16_for_cpu = False",
        "pass",
        "tests/train/test_quantize.py::TestGradientsAfterAnEvaluation::test_repacking_is_off",
    ),
    "scales that belong to nothing": Guard(
        "engine/train/model.py",
        "n not in layout.companions]",
        'n not in layout.companions and "scale" not in n]',
        f"{FP8}::test_a_scale_that_belongs_to_nothing",
    ),
    "weights that the model has no place for": Guard(
        "engine/train/model.py",
        '"holds weights that the model has no place for": extra,',
        "",
        f"{MODEL}::TestWhatIsRefused::test_a_weight_without_a_place",
    ),
    "weights that are missing": Guard(
        "engine/train/model.py",
        "[n for n in missing if n not in shared]",
        "[n for n in missing if n not in shapes]",
        f"{MODEL}::TestWhatIsRefused::test_a_missing_weight",
    ),
    "FP8 without its scale": Guard(
        "engine/train/quantize.py",
        "        if not found:\n",
        "        if not found:\n            continue\n",
        f"{FP8}::test_fp8_without_scale",
    ),
    "FP8 experts without their scale": Guard(
        "engine/train/quantize.py",
        "        if not found:\n",
        "        if not found:\n            continue\n",
        f"{FP8}::test_fp8_without_scale[experts]",
    ),
    "FP8 scales of another shape": Guard(
        "engine/train/quantize.py",
        "    shown = visible(weight.name, one_line=True)\n",
        "    return None\n    shown = visible(weight.name, one_line=True)\n",
        f"{FP8}::test_scale_of_no_layout",
    ),
    "weights quantized in another way": Guard(
        "engine/train/model.py",
        "    refuse_other_formats(folder, architecture.config)\n",
        "",
        f"{FP8}::test_other_quantized_formats",
    ),
    "the class of config.architectures": Guard(
        "engine/train/model.py",
        "model_class = getattr(transformers, architecture.class_name)",
        "model_class = transformers.MistralForCausalLM",
        f"{MODEL}::TestWhatIsLoaded::test_class_comes_from_the_config",
    ),
    "a LoRA target of a list that matches nothing": Guard(
        "engine/plan/targets.py",
        "            raise _no_match(entry, modules)",
        "            continue",
        f"{TARGETS}::TestTargets::test_a_wish_that_matches_nothing_is_refused",
    ),
    "a LoRA target as an expression that matches nothing": Guard(
        "engine/plan/targets.py",
        "            raise _no_match(named, reachable)",
        "            return ()",
        f"{TARGETS}::TestTargets::test_a_wish_that_matches_nothing_is_refused",
    ),
    "an adapter on nothing at all": Guard(
        "engine/plan/targets.py",
        "if not found and not config.lora_target_parameters:",
        "if False:",
        f"{TARGETS}::TestTargets::test_no_target_at_all_is_refused",
    ),
    "an expert target that matches nothing": Guard(
        "engine/plan/targets.py",
        "        if not matches:\n            raise UserError(\n"
        '                f"lora_target_param',
        "        if not matches:\n            continue\n            raise UserError(\n"
        '                f"lora_target_param',
        f"{TARGETS}::TestExperts::test_an_entry_that_matches_nothing_is_refused",
    ),
    "an unfrozen parameter that matches nothing": Guard(
        "engine/plan/targets.py",
        '        if not matches:\n            raise UserError(\n                f"unfrozen',
        "        if not matches:\n            continue\n            raise UserError(\n"
        '                f"unfrozen',
        f"{LORA}::TestWhatIsTrained::test_an_unfrozen_parameter_that_matches_nothing_is_refused",
    ),
    "an adapter on other modules than were chosen": Guard(
        "engine/train/lora.py",
        "    if reached != chosen:",
        "    if False:",
        f"{LORA}::test_a_model_that_is_not_built_as_described_is_refused",
    ),
    "targets inside the language model": Guard(
        "engine/catalog/modules.py",
        'if row.group in ("attention", "mlp") and row.quantizable',
        'if row.group in ("attention", "mlp", "vision") and row.quantizable',
        f"{VISION}::TestWhatIsTrained::test_adapter_spares_the_tower",
    ),
    "an expression for PEFT inside the language model": Guard(
        "engine/train/lora.py",
        "re.escape(name)) for name in names})",
        '".*" + re.escape(name.rpartition(".")[2])) for name in names})',
        f"{LORA}::test_the_expression_for_all_layers_covers_them_and_nothing_else",
    ),
    "a full fine-tune freezes tower and projector": Guard(
        "engine/plan/targets.py",
        "if row.group not in VISION.values()]",
        "if row.group]",
        f"{VISION}::TestWhatIsTrained::test_full_fine_tune_of_the_text",
    ),
    "a first step that reaches nothing": Guard(
        "engine/train/evaluate.py",
        'raise UserError(\n            "Nothing would be trained',
        'UserError(\n            "Nothing would be trained',
        "tests/train/test_evaluate.py::TestStart::test_run_that_trains_nothing_is_refused",
    ),
    "a dataset in which nothing is learned": Guard(
        "engine/data/prepare.py",
        "    prepared.refuse_if_nothing_learned(label_rule(config))\n",
        "",
        "tests/data/test_prepare.py::TestRefusals::test_nothing_learned",
    ),
    "rows beyond the length that teach nothing": Guard(
        "engine/data/prepared.py",
        "        if self.learned_tokens(rule):\n            return\n",
        "        return\n",
        "tests/data/test_prepared.py::TestSelect::test_nothing_left_is_refused",
    ),
    "FlashAttention is told where rows begin": Guard(
        "engine/train/attention.py",
        "        if attention_mask is not None:\n            options |= {",
        "        if False:\n            options |= {",
        f"{ATTENTION}::test_flash_attention_gets_where_rows_begin_in_a_batch_of_several_sequences",
    ),
    "every FlashAttention is told": Guard(
        "engine/train/attention.py",
        "AttentionInterface.register(name, hand_over_rows(flash_attention_forward))",
        "pass",
        f"{ATTENTION}::test_every_flash_attention_gets_the_rows",
    ),
    "a mask of padding is not ignored": Guard(
        "engine/train/attention.py",
        '        raise ValueError("rows are kept apart',
        '        ValueError("rows are kept apart',
        f"{ATTENTION}::test_a_mask_of_padding_is_an_error_rather_than_ignored",
    ),
    "image tokens agree with the images' grids": Guard(
        "engine/train/batches.py",
        "if (tokens[:whole].sum(), patches) != (of_images.sum(), found):",
        "if False:",
        f"{VISION}::TestImagesOfARow::test_tokens_that_do_not_fit_the_images",
    ),
    "tokenizer and model cut images alike": Guard(
        "engine/plan/trainer.py",
        "if (patch, merge, token) != (spec.patch, spec.merge, IMAGE_TOKEN):",
        "if False:",
        "tests/train/test_batches.py::TestRefusal::test_other_patch_sizes_are_refused",
    ),
    "images for a model that reads them": Guard(
        "engine/plan/trainer.py",
        "    if not vision:",
        "    if False:",
        "tests/train/test_batches.py::TestRefusal::test_a_text_model_is_refused",
    ),
    "a lone image of one token": Guard(
        "engine/train/forward.py",
        "if group == [[side, side]]:",
        "if False:",
        f"{VISION}::TestSameNumbers::test_lone_image_of_one_token",
    ),
    "no image from outside the dataset": Guard(
        "engine/data/rows.py",
        '            raise RowProblem(\n                f"The image {_short(name)} is outside',
        "            return Path(real)\n            raise RowProblem(\n"
        '                f"The image {_short(name)} is outside',
        "tests/data/test_rows.py::TestPlaces::test_nothing_outside_is_read",
    ),
    "no kernels from the hub": Guard(
        "engine/train/__init__.py",
        'sys.modules["kernels"] = None',
        'sys.modules["kernels_"] = None',
        "tests/train/test_fetch.py::test_no_kernel_import_and_no_hub_request",
    ),
    "no code from a model": Guard(
        "engine/catalog/architecture.py",
        'if key == "auto_map" and value:',
        "if False:",
        f"{ARCHITECTURE}::TestStrangersConfig::test_what_may_not_or_cannot_be_built_is_refused_by_name",
    ),
    "a model does not choose its kernels": Guard(
        "engine/catalog/architecture.py",
        "            if _KERNEL_KEY.match(key):",
        "            if False:",
        f"{MODEL}::TestWhoChoosesTheKernels::test_a_kernel_from_the_hub_is_refused",
    ),
    "a first loss worse than guessing is told": Guard(
        "engine/train/evaluate.py",
        "        if loss <= self._guessing:",
        "        if True:",
        "tests/train/test_evaluate.py::TestStart::test_a_loss_above_that_of_guessing_is_reported",
    ),
    "a loss that is no number ends the run": Guard(
        "engine/train/evaluate.py",
        "if not (math.isfinite(loss) and math.isfinite(norm)):",
        "if False:",
        "tests/train/test_process_ends.py::test_nan_loss_touches_no_weight",
    ),
    "small steps of a bfloat16 adapter are not lost": Guard(
        "engine/train/optim.py",
        "parameter.data = round_at_random(parameter.data)",
        "parameter.data = parameter.data.bfloat16()",
        "tests/train/test_optim.py::TestBfloat16Adapter"
        "::test_steps_far_below_the_spacing_shift_the_mean",
    ),
    "nothing of an image is learned": Guard(
        "engine/chat/render.py",
        "Kind.TOOL_RESULT]] = rule.inputs",
        "Kind.TOOL_RESULT, Kind.IMAGE]] = rule.inputs",
        "tests/chat/test_differential.py::test_nothing_of_an_image_is_ever_learned",
    ),
    "what a row keeps out of the loss": Guard(
        "engine/chat/render.py",
        "_learned_by_kind(rule)[kinds]",
        "_learned_by_kind(rule)[kinds & ~np.uint8(WITHHELD)]",
        "tests/chat/test_render.py::test_a_rule_learns_its_kinds_and_nothing_withheld",
    ),
    "a save copies no state on the device": Guard(
        "engine/train/moments.py",
        "= Slice(value, start or 0,",
        "= Slice(value.clone(), start or 0,",
        f"{SAVING}::test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned",
    ),
    "a save holds one piece of a tensor": Guard(
        "engine/train/weight_files.py",
        "for part in cut(tensor.detach(), tensor.dtype.itemsize):",
        "for part in [tensor.detach()]:",
        f"{SAVING}::test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned",
    ),
    "a piece is given up before the next one": Guard(
        "engine/train/weight_files.py",
        "                del piece, content  # or",
        "                pass  # or",
        f"{SAVING}::test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned",
    ),
    "a resume holds one piece of a tensor": Guard(
        "engine/train/slices.py",
        "for part in cut(out, self.entry.dtype.itemsize):",
        "for part in [out]:",
        f"{SAVING}::test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned",
    ),
    "a finished model is written piece by piece": Guard(
        "engine/train/slices.py",
        "        yield from in_pieces(local_part(tensor))",
        "        yield local_part(tensor).cpu()",
        f"{SAVING}::test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned",
    ),
    "a batch is made in its step's time": Guard(
        "engine/train/loop.py",
        "            self.step_clock.start()\n            number, batch = next(batches)\n",
        "            number, batch = next(batches)\n            self.step_clock.start()\n",
        f"{SECONDS}::test_collating_and_the_optimizer_count",
    ),
    "a step ends when the card has moved the weights": Guard(
        "engine/train/loop.py",
        "            torch.cuda.synchronize(self._device)",
        "            pass",
        f"{SECONDS}::test_clock_is_read_after_the_update",
    ),
    "losses are read once a step": Guard(
        "engine/train/loop.py",
        "total += mean.detach()",
        "total += float(mean.detach())",
        f"{SECONDS}::test_no_forward_pass_waits_for_its_loss",
    ),
    "a file that does not read back": Guard(
        "engine/train/weight_files.py",
        "    if not same:\n",
        "    if False:\n",
        "tests/train/test_weight_files.py::test_a_file_that_does_not_read_back_is_an_error",
    ),
    "a file that ends while it is read": Guard(
        "engine/train/slices.py",
        "!= piece.nbytes:",
        "< 0:",
        "tests/train/test_weight_files.py::test_a_file_that_is_cut_while_it_is_read_is_refused",
    ),
    "cut-cross-entropy is tried before a run needs it": Guard(
        "engine/train/loss.py",
        " or _failed(head, device)",
        "",
        "tests/train/test_loss.py"
        "::test_a_run_without_a_compiler_trains_in_chunks_to_the_same_losses",
    ),
    "a head that is trained is never left to cut-cross-entropy": Guard(
        "engine/train/loss.py",
        "loss.cut and not head.requires_grad",
        "loss.cut",
        "tests/train/test_loss.py::test_a_head_that_is_trained_is_never_left_to_it",
    ),
    "a card's logits are not rounded to half precision": Guard(
        "engine/train/loss.py",
        "left.is_cuda and left.dtype != torch.float32",
        "False",
        f"{LOSS}::test_on_a_card_a_product_of_bfloat16_is_asked_for_in_float32",
    ),
    "the target's gradient joins in float32": Guard(
        "engine/train/loss.py",
        "product(logits.scatter_(1, target, 0.0).to(head.dtype), head)\n"
        "        grad.copy_(moved.addcmul_(of_target, head[targets].float()).div_(sums))",
        "product(logits.scatter_(1, target, of_target).to(head.dtype), head)\n"
        "        grad.copy_(moved.div_(sums))",
        f"{LOSS}::TestAtTheRealVocabulary::test_bfloat16_on_a_card",
    ),
    "gradients of ranks are added up, not averaged": Guard(
        "engine/train/shard.py",
        "        unit.set_gradient_divide_factor(1.0)  # of this unit alone, whatever is inside\n",
        "",
        f"{RANKS}::test_two_ranks_learn_what_one_learns[full]",
    ),
    "an image that only takes part changes nothing": Guard(
        "engine/train/forward.py",
        "nothing = nothing + 0.0 * seen",
        "nothing = nothing + seen",
        f"{RANKS}::test_two_ranks_learn_what_one_learns[tower and projector]",
    ),
    "every rank computes as often": Guard(
        "engine/train/batches.py",
        "in itertools.zip_longest(free, members):",
        "in zip(free, members, strict=False):",
        "tests/train/test_batches.py::TestRanks",
    ),
    "every rank calls the vision tower as often": Guard(
        "engine/train/batches.py",
        "for number in (each[turn] for each in self._all):",
        "for number in (self._own[turn],):",
        "tests/train/test_batches.py::TestRanks",
    ),
    "copies round at random by the same numbers": Guard(
        "engine/train/shard.py",
        "    if ranks.replicas == 1:\n        yield",
        "    if True:\n        yield",
        f"{RANKS}::test_copies_stay_one_model_where_weights_are_rounded_at_random",
    ),
    "a norm counts every rank's rows": Guard(
        "engine/train/loop.py",
        "    if ranks.shards > 1:\n        norm",
        "    if False:\n        norm",
        f"{RANKS}::test_two_ranks_learn_what_one_learns[full]",
    ),
    "gradients are added up once a step": Guard(
        "engine/train/loop.py",
        "last=not defer or turn == len(batch.micros)",
        "last=True",
        f"{RANKS}::test_gradients_are_added_up_once_a_step",
    ),
    "a head that was used is divided again": Guard(
        "engine/train/evaluate.py",
        "        put_head_away(model)\n",
        "",
        "tests/train/test_rank_runs.py::test_steps_and_evaluations_are_those_of_one",
    ),
    "a resumed run keeps the chunks of its loss": Guard(
        "engine/train/loop.py",
        "if 0 < position.loss_chunk_bytes < self.loss.chunk_bytes:",
        "if False:",
        "tests/train/test_checkpoint.py::TestRoundTrip::test_resume_keeps_the_smaller_chunks",
    ),
}


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest on the code in `folder`, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
    return subprocess.run(
        [*command, *tests],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code and its tests in a folder of their own."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_what_is_taken_out_is_still_there_and_so_is_its_test(guard: Guard) -> None:
    assert (ROOT / guard.file).read_text("utf-8").count(guard.text) == 1
    assert guard.text != guard.without
    file, *names = guard.test.split("[")[0].split("::")
    tests = (ROOT / file).read_text("utf-8")
    assert all(re.search(rf"(class|def) {name}\b", tests) for name in names), guard.test


@pytest.mark.slow
def test_with_all_guards_the_tests_pass(copy: Path) -> None:
    done = run_tests(copy, *sorted({guard.test for guard in GUARDS.values()}))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_without_the_guard_its_test_fails(copy: Path, guard: Guard) -> None:
    file = copy / guard.file
    whole = file.read_text("utf-8")
    file.write_text(whole.replace(guard.text, guard.without), "utf-8")
    try:
        done = run_tests(copy, guard.test)
    finally:
        file.write_text(whole, "utf-8")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert " failed" in done.stdout, done.stdout
