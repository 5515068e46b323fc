"""Makes the package and the tests' helpers importable, wherever pytest is started."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [entry for entry in (str(TESTS), str(TESTS.parent)) if entry not in sys.path]

# one thread, so that a number does not depend on the machine's count of cores
torch.set_num_threads(1)
