import signal
from importlib.util import find_spec

from tests.fakes.nvml import nvml as nvml
from tests.fakes.nvml import nvml_library as nvml_library

# Without the extra [train] everything else is still tested.
collect_ignore = [] if find_spec("torch") else ["train", "gpu"]

# What is started by nohup ignores hangups, and so would every process that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
