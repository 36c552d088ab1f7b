"""Makes presets/SCALING.md: large jobs on 1 to 64 cards, counted, beside published figures.

`python -m tests.make.scaling` writes the page; a test makes it anew and compares.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.catalog import read_architecture
from engine.config import RunConfig
from engine.hardware import assume
from engine.plan import Place, best_device, estimate
from engine.plan.duration import pace_of, paces_of
from engine.plan.layout import layout_of
from engine.plan.step import make_step
from engine.plan.traffic import traffic_of
from engine.report import VERDICT_MARKS
from engine.units import GIB

PAGE = Path(__file__).parents[2] / "presets" / "SCALING.md"
CARDS = (1, 2, 4, 8, 16, 64)
CARD, NODE = "H100 80GB HBM3", 8
ADAPTER: dict[str, Any] = {"adapter": "lora", "lora_r": 32, "lora_target_linear": True}
FULL: dict[str, Any] = {"adapter": None, "optimizer": "adamw_torch_fused"}
JOBS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Ministral 3 8B, all weights", "ministral-3-8b", FULL),
    ("Magistral Small 24B, all weights", "magistral-small-2506", FULL),
    ("Mistral Medium 3.5, LoRA", "mistral-medium-3.5", ADAPTER),
    ("Mistral Medium 3.5, all weights", "mistral-medium-3.5", FULL),
    ("Mistral Small 4, all weights", "mistral-small-4", FULL),
)
HEAD = """# What many cards make of a large job

Made by `python -m tests.make.scaling` from the plan's own formulas; no card was used. Bytes of one
rank and the sizes that its collectives are given are proved against the real models, really sharded
by the trainer among ranks that are not there (`make research`). Times follow from data sheets: 40 %
of the card's products, 80 % of its links, and no time for starting a collective; so read them as
what is possible, and the shares beside them as what the links cost.

{card}, {node} in a computer (NVLink 450 GB/s a card, 50 GB/s a card between computers), packed
sequences of 4,096 tokens, two of them at once, gradient checkpointing in every layer, one
micro-batch a step. FSDP2 shards over the cards of one computer, and over all where that is not
enough; further computers hold copies of their own (HSDP) where one holds a copy. needs: GiB of one
card, of the 75.7 that it can give. sent: GiB that a rank's collectives are given in a step:
gathered, scattered, added up over copies. Seconds and tokens are those of ranks that send while
they compute; efficiency is what a card does beside one that nobody waits for: from ranks that would
wait for all that is sent to those. What is published lies between (985 of 1,092 is 90 %).

"""
PUBLISHED = (
    ("system", "job", "cards", "tokens/s of a card"),
    ("---",) * 4,
    (
        "torchtitan",
        "Llama 3.1 8B, all weights, FSDP, 8,192 tokens, selective checkpointing",
        "8 H100",
        "5,762; compiled 6,667; float8 8,532",
    ),
    (
        "torchtitan (Trainy)",
        "Llama 3.1 8B, all weights, compiled, float8",
        "32; 64 H200",
        "10,938; 10,753",
    ),
    ("NeMo AutoModel", "Llama 3 70B, LoRA, TP 2 x FSDP", "8; 16 H100", "1,092; 985"),
    ("NeMo AutoModel", "Llama 3 70B, pre-training, CP 2 x FSDP 32, 8,192 tokens", "64 H100", "867"),
    ("NeMo AutoModel", "GPT-OSS 120B (5B at work), all weights, FSDP 64", "64 H100", "7,626"),
)
SOURCES = """
torchtitan's benchmarks/llama3_h100_202412 and ..._trainy-whitefiber, AutoModel's
docs/performance-summary.mdx. None is of these models: Medium 3.5 has 1.8 times the weights of
Llama 3 70B, and full checkpointing computes a third more than none.
"""
COLUMNS = (
    *("cards", "sharded over", "needs", "verdict", "sent in a step", "seconds a step"),
    *("tokens/s of a card", "efficiency"),
)


def _line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n"


def layout_for(keys: dict[str, Any], name: str, cards: int) -> RunConfig:
    """The config with copies in as few computers as hold one."""
    common = {
        "base_model": name,
        "bf16": True,
        "sequence_len": 4096,
        "micro_batch_size": 2,
        "sample_packing": True,
        "gradient_checkpointing": True,
    }
    found = RunConfig.model_validate(common | keys)
    for shard in sorted({min(cards, NODE), cards}):
        sharded: dict[str, Any] = {"dp_shard_size": shard, "dp_replicate_size": cards // shard}
        config = RunConfig.model_validate(common | keys | (sharded if cards > 1 else {}))
        found = config
        if estimate(config, place_of(name, cards)).verdict == "fits":
            break
    return found


def place_of(name: str, cards: int) -> Place:
    """A model on so many cards, as many in a computer as it has."""
    text = f"{-(-cards // NODE)} x {min(cards, NODE)} x {CARD}"
    return Place(read_architecture(name), best_device(assume(text)))


def _rows(name: str, keys: dict[str, Any]) -> Iterator[str]:
    for cards in CARDS:
        config, place = layout_for(keys, name, cards), place_of(name, cards)
        layout = layout_of(config)
        assert layout
        needs, step = estimate(config, place), make_step(config, place)
        sent = traffic_of(step, layout)
        gathered = sent.gathered_forward + sent.gathered_backward
        sizes = " + ".join(f"{size / GIB:,.1f}" for size in (gathered, sent.scattered, sent.summed))
        paces = paces_of(config, place)
        alone = pace_of(layout_for(keys, name, 1), place_of(name, 1))
        assert paces
        assert alone
        pace, shares = paces[0], [each / cards / alone for each in paces]
        seconds = step.tokens * config.gradient_accumulation_steps * layout.readers / pace
        over = f"{layout.shard} x {layout.replicate}" if layout.replicate > 1 else f"{layout.shard}"
        fits = needs.verdict != "does not fit"
        columns = (
            f"{cards}",
            over,
            f"{needs.device_bytes / GIB:,.1f}",
            f"{VERDICT_MARKS[needs.verdict]} {needs.verdict}",
            sizes if cards > 1 else "-",
            f"{seconds:.2f}" if fits else "-",
            f"{pace / cards:,.0f}" if fits else "-",
            f"{shares[1]:.0%} to {shares[0]:.0%}" if fits else "-",
        )
        yield _line(columns)


def page() -> str:
    """The whole of presets/SCALING.md."""
    parts = [HEAD.format(card=CARD, node=NODE)]
    for title, name, keys in JOBS:
        parts += [f"## {title}\n\n", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        parts += [*_rows(name, keys), "\n"]
    parts += ["## Published figures of comparable jobs\n\n", *map(_line, PUBLISHED), SOURCES]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
