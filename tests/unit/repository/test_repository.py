"""Promises that the repository makes about itself."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_base
from megatron_prepo.config import reference
from tests.tiny_tasks import TASKS, load

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_configuration_reference_is_that_of_the_code():
    """`make docs` writes it."""
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == reference.markdown()


@pytest.mark.parametrize("raw", ["laptop_demo.json", "real/make_real.json"])
def test_the_readmes_numbers_are_those_of_the_raw_result(raw):
    text = (REPOSITORY / "README.md").read_text()
    result = json.loads((REPOSITORY / "benchmarks/results" / raw).read_text())
    low, high = result["pass_rate_after_ci95"]
    for number in (
        f"**{result['pass_rate_before']:.3f} -> {result['pass_rate_after']:.3f}**",
        f"{low:.3f} to {high:.3f}",
        f"{result['pass_rate_transformers']:.3f}",
        f"{result['rollouts']:,} rollouts",
        f"{result['tokens']:,} tokens",
    ):
        assert number in " ".join(text.split())


def test_importing_the_package_imports_no_engine_and_no_trainer():
    heavy = ("torch", "megatron", "transformers", "sglang")
    found = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import sys, megatron_prepo.config; sys.exit(bool({found}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_prompts_are_what_the_generator_makes(name, tmp_path):
    """`examples/<name>/build.py` rebuilds the shipped prompt files byte for byte."""
    task = load(name)
    tiny_base.write_shipped_prompts(task, tmp_path, task.seed)
    for file in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / file).read_bytes() == (task.folder / file).read_bytes()


@pytest.mark.parametrize("name", TASKS)
def test_shipped_files_are_small(name):
    files = (f for f in load(name).folder.rglob("*") if f.is_file())
    assert sum(f.stat().st_size for f in files) < 1_600_000


def test_the_tables_of_the_comparison_are_those_of_the_raw_results():
    """`megatron-prepo report benchmarks/results/compare/*.jsonl` writes them in Markdown."""
    from megatron_prepo.compare import report_page as page

    text = (REPOSITORY / "docs" / "selection.md").read_text()
    results = sorted((REPOSITORY / "benchmarks" / "results" / "compare").glob("*.jsonl"))
    assert results
    for records in page.read(results).values():
        assert page.markdown(records) in text


def test_the_overview_of_the_comparison_is_that_of_the_raw_results():
    """Savings at 50, 75 and 100 % (a dash: not reached) and the end against Random's."""
    from megatron_prepo.compare import report_page as page

    text = (REPOSITORY / "docs" / "selection.md").read_text()
    [text] = re.findall(r"^\| \| lists, held out \|.*\n(?:\|.*\n)+", text, re.M)
    shown = {m[1]: m[0].split("|") for m in re.finditer(r"^\| `?(\w+)`? \|.*$", text, re.M)}
    checked = 0
    for column, name in enumerate(("lists", "story_sums", "story_sums_fresh", "traces")):
        [records] = page.read([REPOSITORY / f"benchmarks/results/compare/{name}.jsonl"]).values()
        for line in page.markdown(records).splitlines()[3:]:
            arm, _, *savings, _, difference = (cell.strip() for cell in line.split("|")[1:8])
            if (cells := shown.get(arm.strip("`"))) is None:
                continue
            reached = ("–" if s.startswith("&lt;") else s.split()[0] for s in savings)
            assert cells[2 + 2 * column].strip() == " / ".join(reached), (name, arm)
            assert cells[3 + 2 * column].strip() == difference.split()[0], (name, arm)
            checked += 1
    assert checked == 4 * 5 + 2, "five methods in four comparisons, the oracle in two"


def test_the_tables_of_the_development_are_those_of_the_raw_results():
    """Areas and ends in docs/foresight.md: means over seeds of the runs of one variant."""
    import numpy as np

    text = (REPOSITORY / "docs" / "foresight.md").read_text()
    raw = json.loads((REPOSITORY / "benchmarks/results/foresight_development.json").read_text())
    grid = np.linspace(0, 20480, 200)
    for setting, variant, row in (
        ("K=16 of P=80, 160 steps, lr 2e-4", "random", "| random | 3 | {} | {} |"),
        (
            "K=16 of P=80, 160 steps, lr 2e-4",
            "foresight as kept (KEPT 0.7)",
            "| **as kept** | 3 | **{}** | **{}** |",
        ),
        ("K=16 of P=80, 160 steps, lr 2e-4", "dapo", "| dapo | 2 | {} | {} |"),
        ("K=32 of P=160, 80 steps, lr 2e-4", "random", "| random | 3 | {} | {} |"),
        ("K=32 of P=160, 80 steps, lr 2e-4", "random, K = 20", "| random, K = 20 | 3 | {} | {} |"),
        ("K=32 of P=160, 80 steps, lr 2e-4", "foresight (KEPT 1)", "| foresight | 3 | {} | {} |"),
    ):
        runs = [r for r in raw["runs"] if (r["setting"], r["variant"]) == (setting, variant)]
        area = np.mean([np.interp(grid, r["rollouts"], r["pass_rate"]).mean() for r in runs])
        end = np.mean([r["pass_rate"][-1] for r in runs])
        assert row.format(f"{area:.3f}", f"{end:.3f}") in text, row
