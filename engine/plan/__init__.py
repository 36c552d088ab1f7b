"""Whether a run fits and what to run, before anything is loaded.

Everything here is arithmetic over the catalog's module table, the machine and the counts of a
dataset: `memory` estimates a config from the `step` and the `layers` that it runs, `targets` counts
what its adapter lands on, `attention` chooses a backend, `recommend` makes a whole config with a
reason for every value and compares the models of the catalog, `savers` is the table of all that
makes a run need less, by which `ladder` makes one fit, `remarks` says what a config does less of
than it seems to and what cannot be done here. `trainer` holds what the trainer itself runs by.
"""

from engine.data.statistics import Statistics
from engine.plan.attention import Attention, Heads, Task, choose_attention, heads_of
from engine.plan.device import Device, Place, best_device, cpu_device, device_document, gpu_device
from engine.plan.duration import Duration, expected_duration
from engine.plan.ladder import (
    Alternative,
    alternative_document,
    changed,
    describe_faster,
    list_alternatives,
    make_faster,
    make_fit,
    next_rung,
)
from engine.plan.memory import Peer, compare_peer, estimate
from engine.plan.recommend import (
    LengthPrice,
    Prospect,
    Recommendation,
    advice_document,
    assess,
    price_lengths,
    propose,
    recommend,
    survey,
)
from engine.plan.remarks import Goal, refuse_answering, remarks
from engine.plan.savers import SAME_RESULT
from engine.plan.step import AXOLOTL, WEIGHTS
from engine.plan.verdict import (
    Estimate,
    Verdict,
    estimate_document,
    lacks_cards,
    misses,
    plan_document,
)
