"""A plan as lines: its memory bar, its model, verdict, parts and time, what would make it fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.config import SHARDED_OPTIMIZERS, RunConfig, assignment
from engine.errors import UserError
from engine.hardware import assume, listed_gpus
from engine.plan import (
    WEIGHTS,
    Alternative,
    Device,
    Duration,
    Estimate,
    LengthPrice,
    Peer,
    Place,
    Recommendation,
    best_device,
    describe_faster,
    estimate,
    lacks_cards,
)
from engine.plan.memory import cards_needed
from engine.plan.trainer import refuse_bf16, why_float32
from engine.report import VERDICT_MARKS, Line
from engine.units import GIB, counted, gib, spoken

Role = Literal["weights", "trainable", "activations", "process", "spare", "over", "kept"]
_TRAINABLE = ("adapter", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of the bar, and its place in the legend."""

    glyph: str
    name: str
    size_bytes: int
    role: Role
    drawn_bytes: int
    """Of it on the bar: what lies beyond the device is drawn as over."""


def bar_parts(needs: Estimate, device: Device) -> list[Part]:
    """The stretches from left to right; the last is what the plan leaves to others.

    Where the plan does not fit, what is over stands in place of the spare.
    """
    room = needs.can_give_bytes

    def part(glyph: str, name: str, size: int, role: Role) -> Part:
        nonlocal room
        drawn = min(size, room)
        room -= drawn
        return Part(glyph, name, size, role, drawn)

    weights = sum(needs.parts.get(name, 0) for name in WEIGHTS)
    trainable = sum(needs.parts.get(name, 0) for name in _TRAINABLE)
    rest = needs.peak_allocated_bytes - weights - trainable
    parts = [
        part("█", "weights", weights, "weights"),
        part("▓", "adapter" if needs.targets else "training", trainable, "trainable"),
        part("▒", "activations", rest, "activations"),
        part(
            "░",
            "driver" if device.kind == "cuda" else "process",
            needs.device_bytes - needs.peak_allocated_bytes,
            "process",
        ),
    ]
    if needs.spare_bytes >= 0:
        parts.append(part("·", "spare", needs.spare_bytes, "spare"))
    else:
        over = -needs.spare_bytes
        parts.append(Part("!", "over by", over, "over", over))
    kept = max(0, device.total_bytes - needs.can_give_bytes)
    parts.append(Part("╱", "kept free", kept, "kept", kept))
    return parts


def share_cells(sizes: Sequence[int], cells: int) -> list[int]:
    """Cells for each size, in proportion, that add up to `cells`; the largest remainders win."""
    total = sum(sizes)
    if total <= 0:
        return [0] * len(sizes)
    exact = [size * cells / total for size in sizes]
    found = [int(each) for each in exact]
    order = sorted(range(len(sizes)), key=lambda at: found[at] - exact[at])
    for at in order[: cells - sum(found)]:
        found[at] += 1
    return found


def legend(parts: Sequence[Part], cells: int) -> list[tuple[Part, str]]:
    """Each part and the text behind its glyph, as many as fit `cells` cells, two blanks apart."""
    found: list[tuple[Part, str]] = []
    for part in parts:
        found.append((part, f" {part.name} {part.size_bytes / GIB:.1f}"))
    while found and sum(len(text) + 3 for _, text in found) - 2 > cells:
        found.pop()
    return found


def stretches(parts: Sequence[Part], cells: int) -> list[tuple[Part | None, str]]:
    """The bar in `cells` cells: each part's glyphs, and the mark where the device can give no more
    (its part is None)."""
    counts = share_cells([part.drawn_bytes for part in parts], cells - 1)
    limit = next((part for part in parts if part.role in ("over", "kept")), None)
    found: list[tuple[Part | None, str]] = []
    for part, count in zip(parts, counts, strict=True):
        if part is limit:
            found.append((None, "┃"))
        found.append((part, part.glyph * count))
    return found


def method(plan: Recommendation) -> str:
    """How the plan trains, as people call it."""
    return {"lora": "LoRA", "qlora": "QLoRA"}.get(plan.config.adapter or "", "all weights")


def size(parameters: int) -> str:
    """A number of parameters as people say it: 24.0B."""
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f}M"
    return f"{parameters / 10**9:.1f}B"


def model_verdict(plan: Recommendation) -> Line:
    """Whether the model trains on the device: fits, tight, slow, 46.1 over, plan only.

    A model that is not trained yet is not called fitting, and one whose layers are in this
    computer's memory is, with a warning.
    """
    needs = plan.estimate
    given = f"{needs.device_bytes / GIB:.1f} of {gib(needs.can_give_bytes)}"
    mark, word, text = VERDICT_MARKS[needs.verdict], str(needs.verdict), f"needs {given}"
    if needs.verdict == "does not fit":
        word = f"{-needs.spare_bytes / GIB:.1f} over"
    elif plan.not_trained:
        mark, word, text = "·", "plan only", "can be planned and previewed, and is not trained yet"
    elif plan.is_slow and needs.verdict == "fits":
        mark, word, text = "!", "slow", f"fits with layers in RAM, slow: needs {given}"
    return Line(mark, word, text)


def weights_sentence(plan: Recommendation) -> str:
    needs = plan.estimate
    held = sum(needs.parts.get(name, 0) for name in WEIGHTS)
    shown = gib(held) if held >= GIB / 10 else f"{held / 2**20:.0f} MiB"
    kind = "In 4 bit" if plan.config.load_in_4bit else "Not quantized,"
    if plan.offloads:
        return (
            f"{kind} the weights on the device take {shown}; the others are read from"
            f" {gib(needs.host_bytes)} of this computer's memory"
        )
    each = f" of each of {needs.cards} cards" if needs.cards > 1 else ""
    return f"{kind} the weights take {shown}{each}"


def fit_lines(fitted: Mapping[str, Any]) -> Iterator[str]:
    measured, needs = fitted["measurement"], fitted["estimate"]
    rows = "your rows" if fitted["own_rows"] else "random tokens"
    built = f"{needs['total_parameters']:,} random weights in {fitted['layers']} layers"
    yield f"{built}, {fitted['tokens']:,} tokens at once of {rows}, on {fitted['device']}"
    if not fitted["whole"]:
        widths = fitted["widths_divided_by"]
        smaller = f", all widths divided by {widths}" if widths > 1 else ""
        yield (
            f"  this is {fitted['layers']} of {fitted['of_layers']} layers{smaller}: it checks the "
            "formula, and says nothing of a card's memory or speed"
        )
    yield f"  measured peak   {gib(measured['peak_allocated_bytes']):>10}  allocated by tensors"
    if measured["peak_reserved_bytes"]:
        yield f"                  {gib(measured['peak_reserved_bytes']):>10}  held by the allocator"
    if measured["device_bytes"]:
        where = "of the device, by the driver" if fitted["kind"] == "cuda" else "of RAM at most"
        yield f"                  {gib(measured['device_bytes']):>10}  the whole process, {where}"
    yield (
        f"  formula         {gib(needs['step_bytes']):>10}  "
        f"measured is {difference(fitted):+.1%} from it"
    )
    if measured["load_peak_bytes"] > measured["peak_allocated_bytes"]:
        yield f"  loading took    {gib(measured['load_peak_bytes']):>10}  more than the steps"
    yield f"  speed           {measured['tokens_per_second']:>10,.0f}  tokens/s"
    if fitted["run_seconds"] is not None:
        steps = f"{fitted['total_steps']:,} steps, evaluations aside"
        yield f"  the whole run   {spoken(fitted['run_seconds']):>10}  {steps}"
    elif fitted["whole"]:
        hourly = f"{3600 * measured['tokens_per_second']:,.0f}"
        yield f"  an hour         {hourly:>10}  tokens; the rows that are not here decide how many"


def difference(fitted: Mapping[str, Any]) -> float:
    """How far the measured peak is from the formula's, as a share of the formula's."""
    formula = int(fitted["estimate"]["step_bytes"])
    return int(fitted["measurement"]["peak_allocated_bytes"]) / max(1, formula) - 1


NOTABLE = 0.02
"""Of our peak, by which that of another trainer has to differ to be worth a line."""


def plan_verdict(needs: Estimate, device: Device, *, named: bool = True) -> Line:
    sure = "measured" if needs.source == "measured" else f"± {needs.uncertainty:.0%}"
    each = f" on each of {needs.cards}" if needs.cards > 1 else ""
    given = f"{device.can_give_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f}"
    name = device.name if named else "it"
    text = f"needs {gib(needs.device_bytes)}{each} {sure}, {name} can give {given}"
    if lacks_cards(needs, device):
        return Line("✗", "too few cards", f"{text}; there {_are(device.cards)}")
    return Line(VERDICT_MARKS[needs.verdict], needs.verdict, text)


def alternative_line(other: Alternative) -> Line:
    """Another plan and its verdict; the detail is what it costs."""
    needs = other.estimate
    return Line(VERDICT_MARKS[needs.verdict], other.name, gib(needs.device_bytes), other.trade)


def advice_lines(advice: Recommendation, device: Device) -> list[Line]:
    lines = [plan_verdict(advice.estimate, device), *_device_lines(device, advice.estimate)]
    if advice.not_trained:
        lines.append(Line("✗", "not trained yet", advice.not_trained))
    lines += duration_lines(advice.duration)
    if advice.duration is None and advice.tokens_per_second:
        pace = f"about {advice.tokens_per_second:,.0f} tokens a second, by the data sheet"
        lines.append(Line("·", "", pace))
    lines += precision_lines(advice.config, device)
    attention = advice.attention
    lines.append(Line("·", "attention", f"{attention.backend}, {attention.reason}"))
    if attention.flash_4:
        lines.append(Line("·", "", attention.flash_4))
    if package := attention.worth_installing:
        missing = f"{package} is not installed; `windtunnel doctor` has the command"
        lines.append(Line("·", "", missing))
    return [*lines, *map(alternative_line, advice.alternatives)]


def estimate_lines(needs: Estimate, device: Device) -> list[Line | str]:
    """The parts of an estimate, and what moves."""
    overhead = needs.device_bytes - needs.peak_allocated_bytes
    around = "driver and slack" if device.kind == "cuda" else "the process itself"
    sizes = {**needs.parts, around: overhead}
    width = max(map(len, sizes))
    share = needs.trainable_parameters / max(1, needs.total_parameters)
    return [
        plan_verdict(needs, device),
        *_device_lines(device, needs),
        f"fullest at: {needs.moment}",
        *(f"  {name:<{width}}  {gib(size):>10}" for name, size in sizes.items()),
        f"{needs.tokens_at_once:,} tokens at once; {needs.trainable_parameters:,} of"
        f" {needs.total_parameters:,} parameters are trainable ({share:.2%})",
        *(f"adapter on {count} modules by {entry}" for entry, count in needs.targets.items()),
        f"takes {gib(needs.host_bytes)} of this computer's memory,"
        f" {gib(needs.disk_bytes)} of its disk",
    ]


def precision_lines(config: RunConfig, device: Device) -> list[Line]:
    """Why a run computes in another precision than others would, or cannot in the one it names."""
    if why := why_float32(config, device):
        return [Line("·", "", why)]
    try:
        refuse_bf16(config, device)
    except UserError as refusal:
        return [Line("✗", "bf16", f"{refusal.why} {refusal.fix}")]
    return []


def peer_lines(needs: Estimate, peer: Peer) -> list[Line]:
    """What another trainer would hold for the same config, where that is another figure."""
    if abs(sum(peer.differences.values())) < NOTABLE * needs.peak_allocated_bytes:
        return []
    why = ", ".join(
        f"{words} {'+' if size > 0 else '-'}{gib(abs(size))}"
        for words, size in peer.differences.items()
    )
    held = f"without driver and slack {gib(needs.peak_allocated_bytes)}"
    other = f"{peer.name} would hold {gib(peer.peak_allocated_bytes)}"
    return [Line("·", "", f"{held}; {other}: {why}")]


def row_line(needs: Estimate, uncounted: str) -> str:
    """Which row decides, or why `sequence_len` does."""
    return f"{needs.decided_by}{f' ({uncounted})' if uncounted else ''}"


def steps_text(duration: Duration) -> str:
    """How many steps, and how long they take: the formula knows no kernel's launch, so that of
    seconds it knows a bound only."""
    short = duration.source == "formula" and duration.seconds < 60
    time = "less than a minute" if short else f"about {spoken(duration.seconds)}"
    return f"{counted(duration.steps, 'step')}, {time}"


def duration_lines(duration: Duration | None) -> list[Line]:
    if duration is None:
        return []
    pace = f"{duration.tokens_per_second:,.0f} tokens a second ({duration.source})"
    cost = "" if duration.usd is None else f"about ${duration.usd:,.2f} at a usual price"
    return [Line("·", "", f"{steps_text(duration)} at {pace}", cost)]


def faster_lines(faster: Alternative | None) -> list[Line]:
    return [Line("·", "", describe_faster(faster))] if faster else []


def ladder_lines(needs: Estimate, rungs: Sequence[Alternative]) -> Iterator[Line | str]:
    """What would make it fit, the cheapest first, and the command that says so."""
    if not rungs:
        return
    enough = rungs[-1].estimate.verdict == "fits"
    yield "to make it fit, each on top of those above:" if enough else "all of this is not enough:"
    for rung in rungs:
        line = alternative_line(rung)
        yield replace(line, text=f"{line.text}, saves {gib(rung.saves_bytes)}")
    if enough:
        values = " ".join(assignment(*change) for change in rungs[-1].changes.items())
        yield f"behind the config, that is: {values}"
    else:
        yield f"{gib(-rungs[-1].estimate.spare_bytes)} are still missing"


def larger_card_lines(config: RunConfig, place: Place) -> Iterator[str]:
    """The smallest card that holds the plan as it is, and how many of this one would."""
    for gpu in listed_gpus():
        other = best_device(assume(gpu.name))
        if estimate(config, replace(place, device=other)).verdict == "fits":
            yield f"as it is it fits: {other.name}"
            break
    if place.device.kind == "cuda":
        count = cards_needed(config, place)
        name = place.device.name
        if count is None:
            yield f"sharded, no number of {name} holds it: a layer at work is too large for one"
        elif count > 1:
            instead = SHARDED_OPTIMIZERS.get(config.optimizer)
            more = f" optimizer={instead}" if instead else ""
            yield (
                f"{count} of {name} are the fewest that hold it together; behind the config, that"
                f" is: dp_shard_size={count}{more}"
            )


def length_lines(prices: Sequence[LengthPrice], device: Device) -> list[str]:
    """A table of lengths, one sequence at a time."""
    lines = [
        f"one sequence at a time; {device.name} can give {gib(device.can_give_bytes)}",
        f"{'tokens':>9}  {'needs':>10}  verdict         with the same result",
    ]
    for price in prices:
        verdict = f"{VERDICT_MARKS[price.verdict]} {price.verdict}"
        how = ", ".join(price.changes)
        if price.fitting_bytes is not None and how:
            how = f"{gib(price.fitting_bytes)} by {how}"
        pace = f"{price.tokens_per_second:,.0f} tokens/s" if price.tokens_per_second else ""
        rest = ", ".join(words for words in (how, pace) if words)
        row = f"{price.sequence_len:>9,}  {gib(price.device_bytes):>10}  {verdict:<14}  {rest}"
        lines.append(row.rstrip())
    lines.append("A row has to fit on one card: it is not spread over several.")
    return lines


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count}"


def _device_lines(device: Device, needs: Estimate) -> list[Line]:
    lines = []
    if device.cards > 1 or needs.cards > 1:
        where = f" in {device.nodes} computers" if device.nodes > 1 else ""
        used = "one" if needs.cards == 1 else f"{needs.cards}"
        there = f"there {_are(device.cards)}{where}"
        lacking = needs.cards > device.cards
        lines.append(Line("✗" if lacking else "·", "", f"{there}; this run uses {used}"))
    lines += [Line("·", "left out", reason) for reason in device.left_out]
    if device.used_by:
        lines.append(Line("·", "in use already", device.used_by))
    return lines
