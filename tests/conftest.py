"""Make the package, the examples and the tests' helpers importable, wherever pytest is started.

With `--only-allowed-skips`, as in `make test`, a skip that is not in allowed_skips.py is a failure.
"""

import os
import signal
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS, TESTS.parent, TESTS.parent / "examples")
sys.path[:0] = [entry for entry in map(str, FOLDERS) if entry not in sys.path]

import allowed_skips  # noqa: E402

# one thread unless asked otherwise, so that a number does not depend on the machine's count of
# cores, here and in the runs that tests start
os.environ.setdefault("TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = os.environ["TEST_THREADS"]
torch.set_num_threads(int(os.environ["TEST_THREADS"]))

# many tests read all that a command writes; test_activity.py and test_says.py test what is shown
os.environ.setdefault("MEGATRON_PREPO_QUIET", "1")

# no test asks the hub: a path that is not here could be a name there (tests/fake_hub.py)
os.environ["HF_HUB_OFFLINE"] = "1"

# without a GPU, Triton's kernels are interpreted; Triton looks at this when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") and Version(metadata.version("triton")) < Version("3.7"):
        from triton.runtime import interpreter

        patch_tensor = interpreter._patch_lang_tensor

        def as_from_3_7(tensor, scope) -> None:
            """An array of one number is an index, which numpy 2.5 no longer accepts."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = as_from_3_7

# started in the background of a script, processes do not hear Ctrl-C, and tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--only-allowed-skips",
        action="store_true",
        help="fail what is skipped and is not allowed to be by tests/allowed_skips.py",
    )


def pytest_configure(config) -> None:
    if config.getoption("--only-allowed-skips"):
        # a plugin, since hooks of this file are not called for the package's doctests
        config.pluginmanager.register(OnlyAllowedSkips())


class OnlyAllowedSkips:
    """Report a skip that is not allowed as a failure."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        return self._judged((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        """Handle a module that is skipped entirely."""
        return self._judged((yield))

    def _judged(self, report):
        if report.skipped:
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            if fault := allowed_skips.fault(report.nodeid, str(why)):
                report.outcome, report.longrepr = "failed", fault
        return report
