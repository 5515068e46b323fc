"""Every metric that the code writes has a line in the table of metrics, and the reverse."""

import ast
import re
import tarfile
from pathlib import Path

import pytest

from megatron_prepo.compare import record
from megatron_prepo.run import metrics_table as table
from megatron_prepo.run.recorder import TRAINING_STAGES

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE = REPOSITORY / "megatron_prepo"
OLD_RUN = REPOSITORY / "tests" / "data" / "run_of_d7965c3.tar.xz"
SUBJECTS = {key.split("/")[0] for key in table.KEYS if "/" in key}
ANYTHING = "[a-z0-9_.]+"


def pattern(node: ast.AST) -> str | None:
    """Return a string, or an f-string with its values as wildcards, as a regular expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) or ANYTHING for part in node.values)
    return None


def keys_in(source: str) -> set[str]:
    """Return the keys of metrics in a module, as regular expressions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            found |= {pattern(key) for key in node.keys if key is not None}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            found.add(pattern(node.targets[0].slice))
        elif isinstance(node, ast.DictComp):
            found.add(pattern(node.key))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "quantiles":
            name = pattern(node.args[0])
            found |= {f"{name}/{statistic}" for statistic in ("min", "q25", "q50", "q75", "max")}
    return {key for key in found if key and re.match(rf"({'|'.join(SUBJECTS)})/", key)}


@pytest.fixture(scope="module")
def written() -> set[str]:
    """Keys that the package writes: what `Run.record` gets in runs of every kind."""
    places = [*(PACKAGE / "trainer").glob("*.py"), *(PACKAGE / "selection").glob("*.py")]
    places += [PACKAGE / "actor" / "actor.py", PACKAGE / "run" / "recorder.py"]
    places += [PACKAGE / "train.py", PACKAGE / "train_async.py"]
    return set().union(*(keys_in(path.read_text()) for path in places))


def test_the_page_is_that_of_the_code():
    """`make docs` writes it."""
    assert (REPOSITORY / "docs" / "metrics.md").read_text() == table.markdown()


def test_every_key_that_is_written_is_in_the_table(written):
    assert {"reward/mean", "memory/peak_gib", "weight/q25", "selection/rounds"} <= written
    unknown = [key for key in written if not any(re.fullmatch(key, known) for known in table.KEYS)]
    assert not unknown


def test_every_key_of_the_table_is_written(written):
    absent = [
        key for key in table.KEYS - {"step"} if not any(re.fullmatch(one, key) for one in written)
    ]
    assert not absent


def test_stages_are_those_of_the_step():
    assert {f"seconds/{stage}" for stage in TRAINING_STAGES} <= table.KEYS


def test_a_key_without_a_line_is_refused():
    table.check_step({"reward/mean", "weight/max"}, custom_selector=False)
    with pytest.raises(AssertionError, match=r"does not list: \['weight_max'\]"):
        table.check_step({"reward/mean", "weight_max"}, custom_selector=True)
    table.check_step({"selection/mine"}, custom_selector=True)
    with pytest.raises(AssertionError, match="selection/mine"):
        table.check_step({"selection/mine"}, custom_selector=False)


def test_earlier_keys_are_read_as_the_present_ones():
    assert set(table.NEW_KEY.values()) <= table.KEYS and not set(table.NEW_KEY) & table.KEYS
    assert set(record.SERIES) | set(record.TOTALS) <= table.KEYS


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    """The page and the records of comparisons find what that version named otherwise."""
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "begun"
    raw = (run / "metrics.jsonl").read_text()
    assert '"weight_max"' in raw and '"ppl/selected_mean"' in raw and '"weight/max"' not in raw
    steps = list(table.read_steps(run))
    assert len(steps) == raw.count("\n") and all(set(step) <= table.KEYS for step in steps)
    columns = record.record(run)["steps"]
    assert {"ppl/selected/mean", "ppl/candidates/q50", "weight/max"} <= columns.keys()
    assert columns["step/every"] == 1
    assert columns["weight/max"][0] == float(f"{steps[0]['weight/max']:.4g}")
