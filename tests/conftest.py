"""Makes the package, the examples and the tests' helpers importable, wherever pytest is started."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS, TESTS.parent, TESTS.parent / "examples")
sys.path[:0] = [entry for entry in map(str, FOLDERS) if entry not in sys.path]

# one thread, so that a number does not depend on the machine's count of cores
torch.set_num_threads(1)
