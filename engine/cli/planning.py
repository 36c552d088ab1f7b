"""`recommend`, `estimate` and `fit`: will it fit, what to run, and why, before a weight is loaded.

They only read arguments and print. `fit` measures in a process with torch; what fits and what is
advised is in `engine.plan`.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from engine.catalog import Architecture, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.cli.terminal import (
    HOST,
    AsEvents,
    AsJson,
    Assume,
    CommandHost,
    ConfigPath,
    EventLines,
    PlainWatch,
    print_lines,
)
from engine.config import (
    DatasetConfig,
    RunConfig,
    override,
    write_config,
)
from engine.data.sources import with_absolute_paths
from engine.errors import DOES_NOT_FIT, WRONG_REQUEST, UserError
from engine.interrupt import last_words
from engine.plan import (
    AXOLOTL,
    Device,
    Goal,
    Place,
    advice_document,
    alternative_document,
    compare_peer,
    device_document,
    estimate,
    estimate_document,
    expected_duration,
    make_faster,
    make_fit,
    misses,
    price_lengths,
    recommend,
    remarks,
)
from engine.plan.attention import follow_attention, task_of
from engine.plan.measured import Measurement, store
from engine.report import Line
from engine.report.plan import (
    advice_lines,
    difference,
    duration_lines,
    estimate_lines,
    faster_lines,
    fit_lines,
    ladder_lines,
    larger_card_lines,
    length_lines,
    peer_lines,
    precision_lines,
    row_line,
)
from engine.visible import visible
from engine.wizard.draft import count_config_rows, require_usable
from engine.wizard.start import STEPS, find_device, measure, read_planned, spread_on

if TYPE_CHECKING:
    from engine.data.statistics import Checkup


def print_recommendation(
    *changes: Annotated[str, Parameter(help="Values to keep, such as lora_r=64.")],
    model: Annotated[str, Parameter(help="Catalog name, hub id or folder.")],
    data: Annotated[str | None, Parameter(help="File, folder, hub id or sample:NAME.")] = None,
    assumed: Assume = None,
    goal: Annotated[Goal, Parameter(help="What the model should get better at.")] = "text",
    out: Annotated[Path | None, Parameter(("--out", "-o"), help="Write the config there.")] = None,
    as_json: AsJson = False,
) -> int:
    """Recommend a whole config for a model on this machine, with a reason for every value."""
    last_words("Nothing was written yet.")
    device = find_device(assumed)
    place = Place(read_architecture(model), device)
    dataset = DatasetConfig(path=data, type="chat_template") if data else None
    fixed = _fixed_values(model, changes)
    advice = recommend(place, dataset=dataset, goal=goal, fixed=fixed)
    check_tokenizer(tokenizer_name(advice.config))
    found = None
    if dataset:
        # Goal and changes decide what a row becomes, so that its lengths are those of the config.
        found = _check_rows(advice.config)
        place = replace(place, statistics=found.statistics())
        advice = recommend(place, dataset=dataset, goal=goal, fixed=fixed)
    config = advice.config
    if out and out.absolute().parent != Path.cwd():
        config = with_absolute_paths(config, Path.cwd())
    reasons = {key: why for key, why in advice.reasons.items() if key != "datasets"}
    text = write_config(config, reasons, out)
    if as_json:
        said = [asdict(finding) for finding in found.findings] if found else []
        print(json.dumps(advice_document(advice, device) | {"findings": said}))
        return 0
    print_lines(advice_lines(advice, device))
    if found:
        from engine.report.data import note_lines

        print_lines(map(str, note_lines(found)))
    if out:
        print_lines([f"Written to {out}. Train it with: windtunnel train {out}"])
    else:
        print(f"\n{visible(text)}", end="")
    return 0


def print_estimate(
    config: ConfigPath,
    /,
    *changes: Annotated[str, Parameter(help="Changes, such as sequence_len=4096.")],
    assumed: Assume = None,
    lengths: Annotated[
        bool, Parameter(help="What each sequence_len would cost, up to the most of the model.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Estimate a config's memory by part, and say whether it fits.

    Exit status 3: it does not; 2: it would not be trained.
    """
    last_words("Nothing is written here.")
    given, architecture = read_planned(config, changes, sharded=True)
    device = find_device(assumed)
    run = spread_on(given, device)
    if lengths:
        prices = price_lengths(run, Place(architecture, device))
        if as_json:
            print(json.dumps({"lengths": [asdict(price) for price in prices]}))
        else:
            print_lines(length_lines(prices, device))
        return 0
    statistics, uncounted = count_config_rows(run, architecture, config.absolute().parent)
    place = Place(architecture, device, statistics)
    needs = estimate(run, place)
    rungs = make_fit(run, place)
    faster = make_faster(run, place)
    duration = expected_duration(run, place, needs.tokens_per_second)
    odd = remarks(run, architecture)
    peer = compare_peer(AXOLOTL, run, place)
    asked = (*precision_lines(run, device), *_attention_lines(run, architecture, device))
    refused = [line for line in asked if line.mark == "✗"]
    if as_json:
        more = {
            "axolotl": asdict(peer),
            "device": device_document(device),
            "remarks": odd,
            "rows_counted": statistics.usable_rows if statistics else None,
            "ladder": [alternative_document(rung) for rung in rungs],
            "faster": alternative_document(faster) if faster else None,
            "duration": asdict(duration) if duration else None,
        }
        print(json.dumps(estimate_document(needs) | more))
    else:
        lines = (
            *estimate_lines(needs, device),
            *peer_lines(needs, peer),
            row_line(needs, uncounted),
            *duration_lines(duration),
            *faster_lines(faster),
            *asked,
            *(Line("!", "", sentence) for sentence in odd),
            *ladder_lines(needs, rungs),
            *(larger_card_lines(run, place) if needs.verdict != "fits" else ()),
        )
        print_lines(lines)
    return WRONG_REQUEST if refused else DOES_NOT_FIT if misses(needs, device) else 0


def _check_rows(config: RunConfig) -> "Checkup":
    """Count every row, read and tokenized if it is not prepared: lengths, how much is learned.

    Raises UserError where the dataset cannot be read or no row of it can be used.
    """
    from engine.chat.tokenizer import open_tokenizer
    from engine.data.checkup import count_rows

    tokenizer = open_tokenizer(tokenizer_name(config), Path.cwd())
    found = count_rows(config, Path.cwd(), tokenizer)
    require_usable(found, config.datasets[0].path)
    return found


def _attention_lines(config: RunConfig, architecture: Architecture, device: Device) -> list[Line]:
    """Why the attention code that the config asks for cannot be used, if it cannot."""
    if config.attn_implementation is None:
        return []
    try:
        task = task_of(config, architecture, device)
        follow_attention(config.attn_implementation, device, task)
    except UserError as refusal:
        return [Line("✗", "attn_implementation", f"{refusal.why} {refusal.fix}")]
    return []


def _fixed_values(model: str, changes: tuple[str, ...]) -> dict[str, object]:
    """The values of `key=value` changes, checked as in a config; `adapter=` is a full fine-tune."""
    if not changes:
        return {}
    kept = override(RunConfig(base_model=model), changes)
    unset = {change.partition("=")[0] for change in changes} & set(RunConfig.model_fields)
    return {key: getattr(kept, key) for key in (kept.model_fields_set | unset) - {"base_model"}}


def fit(
    config: ConfigPath,
    /,
    *changes: Annotated[str, Parameter(help="Changes, such as sequence_len=4096.")],
    steps: Annotated[int, Parameter(help="Steps to make; the first is not timed.")] = STEPS,
    keep: Annotated[Path | None, Parameter(help="Keep the figures in this folder too.")] = None,
    as_json: AsJson = False,
    as_events: AsEvents = False,
    host: CommandHost = HOST,
) -> int:
    """Measure what a config takes here, in a few real steps on random weights.

    Nothing is downloaded. The figures are kept, and beat the formula from then on.
    Without a GPU a model of two layers is measured, which checks the formula only.
    Exit status 3: it does not fit.
    """
    last_words("No figure was kept yet.")
    run, _ = read_planned(config, changes)
    watch = EventLines() if as_events else None if as_json else PlainWatch(sys.stderr)
    fitted = measure(run, max(1, steps), host.trainer, watch.show if watch else None)
    measured = Measurement(**fitted["measurement"])
    kept = [store(measured)] + ([store(measured, keep)] if keep else [])
    if as_json:
        print(json.dumps(document(fitted, kept)))
    elif not as_events:
        places = visible(" and ".join(map(str, kept)), one_line=True)
        for line in fit_lines(fitted):
            print(visible(line, one_line=True))
        print(f"Kept in {places}")
    return 0


def document(fitted: Mapping[str, Any], kept: list[Path]) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, times in seconds."""
    figures = {name: value for name, value in fitted["measurement"].items() if name != "key"}
    rest = {name: value for name, value in fitted.items() if name != "measurement"}
    return figures | rest | {"difference": difference(fitted), "kept": [str(path) for path in kept]}
