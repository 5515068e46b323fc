"""The report's page is self-contained, and its numbers are those of `compare/analysis.py`."""

import json
import re
import sys
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import fake_train
import pytest
import yaml

from megatron_prepo.cli import main
from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare import figures
from megatron_prepo.compare import report_page as page
from megatron_prepo.compare.arms import ABLATIONS, ARMS
from megatron_prepo.config.schema import SELECTION_METHODS as METHODS
from megatron_prepo.errors import UserError
from tests.made_records import lifelike, line

ALL = [lifelike(arm, seed, "everything") for arm in ARMS for seed in (1, 2, 3)]
UNEQUAL = [
    lifelike(arm, seed, "unequal")
    for arm, count in (("random", 3), ("prepo", 2), ("mine", 1))
    for seed in range(1, count + 1)
]


def written(tmp_path, *groups: list[dict]) -> list[str]:
    """Write result files of the groups of records; return their paths."""
    paths = []
    for number, records in enumerate(groups):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths.append(str(path))
    return paths


def body_of(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Page of two comparisons: all arms, and arms of unequal seeds."""
    directory = tmp_path_factory.mktemp("page")
    paths = page.report(written(directory, ALL, UNEQUAL), directory / "report.html")
    return paths


def test_the_page_needs_nothing_else(whole):
    text = whole[0].read_text()
    assert not re.search(r"(src|href)=(?!\"#)", text)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert "<script" not in text and not re.search(r"url\((?!#)", text)


def test_pictures_beside_it(whole):
    assert {path.suffix for path in whole[1:]} == {".png", ".md"}
    names = {path.name for path in whole[1:]}
    assert {"everything_pass_rate.png", "everything_pass_rate_ablations.png"} <= names
    assert {"unequal_pass_rate_tokens.png", "unequal_stages.png"} <= names
    assert all(path.stat().st_size > 5000 for path in whole[1:] if path.suffix == ".png")


def test_the_headline_table_in_markdown_has_the_pages_numbers(whole):
    (table,) = (path.read_text() for path in whole if path.name == "everything.md")
    lines = table.splitlines()
    results = {result.arm.name: result for result in comparison.analyse(ALL)}
    assert len({row.count("|") for row in lines}) == 1
    for row in lines[2:]:
        name = row.split("`")[1]
        assert f"{results[name].final.value:.3f}" in row
        if name != "random" and not results[name].savings["rollouts", 0.75].missed:
            assert f" {results[name].savings['rollouts', 0.75].ratio:.2f} (" in row
    assert [row.split("`")[1] for row in lines[2:]] == list(results)


def test_figures_are_sound_and_take_their_colours_from_the_page(whole):
    text = whole[0].read_text()
    drawings = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(drawings) == sum(path.suffix == ".png" for path in whole)
    for drawing in drawings:
        xml.fromstring(drawing)
        assert not re.search(r"#fe[0-9a-f]{4}", drawing), "a placeholder is left"
        assert "width=" not in drawing.split(">")[0], "it has to shrink on a phone"
    variables = set(re.findall(r"var\((--[a-z0-9_-]+)\)", text))
    defined = set(re.findall(r"(--[a-z0-9_-]+):", text))
    assert variables <= defined
    assert text.count("prefers-color-scheme: dark") == 3


def test_each_line_is_named(whole):
    drawing = re.search(r"<svg .*?</svg>", whole[0].read_text(), re.S)[0]
    for name in set(METHODS) - {"oracle"}:
        assert f">{name}<" in drawing
    assert ">oracle (ceiling)<" in drawing and ">reverse<" not in drawing


@pytest.mark.parametrize("records", [ALL, UNEQUAL])
def test_the_tables_numbers_are_those_of_the_analysis(records):
    text = page.page({"it": records})
    rows = {}
    for row in re.findall(r"<tr[^>]*><th scope=row>.*?</tr>", text, re.S):
        name = re.search(r"</i>(\w+)<", row)[1]
        rows.setdefault(name, []).append([body_of(c) for c in re.findall(r"<td>(.*?)</td>", row)])
    for result in comparison.analyse(records):
        headline, others = rows[result.arm.name]
        for place, quota in enumerate(comparison.QUOTAS):
            saving = result.savings["rollouts", quota]
            cell = headline[place].replace("&lt;", "<")
            assert cell.startswith(f"{'< ' * saving.missed}{saving.ratio:.2f}")
            assert cell.endswith(f"{saving.reached_seeds}/{len(result.arm.records)} seeds")
            if saving.low is not None and saving.reached_draws:
                assert f"{saving.low:.2f} to {saving.high:.2f}" in cell
                assert (f"< {saving.low:.2f} to" in cell) is saving.low_missed
            else:
                assert " to " not in cell
            ratio = f"{result.savings['tokens', quota].ratio:.2f}"
            assert others[place].replace("&lt; ", "").startswith(ratio)
        assert headline[3].startswith(f"{result.final.value:.3f}")
        assert headline[5].startswith(f"{result.mean_pass.value:.3f}")
        if result.final_difference:
            shown = headline[4].split()[0].replace("−", "-")
            assert shown == f"{result.final_difference.value:+.3f}"


def test_commands_machine_and_seeds_at_the_foot(whole):
    text = body_of(whole[0].read_text())
    assert "megatron-prepo compare examples/laptop/prepo.yaml" in text
    assert "processor made up, cores 2" in text
    assert "random: 1, 2, 3; prepo: 1, 2; mine: 1" in text


def test_arms_without_perplexity_have_no_such_figure():
    arms = list(comparison.group_by_arm([lifelike("random", 1), lifelike("mopps", 1)]).values())
    keys = {figure.key for figure in figures.figures(arms)}
    assert "zero_variance" in keys and not keys & {"window", "spearman", "deciles"}


def test_bare_records_are_enough_for_curves():
    arms = list(comparison.group_by_arm([line("random", 1), line("prepo", 1)]).values())
    keys = [figure.key for figure in figures.figures(arms)]
    assert keys == ["pass_rate", "pass_rate_tokens", "pass_rate_seconds"]


def test_figures_are_cut_where_there_are_many_arms():
    made = figures.figures(list(comparison.group_by_arm(ALL).values()))
    by_key = {figure.key: [arm.name for arm in figure.arms] for figure in made}
    assert set(by_key["pass_rate"]) == set(METHODS)
    assert set(by_key["pass_rate_ablations"]) == {"random", "prepo", *ABLATIONS}


def test_one_comparison_of_two_files(tmp_path):
    paths = written(tmp_path, [lifelike("random", 1)], [lifelike("random", 2)])
    (records,) = page.read(paths).values()
    assert [record["seed"] for record in records] == [1, 2]


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    paths = written(tmp_path, [lifelike("random", 1)], [lifelike("random", 1)])
    assert main(["report", *paths, "--out", str(tmp_path / "x.html")]) == 2
    assert "random/1 twice" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["hello", '{"a": 1}', "[1]", None])
def test_what_is_neither_run_nor_results(tmp_path, content):
    path = tmp_path / "thing"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match="thing"):
        page.read([path])


def test_without_a_baseline_that_gains_the_page_says_so():
    for records in (
        [lifelike("prepo", 1)],
        [{**lifelike("random", 1), **line("random", 1, final=0.3)}, lifelike("prepo", 1)],
    ):
        text = page.page({"it": records})
        assert "No savings" in text and "saving at" not in text


def elements_of(text: str) -> list[tuple[str, list[str]]]:
    """Return the elements of a page as a browser sees them: names, and names of attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, given: found.append((tag, [name for name, _ in given]))
    parser.feed(text)
    return found


def test_no_text_of_a_record_becomes_an_element():
    hostile = """</pre></title><script>alert(1)</script><img src=x onerror="alert(1)">'{{ 1 }}"""
    pages = []
    for words in ("harmless", hostile):
        about = {"arm": words, "command": words, "machine": {words: words}}
        about["settings"] = {words: words}
        pages.append(page.page({words: [lifelike("random", 1) | about]}))
    assert elements_of(pages[0]) == elements_of(pages[1])
    assert "&lt;/title&gt;&lt;script&gt;" in pages[1] and "{{ 1 }}" in pages[1]


@pytest.fixture
def cluster_run(tmp_path, monkeypatch):
    """Directory of a run of GRESO through SGLang: groups dropped, one completion cut."""
    model = tmp_path / "model"
    model.mkdir()
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"hf": str(model)},
        "data": {"train": "absent", "eval": "absent"},
        "selection": {"method": "greso", "num_candidates": 20, "num_selected": 4},
        "rollout": {"engine": "sglang", "samples_per_prompt": 2, "max_new_tokens": 8},
        "servers": {"urls": ["http://10.0.0.8:30000"]},
        "train": {"total_steps": 80},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))
    directory = tmp_path / "run"
    (directory / "logs" / "node_1").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    fake_train.main()
    entries = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]
    for entry in entries[:2]:
        entry |= {"trained": False, "weight": None, "mean_entropy": None, "aborted": True}
    (directory / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return directory


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(cluster_run, tmp_path):
    """The report also works while a line is being written."""
    (cluster_run / "summary.json").unlink()
    for name in ("metrics", "ledger", "evaluations"):
        with open(cluster_run / f"{name}.jsonl", "a") as file:
            file.write('{"step": 3, "rew')
    assert main(["report", str(cluster_run), "--out", str(tmp_path / "page.html")]) == 0
    text = body_of((tmp_path / "page.html").read_text())
    assert "steps 3 of 80, unfinished" in text and "rollouts 24 " in text
    assert "pass rate so far 0.600 0.300 to 0.700" in text and "gain so far 0.200 " in text
    assert "greso, weights relative_entropy" in text


def test_a_finished_run_of_a_cluster_is_reported(cluster_run, tmp_path):
    summary = json.loads((cluster_run / "summary.json").read_text())
    intervals = {f"{key}_ci95": [0.3, 0.7] for key in ("pass_rate_before", "pass_rate_after")}
    summary |= intervals | {"gain": 0.2, "gain_ci95": [0.1, 0.3], "weighting": "none", "ranks": 16}
    (cluster_run / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(cluster_run), "--out", str(tmp_path / "page.html")]) == 0
    text = body_of((tmp_path / "page.html").read_text())
    assert "gain, prompt by prompt 0.200 0.100 to 0.300" in text and "unfinished" not in text


def test_a_run_without_an_evaluation_is_a_sentence(cluster_run, tmp_path, capsys):
    for name in ("summary.json", "evaluations.jsonl", "metrics.jsonl", "ledger.jsonl"):
        (cluster_run / name).unlink()
    assert main(["report", str(cluster_run)]) == 2
    assert "neither a run's directory" in capsys.readouterr().err
    for name in ("evaluations.jsonl", "metrics.jsonl", "ledger.jsonl"):
        (cluster_run / name).touch()
    assert main(["report", str(cluster_run)]) == 2
    assert "needs: its first evaluation is before its first step\n" in capsys.readouterr().err
    path = cluster_run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"eval": {"before": False, "every": 8}}))
    (cluster_run / "evaluations.jsonl").unlink()
    assert main(["report", str(cluster_run)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "has not been evaluated yet" in line
    assert line.endswith("after 8 of 80 steps (eval.before=false, eval.every=8)")
    first = json.dumps(
        {"step": 0, "rollouts": 0, "tokens": 0, "seconds": 0.0, "pass_rate": 0.4}
        | {"pass_rate_ci95": [0.3, 0.5], "samples_per_prompt": 4}
    )
    (cluster_run / "evaluations.jsonl").write_text(first + "\n")
    assert main(["report", str(cluster_run), "--out", str(tmp_path / "page.html")]) == 0
