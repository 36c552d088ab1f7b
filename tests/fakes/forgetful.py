"""The real trainer with a fault that a resume must not have: `python -m tests.fakes.forgetful`.

FORGETS names a function of `engine.train.checkpoint` or `engine.train.loop` that does nothing.
"""

import os
import sys

from engine.train import checkpoint, loop
from engine.train.__main__ import main

for module in (checkpoint, loop):
    if hasattr(module, os.environ["FORGETS"]):
        setattr(module, os.environ["FORGETS"], lambda *_: None)

if __name__ == "__main__":
    sys.exit(main())
