"""The values of a recommended config, chosen one after another, each with its reason.

Rules, each from published practice: all linear layers get an adapter (Thinking Machines, "LoRA
without regret": attention alone learns less at an equal size), rank 16 or 32 on small data
(Unsloth's guide, the QLoRA paper's settings), a learning rate by method and size, small batches
(adapters lose more in large ones: the same note), 1 to 3 epochs, 5 to 10 % held out, a warmup of
5 %, the best save kept as a guard against learning by heart. Memory decides the rest: a value grows
only while the estimate still says `fits`. A recipe that ships for the very model and dataset goes
before the rules.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from math import ceil
from typing import Any

from engine.catalog import Architecture, ModelCard
from engine.config import SHARDED_OPTIMIZERS, DatasetConfig, RunConfig, read_config
from engine.data.statistics import Statistics, count_held_out
from engine.plan.attention import Attention, choose_attention, task_of
from engine.plan.device import Place
from engine.plan.duration import count_steps, expected_duration, pace_of
from engine.plan.ladder import learning_rate, make_faster, make_fit
from engine.plan.layers import largest_image_tokens
from engine.plan.layout import ONE, Layout
from engine.plan.memory import estimate
from engine.plan.remarks import Goal
from engine.plan.savers import BUSY_TOKENS, IN_RAM, SLOW, in_use
from engine.plan.targets import linear_endings
from engine.plan.verdict import Estimate
from engine.units import counted, gib, spoken

TOKENS_AT_ONCE = 8192
"""Beyond this a GPU is busy anyway, and activations only cost memory."""
TOKENS_A_STEP = 32768
UPDATES_AN_EPOCH = 30
"""Fewer leave the learning rate no room to fall."""
CHECKPOINTED_MODEL = 10**9
LOST_SECONDS = 1800
"""Between two saves at most, where the pace is known: what a power cut may cost."""
MOST_SAVES, LEAST_SAVES = 8, 2
"""Of an epoch; each comes with an evaluation."""
OUTLIER = 2
"""Rows of more than twice the 99th percentile's tokens do not decide the length of a sequence."""
USUAL_LENGTHS = {"text": 2048, "vision": 2048, "tools": 4096, "think": 8192}
"""Until the rows are counted: most conversations; with tools and their results; with thoughts."""

_EITHER_OR = (
    {"warmup_ratio", "warmup_steps"},
    {"saves_per_epoch", "save_steps", "save_strategy"},
    {"evals_per_epoch", "eval_steps", "eval_strategy"},
    {"val_set_size", "test_datasets"},
    {"lora_target_linear", "lora_target_modules"},
    {"gradient_accumulation_steps", "batch_size"},
)
"""Keys that say the same thing in other ways: where the person chose one, none is advised."""
RANKS = {"does not fit": 0, "tight": 1, "fits": 2}

_REASON = re.compile(r"^(\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)

_OF_THE_MODEL = (
    *("lora_r", "lora_alpha", "lora_target_linear", "optimizer", "learning_rate"),
    *("lr_scheduler", "cosine_min_lr_ratio", "adam_beta2", "weight_decay", "bf16"),
)
"""Keys that suit the model whatever it learns; whether 4 bits are needed is memory's to say."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The values of a shipped config, and the comments beside them."""

    values: Mapping[str, object]
    reasons: Mapping[str, str]
    whole: bool
    """Whether it is for the very dataset; else only what depends on the model is here."""


@dataclass(slots=True)
class Choice:
    """The values chosen so far, each with its reason."""

    place: Place
    dataset: DatasetConfig | None
    fixed: dict[str, object] = field(default_factory=dict)
    """Values that the person chose."""
    images: bool = False
    """Whether the rows have images."""
    goal: Goal = "text"
    may_offload_layers: bool = True
    """Whether layers may be offloaded to make the plan fit, which can take many times as long."""
    layout: Layout = ONE
    """Over which cards it is laid."""
    values: dict[str, Any] = field(default_factory=dict, init=False)
    reasons: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def known(self) -> Statistics | None:
        return self.place.statistics

    @property
    def card(self) -> ModelCard | None:
        return self.place.architecture.card

    @property
    def on_gpu(self) -> bool:
        return self.place.device.kind == "cuda"

    @property
    def attention(self) -> Attention:
        task = task_of(self.config(), self.place.architecture, self.place.device, self.images)
        return choose_attention(self.place.device, task)

    def put(self, key: str, value: object, reason: str) -> None:
        """Advise a value, unless the person chose it or said the same in another way."""
        said = {other for group in _EITHER_OR if key in group for other in group}
        sharded = self.layout.shard > 1 or self.fixed.get("fsdp_config") is not None
        if key == "optimizer" and sharded:
            value = SHARDED_OPTIMIZERS.get(str(value), value)
        if key not in self.fixed and not any(self.fixed.get(other) for other in said):
            self.values[key], self.reasons[key] = value, reason

    def config(self, **trial: object) -> RunConfig:
        """The config of the values so far, with `trial` in place of some and `fixed` over all."""
        data = {"datasets": [self.dataset]} if self.dataset else {}
        chosen = {**self.values, **trial, **self.fixed}
        return RunConfig.model_validate(
            {"base_model": self.place.architecture.name} | data | chosen
        )

    def needs(self, **trial: object) -> Estimate:
        return estimate(self.config(**trial), self.place)

    def fits(self, trial: Mapping[str, object]) -> bool:
        return self.needs(**trial).verdict == "fits"

    def largest(self, key: str, values: tuple[Any, ...], **others: Callable[[Any], object]) -> Any:
        """The first of `values` with which the plan fits, else the last."""
        for value in values:
            if self.fits({key: value} | {other: make(value) for other, make in others.items()}):
                return value
        return values[-1]

    def lay_out(self) -> None:
        """The keys of the layout; `settle_layout` says why."""
        if self.layout.shard > 1:
            self.put("fsdp_version", 2, "the one that PyTorch maintains")
            whole = {"reshard_after_forward": True}
            self.put("fsdp_config", whole, "a layer is whole on a card only while it works")
            self.put("dp_shard_size", self.layout.shard, "")
        if self.layout.replicate > 1:
            self.put("dp_replicate_size", self.layout.replicate, "")
        elif self.layout == ONE and self.place.device.unused:
            self.put("dp_replicate_size", 1, "one card was picked; without it all would be used")
        elif self.layout == ONE and (cards := self.place.device.cards) > 1:
            why = "leave few updates an epoch or be no faster"
            self.put("dp_replicate_size", 1, f"one of {cards} cards: a copy on each would {why}")

    def waits(self) -> bool:
        """Whether each step waits for weights that lie in this computer's memory."""
        return any(saver.slow for saver in in_use(self.config()))

    def settle_layout(self, alone: "Choice") -> None:
        """The reasons of the layout; `alone` is what would be chosen for one card."""
        device, pace = self.place.device, pace_of(self.config(), self.place)
        speed = f", about {pace:,.0f} tokens a second together" if pace else ""
        copies = f"{self.layout.replicate} copies learn side by side{speed}"
        if self.reasons.get("dp_shard_size") == "":
            needs = alone.needs()
            needed = f"one card would need {gib(needs.device_bytes)}"
            if needs.verdict == "fits" and alone.waits():
                needed = "on one card each step would wait for weights in this computer's memory"
            where = "all cards" if self.layout.shard >= device.cards else "the cards of a computer"
            held = f"a copy is held by {where} together"
            rest = speed if self.layout.replicate == 1 else ""
            self.reasons["dp_shard_size"] = f"{needed}; {held}{rest}"
            copies += ": only gradients go between computers"
        else:
            copies += ": each card holds a whole one"
        if self.reasons.get("dp_replicate_size") == "":
            self.reasons["dp_replicate_size"] = copies

    def follow(self, recipe: Recipe) -> None:
        for key, value in recipe.values.items():
            self.put(key, value, recipe.reasons.get(key, "of the recipe that ships"))

    def method(self) -> None:
        """Adapters in the base's own precision where they fit, else over 4-bit weights."""
        small: dict[str, Any] = {
            "sequence_len": self._sequence_len()[0],
            "sample_packing": True,
            "gradient_checkpointing": True,
            "optimizer": "adamw_bnb_8bit",
        }
        four_bit: dict[str, Any] = {"adapter": "qlora", "load_in_4bit": True}
        if self._has_experts() and self.fixed.get("adapter", "qlora") == "qlora":
            self.put(
                "lora_target_modules",
                linear_endings(self.place.table),
                "attention and shared experts",
            )
            four_bit["quantize_moe_experts"] = True
        if "adapter" in self.fixed:
            if self.fixed["adapter"] == "qlora" and self._has_experts():
                self.put("quantize_moe_experts", True, "experts are most of the model")
            return
        whole = self.needs(adapter="lora", **small)
        packed = self.needs(**four_bit, **small)
        if whole.verdict == "fits" and not self._has_experts():
            saved = gib(whole.device_bytes - packed.device_bytes)
            reason = f"fits: 4-bit weights would save {saved} and are a little less exact"
            self.put("adapter", "lora", reason)
            return
        reason = f"16-bit weights would need {gib(whole.device_bytes)}"
        self.put(
            "adapter", "qlora", f"{reason}, {self._where()} can give {gib(whole.can_give_bytes)}"
        )
        self.put("load_in_4bit", True, f"weights in 4 bits: {gib(packed.device_bytes)} in all")
        if self._has_experts():
            self.put("quantize_moe_experts", True, "experts are most of the model")

    def rows(self) -> None:
        """How long a sequence is, and whether rows share one."""
        known = self.known
        length, reason = self._sequence_len()
        uneven = known is None or known.mean_tokens * 1.5 < known.longest_tokens
        waste = 0.0 if known is None else 1 - known.mean_tokens / max(1, known.longest_tokens)
        why = f"padding would waste {waste:.0%} of a batch" if known else "no padding is computed"
        why = why if uneven else "rows of nearly one length gain nothing"
        self.put("sample_packing", uneven, why)
        if self.place.table.total_parameters >= CHECKPOINTED_MODEL:
            self.put("gradient_checkpointing", True, "a third slower, a fraction of the memory")
        self.put("sequence_len", length, reason)
        least = {"lora_r": 16, "optimizer": "adamw_bnb_8bit", **self._offloading()}
        shorter = length
        while not self.fits(least | {"sequence_len": shorter}) and shorter > 1024:
            shorter //= 2
        # Where even the shortest does not fit, leaving rows out would be for nothing.
        if shorter < length and self.fits(least | {"sequence_len": shorter}):
            self.put("sequence_len", shorter, self._cut(shorter))

    def _offloading(self) -> dict[str, object]:
        """What makes room without leaving a row out: all that can be offloaded is."""
        config, quick = self.config(), (saver for saver in IN_RAM if not saver.slow)
        changes = (each for saver in quick for each in saver.changes(config, self.place, self.fits))
        return {key: value for _, keys, _ in changes for key, value in keys.items()}

    def adapter(self) -> None:
        if self.config().adapter is None:
            return
        rank = self.largest("lora_r", (32, 16), optimizer=lambda _: "adamw_bnb_8bit")
        other = self.needs(lora_r=48 - rank, optimizer="adamw_bnb_8bit").device_bytes
        here = self.needs(lora_r=rank, optimizer="adamw_bnb_8bit").device_bytes
        compared = f"16 saves {gib(here - other)}" if rank == 32 else f"32 adds {gib(other - here)}"
        self.put("lora_r", rank, f"room for a task like this; {compared}")
        self.put("lora_alpha", int(self.config().lora_r), "same as lora_r: a scale of 1")
        if not self._has_experts():
            self.put("lora_target_linear", True, "attention and MLP: attention alone learns less")

    def batch(self) -> None:
        exact = self.needs(optimizer="adamw_torch_fused")
        small = self.needs(optimizer="adamw_bnb_8bit")
        more = gib(exact.device_bytes - small.device_bytes)
        if exact.verdict == "fits" or not self.on_gpu:
            self.put("optimizer", "adamw_torch_fused", f"exact; 8-bit states would save {more}")
        else:
            self.put("optimizer", "adamw_bnb_8bit", f"states in 8 bits; adamw_torch adds {more}")
        length = int(self.config().sequence_len)
        most = TOKENS_AT_ONCE if self.on_gpu else 1024
        sizes = tuple(n for n in (8, 4, 2) if n * length <= most)
        micro = self.largest("micro_batch_size", (*sizes, 1))
        self.put("micro_batch_size", micro, "")  # `settle` says why
        self._accumulate()

    def _accumulate(self) -> None:
        known = self.known
        at_once = self.needs().tokens_at_once * self.layout.readers
        if known is None:
            steps = max(1, TOKENS_A_STEP // 2 // at_once)
            self.put("gradient_accumulation_steps", steps, f"{at_once * steps:,} tokens a step")
            return
        a_step = known.total_tokens / at_once
        steps = int(max(1, min(a_step / UPDATES_AN_EPOCH, TOKENS_A_STEP / at_once)))
        self.put("gradient_accumulation_steps", steps, "")

    def settle(self) -> None:
        key = "micro_batch_size"
        if self.reasons.get(key) == "":
            self.reasons[key] = self._why_no_more(self.values[key])
        key = "gradient_accumulation_steps"
        if self.reasons.get(key) == "":
            an_epoch = {"num_epochs": 1, "max_steps": None}
            config = self.config().model_copy(update=an_epoch)
            steps = count_steps(config, self.known, self.layout.readers)
            self.reasons[key] = f"{counted(steps or 1, 'update')} an epoch"

    def _why_no_more(self, micro: int) -> str:
        """Why twice as many sequences at once are not taken: memory, or that nothing is gained."""
        known = self.known
        if known and known.usable_rows <= micro:
            return f"all {counted(known.usable_rows, 'row')} at once"
        needs = self.needs(micro_batch_size=2 * micro)
        if needs.verdict != "fits":
            return f"{2 * micro} would need {gib(needs.device_bytes)}"
        at_once = self.needs().tokens_at_once
        if self.on_gpu and at_once < BUSY_TOKENS:  # chosen before room was made
            return f"{2 * micro} would fit too, with {gib(needs.device_bytes)}"
        return f"{at_once:,} tokens at once keep {self._where()} busy"

    def optimization(self) -> None:
        whole, total = self.config().adapter is None, self.place.table.total_parameters
        self.put("learning_rate", *learning_rate(total, whole=whole))
        rows = self.known.usable_rows if self.known else None
        if rows is None:
            self.put("num_epochs", 2, "1 to 3 is usual")
        else:
            epochs = 3 if rows < 1000 else 2 if rows < 10_000 else 1
            why = {3: "are few", 2: "are enough for two passes", 1: "need no second pass"}[epochs]
            self.put("num_epochs", epochs, f"{rows:,} rows {why}")
        self.put("warmup_ratio", 0.05, "the first steps are the least sure")
        self.put("weight_decay", 0.01, "usual")

    def habits(self) -> None:
        known = self.known
        if self.images:
            self.put("processor_type", "AutoProcessor", "rows have images; Axolotl needs it too")
        if known and (known.usable_rows >= 40 or self.fixed.get("eval_steps")):
            share = 0.05 if known.usable_rows >= 1000 else 0.1
            held = count_held_out(share, known.usable_rows)
            self.put("val_set_size", share, f"{held:,} rows are held out, to see memorising")
        elif known:
            self.put("val_set_size", 0, f"{known.usable_rows} rows are too few to hold any out")
        else:
            self.put("val_set_size", 0.05, "some rows are held out, to see memorising")
        if known and known.thinking_tokens:
            learned = f"{known.thinking_tokens:,} tokens of thinking are learned"
            self.put("train_on_thinking", True, learned)
        if known and known.prompts:
            self.put("sample_prompts", known.prompts[:3], "answered before, during and after")
        if self.goal == "think" and self.card and self.card.thinking == "effort":
            reason = "rows that think are rendered as the model thinks: on request"
            self.put("chat_template_kwargs", {"reasoning_effort": "high"}, reason)

    def intervals(self) -> None:
        config = self.config()
        needed = expected_duration(config, self.place)
        epoch = needed.seconds / config.num_epochs if needed and not config.max_steps else 0.0
        saves = int(min(MOST_SAVES, max(LEAST_SAVES, ceil(epoch / LOST_SECONDS))))
        lost = f"about {spoken(epoch / saves)}" if epoch else f"1/{saves} of an epoch"
        self.put("saves_per_epoch", saves, f"a power cut costs {lost} at most")
        if config.val_set_size and self.known:
            self.put("evals_per_epoch", saves, "as often as it is saved, to see memorising")
            best = "the save with the lowest held-out loss counts, not the last one"
            self.put("load_best_model_at_end", True, best)

    def fit(self) -> None:
        """Take the rungs that lead to a better verdict; none changes what the person chose."""
        needed = self.needs()
        keep = {*self.fixed, *(() if self.may_offload_layers else SLOW)}
        rungs = make_fit(self.config(), self.place, keep=keep)
        if not rungs or RANKS[rungs[-1].estimate.verdict] <= RANKS[needed.verdict]:
            return
        for rung in rungs:
            for key, value in rung.changes.items():
                if self.values.get(key) != value:
                    without = gib(needed.device_bytes)
                    self.put(key, value, f"{rung.trade}; without it {without} would be needed")
            needed = rung.estimate

    def recomputation(self) -> None:
        """On a GPU every layer is computed once where there is room, elsewhere as many as fit.

        A GPU is busy with few tokens, so this comes before the rest of a micro-batch. This
        computer's own memory is not filled for it: other programs live there.
        """
        config = self.config()
        needed, micro, length = self.needs(), config.micro_batch_size, config.sequence_len
        asked = {"gradient_checkpointing", "checkpointed_layers"} & self.fixed.keys()
        asked |= {"activation_offloading"} if self.fixed.get("activation_offloading") else set()
        if asked or not self.on_gpu or needed.verdict != "fits":
            return
        busy = min(BUSY_TOKENS, micro * length)
        sizes = sorted({micro, *(n for n in (4, 2, 1) if n < micro and n * length >= busy)})
        if "micro_batch_size" in self.fixed:
            sizes = [micro]
        faster = make_faster(config, self.place, sizes=sizes)
        if faster is None:
            return
        count = faster.changes.get("checkpointed_layers")
        reason = f"{faster.trade}; all computed twice need {gib(needed.device_bytes)}"
        self.put("gradient_checkpointing", count is not None, reason)
        if count is not None:
            self.put("checkpointed_layers", count, "there is room to keep what the others compute")
        if "micro_batch_size" in faster.changes:
            size = faster.estimate.tokens_at_once
            why = f"{size:,} tokens keep a GPU busy, and more would leave less room for layers"
            self.put("micro_batch_size", faster.changes["micro_batch_size"], why)
            self._accumulate()
        else:
            self.put("micro_batch_size", micro, "")

    def _sequence_len(self) -> tuple[int, str]:
        known = self.known
        most = self.card.context_tokens if self.card else 2**18
        if known is None:
            image = largest_image_tokens(self.place.architecture) if self.images else 0
            if not image:
                usual = USUAL_LENGTHS[self.goal]
                reason = f"rows are not known yet; {usual} suits most of this kind"
                return min(usual, most), reason
            length = 1 << image.bit_length()
            return min(length, most), f"the largest image has {image:,} tokens"
        longest = known.longest_tokens
        odd = known.p99_tokens and longest > OUTLIER * known.p99_tokens
        held = known.p99_tokens if odd else longest
        least = 1024 if self.on_gpu else 128
        length = max(least, 1 << max(0, held - 1).bit_length())
        if length > most:
            return most, f"the model reads no more; {self._left_out(most)}"
        if longest > length:
            row = f"row {known.longest_row:,}" if known.longest_row else "the longest"
            reason = f"99 in 100 rows have at most {held:,} tokens and {row} {longest:,}"
            return length, f"{reason}; {self._left_out(length)}"
        return length, f"longest row has {longest:,} tokens, so none is left out"

    def _cut(self, length: int) -> str:
        cut = f"{2 * length:,} would not fit"
        return f"{cut}; {self._left_out(length)}" if self.known else cut

    def _left_out(self, length: int) -> str:
        assert self.known is not None
        over, more = self.known.rows_over(length)
        rows = f"{over:,}{' or more' if more else ''} of {self.known.usable_rows:,} rows"
        return f"{rows} are longer and left out"

    def _where(self) -> str:
        return "this card" if self.on_gpu else "this computer"

    def _has_experts(self) -> bool:
        return bool(self.place.table.counts_by_group()["experts"])


def find_recipe(architecture: Architecture, dataset: DatasetConfig | None) -> Recipe | None:
    """The recipe of a model that is made here; None for any other, and where it has none.

    Without a dataset, and with the recipe's own, it is whole.
    """
    card = architecture.card
    if card is None or card.repositories:
        return None
    with as_file(files("presets") / "recipes" / card.name / "lora.yml") as path:
        if not path.is_file():
            return None
        file = read_config(path)
        config, text = file.config, file.document.text
    whole = dataset is None or dataset.path == config.datasets[0].path
    values = {key: getattr(config, key) for key in config.file_values()}
    del values["base_model"]
    if not whole:
        values = {key: value for key, value in values.items() if key in _OF_THE_MODEL}
    return Recipe(values, dict(_REASON.findall(text)), whole)
