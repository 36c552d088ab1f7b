"""The steps: from batches to moved weights, and everything that happens between two steps.

Thin on purpose. What is learned is decided by `batches`, what it costs by `loss`, what moves by
`optim`; here is only their order, and the arithmetic that makes every learned token of an optimizer
step weigh the same, however the step is cut into forward passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.errors import WorkError
from engine.events import Ended, Eval, Note, Phase, Sample, SampleTime, Saved, Score, Step
from engine.train.batches import Order, Rows, StepBatch
from engine.train.checkpoint import Checkpoints, Position
from engine.train.evaluate import mean_loss, score, score_all
from engine.train.forward import Model, head_of, hidden_states
from engine.train.generate import generate, readable
from engine.train.loss import summed_cross_entropy
from engine.train.meter import Meter, peak_memory_bytes
from engine.train.model import Base
from engine.train.optim import build_optimizer, learning_rate, set_learning_rate
from engine.train.session import Session
from engine.train.weights import export_trained, load_trained, trained_parameters

SAMPLE_TOKENS = 256
"""Longest answer of a sample: enough for a first look, and what a model that never stops costs."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question that is asked before, during and after."""

    text: str
    tokens: tuple[int, ...]


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
    ) -> None:
        self.base, self.model, self.config, self.session = base, model, config, session
        self.rows, self.held_out, self.tokenizer = rows, held_out, tokenizer
        self.order = Order(rows, config)
        self.parameters = [p for _, p in trained_parameters(model)]
        self.optimizer = build_optimizer(trained_parameters(model), config)
        self.checkpoints = Checkpoints(session.run.checkpoints, config)
        self.position = Position(fingerprint=self.order.fingerprint())
        self.meter = Meter()
        self._saved_step = -1

    def restore(self, name: str | None) -> None:
        """Go back to the checkpoint `name`, else to the newest one, where there is one."""
        folder = self.checkpoints.root / name if name else self.checkpoints.latest()
        if folder is None:
            self.session.emit(Note("info", "there is no checkpoint: the run begins at step 1"))
            return
        position = self.checkpoints.load(folder, self.model, self.optimizer)
        if position.fingerprint != self.position.fingerprint:
            raise WorkError(
                f"The run cannot go on from {folder.name}.",
                "The rows, the batch size, the packing or the seed are others than when it was "
                "saved, so the rest would repeat some rows and skip others.",
                "Undo the change, or start a new run with another output_dir.",
            )
        self.checkpoints.go_on_from(folder, position)
        self.position = position
        self._saved_step = position.step

    def fit(self, prompts: Sequence[Prompt]) -> None:
        """Train to the last step, or to a stop; ends with the `ended` event."""
        self.model.train()
        if self.position.step == 0 and not self.session.stopping:
            self.sample(prompts, "before")
            self.evaluate()
        steps_per_epoch, last = self.order.steps_per_epoch(), self.order.total_steps
        every_eval = eval_interval(self.config, steps_per_epoch)
        every_save = save_interval(self.config, steps_per_epoch)
        for number, batch in self.order.steps(self.position.step):
            self.between_steps(prompts)
            if self.session.stopping:
                break
            self.step(number, batch)
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
            self.session.read()
            if self.session.wished("save"):
                self.save()
                self.session.grant("save")
            if self.session.wished("sample"):
                self.sample(prompts, "during")
                self.session.grant("sample")
            if not self.session.paused or self.session.stopping:
                return
            self.session.rest()

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """The last answers, and the finished adapter or model."""
        if self.config.load_best_model_at_end:
            self._go_to_best()
        self.sample(prompts, "after")
        self.session.emit(Phase("export"))
        run = self.session.run
        exported = export_trained(self.model, run.path, self.session.base_folder, self.config)
        self.session.emit(Saved(self.position.step, exported.name))
        self.session.emit(Ended("finished", self.position.step))

    def step(self, number: int, batch: StepBatch) -> None:
        """One optimizer step and its event."""
        self.meter.start()
        rate = learning_rate(number, self.order.total_steps, self.config)
        set_learning_rate(self.optimizer, rate)
        loss, norm = self.gradients(batch)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(number, loss, norm, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds, speed = self.meter.stop(batch.tokens)
        self.position.step = number
        self.position.tokens += batch.tokens
        self.session.emit(
            Step(
                step=number,
                epoch=batch.epoch,
                loss=loss,
                learned_tokens=batch.learned_tokens,
                tokens=batch.tokens,
                lr=rate,
                grad_norm=norm,
                seconds=seconds,
                tokens_per_second=speed,
                peak_memory_bytes=peak_memory_bytes(self.base.device),
                total_steps=self.order.total_steps,
            )
        )

    def gradients(self, batch: StepBatch) -> tuple[float, float]:
        """Fill the gradients of one optimizer step; returns its loss and gradient norm.

        The loss is the mean over all learned tokens of the step, the norm is the one before
        clipping to `max_grad_norm`.
        """
        total = 0.0
        for micro in batch.micros:
            tensors = micro.to(self.base.device)
            loss = summed_cross_entropy(
                hidden_states(self.model, tensors), head_of(self.model), tensors["labels"]
            )
            mean = loss / max(1, batch.learned_tokens)
            mean.backward()
            total += float(mean.detach())
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit else math.inf)
        return total, float(norm)

    def evaluate(self) -> bool:
        """Score the held-out rows; True when their loss is the lowest so far."""
        if not self.held_out:
            return False
        self.session.emit(Phase("evaluate", 0, len(self.held_out)))
        step = self.position.step
        scores = score_all(self.model, self.base, self.held_out, self.config)
        if self.config.eval_train_rows and step in (0, self.order.total_steps):
            seen = self.rows.first(self.config.eval_train_rows)
            result = score(self.model, self.base, seen, self.config)
            self.session.emit(Score(step, "train", result.loss, result.exact, result.rows))
        for name, result in scores.items():
            self.session.emit(Score(step, name, result.loss, result.exact, result.rows))
        loss = mean_loss(scores)
        self.session.emit(Eval(step, loss))
        best = self.position.best_loss
        if step == 0 or not math.isfinite(loss) or (best is not None and loss >= best):
            return False
        self.position.best_loss, self.position.best_step = loss, step
        return True

    def sample(self, prompts: Sequence[Prompt], when: SampleTime) -> None:
        """Let the model answer every prompt, greedily."""
        for prompt in prompts:
            tokens = generate(
                self.model,
                self.base.device,
                prompt.tokens,
                end=self.tokenizer.specials.eos,
                max_new_tokens=SAMPLE_TOKENS,
            )
            text = readable(tokens, self.tokenizer)
            self.session.emit(Sample(self.position.step, prompt.text, text, when))

    def save(self) -> None:
        """Write a checkpoint of the present step, once."""
        if self._saved_step == self.position.step:
            return
        self.session.emit(Phase("save", detail=f"step {self.position.step}"))
        folder = self.checkpoints.save(self.model, self.optimizer, self.position)
        self._saved_step = self.position.step
        self.session.emit(Saved(self.position.step, f"checkpoints/{folder.name}"))

    def _go_to_best(self) -> None:
        folder = self.checkpoints.best()
        if folder is not None and self.position.best_step != self.position.step:
            load_trained(self.model, folder)
            self.session.emit(Note("info", f"ends with {folder.name}, the lowest evaluation loss"))

    def _diverged(self, number: int, loss: float, norm: float, batch: StepBatch) -> WorkError:
        rows = "; ".join(self.rows.place(row) for row in batch.rows[:8])
        self.session.emit(Note("error", f"step {number}: loss {loss}, gradient norm {norm}"))
        return WorkError(
            f"Step {number} gave a loss of {loss:g} and a gradient norm of {norm:g}.",
            f"The weights were not touched by it. Its first rows: {rows}.",
            "Look at those rows with `windtunnel preview`, or lower learning_rate; the run "
            "resumes from its last checkpoint.",
        )


def eval_interval(config: RunConfig, steps_per_epoch: int) -> int | None:
    """Optimizer steps between two evaluations inside the run; None: only before and after."""
    if config.eval_strategy == "no":
        return None
    if config.eval_strategy == "epoch":
        return steps_per_epoch
    return _interval(config.eval_steps, config.evals_per_epoch, steps_per_epoch)


def save_interval(config: RunConfig, steps_per_epoch: int) -> int | None:
    """Optimizer steps between two saves; None: only at the end, at a stop and at a best loss."""
    if config.save_strategy in ("no", "best"):
        return None
    if config.save_strategy == "epoch":
        return steps_per_epoch
    return _interval(config.save_steps, config.saves_per_epoch or 1, steps_per_epoch)


def _interval(steps: int | None, per_epoch: int | None, steps_per_epoch: int) -> int | None:
    if steps is not None:
        return steps
    return max(1, round(steps_per_epoch / per_epoch)) if per_epoch else None
