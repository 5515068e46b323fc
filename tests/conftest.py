"""Makes the package, the examples and the tests' helpers importable, wherever pytest is started."""

import os
import signal
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS, TESTS.parent, TESTS.parent / "examples")
sys.path[:0] = [entry for entry in map(str, FOLDERS) if entry not in sys.path]

# one thread unless asked otherwise, so that a number does not depend on the machine's count of
# cores, here and in the runs that tests start
os.environ.setdefault("TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = os.environ["TEST_THREADS"]
torch.set_num_threads(int(os.environ["TEST_THREADS"]))

# without a GPU, Triton's kernels are interpreted; Triton looks at this when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# started in the background of a script, processes do not hear Ctrl-C, and tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
