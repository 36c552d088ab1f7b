"""The keys of what a run leaves behind: its folder, saves, evaluations, samples, trackers."""

from typing import Literal

from engine.config.section import Count, Section, Whole


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
