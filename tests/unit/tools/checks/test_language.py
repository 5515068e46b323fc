"""`tools/checks/language.py`: what it counts in small texts, and what it finds in this tree."""

from pathlib import Path

import pytest
from rounding import approx

from tools.checks import language

REPOSITORY = Path(__file__).resolve().parents[4]

PROSE = {
    "per": ("one message per step, a per-rank buffer", "the upper stage, a permutation"),
    "rate": (
        "four numbers a token, once a step, 12 bytes a parameter",
        "It needs a step; each rank has a token; a rank-local view of tokens.",
    ),
    "resume": ("An unfinished run is resumed and continues.", "a continuous range"),
    "goes-on": ("It goes on; it is gone on\nwith.", "It goes in, on request."),
    "so-many": ("so many ranks, so often", "so that many ranks"),
    "anew": (
        "Start anew, in a process of its own, at once, beforehand, by itself.",
        "Start it once, before the run, by its own name.",
    ),
    "says": ("The log says so; it is said in a sentence.", "an essay, and what the log reports"),
    "others": ("The others follow; what is left is left out; it leaves out.", "other ranks"),
    "whole": ("the whole file", "wholesale"),
    "there": ("what is there", "is there a file, is there any"),
    "beside": ("beside the file", "besides"),
    "behind": ("behind the job", "lag"),
    "tells": ("the exit code tells, as it was told", "retells"),
    "paid": ("rollouts that are paid; written aside; at SGLang's border", "a repaid loan"),
    "dialect": ("it answers with nonsense; it goes with any method", "a sensible word"),
}
COUNTS = {
    "per": 2,
    "rate": 3,
    "resume": 2,
    "goes-on": 2,
    "so-many": 2,
    "anew": 5,
    "says": 3,
    "others": 4,
    "whole": 1,
    "there": 1,
    "beside": 1,
    "behind": 1,
    "tells": 2,
    "paid": 3,
    "dialect": 2,
}


def found(row: str, source: str) -> list[str]:
    passages = list(language.python_prose(source, "file.py"))
    places = language.hits(language.row_named(row), passages)
    return [language.sentence(passage.text, start) for passage, start in places]


def test_every_row_has_an_example():
    rows = {row.name for row in (*language.ROWS, *language.WORDS)}
    assert rows == PROSE.keys() | {"docstrings"}


@pytest.mark.parametrize("row", PROSE)
def test_each_idiom_is_counted_and_its_neighbours_are_not(row):
    idiom, plain = PROSE[row]
    assert len(found(row, f'"""Text.\n\n{idiom}\n"""')) == COUNTS[row]
    assert found(row, f'"""Text.\n\n{plain}\n"""') == []


@pytest.mark.parametrize(
    "source",
    [
        '"""The file goes on."""',
        "class A:\n    x: int\n    '''The file goes on.'''",
        "# The file\n# goes on.",
        "x = 1  # The file goes on.",
        'raise ValueError(f"{x}: the file goes on")',
        'raise UserError("a", *["the file " "goes on"])',
        'assert x, "the file goes on"',
        'logger.info("the file %s goes on", x)',
        'print(f"the file {x} goes on")',
        'p.add_argument("--x", help="the file goes on")',
    ],
)
def test_prose_of_every_kind_is_read(source):
    assert len(found("goes-on", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""Text.\n\n    python run.py  # goes on\n"""',
        '"""Text.\n\n>>> goes("on")\n\'goes on\'\n"""',
        '"""Text with `goes on` in code."""',
        "text = 'goes on'",
        "find('goes on')",
        "# noqa: goes on",
        "goes on",
        '"""它 goes on."""',
    ],
)
def test_code_is_no_prose(source):
    assert found("goes-on", source) == []


def test_code_blocks_of_markdown_are_no_prose():
    text = "\n".join(
        (
            "It goes on.",
            "",
            "    goes on",
            "",
            "    goes on",
            "```sh",
            "goes on",
            "```",
            "[a link that goes on](goes on.md) `goes on` <!-- goes\non -->",
            "",
            "- a list",
            "    goes on",
            "",
            "| it goes on | cell |",
        )
    )
    passages = list(language.markdown_prose(text, "README.md"))
    places = [
        (p.line + p.text.count("\n", 0, start), language.sentence(p.text, start))
        for p, start in language.hits(language.row_named("goes-on"), passages)
    ]
    assert places == [
        (1, "It goes on."),
        (9, "[a link that goes on] _ _"),
        (13, "- a list goes on"),
        (15, "it goes on"),
    ]


@pytest.mark.parametrize(
    ("docstring", "hit"),
    [
        ("Return the size.", False),
        ("The size.", False),
        ("Bytes of `x`.", False),
        ("`x` in bytes.", False),
        ("Of the job, with the smallest size.", True),
        ("Those that failed.", True),
        ("With a remedy.", True),
        ("How many.", True),
    ],
)
def test_docstrings_are_judged_by_their_first_word(docstring, hit):
    source = f'def f():\n    """{docstring}"""\n'
    assert bool(found("docstrings", source)) == hit
    assert bool(found("docstrings", f"x: int\n'''{docstring}'''")) == hit


def test_rates_are_per_1000_words_and_docstrings_in_per_cent():
    source = '"""Of ' + "word " * 498 + 'goes on"""\ndef f():\n    "Return."\n'
    passages = list(language.python_prose(source + "# goes on\n" + "# word\n" * 496, "a.py"))
    rates = language.rates(passages)
    assert rates["goes-on"] == approx(1000 * 2 / 1000)
    assert rates["docstrings"] == approx(50)


def test_the_range_is_that_of_the_four_others():
    """Idioms to avoid may be rarer than in all four, and the field's terms more frequent."""
    per, says = language.row_named("per"), language.row_named("says")
    assert [language.in_range(per, rate) for rate in (1.96, 1.97, 5.09, 5.1)] == [
        False,
        True,
        True,
        True,
    ]
    assert [language.in_range(says, rate) for rate in (0, 0.07, 0.08)] == [True, True, False]


def test_the_command_lists_sentences_and_folders(tmp_path, capsys):
    for name in ("docs/a.md", "docs/deep/b.md", "pkg/sub/deep/c.py", "notes.md", ".venv/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Text.\n\nIt goes on. Yes." if path.suffix == ".md" else "# It goes on.")
    (tmp_path / "linked").symlink_to(tmp_path / "pkg")
    assert language.main([str(tmp_path), "--list", "goes-on"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "docs/a.md:3: It goes on.",
        "docs/deep/b.md:3: It goes on.",
        "pkg/sub/deep/c.py:1: It goes on.",
    ]
    assert language.main([str(tmp_path), "--by-folder"]) == 0
    header, *folders = (line.split() for line in capsys.readouterr().out.splitlines())
    column = 1 + header.index("goes-on")
    counts = {line[0]: line[column] for line in folders}
    assert counts == {"docs": "1", "docs/deep": "1", "pkg/sub": "1"}
    assert language.main([str(tmp_path)]) == 0
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "<--" in line]
    assert marked == ["per", "resume", "goes-on"]


def test_this_trees_prose_is_within_the_range_of_the_four_others():
    rates = language.rates(list(language.read_tree(REPOSITORY)))
    outside = {
        r.name: rates[r.name] for r in language.ROWS if not language.in_range(r, rates[r.name])
    }
    assert not outside, "python tools/checks/language.py --list ROW shows each sentence"
