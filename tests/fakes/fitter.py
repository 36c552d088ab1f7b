"""The process behind `fit` without torch: it says back what it was given, with figures of its own.

FAKE_FAILS makes it tell that memory ran out; FAKE_PART is the share of the layers that it built.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from engine.catalog import read_architecture
from engine.config import read_config
from engine.hardware import assume
from engine.plan import Place, cpu_device, estimate, estimate_document
from engine.plan.measured import Measurement, key_of, step_bytes
from engine.plan.step import make_step


def tell(**record: object) -> None:
    print(json.dumps(record), flush=True)


def main() -> int:
    _, command, folder, _, steps = sys.argv
    assert command == "fit"
    event = {"v": 1, "time": 1.5}
    print("a library says hello")
    tell(**event, seq=0, type="phase", name="load", done=0, total=0, detail="random weights")
    if what := os.environ.get("FAKE_FAILS"):
        tell(error={"what": what, "why": "It was full.", "fix": "Use less.", "exit_status": 3})
        return 3
    tell(**event, seq=1, type="note", level="info", text=f"{steps} steps\x1b[31m")
    config = read_config(Path(folder, "config.yml")).config
    architecture, device = read_architecture(config.base_model), cpu_device(assume("24 GB"))
    step = make_step(config, Place(architecture, device))
    needs = estimate(config, step.place)
    formula = step_bytes(needs)
    measured = Measurement(
        key=key_of(step),
        model=architecture.class_name,
        peak_allocated_bytes=formula * 5 // 4,
        peak_reserved_bytes=None,
        device_bytes=2 * formula,
        load_peak_bytes=1,
        tokens_per_second=2000.0,
        formula_bytes=formula,
        measured_at="2026-11-26",
    )
    whole = "FAKE_PART" not in os.environ
    tell(
        fitted={
            "measurement": asdict(measured),
            "estimate": estimate_document(needs) | {"step_bytes": formula},
            "device": device.name,
            "kind": device.kind,
            "layers": 3 if whole else 2,
            "of_layers": 3,
            "widths_divided_by": 1 if whole else 4,
            "whole": whole,
            "own_rows": whole,
            "tokens": needs.tokens_at_once,
            "losses": [12.0],
            "step_seconds": 1.0,
            "run_seconds": 7200.0 if whole else None,
            "total_steps": 7200 if whole else None,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
