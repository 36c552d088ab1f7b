"""What strangers' files do to the readers: `make fuzz`, or one: `python -m tests.fuzz NAME`."""
