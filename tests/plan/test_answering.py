"""A model is asked with its weights alone, and refused where those do not fit."""

import pytest

from engine.errors import DOES_NOT_FIT, UserError
from engine.plan import estimate, refuse_answering
from engine.plan.answering import answering_bytes
from engine.units import GIB
from tests.support.machines import card, config, model, sized


def test_asking_takes_the_weights_and_the_adapter_but_no_step() -> None:
    asked, device = config(adapter="qlora"), card("RTX 4090")
    needed = answering_bytes(asked, model("ministral-3-8b"), device)
    assert needed < estimate(asked, model("ministral-3-8b"), device).device_bytes
    wide = answering_bytes(config(), model("ministral-3-8b"), device)
    assert wide == pytest.approx(8.92e9 * 2 * 1.03 + 0.55 * GIB, rel=0.03)
    assert needed < wide / 2


def test_a_model_that_does_not_fit_is_refused_with_figures() -> None:
    refuse_answering(config(), model("ministral-3-3b"), sized(9))
    with pytest.raises(UserError, match=r"8\.\d GiB are needed to ask it") as caught:
        refuse_answering(config(), model("ministral-3-3b"), sized(8))
    assert caught.value.exit_status == DOES_NOT_FIT
    assert "adapter: qlora" in caught.value.fix
