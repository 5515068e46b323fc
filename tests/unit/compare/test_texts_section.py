"""Texts on a run's page: complete, of a limited size, and harmless whatever they are."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_prepo.cli import main
from megatron_prepo.compare import report_page, texts_section
from megatron_prepo.run.texts import file_name
from tests.unit.compare.test_report_page import cluster_run  # noqa: F401 - a fixture
from tests.unit.compare.test_run_page import finished

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'"
    "</script><!-- \u2028 \ud800 ' \" & &lt; ]]>"
)


def rollout(text: str, reward: float = 1.0) -> dict:
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return {
        "reward": reward,
        "graded": "ok",
        "tokens": len(pieces),
        "finished": True,
        "text": text,
        "aborted": False,
        "trained": True,
        "advantage": reward - 0.5,
        "weight": 1.25,
        "mean_entropy": 0.5,
        "entropy": [round(0.5 * i, 4) for i in range(len(pieces))],
        "pieces": pieces,
    }


def step_line(step: int, text: str = "2 + 2 = 4") -> dict:
    """Return a step with 6 candidates, of which 2 were rolled out and kept."""
    prompts = [
        {
            "id": f"p{position}{text[:9]}",
            "text": f"question {position} {text}",
            "answer": text,
            "position": position,
            "ppl": 1.0 + position,
            "rollouts": [rollout(text), rollout(f"no {text}", reward=0.0)],
        }
        for position in (2, 3)
    ]
    ppl = [1.0, 2.0, 3.0, 4.0, 5.0, None]
    return {"step": step, "ppl": ppl, "chosen": [2, 3], "prompts": prompts}


def evaluation_line(step: int, when: str, text: str) -> dict:
    keys = ("reward", "graded", "tokens", "finished", "text")
    completion = {key: value for key, value in rollout(text).items() if key in keys}
    prompt = {"id": "e0", "text": "held out", "answer": "4", "completions": [completion]}
    return {"step": step, "when": when, "prompts": [prompt]}


def keep(run: Path, kind: str, lines: list[dict]) -> None:
    (run / "texts").mkdir(exist_ok=True)
    (run / file_name(kind)).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(cluster_run):  # noqa: F811
    (cluster_run / "summary.json").write_text(finished(cluster_run))
    return cluster_run


class Elements(HTMLParser):
    """Elements of a page as a browser sees them: all names, and the scripts with their content."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[tuple[dict, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def data(self, kind: str) -> list[dict]:
        """Return the embedded lines of a kind."""
        return [
            json.loads(text[: text.rindex("}") + 1])
            for attributes, text in self.scripts
            if attributes.get("data-kind") == kind
        ]


def page_of(run: Path) -> str:
    return report_page.page(report_page.read([run]))


def test_the_page_has_all_texts(run):
    rollouts = [step_line(step) for step in range(3)]
    evaluations = [evaluation_line(0, "before", "one"), evaluation_line(3, "after", "two")]
    keep(run, "rollouts", rollouts)
    keep(run, "evaluations", evaluations)
    elements = Elements(page_of(run))
    assert elements.data("rollouts") == rollouts
    assert elements.data("evaluations") == evaluations


def test_no_text_becomes_an_element(run):
    keep(run, "rollouts", [step_line(0)])
    keep(run, "evaluations", [evaluation_line(0, "before", "one")])
    harmless = Elements(page_of(run))
    keep(run, "rollouts", [step_line(0, HOSTILE)])
    keep(run, "evaluations", [evaluation_line(0, "before", HOSTILE)])
    hostile = Elements(page_of(run))
    assert hostile.names == harmless.names
    assert hostile.data("rollouts") == [step_line(0, HOSTILE)]


def test_only_our_script_may_run_and_nothing_is_loaded(run):
    keep(run, "rollouts", [step_line(0, HOSTILE)])
    page = page_of(run)
    [script] = [text for attributes, text in Elements(page).scripts if not attributes]
    digest = base64.b64encode(hashlib.sha256(texts_section.SCRIPT.encode()).digest()).decode()
    assert script.startswith(texts_section.SCRIPT)
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "innerHTML" not in page and not re.search(r"<link|@import|url\((?!#)", page)


@pytest.mark.parametrize("empty", ["no folder", "no file", "no line", "half a line"])
def test_a_run_without_texts_has_a_page_without_script(run, empty):
    if empty != "no folder":
        (run / "texts").mkdir()
    if empty.endswith("line"):
        (run / file_name("rollouts")).write_text('{"step": 0, "pro' * (empty == "half a line"))
    page = page_of(run)
    assert "script" not in Elements(page).names and 'class="texts"' not in page


def test_a_step_that_is_being_written_is_not_shown_yet(run):
    keep(run, "rollouts", [step_line(0)])
    with open(run / file_name("rollouts"), "a") as file:
        file.write(json.dumps(step_line(1))[:-9])
    assert [line["step"] for line in Elements(page_of(run)).data("rollouts")] == [0]


def test_a_step_without_kept_prompts_is_shown_by_its_window(run):
    keep(run, "rollouts", [step_line(0) | {"prompts": []}])
    assert len(Elements(page_of(run)).data("rollouts")) == 1


@pytest.mark.parametrize("damage", ["no JSON", "[1]", '{"step": 1}'])
def test_a_damaged_line_is_named(run, capsys, damage):
    keep(run, "rollouts", [step_line(0)])
    with open(run / file_name("rollouts"), "a") as file:
        file.write(f"{damage}\n")
    assert main(["report", str(run), "--out", str(run.parent / "page.html")]) == 2
    assert "texts/rollouts.jsonl, line 2 is damaged" in capsys.readouterr().err


def test_a_large_file_is_shown_in_part_from_its_first_to_its_last_step(run, monkeypatch):
    keep(run, "rollouts", [step_line(step) for step in range(100)])
    size = (run / file_name("rollouts")).stat().st_size
    monkeypatch.setattr(texts_section, "MAX_BYTES", size // 10)
    page = page_of(run)
    shown = [line["step"] for line in Elements(page).data("rollouts")]
    assert len(shown) == 10 and (shown[0], shown[-1]) == (0, 99)
    assert "10 of 100, evenly spread" in page
    monkeypatch.setattr(texts_section, "MAX_BYTES", 1)
    assert [line["step"] for line in Elements(page_of(run)).data("rollouts")] == [0, 99]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_tokens_by_entropy_and_runs_no_text(run, tmp_path):
    hostile = HOSTILE.replace("\ud800", "")  # shown, but Chromium's --dump-dom crashes on it
    keep(run, "rollouts", [step_line(0), step_line(1, hostile)])
    before = evaluation_line(0, "before", "wrong")
    keep(run, "evaluations", [before, evaluation_line(2, "after", hostile)])
    page = tmp_path / "page.html"
    page.write_text(page_of(run), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *options, profile, "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    shown = Elements(dom)
    assert "img" not in shown.names and f"<title>{run}</title>" in dom
    assert dom.count('class="chosen"') == 2 and dom.count('class="kept"') == 2
    tokens = re.findall(r'<span class="(e\d)" title="([\d.]+) nats">', dom)
    assert tokens[:8] == [
        *(("e0", "0"), ("e2", "0.5"), ("e3", "1"), ("e3", "1.5")),
        *(("e4", "2"), ("e4", "2.5"), ("e5", "3"), ("e5", "3.5")),
    ]
    assert "2 of 2 kept prompts, 4 completions" in dom
    assert all(words in dom for words in ("advantage +0.5", "advantage −0.5", "weight 1.25"))
    assert "mean reward 1 → 1" in dom and "before, step 0" in dom
