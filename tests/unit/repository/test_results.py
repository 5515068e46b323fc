"""Pages state what the raw results say: missed goals, and the runs of the tiny tasks."""

import json
from pathlib import Path

import pytest

from megatron_prepo.compare import report_page

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = {"head_cpu_2core": "head_benchmark", "train_cpu_2core": "train_benchmark"}
"""Page of each raw result that judges goals."""


def goals(result) -> list[dict]:
    """Return the judged goals anywhere in a raw result."""
    if isinstance(result, list):
        return [goal for entry in result for goal in goals(entry)]
    if not isinstance(result, dict):
        return []
    return [result] if "verdict" in result else goals([*result.values()])


def test_a_missed_goal_is_called_missed_on_its_page():
    judged = {path.stem: goals(json.loads(path.read_text())) for path in RESULTS.glob("*.json")}
    assert {name for name, found in judged.items() if found} == PAGES.keys()
    for name, page in PAGES.items():
        text = (REPOSITORY / "docs" / f"{page}.md").read_text()
        missed = [goal for goal in judged[name] if goal["verdict"] == "missed"]
        assert all(f"{goal['measured']:.3f}, missed" in text for goal in missed)
    assert len([goal for goal in judged["head_cpu_2core"] if goal["verdict"] == "missed"]) == 2


def test_the_goal_of_a_sync_is_judged_by_the_raw_result():
    result = json.loads((RESULTS / "sync_cpu_2core.json").read_text())
    best = max(way["of_the_copys_speed"] for way in result["transports"].values())
    assert best < 0.5, "call the goal met on the page"
    assert f"is **missed**: {best:.2f} by `ipc`" in (REPOSITORY / "docs" / "sglang.md").read_text()


def mean_row(path: Path, arm: str) -> str:
    """Return a row of a README's table: means over the seeds of one arm."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [record for record in records if record["arm"] == arm]
    rates = {step: [] for step in (0, 40, 80, 120, 160)}
    for record in records:
        for point in record["evaluations"]:
            rates.get(point["step"], []).append(point["pass_rate"])
    before, *after = (f"{sum(column) / len(records):.3f}" for column in rates.values())
    tokens = sum(record["summary"]["tokens"] for record in records) / len(records) / 1e6
    return f"| {before} | {' / '.join(after)} | {tokens:.2f} million |"


@pytest.mark.parametrize(
    ("task", "file", "arms"),
    [
        ("traces", "traces_learning_rate.jsonl", ("random2", "random4")),
        ("lists", "compare/lists.jsonl", ("random",)),
    ],
)
def test_the_tables_of_the_tiny_tasks_are_those_of_the_raw_results(task, file, arms):
    text = (REPOSITORY / "examples" / task / "README.md").read_text()
    for arm in arms:
        assert mean_row(RESULTS / file, arm) in text, arm


def test_the_rates_of_the_page_of_an_own_task_are_its_raw_result():
    result = json.loads((RESULTS / "own_task.json").read_text())
    page = (REPOSITORY / "docs" / "own_task.md").read_text()
    for when in ("before", "after"):
        low, high = result[f"pass_rate_{when}_ci95"]
        line = f"{result[f'pass_rate_{when}']:.3f}  (95 % interval {low:.3f} to {high:.3f})"
        assert f"held-out pass rate {when:<8} {line}" in page


@pytest.mark.parametrize(
    ("file", "page"),
    [("real/comparison", "real_model"), ("compare/lists_scarce", "selection")],
)
def test_the_table_of_a_comparison_is_that_of_its_runs(file, page):
    lines = (RESULTS / f"{file}.jsonl").read_text().splitlines()
    table = report_page.markdown([json.loads(line) for line in lines])
    assert table in (REPOSITORY / "docs" / f"{page}.md").read_text()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tokens", ["all", "content"])
def test_the_page_on_difficulty_has_the_correlations_of_the_raw_results(when, tokens):
    page = (REPOSITORY / "docs" / "difficulty.md").read_text()
    result = json.loads((RESULTS / "real" / f"difficulty_{when}_{tokens}.json").read_text())
    column = when == "after"
    for q, quantity in enumerate(("perplexity", "mean entropy")):
        for name in list(result[quantity])[: None if tokens == "all" else 4]:
            value, interval = result[quantity][name].values()
            cells = next(
                line.strip("| ").split(" | ")
                for line in page.splitlines()
                if line.startswith(f"| {name} |")
                and (len(line.split(" | ")) > 5) == (tokens == "all")
            )
            number = "none" if value is None else f"{value:.2f} (no interval)"
            if interval is not None:
                low, high = interval
                number = f"{value:.2f} ({low:.2f} to {high:.2f})"
                number = f"**{number}**" if low > 0 or high < 0 else number
            assert cells[(3 if tokens == "all" else 1) + 2 * q + column].strip(" |") == number
    if (when, tokens) == ("before", "all"):
        length = result["prompt length"]
        lengths = [length[of]["within tasks"]["value"] for of in ("perplexity", "pass rate")]
        assert "perplexity is\n{:.2f}, and with the pass rate {:.2f}".format(*lengths) in page
