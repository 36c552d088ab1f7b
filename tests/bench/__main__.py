"""Every benchmark, one after the other: `make bench`. Each prints ratios measured side by side."""

import subprocess
import sys

BENCHMARKS = ("first_frame", "frozen_tower", "prepare_throughput", "step_counts", "train_step")

for name in BENCHMARKS:
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=True)
