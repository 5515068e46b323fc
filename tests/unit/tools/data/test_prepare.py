"""Data sets in their real schemas, handwritten: problems and answers, repeats, contamination."""

import json
import re
import sys
from fractions import Fraction
from math import isfinite
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prepo.errors import UserError
from megatron_prepo.rewards.boxed import last_boxed
from tools.data.prepare import (
    HENDRYCKS,
    Problem,
    decontaminate,
    main,
    read_problems,
    split,
    unique,
)

LONG = "a farmer plants seven rows of corn and each row has twelve stalks how many stalks are there"
ROWS = {
    "dapo-math-17k": {
        "data_source": "math_dapo",
        "prompt": [
            {
                "role": "user",
                "content": "Solve the following math problem step by step. The last line of your "
                "response should be of the form Answer: $Answer (without quotes) where $Answer is "
                "the answer to the problem.\n\nFind $x$ if $2x = 10$.\n\nSecond paragraph.\n\n"
                'Remember to put your answer on its own line after "Answer:".',
            }
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    },
    "gsm8k": {
        "question": "Ann sells 1,000 eggs at $2. How much does she make?",
        "answer": "She makes 1000*2=<<1000*2=2000>>2,000 dollars.\n#### 2,000",
    },
    "math": {
        "problem": "What is half of $\\frac{2}{3}$?",
        "level": "Level 1",
        "type": "Prealgebra",
        "solution": "Not $\\boxed{2}$ but $\\boxed{\\frac{1}{3}}$.",
    },
    "math500": {
        "problem": "Compute $1+1$.",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    },
    "aime24": {
        "id": 60,
        "problem": "Every morning Aya goes for a walk.",
        "solution": "...",
        "answer": "204",
        "url": "https://artofproblemsolving.com",
        "year": "2024",
    },
    "aime25": {"problem": "Find the sum of all integer bases.", "answer": "70", "id": "0"},
    "olympiadbench": {
        "id": 1606,
        "question": "Find all $c$.",
        "solution": ["..."],
        "final_answer": ["$2$", "$\\frac{5}{2}$"],
        "context": None,
        "is_multiple_answer": True,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
    },
}
READ = {
    "dapo-math-17k": ("dapo-math-17k/1", "Find $x$ if $2x = 10$.\n\nSecond paragraph.", "5"),
    "gsm8k": ("gsm8k/1", "Ann sells 1,000 eggs at $2. How much does she make?", "2000"),
    "math": ("math/1", "What is half of $\\frac{2}{3}$?", "\\frac{1}{3}"),
    "math500": ("math500/test/prealgebra/1.json", "Compute $1+1$.", "2"),
    "aime24": ("aime24/60", "Every morning Aya goes for a walk.", "204"),
    "aime25": ("aime25/0", "Find the sum of all integer bases.", "70"),
    "olympiadbench": ("olympiadbench/1606", "Find all $c$.", "2, \\frac{5}{2}"),
}


def problems(*texts: str, answer: str = "1") -> list[Problem]:
    return [Problem(str(i), text, answer) for i, text in enumerate(texts)]


def rows_file(folder, name: str, *rows: dict):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_data_set(name, tmp_path):
    (problem,) = read_problems(name, str(rows_file(tmp_path, name, ROWS[name])))
    assert (problem.id, problem.text, problem.answer) == READ[name]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\sqrt{\frac{a}{b}}}, where {a}", r"\sqrt{\frac{a}{b}}"),
        (r"\fbox{3}", "3"),
        (r"is $\boxed 7$.", "7"),
        (r"\boxed{never closed", ""),
        ("no box", ""),
    ],
)
def test_the_last_box(solution, answer):
    assert last_boxed(solution) == answer


def test_the_hub_is_asked_for_the_right_data_set(monkeypatch):
    asked = []

    def load_dataset(repository, part, split):
        asked.append((repository, part, split))
        return [ROWS["math"]] if "math" in repository else [ROWS["aime24"]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(read_problems("aime24", "hub")) == 1
    assert asked == [("HuggingFaceH4/aime_2024", None, "train")]
    assert len(read_problems("math", "hub")) == 7
    assert [part for _, part, _ in asked[1:]] == list(HENDRYCKS)


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("no such split")])
def test_a_hub_that_does_not_answer_is_a_sentence(monkeypatch, tmp_path, capsys, error):
    def load_dataset(repository, part, split):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert main(["--suite", "gsm8k=hub", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"openai/gsm8k (main, test) cannot be read from the hub: {error}" in said
    assert "NAME=FILE" in said


def test_parquet_and_hub_without_their_packages(monkeypatch, tmp_path):
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(UserError, match=r"pyarrow: pip install -e \"\.\[data\]\""):
        read_problems("aime24", str(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match="package datasets"):
        read_problems("aime24", "hub")


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([ROWS["dapo-math-17k"]]), tmp_path / "part-0.parquet"
    )
    (problem,) = read_problems("dapo-math-17k", str(tmp_path))
    assert (problem.id, problem.text, problem.answer) == READ["dapo-math-17k"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for part in ("b", "a"):
        rows_file(tmp_path, part, {"problem": f"Problem {part}?", "answer": 1, "id": part})
    found = read_problems("aime25", str(tmp_path))
    assert [(problem.id, problem.answer) for problem in found] == [
        ("aime25/a", "1"),
        ("aime25/b", "1"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "?", "answer": "5"}, "line 1: ValueError"),
        ({"question": "?", "answer": None}, "line 1: AttributeError"),
        ({"question": None, "answer": "#### 5"}, "line 1: field `problem` must be a text"),
        (
            {"question": "\ud800", "answer": "#### 5"},
            "line 1: field `problem` is not valid Unicode",
        ),
        ({"problem": "?", "answer": "#### 5"}, r"KeyError 'question'.*\['answer', 'problem'\]"),
        ({"question": " ", "answer": "#### 5"}, "line 1: field `problem` is empty"),
        ({"question": "?", "answer": "#### "}, "line 1: field `answer` is empty"),
        ([1], "line 1: must be an object"),
    ],
)
def test_a_row_that_does_not_read_is_named(row, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        read_problems("gsm8k", str(rows_file(tmp_path, "rows", row)))


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("aime24", {"answer": None}, "field `answer` .* but is null"),
        ("aime24", {"answer": ["1"]}, "field `answer` .* but is a list"),
        ("aime24", {"answer": True}, "field `answer` .* but is true or false"),
        ("aime24", {"answer": float("nan")}, "not valid JSON .NaN is not a JSON number"),
        ("aime24", {"id": "\udc00"}, "field `id` is not valid Unicode"),
        ("aime24", {"id": {"a": 1}}, "field `id` .* but is an object"),
        ("dapo-math-17k", {"reward_model": {"ground_truth": None}}, "field `answer` .* is null"),
        ("dapo-math-17k", {"reward_model": None}, "TypeError"),
        ("dapo-math-17k", {"prompt": [{"content": None}]}, "TypeError"),
        ("olympiadbench", {"final_answer": None}, "`final_answer` must be a list of texts"),
        ("olympiadbench", {"final_answer": [2]}, "`final_answer` must be a list of texts"),
        ("olympiadbench", {"final_answer": []}, "field `answer` is empty"),
        ("math", {"solution": ["no text"]}, "TypeError"),
        ("math", {"solution": "no box"}, "field `answer` is empty"),
    ],
)
def test_what_is_no_text_does_not_become_one(name, row, expected, tmp_path):
    path = rows_file(tmp_path, name, ROWS[name] | row)
    with pytest.raises(UserError, match=rf"{path}, line 1: .*{expected}") as caught:
        read_problems(name, str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("aime24", {"answer": 204.0}, "204"),
        ("aime24", {"answer": 0.50}, "0.5"),
        ("aime24", {"answer": "204.0"}, "204.0"),
        ("dapo-math-17k", {"reward_model": {"ground_truth": 5}}, "5"),
        ("olympiadbench", {"final_answer": "$2$"}, "2"),
        ("olympiadbench", {"final_answer": ["$2$"]}, "2"),
        ("olympiadbench", {"final_answer": ["$1$, $2$", "\\$3"]}, "1, 2, \\$3"),
        ("math500", {"answer": "a\u2028b"}, "a\u2028b"),
    ],
)
def test_answers_of_other_forms(name, row, answer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name] | row, ensure_ascii=False), encoding="utf-8")
    (problem,) = read_problems(name, str(path))
    assert problem.answer == answer


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


def leaves(value) -> list:
    """Return texts and numbers within, in order."""
    if isinstance(value, dict | list):
        return [
            x
            for inner in (value.values() if isinstance(value, dict) else value)
            for x in leaves(inner)
        ]
    return [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else []


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(list(ROWS)), st.data())
def test_any_value_in_a_row_is_a_problem_or_refused_with_its_line(tmp_path, name, data):
    """Problem and answer are texts or numbers of the row; nothing else becomes one."""
    row = ROWS[name] | {data.draw(st.sampled_from(list(ROWS[name]))): data.draw(ANYTHING)}
    path = rows_file(tmp_path, "rows", row)
    try:
        (problem,) = read_problems(name, str(path))
    except UserError as error:
        assert str(error).startswith(f"{path}, line 1: ") and str(error).isprintable()
        return
    texts = [leaf for leaf in leaves(row) if isinstance(leaf, str)]
    numbers = [Fraction(repr(x)) for x in leaves(row) if type(x) in (int, float) and isfinite(x)]
    assert problem.text and any(problem.text in text for text in texts)

    def plain(text: str) -> str:
        return re.sub(r"[\s$,]", "", text)

    in_numbers = re.fullmatch(r"-?\d+(\.\d+)?", problem.answer) and (
        Fraction(problem.answer) in numbers
    )
    assert problem.answer and (in_numbers or plain(problem.answer) in plain("".join(texts)))


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    """Both problems would be held out, or neither."""
    path = rows_file(tmp_path, "rows", ROWS["aime24"], ROWS["aime24"] | {"id": 60.0})
    with pytest.raises(UserError, match=rf"line 2: id '60' is also that of {path}, line 1"):
        read_problems("aime24", str(path))


def test_answers_that_are_the_same_number_do_not_contradict():
    found = [Problem("a", "How many?", "18"), Problem("b", "How many?", "18.0")]
    assert unique(found) == ([found[0]], 1, 0)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet", b"PAR1" + b"\0" * 99 + b"PAR1"])
def test_a_damaged_parquet_file_is_a_sentence(tmp_path, capsys, content):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow (extra `data`)")
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert main(["--suite", f"aime24={path}", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path} cannot be read as Parquet: ") and error.isprintable()


def test_parquet_that_is_cut_short_or_of_other_types_is_a_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow (extra `data`)")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    rows = [ROWS["aime25"] | {"answer": value} for value in (70.0, None, float("nan"))]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
    assert read_problems("aime25", str(path))[0].answer == "70"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_problems("aime25", str(path))
    for row, message in zip(rows[1:], ("is null", "is not a finite number"), strict=True):
        parquet.write_table(pyarrow.Table.from_pylist([rows[0] | {"id": "7"}, row]), path)
        with pytest.raises(UserError, match=rf"rows\.parquet, row 2: field `answer`.*{message}"):
            read_problems("aime25", str(path))


def test_of_the_same_problems_the_first_stays_and_of_contradicting_ones_none():
    found = [
        Problem("a", "What is 3 + 4?", "7"),
        Problem("b", "what is  3 + 4?", "7"),
        Problem("c", "What is 3 - 4?", "-1"),
        Problem("d", "How many?", "1"),
        Problem("e", "How many?", "2"),
    ]
    kept, repeated, contradicting = unique(found)
    assert [problem.id for problem in kept] == ["a", "c"]
    assert (repeated, contradicting) == (1, 2)


def test_a_shared_run_of_words_is_contamination():
    """13 of LONG's words in a row, whatever the signs between them; 12 are none."""
    words = LONG.split()
    suite = problems(LONG)
    thirteen = "Today, " + " - ".join(words[2:15]) + "!"
    twelve = "Today " + " ".join(words[2:14]) + " tomorrow"
    apart = " ".join(words[:9]) + " and " + " ".join(words[9:])
    kept, lost = decontaminate(problems(thirteen, twelve, apart), {"suite": suite}, 13)
    assert [problem.text for problem in kept] == [twelve, apart]
    assert lost == {"suite": 1}
    kept, lost = decontaminate(problems(thirteen, twelve, apart), {"suite": suite}, 9)
    assert not kept and lost == {"suite": 3}


def test_a_short_problem_is_contamination_as_a_whole_only():
    suite = problems("What is 3 + 4?")
    found = problems("what is 3 + 4?", "What is 3 - 4?", "What is 3 + 4? Be quick.")
    kept, lost = decontaminate(found, {"empty": [], "suite": suite}, 13)
    assert [problem.text for problem in kept] == ["What is 3 - 4?", "What is 3 + 4? Be quick."]
    assert lost == {"empty": 0, "suite": 1}


def test_a_split_is_the_same_whatever_comes_or_goes():
    found = problems(*(f"Problem {i}" for i in range(100)))
    training, held_out = split(found, 20)
    assert len(held_out) == 20 and len(training) == 80
    assert {p.text for p in training} | {p.text for p in held_out} == {p.text for p in found}
    others = split([Problem("x" + p.id, p.text, "2") for p in reversed(found)], 20)[1]
    assert {p.text for p in others} == {p.text for p in held_out}
    fewer = split([p for p in found if p.text != held_out[0].text], 20)[1]
    assert {p.text for p in held_out[1:]} < {p.text for p in fewer}
    with pytest.raises(UserError, match="--held-out 100"):
        split(found, 100)


def test_the_command_writes_prompts_suites_and_statistics(tmp_path, capsys):
    train = [
        {"question": f"Problem {i}: {word}?", "answer": f"... #### {i}"}
        for i, word in enumerate(["ja", "oui", "да", "si"])
    ]
    train += [train[0], {"question": LONG, "answer": "#### 84"}]
    rows_file(tmp_path, "train", *train)
    rows_file(tmp_path, "aime", {"problem": LONG + " now", "answer": "84", "id": 1})
    rows_file(tmp_path, "math500", ROWS["math500"])
    words = ["--train", f"gsm8k-train={tmp_path / 'train.jsonl'}"]
    words += ["--suite", f"aime24={tmp_path / 'aime.jsonl'}"]
    words += ["--suite", f"math500={tmp_path / 'math500.jsonl'}"]
    out = tmp_path / "out"
    words += ["--out", str(out), "--together", "paper", "--held-out", "1"]
    assert main([*words, "--instruction", "\nEnd with ####."]) == 0
    statistics = json.loads(capsys.readouterr().out)
    assert statistics == json.loads((out / "statistics.json").read_text())
    entry = statistics["train"]["gsm8k-train"]
    assert (entry["read"], entry["repeated"], entry["contradicting"]) == (6, 1, 0)
    assert entry["contaminated"] == {"aime24": 1, "math500": 0}
    assert entry["train"]["problems"] == 3 and entry["held_out"]["problems"] == 1
    assert entry["train"]["not_ascii"] + entry["held_out"]["not_ascii"] == 1
    assert statistics["together"]["whole_number_answers"] == 2
    assert statistics["suites"]["aime24"]["words"]["most"] == 19
    lines = (out / "gsm8k-train" / "train.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert set(record) == {"id", "prompt", "answer"}
    assert record["prompt"].endswith("?\nEnd with ####.")
    together = [json.loads(line) for line in (out / "paper.jsonl").read_text().splitlines()]
    assert [record["id"] for record in together] == ["aime24/1", "math500/test/prealgebra/1.json"]


def test_what_it_writes_the_trainer_reads(tmp_path):
    from megatron_prepo.data import read_prompts
    from tests.unit.inputs.test_data import TOKENIZER

    path = rows_file(tmp_path, "rows", ROWS["aime25"])
    assert main(["--suite", f"aime25={path}", "--out", str(tmp_path)]) == 0
    (prompt,) = read_prompts(tmp_path / "suites" / "aime25.jsonl", TOKENIZER, max_tokens=99)
    assert (prompt.id, prompt.answer) == ("aime25/0", "70")


def test_a_wrong_name_or_file_is_a_sentence(tmp_path, capsys):
    assert main(["--suite", "aime26=hub", "--out", str(tmp_path)]) == 2
    assert "unknown data set 'aime26'; known are dapo-math-17k" in capsys.readouterr().err
    assert main(["--suite", "aime25=absent.jsonl", "--out", str(tmp_path)]) == 2
    assert "no such file or folder: absent.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--suite", "aime25", "--out", str(tmp_path)])


def test_perplexities_are_those_of_transformers_and_are_drawn(tmp_path):
    """Perplexities equal exp of the loss of `transformers`, for the laptop's model on its prompts
    and on rows of one prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.e2e.laptop import LAPTOP

    base = str(LAPTOP / "base")
    lines = (LAPTOP / "train.jsonl").read_text().splitlines()[:20]
    rows = [
        {"problem": json.loads(line)["prompt"], "answer": "1", "id": str(i)}
        for i, line in enumerate(lines)
    ]
    path = rows_file(tmp_path, "rows", *rows)
    words = ["--suite", f"aime25={path}", "--out", str(tmp_path), "--perplexity", base]
    assert main(words) == 0
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    losses = []
    with torch.no_grad():
        for row in rows:
            ids = tokenizer(row["problem"], return_tensors="pt").input_ids
            losses.append(float(model(ids, labels=ids).loss))
    expected = torch.tensor(losses).exp().quantile(torch.tensor([0.0, 0.5, 1.0]))
    found = json.loads((tmp_path / "statistics.json").read_text())["perplexity"]["aime25"]
    # four decimals are written
    assert [found[q] for q in ("q0", "q50", "q100")] == [round(x, 4) for x in expected.tolist()]
    assert found["prompts"] == 20
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "gsm8k=hub", "--train", "gsm8k=hub"], "--train gsm8k is given twice"),
        (["--suite", "math500=hub", "--suite", "math500=hub"], "--suite math500 is given twice"),
        (["--held-out", "-3"], "--held-out -3 must be at least 0"),
        (["--ngram", "0"], "--ngram 0 at least 1"),
    ],
)
def test_what_would_lose_problems_is_refused(tmp_path, capsys, words, message):
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
