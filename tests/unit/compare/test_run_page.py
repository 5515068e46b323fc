"""The page of one run: every logged value is drawn, and it follows a run in progress."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from megatron_prepo.cli import main
from megatron_prepo.compare import report_page, run_page
from megatron_prepo.compare.analysis import Arm
from megatron_prepo.compare.run_figures import run_figures
from megatron_prepo.compare.style import Palette
from megatron_prepo.files import lock
from megatron_prepo.run.metrics_table import KEYS
from tests.unit.compare.test_report_page import body_of, cluster_run  # noqa: F401 - a fixture
from tests.unit.run.test_metrics_table import OLD_RUN

STEPS = 40
EVALUATIONS = [
    {"step": step, "pass_rate": 0.4 + step / 100, "pass_rate_ci95": [0.3, 0.9]}
    for step in (0, 20, 40)
]
FIGURES = (
    *("pass_rate", "window", "reward", "zero_variance", "length", "entropy"),
    *("weights", "grad_norm", "mismatch", "spearman"),
)


def logged() -> list[dict]:
    """Return steps that have all metrics, with noise."""
    random = np.random.default_rng(0)
    names = sorted(KEYS - {"step"})
    return [
        {"step": step} | dict(zip(names, random.uniform(0.1, 1, len(names)).tolist(), strict=True))
        for step in range(STEPS)
    ]


def made(steps: list[dict]) -> dict:
    return {figure.key: figure for figure in run_figures(Arm("prepo", ()), steps, EVALUATIONS)}


def axes_of(figure) -> pyplot.Axes:
    canvas = pyplot.figure()
    figure.draw(canvas, figure.arms, Palette(["prepo"], placeholders=False))
    pyplot.close(canvas)
    return canvas.axes[0]


def test_every_subject_has_a_figure():
    assert tuple(made(logged())) == FIGURES


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("reward", "reward/mean"),
        ("zero_variance", "reward/zero_variance_ratio"),
        ("length", "rollout/length"),
        ("entropy", "entropy/mean"),
        ("weights", "weight/q50"),
        ("grad_norm", "loss/grad_norm"),
        ("mismatch", "mismatch/logprob_abs/mean"),
    ],
)
def test_the_values_of_all_steps_are_drawn_under_the_smoothed_curve(key, name):
    steps = logged()
    figure = made(steps)[key]
    values, smooth = (line.get_ydata() for line in axes_of(figure).lines[:2])
    assert values.tolist() == [step[name] for step in steps]
    assert np.std(smooth) < np.std(values)
    assert "Thin: each step; bold: running mean of 5 steps." in figure.caption


def test_a_short_run_is_not_smoothed():
    figure = made(logged()[:19])["reward"]
    assert len(axes_of(figure).lines) == 1 and "running mean" not in figure.caption


def test_missing_values_leave_gaps_and_missing_metrics_no_figure():
    steps = logged()
    steps[3]["loss/grad_norm"] = None
    del steps[4]["loss/grad_norm"]
    values = axes_of(made(steps)["grad_norm"]).lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(values)).tolist() == [3, 4]
    for step in steps:
        for name in [name for name in step if name.startswith(("ppl/", "loss/"))]:
            del step[name]
        step["weight/std"] = 0.0
    assert not {"window", "spearman", "grad_norm", "weights"} & set(made(steps))


def test_skipped_updates_are_marked():
    steps = logged()
    for step in steps:
        step["loss/skipped_updates"] = int(step["step"] in (7, 9))
    figure = made(steps)["grad_norm"]
    assert list(axes_of(figure).lines[-1].get_xdata()) == [7, 9]
    assert "crosses: 2 steps with a skipped update" in figure.caption


def test_the_reward_of_a_window_that_moves_is_explained():
    steps = logged()
    assert "window moves to harder prompts" in made(steps)["reward"].caption
    for step in steps:
        del step["selection/window_first"]
    assert "window" not in made(steps)["reward"].caption


def finished(run: Path) -> str:
    """Return the summary of a finished run, with what the stand-in for a run omits."""
    summary = json.loads((run / "summary.json").read_text())
    return json.dumps(summary | {"weighting": "none", "gain": 0.2})


def test_it_is_one_file_with_title_and_command(cluster_run, tmp_path, capsys):  # noqa: F811
    (cluster_run / "summary.json").write_text(finished(cluster_run))
    out = tmp_path / "out" / "page.html"
    assert main(["report", str(cluster_run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert list(out.parent.iterdir()) == [out]
    text = out.read_text()
    assert f"<title>{cluster_run}</title>" in text and f"<h1>{cluster_run}</h1>" in text
    command = f"megatron-prepo train {cluster_run}/config.yaml run.dir=NEW_DIRECTORY"
    assert command in body_of(text)
    assert not re.search(r"(src|href)=(?!\"#)|<script|<link|@import|url\((?!#)", text)
    assert "http-equiv" not in text, "it reloads itself"


def test_a_run_of_an_earlier_version_has_its_window_and_its_weights(tmp_path):
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    text = report_page.page(report_page.read([tmp_path / "begun"]))
    assert all(f"<h2>{title}</h2>" in text for title in ("Window", "Weights", "Engine and actor"))
    assert "Stopped after step 5 of 6; to resume it" in body_of(text)


def test_a_run_is_live_while_a_process_holds_it(cluster_run):  # noqa: F811
    (cluster_run / "summary.json").unlink()
    assert not run_page.is_live(cluster_run)
    hold = (
        "import sys; from megatron_prepo.files import lock\n"
        "lock.take(sys.argv[1], 'it'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(cluster_run / lock.FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert run_page.is_live(cluster_run)
        text = report_page.page(report_page.read([cluster_run]))
        assert "In progress , step 3 of 80," in body_of(text)
    assert not run_page.is_live(cluster_run)


@pytest.fixture
def pages(cluster_run, tmp_path, monkeypatch):  # noqa: F811
    """Pages that `report --follow` wrote until the run ended, and whether each reloads itself."""
    out, seen = tmp_path / "page.html", []
    summary = finished(cluster_run)
    (cluster_run / "summary.json").unlink()
    live = iter([True] * 4)  # asked for twice per page

    def sleep(seconds: float) -> None:
        assert seconds >= report_page.RELOAD_SECONDS
        seen.append(out.read_text())
        if len(seen) == 2:
            (cluster_run / "summary.json").write_text(summary)

    monkeypatch.setattr(run_page, "is_live", lambda _: next(live, False))
    monkeypatch.setattr(report_page.time, "sleep", sleep)
    return lambda *options: (
        main(["report", str(cluster_run), "--out", str(out), *options]),
        [*seen, out.read_text()],
    )


def test_a_live_run_is_followed_until_it_ends(pages):
    code, [first, second, last] = pages("--follow")
    assert code == 0
    for text in (first, second):
        assert '<meta http-equiv="refresh" content="20">' in text and "In progress" in text
    assert "http-equiv" not in last and "unfinished" not in last


def test_in_a_script_the_page_is_written_once(pages):
    code, [text] = pages()
    assert code == 0 and "http-equiv" not in text


def test_ctrl_c_leaves_a_page_that_does_not_reload(pages, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_page.time, "sleep", interrupt)
    code, [text] = pages("--follow")
    assert code == 0 and "http-equiv" not in text
