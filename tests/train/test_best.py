"""With `load_best_model_at_end` a run ends with its best model, and with that one's figures."""

from pathlib import Path

import pytest

from engine.events import Eval, Score
from engine.runs import Follower
from engine.train.batches import Rows
from engine.train.checkpoint import trained_tensors
from tests.support.tiny import settings, training, wake_adapter


def test_last_figures_are_of_the_best_model(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "max_steps": 9, "learning_rate": 0.03}
    config = settings(ministral, **keys, load_best_model_at_end=True)
    run = training(tmp_path, config, uneven, {"validation": uneven})
    for number in range(1, 9):
        run.step(number, run.order.step(number))
    assert run.evaluate()
    run.save()
    best = {name: tensor.clone() for name, tensor in trained_tensors(run.model).items()}
    wake_adapter(run.model)  # forgets what it has learned
    run.position.step = 9
    assert not run.evaluate()
    run.finish([])
    events = [recorded.event for recorded in Follower(run.session.run.events).read()]
    at_best, worse = (event.loss for event in events if isinstance(event, Eval))
    assert at_best < worse
    *_, last = (event.loss for event in events if isinstance(event, Score))
    assert last == pytest.approx(at_best, abs=1e-6)
    result = trained_tensors(run.model)
    assert all(result[name].equal(tensor) for name, tensor in best.items())
