from importlib.util import find_spec

# Without the extra [train] everything else is still tested.
collect_ignore = [] if find_spec("torch") else ["train"]
