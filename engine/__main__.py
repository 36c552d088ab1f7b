"""`python -m engine`: every command without the wizard."""

import sys

try:
    from engine.interrupt import interruptible, leave_at_once

    leave_at_once()
    from engine.cli import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(interruptible(main))
