"""Progress: a bar on a terminal, one line per step elsewhere."""

import contextlib
import sys
from types import SimpleNamespace

from tqdm import tqdm

from megatron_prepo.process import progress


def test_a_log_gets_one_line_a_step_that_says_how_long_yet(monkeypatch, capsys):
    times = iter([0.0, 2.0, 5.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    bar = progress.bar(desc="train", total=80, initial=7)
    for step in (7, 8):
        bar.update()
        bar.set_postfix(reward=f"{step / 10:.2f}")
    bar.close()
    written = capsys.readouterr().err
    assert "\r" not in written
    assert written.splitlines() == [
        "train 8/80 [0:02<2:24, 2 s each] reward=0.70",
        "train 9/80 [0:05<2:58, 2.5 s each] reward=0.80",
    ]


def test_a_bar_of_unknown_length_and_one_that_is_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1.0)
    for disable in (False, True):
        with progress.bar(desc="evaluate during", leave=False, disable=disable) as bar:
            bar.total = 400
            bar.update(300 - bar.n)
            bar.update(400 - bar.n)
            bar.set_postfix(pass_rate="0.419")
    written = capsys.readouterr().err
    assert written == "evaluate during 400/400 [0:00<0:00, 0 s each] pass_rate=0.419\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar(range(3), "train", disable=True) as bar:
        assert isinstance(bar, tqdm) and list(bar) == [0, 1, 2]


def test_a_loop_writes_one_line_at_its_end_which_is_complete(capsys):
    assert list(progress.bar(range(3), "layouts")) == [0, 1, 2]
    with progress.bar(desc="import", total=2500, unit="B", unit_scale=True) as bar:
        bar.update(2500)
    written = capsys.readouterr().err
    assert "\r" not in written
    first, second = written.splitlines()
    assert first.startswith("layouts 3/3 [0:00<0:00,")
    assert second == "import 2.50kB/2.50kB [0:00<0:00]"


def test_a_loop_that_fails_claims_no_end(capsys):
    with contextlib.suppress(RuntimeError), progress.bar(desc="runs", total=3) as bar:
        bar.update()
        raise RuntimeError
    assert capsys.readouterr().err == ""
