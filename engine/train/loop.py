"""The steps: from batches to updated weights, and everything that happens between two steps.

Thin on purpose. What is learned is decided by `batches`, what it costs by `loss`, the update by
`optim`; here is their order, and the arithmetic that makes every learned token of a step weigh the
same however it is cut. What is told and what is asked for goes through `session`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch.optim import Optimizer

from engine.catalog.cards import GREEDY, Sampling
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.errors import WorkError
from engine.events import (
    Ended,
    Eval,
    Phase,
    Sample,
    SampleTime,
    Saved,
    Score,
    Step,
)
from engine.plan.trainer import SAMPLE_TOKENS
from engine.publish.hub import publish_result
from engine.runs.folder import list_checkpoints
from engine.train.batches import NAMED_ROWS, PAD, Order, Rows, StepBatch
from engine.train.checkpoint import (
    Checkpoints,
    export_trained,
    load_trained,
    restore_rng_state,
    rng_state,
    trained_parameters,
)
from engine.train.device import held_memory_bytes, peak_memory_bytes
from engine.train.evaluate import (
    LossAlarm,
    OverfittingAlarm,
    mean_loss,
    row_losses,
    score,
    score_all,
    unreached,
)
from engine.train.experts import balance_loss, balance_weight, watch_routers
from engine.train.forward import Model, head_module, head_of, hidden_states, use_head
from engine.train.generate import Prompt, generate, readable
from engine.train.loss import IN_CHUNKS, Loss, summed_cross_entropy
from engine.train.model import Base
from engine.train.offload import head_for_loss
from engine.train.optim import build_optimizer, learning_rate, set_learning_rate, take_step
from engine.train.out_of_memory import (
    OutOfMemory,
    describe,
    held_parts,
    in_a_step,
    is_out_of_memory,
)
from engine.train.ranks import LONE, Ranks
from engine.train.seal import Position, changes_since
from engine.train.session import Session
from engine.train.shard import (
    add_up,
    can_defer,
    local_parameters,
    same_in_replicas,
    sync_gradients,
    write_back,
)
from engine.train.text_metrics import TextMetrics
from engine.visible import visible

PAUSE_POLL_SECONDS = 0.2


class Training:
    """One run's state while it trains."""

    def __init__(
        self,
        base: Base,
        model: Model,
        rows: Rows,
        held_out: Mapping[str, Rows],
        config: RunConfig,
        session: Session,
        tokenizer: ChatTokenizer,
        text_metrics: TextMetrics | None = None,
        sampling: Sampling = GREEDY,
        loss: Loss = IN_CHUNKS,
    ) -> None:
        self.base, self.model, self.config, self.session = base, model, config, session
        self.rows, self.held_out, self.tokenizer = rows, held_out, tokenizer
        self.text_metrics, self.sampling, self.loss = text_metrics, sampling, loss
        self.ranks = session.ranks
        self.order = Order(rows, config, self.ranks)
        named = local_parameters(trained_parameters(model))
        self.parameters, self._named = [p for _, p in named], named
        self.optimizer = build_optimizer(named, config)
        write_back(self.optimizer, model)
        self.defer = can_defer(model, self.ranks)
        self.checkpoints = Checkpoints(
            session.run, config, partial(session.note, "warning"), self.ranks
        )
        self.position = Position(
            fingerprint=self.order.fingerprint(), loss_chunk_bytes=loss.chunk_bytes
        )
        self.step_clock = StepClock(base.device)
        self.alarm = LossAlarm(config, vocabulary=head_of(model).shape[0])
        self.overfitting = OverfittingAlarm()
        self._saved_step = -1
        self._resumed_at = 0

    def restore(self, name: str | None) -> None:
        """Go back to the checkpoint `name`, else to the newest whole one, where there is one."""
        found = self.checkpoints.find(name)
        if found is None:
            self.session.note("info", "there is no checkpoint: the run begins at step 1")
            return
        folder = found.folder
        position = self.checkpoints.load(found, self.model, self.optimizer)
        if position.fingerprint != self.position.fingerprint:
            raise WorkError(
                f"The run cannot go on from {folder.name}.",
                "The rows, the batch size, the packing or the seed are others than when it was "
                "saved, so the rest would repeat some rows and skip others.",
                "Undo the change, or start a new run with another output_dir.",
            )
        self.checkpoints.go_on_from(folder, position)
        for level, change in changes_since(found, self.config, self.session.fitted):
            self.session.note(level, change)
        if 0 < position.loss_chunk_bytes < self.loss.chunk_bytes:
            # Other chunks round otherwise, and a new plan may have found more room than the first.
            self.loss = replace(self.loss, chunk_bytes=position.loss_chunk_bytes)
        position.loss_chunk_bytes = self.loss.chunk_bytes
        self.position = position
        self._saved_step = self._resumed_at = position.step

    def fit(self, prompts: Sequence[Prompt]) -> None:
        """Train to the last step, or to a stop; ends with the `ended` event."""
        self.session.training = True
        self.model.train()
        self.session.agree()
        if self.position.step == 0 and not self.session.stopping:
            self.sample(prompts, "before")
            self.evaluate()
        config, epoch, last = self.config, self.order.steps_per_epoch(), self.order.total_steps
        every_eval = interval(
            config.eval_strategy, config.eval_steps, config.evals_per_epoch, epoch
        )
        saves = config.saves_per_epoch or 1
        every_save = interval(config.save_strategy, config.save_steps, saves, epoch)
        batches = self.order.steps(self.position.step)
        while self.position.step < last:
            self.between_steps(prompts)
            if self.session.stopping:
                break
            self.step_clock.start()
            number, batch = next(batches)
            self.try_step(number, batch)
            due = every_eval is not None and number % every_eval == 0 and number < last
            if due:
                self.sample(prompts, "during")
            better = (due or number == last) and self.evaluate()
            if better or number == last or (every_save and number % every_save == 0):
                self.save()
        if self.position.step < last:
            if self.position.step:
                self.save()
            self.session.emit(Ended("stopped", self.position.step))
        else:
            self.finish(prompts)

    def between_steps(self, prompts: Sequence[Prompt]) -> None:
        """Do what was asked for, and wait while the run is paused."""
        while True:
            self.session.agree()
            if self.session.wished("save"):
                self.save()
                self.session.grant("save")
            if self.session.wished("sample"):
                self.sample(prompts, "during")
                self.session.grant("sample")
            if not self.session.paused or self.session.stopping:
                return
            self.session.sleep(PAUSE_POLL_SECONDS)

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """The last answers, and the finished adapter or model."""
        best = self.checkpoints.best() if self.config.load_best_model_at_end else None
        if best is not None and self.position.best_step != self.position.step:
            load_trained(self.model, best, self.ranks)
            self.session.note("info", f"ends with {best.name}, the lowest evaluation loss")
            self.measure()  # the last figures of a run are those of its result
        self.sample(prompts, "after")
        self.session.emit(Phase("export"))
        run = self.session.run
        given = (self.model, run.path, self.session.base_folder, self.config, self.ranks)
        exported = export_trained(*given)
        for event in publish_result(run, exported, self.config) if self.ranks.is_first else ():
            self.session.emit(event)
        self.session.emit(Saved(self.position.step, exported.name))
        self.session.emit(Ended("finished", self.position.step))

    def try_step(self, number: int, batch: StepBatch) -> None:
        """One optimizer step; OutOfMemory, with what was held, where it did not fit."""
        try:
            self.step(number, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            held_bytes = held_memory_bytes(self.base.device)
            facts = describe(error, f"step {number}", held_bytes, self.session.run)
            base_bytes, adapted = self.base.report.held_bytes, self.config.adapter is not None
            held = held_parts(self.model.parameters(), self.optimizer, base_bytes, adapted=adapted)
            longest = self.rows.longest(batch.rows)
            # From nothing: the error's own frames hold the memory of the step.
            raise OutOfMemory(in_a_step(facts, number, held, longest)) from None

    def step(self, number: int, batch: StepBatch) -> None:
        """One optimizer step and its event; its time began when its batch was asked for."""
        rate = learning_rate(number, self.order.total_steps, self.config)
        set_learning_rate(self.optimizer, rate)
        loss, norm = self.gradients(batch)
        self.judge(number, loss, norm, batch)
        with same_in_replicas(self.ranks, self.config.seed + number):
            update_weights(self.optimizer)
        seconds, speed = self.step_clock.stop(batch.tokens)
        peaks, slowest = self._of_ranks()
        self.position.step = number
        self.position.tokens += batch.tokens
        self.overfitting.add_step(loss)
        self.session.emit(
            Step(
                step=number,
                epoch=batch.epoch,
                loss=loss,
                learned_tokens=batch.learned_tokens,
                tokens=batch.tokens,
                lr=rate,
                grad_norm=norm,
                grad_norm_clipped=min(norm, self.config.max_grad_norm),
                seconds=seconds,
                tokens_per_second=speed,
                peak_memory_bytes=max(peaks),
                total_steps=self.order.total_steps,
                rank_peak_bytes=peaks if len(peaks) > 1 else None,
                slowest_rank=slowest if len(peaks) > 1 else None,
                imbalance=batch.elsewhere.imbalance if len(peaks) > 1 else None,
            )
        )

    def _of_ranks(self) -> tuple[tuple[int, ...], int]:
        """Each rank's peak bytes, and the rank whose own passes of this step took longest."""
        own = torch.zeros(2, self.ranks.world_size, dtype=torch.float64)
        peak = peak_memory_bytes(self.base.device)
        own[:, self.ranks.rank] = torch.tensor([peak, self.step_clock.computed], dtype=own.dtype)
        peaks, seconds = self.ranks.sum(own)
        return tuple(map(int, peaks.tolist())), int(seconds.argmax())

    def gradients(self, batch: StepBatch) -> tuple[float, float]:
        """`fill_gradients` of this run's model."""
        given = (self.model, self.parameters, batch, self.base.device, self.config, self.loss)
        computed = (lambda: None) if self.ranks.is_alone else self.step_clock.mark
        return fill_gradients(*given, self.ranks, defer=self.defer, computed=computed)

    def judge(self, number: int, loss: float, norm: float, batch: StepBatch) -> None:
        """Say what is odd about a step before it changes anything; WorkError ends the run."""
        if what := self.alarm.stop_reason(number, loss, norm):
            self.session.note("error", what)
            touched = "The weights were not touched by this step."
            if number == self._resumed_at + 1 > 1:
                raise WorkError(
                    what,
                    f"{touched} It is the first one after step-{self._resumed_at} was put back, "
                    "which is as it was saved: what differs is the config, this computer or its "
                    "packages, or it was saved on the way there.",
                    self._further_back(),
                )
            raise WorkError(
                what,
                f"{touched} Its rows with the highest loss: {self._highest(batch)}.",
                "Look at those rows with `windtunnel preview`, or lower learning_rate; the run "
                "resumes from its last checkpoint.",
            )
        if number == 1:
            self.session.note("warning", self.alarm.odd_start(loss))
            self.session.note("warning", unreached(self._named))
        usual = self.alarm.spike(loss)
        if usual is not None:
            leap = f"step {number}: the loss leapt to {loss:.2f} from {usual:.2f}"
            self.session.note("warning", f"{leap}; highest: {self._highest(batch)}")

    def evaluate(self) -> bool:
        """Score the held-out rows; True when their loss is the lowest so far."""
        step, scores = self.position.step, self.measure()
        if not scores:
            return False
        loss = mean_loss(scores)
        self.session.emit(Eval(step, loss))
        self.session.note("warning", self.overfitting.add_evaluation(loss, self.position.best_step))
        best = self.position.best_loss
        if step == 0 or not math.isfinite(loss) or (best is not None and loss >= best):
            return False
        self.position.best_loss, self.position.best_step = loss, step
        return True

    def measure(self) -> list[Score]:
        """Report what the model as it is says and how it scores; the held-out scores."""
        step = self.position.step
        total = sum(map(len, self.held_out.values()))
        if total:
            self.session.emit(Phase("evaluate", 0, total, "rows"))
        inside = 0 < step < self.order.total_steps
        for event in self.text_metrics.take(step, inside=inside) if self.text_metrics else ():
            self.session.emit(event)
        if not self.held_out:
            return []
        scores: list[Score] = []
        for name, rows in self.held_out.items():
            scores += score_all(self.model, self.base, {name: rows}, self.config, step, self.ranks)
            done = sum(each.rows for each in scores)
            self.session.emit(Phase("evaluate", done, total, "rows"))
        if self.config.eval_train_rows and not inside:
            seen = self.rows.first(self.config.eval_train_rows)
            given = (self.model, self.base, seen, self.config, step, "train")
            self.session.emit(score(*given, self.ranks))
        for each in scores:
            self.session.emit(each)
        return scores

    def sample(self, prompts: Sequence[Prompt], when: SampleTime) -> None:
        """Let the model answer every prompt as its makers advise, each from the same seed."""
        before = rng_state()
        for prompt in prompts:
            torch.manual_seed(self.config.seed)
            tokens = generate(
                self.model,
                self.base.device,
                prompt.tokens,
                images=prompt.images,
                end=self.tokenizer.specials.eos,
                max_new_tokens=self.sampling.max_tokens or SAMPLE_TOKENS,
                temperature=self.sampling.temperature or 0.0,
                top_p=self.sampling.top_p or 1.0,
                ranks=self.ranks,
            )
            text = readable(tokens, self.tokenizer)
            self.session.emit(Sample(self.position.step, prompt.text, text, when))
        restore_rng_state(before)

    def save(self) -> None:
        """Write a checkpoint of the present step, once."""
        if self._saved_step == self.position.step:
            return
        self.session.emit(Phase("save", detail=f"step {self.position.step}"))
        folder = self.checkpoints.save(self.model, self.optimizer, self.position)
        self._saved_step = self.position.step
        self.session.emit(Saved(self.position.step, f"checkpoints/{folder.name}"))

    def _further_back(self) -> str:
        """How to go on from before the checkpoint that was gone back to."""
        names = list_checkpoints(self.checkpoints.root)
        earlier = names[: names.index(f"step-{self._resumed_at}")]
        if not earlier:
            return "Start a new run with a lower learning_rate."
        shown = visible(str(self.session.run.path), one_line=True)
        return f"Go further back: `windtunnel resume {shown} --from {earlier[-1]}`."

    def _highest(self, batch: StepBatch) -> str:
        """The rows of a step with the highest losses, as a person finds them."""
        found = self.ranks.gather(row_losses(self.model, self.base, batch))
        losses = list(chain.from_iterable(found))
        losses.sort(key=lambda found: -found[1] if math.isfinite(found[1]) else -math.inf)
        named = (f"{self.rows.place(row)} ({loss:.2f})" for row, loss in losses[:NAMED_ROWS])
        return "; ".join(named)


class StepClock:
    """Seconds and tokens of each optimizer step, from making its batch to the update's end."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._started = clock()
        self.computed = 0.0
        """Seconds until this rank had done its passes of the step."""

    def start(self) -> None:
        """Begin a step: what came before it is not its time."""
        self._started = self._clock()

    def mark(self) -> None:
        """This rank's passes are asked for; a card may still be at them."""
        self.computed = self._clock() - self._started

    def stop(self, tokens: int) -> tuple[float, float]:
        """End a step when the device has done it; returns its seconds and its tokens a second.

        Waits for the optimizer alone, as the loss was read before the update.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = self._clock() - self._started
        return seconds, tokens / seconds if seconds > 0 else 0.0


def update_weights(optimizer: Optimizer) -> None:
    """Move the weights by their gradients, and drop those."""
    take_step(optimizer)
    optimizer.zero_grad(set_to_none=True)


def fill_gradients(
    model: Model,
    parameters: Sequence[torch.nn.Parameter],
    batch: StepBatch,
    device: torch.device,
    config: RunConfig,
    way: Loss,
    ranks: Ranks = LONE,
    *,
    defer: bool = True,
    computed: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Give the trained `parameters` the gradients of one optimizer step; its loss and their norm.

    The loss is the mean over all learned tokens of the step, on all ranks, without the routers'
    balance, the norm the one before clipping to `max_grad_norm`. Both are read at the end: a
    reading waits. With `defer` ranks add their gradients up once, else after each micro-batch;
    `computed` is called before they add up what they have. A lone rank adds bfloat16 gradients up
    in bfloat16, in half the memory: off by 0.2 % of their norm after 2 micro-batches, as where
    they are rounded once, by 0.3 % after 8 and by 0.8 % after 64 (tiny models, against float32).
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    weight = balance_weight(config)
    for turn, micro in enumerate(batch.micros, start=1):
        sync_gradients(model, last=not defer or turn == len(batch.micros))
        tensors = micro.to(device)
        with watch_routers(model, weight > 0) as routings:
            states = hidden_states(model, tensors, micro.tower_calls)
        with head_for_loss(head_module(model), states):
            sum_up = partial(summed_cross_entropy, labels=tensors["labels"], loss=way)
            mean = goal = use_head(model, states, sum_up) / max(1, batch.learned_tokens)
            if routings and micro.rows:
                balance = balance_loss(routings, tensors["input_ids"] != PAD)
                goal = mean + weight * balance / batch.passes
            if goal.requires_grad:  # where only the vision tower moves, text reaches nothing
                goal.backward()
        total += mean.detach()
    computed()
    add_up(model, parameters, ranks)
    norm = clip_gradients(parameters, config.max_grad_norm, ranks)
    found: tuple[float, float] = tuple(torch.stack([ranks.sum(total), norm.to(total)]).tolist())
    return found


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter], limit: float, ranks: Ranks = LONE
) -> torch.Tensor:
    """Shorten the gradients together to `limit` where they are longer; the norm from before.

    Summed up in float32: PyTorch's own norm of bfloat16 gradients has their eight bits. Each rank
    has its rows of a sharded model's, and all of another one's.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    device = parameters[0].device if parameters else None
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)
    if ranks.shards > 1:
        norm = ranks.sum_of_copy(norm.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def interval(
    strategy: str | None, steps: int | None, per_epoch: int | None, epoch: int
) -> int | None:
    """Optimizer steps between two evaluations or saves inside a run, whose epoch has `epoch`.

    None: evaluated only before and after, saved only at the end, at a stop and at a best loss.
    """
    if strategy in ("no", "best"):
        return None
    if strategy == "epoch":
        return epoch
    return steps if steps or not per_epoch else max(1, round(epoch / per_epoch))
