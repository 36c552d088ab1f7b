"""`python -m tests.support.short_rank run FOLDER`: a trainer whose second rank has a small card."""

import sys

from engine.runs.rank import rank_number
from engine.train.__main__ import main
from tests.support.trainers import hold_at_most

if __name__ == "__main__":
    if rank_number() == 1:
        hold_at_most(500, from_step=2)
    sys.exit(main())
