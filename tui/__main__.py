"""The console script `windtunnel`: ctrl+c is heeded before anything that takes time is imported."""

import sys

try:
    from engine.interrupt import interruptible, leave_at_once

    leave_at_once()
    from tui.entry import carry_out
except KeyboardInterrupt:
    sys.exit(130)


def main() -> None:
    sys.exit(interruptible(carry_out))


if __name__ == "__main__":
    main()
