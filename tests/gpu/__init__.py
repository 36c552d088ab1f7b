"""What only a CUDA device can show; run with `make gpu`, in CI on a stand-in (`tests.fakes.card`).

On a machine with a card of capability 7.5 or newer, in this order:

1. Look first what is there: `nvidia-smi`, `python3 --version`, `python3 -c "import torch;
   print(torch.__version__, torch.version.cuda)"`, and so for transformers, peft, bitsandbytes.
   Where nothing can be fetched, bring wheels: bitsandbytes, peft and this repository are small.
2. With torch 2.12 or newer and all of [train]: `make gpu`. Six minutes; each part that the card or
   its packages lack is skipped by name, and the report says so.
3. With an older torch, or without transformers and peft: `WINDTUNNEL_GPU_REPORT=presets/measured
   python3 -m pytest -m gpu tests/gpu/test_kernels.py`. Loss, experts, NF4 and optimizers need torch
   and bitsandbytes alone, and what cannot be imported is skipped; attention needs transformers.
4. `windtunnel fit presets/recipes/<model>/<method>.yml --keep presets/measured` for the full-size
   presets that the card holds: peak memory and tokens/s, which then replace the formula.
5. Commit what step 2 or 3 left, presets/measured/tests-<card>-<day>.md, and what step 4 kept. A
   part that did not run stays named in the report; nothing is asserted on time.
"""
