"""Prompts whose chat template writes the date: the same in a resumed run, and on all ranks."""

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import pytest

from megatron_prepo import config, data
from megatron_prepo.compare import runner as compare
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation import suites
from megatron_prepo.inputs import preflight, prompt_digests
from megatron_prepo.inputs.prompt_digests import PromptDigests
from megatron_prepo.run import directory as run_directory

LAPTOP = Path(__file__).resolve().parents[3] / "examples" / "laptop"
LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %m %Y") %}{%- else %}'
    '{%- set date_string = "26 07 2024" %}{%- endif %}{%- endif %}'
    "{{ date_string }} . {{ messages[0]['content'] }}"
)
"""Template that gets the date as Llama 3.2's does; the month in digits, since no month is in the
vocabulary."""


class Calendar(datetime.date):
    """A machine's date."""

    day_of_test = datetime.date(2026, 1, 31)

    @classmethod
    def today(cls):
        return cls.day_of_test


@pytest.fixture
def day(monkeypatch):
    """Set the date, for our code and for transformers'."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.combine(Calendar.day_of_test, datetime.time(23, 59))

    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(prompt_digests, "date", Calendar)
    monkeypatch.setattr(suites, "date", Calendar)

    def set_day(text: str) -> None:
        monkeypatch.setattr(Calendar, "day_of_test", datetime.date.fromisoformat(text))

    return set_day


@pytest.fixture
def laptop(tmp_path):
    """Configuration of the laptop experiment whose model has the template."""
    base = shutil.copytree(LAPTOP / "base", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": LLAMA32}))
    for file in ("train.jsonl", "eval.jsonl"):
        lines = (LAPTOP / file).read_text().splitlines(keepends=True)
        (tmp_path / file).write_text("".join(lines[:40]))

    def load(*overrides: str) -> config.Config:
        files = [
            f"model.hf={base}",
            f"data.train={tmp_path / 'train.jsonl'}",
            f"data.eval={tmp_path / 'eval.jsonl'}",
            "selection.num_candidates=32",
            f"run.dir={tmp_path / 'run'}",
            "data.chat_template=true",
        ]
        return config.load(LAPTOP / "prepo.yaml", [*files, *overrides])

    return load


def begin(settings: config.Config) -> preflight.Inputs:
    """Do what a run does at its first start, without the digests of files, which would detect the
    change first."""
    inputs = preflight.check(settings)
    directory = Path(settings.run.dir)
    run_directory.begin(settings, print)
    run_directory.end(Path(settings.run.dir))
    (directory / "inputs.json").unlink()
    prompt_digests.save(directory, inputs.digests)
    return inputs


def test_a_template_is_told_the_date_and_by_default_todays(laptop, day):
    """The reference is what `transformers` renders on that day."""
    tokenizer = preflight.read_tokenizer(laptop().model.hf)
    turns = [{"role": "user", "content": "1 + 2"}]
    day("2025-12-24")
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    today, _ = data.tokenize("1 + 2", tokenizer, chat_template=True)
    day("2026-06-01")
    pinned, _ = data.tokenize(
        "1 + 2", tokenizer, chat_template=True, date=datetime.date(2025, 12, 24)
    )
    other, _ = data.tokenize("1 + 2", tokenizer, chat_template=True)
    assert list(today) == list(pinned) == theirs != list(other)


def test_a_run_that_resumes_on_another_day_has_the_prompts_of_its_first(laptop, day):
    day("2026-01-31")
    first = begin(laptop())
    day("2026-02-01")
    again = preflight.check(laptop())
    assert again.train_prompts == first.train_prompts and again.digests == first.digests
    prompt_digests.save(Path(laptop().run.dir), again.digests)
    assert prompt_digests.recorded_date(Path(laptop().run.dir)) == datetime.date(2026, 1, 31)
    new = preflight.check(laptop("run.overwrite=true"))
    assert new.train_prompts[0].tokens != first.train_prompts[0].tokens
    pinned = preflight.check(laptop("data.chat_template_date=2026-01-31", "run.overwrite=true"))
    assert pinned.train_prompts == first.train_prompts


def changed(path: Path, change) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in change(records)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda records: [records[0], records[1] | {"prompt": "9 + 9 ="}, *records[2:]],
            r"train\.jsonl: prompt '\S+' has different tokens or a different answer; "
            ".* since its first start",
        ),
        (
            lambda records: [r | {"answer": "77"} for r in records],
            r"prompt '\S+' \(and [\d,]+ more\) has different tokens or a different answer",
        ),
        (lambda records: records[:-1], r"train\.jsonl has [\d,]+ prompts, not [\d,]+; "),
    ],
)
def test_a_resumed_run_with_other_prompts_is_refused_by_their_name(laptop, change, message):
    begin(laptop())
    changed(Path(laptop().data.train), change)
    with pytest.raises(UserError, match=rf"^run\.dir=\S+ began with other prompts: .*{message}"):
        preflight.check(laptop())
    preflight.check(laptop("run.overwrite=true"))


def test_a_damaged_record_is_a_sentence(laptop):
    begin(laptop())
    (Path(laptop().run.dir) / "prompts.json").write_text('{"date": null}')
    with pytest.raises(UserError, match=r"prompts\.json is damaged"):
        preflight.check(laptop())


def test_ranks_with_another_date_are_named(laptop, day):
    day("2026-01-31")
    zero = preflight.check(laptop()).digests
    day("2026-02-01")
    late = preflight.check(laptop()).digests

    def gather(value) -> list:
        return [zero, zero, late] if isinstance(value, PromptDigests) else [zero.summed] * 2 + [""]

    message = r"^ranks 2 have other .* on rank 2, where the date is 2026-02-01, not 2026-01-31"
    with pytest.raises(UserError, match=message):
        prompt_digests.check_ranks(zero, gather)
    prompt_digests.check_ranks(zero, lambda value: [value, value])


def test_a_comparison_of_dated_prompts_wants_their_date(laptop):
    with pytest.raises(UserError, match=r"set data\.chat_template_date, such as data\.chat"):
        compare.check_inputs(laptop())
    compare.check_inputs(laptop("data.chat_template_date=2026-01-31"))


def test_an_evaluation_has_the_date_of_its_run_or_of_its_first_start(laptop, tmp_path, day):
    day("2026-01-31")
    begin(laptop())
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config.to_tree(laptop())))
    day("2026-02-01")
    of_run = suites.load_settings(None, [("run", str(tmp_path / "run"))], [])
    assert of_run.data.chat_template_date == "2026-01-31"
    out = tmp_path / "out"
    given = laptop()
    first = dataclasses.replace(given, data=suites.dated(given.data, Calendar.today()))
    suites.agree(out, suites.fixed_settings(first), {}, {})
    day("2026-02-02")
    assert suites._first_start_date(out) == datetime.date(2026, 2, 1)


@pytest.mark.parametrize("value", ["'2026-02-30'", "today", "31.01.2026", "'20260131'", "''"])
def test_what_is_no_date_is_refused(laptop, value):
    with pytest.raises(UserError, match=r"data\.chat_template_date='.*' must be a date such as"):
        laptop(f"data.chat_template_date={value}")
