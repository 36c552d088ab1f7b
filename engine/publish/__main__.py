"""`python -m engine.publish FOLDER`: upload a run's result, in a process that may reach the hub.

A trainer leaves the hub for good once its model and rows are there; so it starts this instead.
"""

import sys
from pathlib import Path

from engine.errors import UserError
from engine.publish.hub import push
from engine.runs import RunFolder


def main() -> int:
    """Upload the result of the run in the folder that is named; prints its address."""
    try:
        print(push(RunFolder(Path(sys.argv[1]).resolve())))
    except UserError as error:
        print(error.what, error.why, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
