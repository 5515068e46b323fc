"""Which messages of libraries a user sees: those that a user can act on."""

import logging
import subprocess
import sys

import pytest

from megatron_prepo.process import library_messages

LIBRARY = subprocess.__file__


@pytest.mark.parametrize(
    ("words", "category", "file", "shown"),
    [
        ("`torch_dtype` is deprecated", FutureWarning, LIBRARY, False),
        ("x will be removed in 0.14", UserWarning, LIBRARY, False),
        ("changes", FutureWarning, library_messages.__file__, False),
        ("sequence parallelism must be used", UserWarning, LIBRARY, True),
        ("the driver is too old", RuntimeWarning, LIBRARY, True),
        ("my function is deprecated", FutureWarning, __file__, True),
    ],
)
def test_a_warning_that_a_user_can_act_on_stays(monkeypatch, words, category, file, shown):
    seen = []
    monkeypatch.setattr(library_messages, "_shown_before", lambda *given: seen.append(given))
    library_messages.show(words, category, file, 1)
    assert bool(seen) == shown


@pytest.mark.parametrize(
    ("level", "words", "shown"),
    [
        (logging.WARNING, "Overwriting old incomplete / corrupted checkpoint...", False),
        (logging.WARNING, "non_homogeneous_layers=False is deprecated.", False),
        (logging.WARNING, "CUDA OutOfMemoryError encountered", True),
        (logging.ERROR, "deprecated and broken", True),
    ],
)
def test_messages_of_loggers_are_judged_alike(level, words, shown):
    record = logging.LogRecord("megatron", level, LIBRARY, 1, words, (), None)
    assert library_messages.is_for_users(record) == shown


@pytest.mark.parametrize(("options", "shown"), [([], False), (["-W", "default"], True)])
def test_it_applies_to_every_process_that_imports_us(options, shown, tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "library.py").write_text("import warnings\nwarnings.warn('old', FutureWarning)\n")
    code = f"import megatron_prepo, sys; sys.path.append({str(folder)!r}); import library"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and ("FutureWarning: old" in done.stderr) == shown
