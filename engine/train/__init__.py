"""The trainer: the only room with torch in it, started by name and imported by nobody.

__main__  one process: `python -m engine.train run FOLDER`
run       one launch, from its folder to its last event
ranks     the processes that train one model together, and what they tell each other
shard     one copy of a model divided over ranks, gradients added up once a step
fetch     where the base model's files are, and the embedded tiny bases of the demo
model     the base model from its folder, refused when it would train broken
forward   hidden states of a batch, packed rows kept apart
offload   what lies in RAM until its turn on the device
weight_files  safetensors files, read one tensor at a time and written as a stream
quantize  weights in fewer bits: NF4 and int8, FP8 with its scales
experts   mixture-of-experts layers in NF4, and adapters on them
lora      adapters on the language model's linears
batches   prepared rows and their images -> batches, in an order that a resumed run repeats
loss      cross entropy over the full vocabulary without its logits
optim     optimizers and the learning-rate schedule
loop      the steps; events, control and signals between them
checkpoint what is trained, and all that a run needs to go on, to disk and back
evaluate  held-out loss, exact answers, drift from the base, and what a run's losses warn of
generate  text from a prompt: a run's own questions, and those to what it trained
text_metrics  what the model writes by itself, in numbers
merge     a saved adapter read without its model, and put into its base's weights
out_of_memory  which errors say so, what was held, what makes room
fitcheck  what a config really takes, measured on random weights
stand_in  the model and the batch that are measured
"""

import os
import sys

# transformers and bitsandbytes fetch compiled kernels from the hub when this package is importable;
# a run executes only what was installed. `None` makes every later import of it fail.
sys.modules["kernels"] = None  # type: ignore[assignment]
os.environ["USE_HUB_KERNELS"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Under its older name torch would read ours first, and a person's own settings would be lost.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
