"""The trainer: the only room with torch in it, started by name and imported by nobody.

__main__  one process: `python -m engine.train run FOLDER`
run       one launch, from its folder to its last event
fetch     where the base model's files are
model     the base model from its folder, refused when it would train broken
forward   hidden states of a batch, packed rows kept apart
quantize  NF4 and its guards
lora      adapters on the language model's linears
batches   prepared arrays -> batches, in an order that a resumed run repeats
loss      cross entropy over the full vocabulary without its logits
optim     optimizers and the learning-rate schedule
loop      the steps
checkpoint what a run needs to go on, written so that a kill cannot hurt it
evaluate  held-out loss and exact answers
generate  text from a prompt
weights   what is trained, to disk and back
session   lock, events, control and signals of one process
meter     speed and peak memory
demo      the embedded tiny base model
"""

import os
import sys

# transformers and bitsandbytes fetch compiled kernels from the hub when this package is importable;
# a run executes only what was installed. `None` makes every later import of it fail.
sys.modules["kernels"] = None  # type: ignore[assignment]
os.environ["USE_HUB_KERNELS"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
