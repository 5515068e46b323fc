"""Measure how far the prose of a tree is from the field's plain technical English.

    python tools/checks/language.py [TREE]              # a table: this tree next to four others
    python tools/checks/language.py --list ROW          # every hit, as FILE:LINE and its sentence
    python tools/checks/language.py --by-folder         # hits per folder

Prose is: docstrings and the strings under fields, comments, string literals in `raise X(...)`, in
`assert` messages, in calls that log, print or warn, and in argparse help, of every Python file;
README files and everything in folders named `docs`, in Markdown.  Not prose, and neither searched
nor counted as words: fenced and indented code blocks, doctests, inline code, link targets, HTML.
Passages with Chinese characters are skipped.  Files of other types (YAML, shell, Makefile) are not
read.

`Row.published` is LANGUAGE.md's table, and the goal: an idiom to avoid is at most as frequent as
where the four others have it most, and a standard term at least as frequent as where they have it
least; a program with a command `resume` may use that word more often than they do.

`Row.measured` is what this script gave for the same repositories on 2026-11-28, at slime 624b824a,
prime-rl 559b4477, torchtitan b5bcd76c and nanochat 92d63d4e.

For this project's tree d7965c3, LANGUAGE.md gives 0.16, 1.65, 0.22, 0.96, 0.54, 2.84, 1.83, 1.19
and 16 %, in the order of ROWS; this script gives 0.20, 1.44, 0.14, 1.27, 0.74, 2.30, 2.21, 1.10 and
17 %. The two differ in which files and strings they take for prose.

The patterns are regular expressions, not a parser: each row names what it also matches.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

OTHERS = ("slime", "prime-rl", "torchtitan", "nanochat")
LOGGING = {"debug", "info", "warning", "warn", "error", "exception", "critical", "log", "print"}
LOGGING |= {"say"}  # `Run.say`
HELP = ("help", "description", "epilog")
SKIPPED_FOLDERS = {"build", "runs"}

WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")
CHINESE = re.compile(r"[\u3040-\u9fff]")
INLINE_CODE = re.compile(r"(`+)[^`]+?\1|https?://\S+")
HTML = re.compile(r"<!--.*?-->|</?[a-zA-Z][^>]*>", re.DOTALL)
LINK_TARGET = re.compile(r"\]\([^)]*\)")
FENCE = re.compile(r"\s*(```+|~~~+)")
PRAGMA = re.compile(r"#\s*(!|noqa|type:|fmt:|ruff:|pragma|pylint|mypy:|isort:)")
SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\|")

UNITS = (
    "step|rank|token|rollout|prompt|line|row|second|minute|hour|day|micro-batch|mini-batch|batch|"
    "sequence|sample|completion|group|parameter|GPU|node|device|layer|expert|server|process|job|"
    "file|machine|seed|run|task|request|answer|weight|element|tensor|chunk|block|epoch|update|"
    "position|host|family|head|page|column|stage|shard|replica|message|word|test|call|visit|suite|"
    "problem|model|pass|digit"
)
VERBS = set(
    """
    is was has does as makes needs gives takes keeps names holds writes ends sees becomes gets
    sends reads calls requires means crosses routes splits returns downloads runs turns spawns
    enters saves starts stops uses owns creates produces allows carries maps queues builds extracts
    restores prevents avoids lets consumes implements submits tells chooses lacks computes garbles
    forks forms reaches refuses shows loads leaves kills costs replaces contains includes defines
    lists wants adds asks passes marks follows outlives generates expects finds skips fills goes
    forbids sets picks compares changes moves orders pays applies meets measures hides feeds sorts
    drops wraps represents describes reports processes rejects extends process express tests
    registers resumes selects logs shares initialises trains this its thus us plus less unless
    always across versus besides towards perhaps whereas
    """.split()  # noqa: SIM905
)
"""Words in -s that are followed by a thing without meaning a rate."""
QUANTITY = re.compile(
    r"[\d.,]*\d|GB|GiB|MB|MiB|KiB|once|twice|times|memory|s|ms|one|two|three|four|five|six|eight|ten"
)
NO_START = set(
    """
    of with without by in on from for to at as into onto over under above below between among across
    against along around after before behind beside besides beyond during inside outside through
    throughout toward towards until till up upon via within about per than except despite like near
    off out since and but or nor if unless because although though while whereas so then thus
    neither either also however not only even which who whom whose where when how why whatever
    whichever whoever wherever whenever those these it its they them their that
    """.split()  # noqa: SIM905
)
"""First words of a docstring that begins with neither a verb nor a noun phrase."""


@dataclass(frozen=True)
class Passage:
    """A piece of prose; `text` keeps the line breaks, so that a place in it has a line."""

    file: str
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Row:
    """One row of the table: an idiom, what it also matches, and the four others in LANGUAGE.md."""

    name: str
    idiom: str
    pattern: str
    published: tuple[float, float, float, float] | None
    """Rates per 1,000 words, in the order of OTHERS; None if LANGUAGE.md has no number."""
    measured: tuple[float, float, float, float]
    """The same as this script counts it."""
    also: str
    """False positives."""
    wanted: bool = False
    """The field's own term: too few are out of range as well."""


ROWS = (
    Row(
        "per",
        '"per step", "per rank"',
        r"\bper[-\s]\w+",
        (4.75, 5.09, 3.70, 1.97),
        (4.33, 6.07, 3.89, 2.73),
        "any `per` before a word, such as per cent in two words",
        wanted=True,
    ),
    Row(
        "rate",
        '"a step", "a rank" in the sense of "per"',
        rf"(?P<before>\S+)\s+an?\s+(?:{UNITS})\b(?!-)",
        (0.06, 0.11, 0.10, 0.07),
        (0, 0.02, 0, 0),
        "a plural or a quantity in front of a new clause (between two steps a run is ...); a rate "
        "after a singular (an answer a line) is missed",
    ),
    Row(
        "resume",
        "resume, continue",
        r"\b(?:resum|continu)(?:e|es|ed|ing)\b",
        (0.49, 1.26, 0.36, 1.10),
        (0.41, 1.48, 0.34, 0.48),
        "continued lines and lists",
        wanted=True,
    ),
    Row(
        "goes-on",
        '"goes on", "gone on with"',
        r"\b(?:go|goes|going|gone|went)\s+on\b",
        (0, 0, 0.01, 0),
        (0, 0, 0.01, 0),
        "what goes on top of something",
    ),
    Row(
        "so-many",
        '"so many", "so much" (= this many)',
        r"\bso\s+(?:many|much|often)\b",
        (0, 0, 0.01, 0.07),
        (0, 0, 0, 0.05),
        "so many that ...",
    ),
    Row(
        "anew",
        "anew, beforehand, of its own, by itself, at once",
        r"\b(?:anew|beforehand|of\s+(?:its|their|his|our|your|one['’]s)\s+own|"
        r"by\s+(?:itself|themselves)|at\s+once)\b",
        (0.08, 0.05, 0.03, 0),
        (0.06, 0.08, 0.03, 0),
        "at once in the sense of simultaneously",
    ),
    Row(
        "says",
        '"says", "said", "in a sentence" (of a program)',
        r"\b(?:says?|saying|said|a\s+sentence)\b",
        (0, 0, 0.01, 0.07),
        (0, 0.02, 0.03, 0.05),
        "what a person or a paper says",
    ),
    Row(
        "others",
        '"the others", "what is left", "left out"',
        r"\b(?:the\s+others|what\s+is\s+left|(?:left|leaves?|leaving)\s+out)\b",
        (0.03, 0, 0.10, 0),
        (0.01, 0.02, 0.01, 0.11),
        "the others of two groups that were just named",
    ),
    Row(
        "docstrings",
        "docstrings that begin without verb or noun (%)",
        "",
        (1, 1, 0, 1),
        (0.85, 1.56, 2.01, 1.67),
        "judged by the first word alone: `Only rank 0 ...`, `Up to N tokens`",
    ),
)
WORDS = (
    Row(
        "whole", "whole (= complete)", r"\bwhole\b", None, (0.54, 0.19, 0.31, 0.37), "whole numbers"
    ),
    Row(
        "there",
        "what is there, that are there",
        r"\b(?:is|are|was|were)\s+there\b(?!\s+(?:a|an|any|no|is|are))",
        None,
        (0.01, 0, 0, 0.05),
        "a place that was just named",
    ),
    Row("beside", "beside (= next to)", r"\bbeside\b", None, (0, 0, 0, 0), "nothing known"),
    Row(
        "behind",
        "behind (= after)",
        r"\bbehind\b",
        None,
        (0.18, 0.18, 0.08, 0.05),
        "behind a firewall, a proxy or an interface",
    ),
    Row(
        "tells",
        "tells, told (of a program)",
        r"\b(?:tells|told)\b",
        None,
        (0.03, 0.02, 0.02, 0.05),
        "tells X from Y",
    ),
    Row(
        "paid",
        "paid (of rollouts), mended, undisturbed, written aside, at the border",
        r"\b(?:paid|mended|undisturbed|(?:writes?|written)\s+aside|at\s+(?:the|\w+['’]s)\s+border)\b",
        None,
        (0, 0, 0, 0),
        "costs that are paid",
    ),
    Row(
        "dialect",
        "nonsense, nobody, opinion, without a word, goes with",
        r"\b(?:nonsense|nobody|opinion|without\s+a\s+word|go(?:es)?\s+with)\b",
        None,
        (0, 0, 0, 0),
        "nobody as a Unix user",
    ),
)
"""LANGUAGE.md's word list: for the writer, without a goal."""


def main(argv: list[str] | None = None) -> int:
    """Print the table, the hits of a row, or the hits per folder; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tree", nargs="?", default=".", type=Path, metavar="TREE")
    names = [row.name for row in (*ROWS, *WORDS)]
    parser.add_argument("--list", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--by-folder", action="store_true", help="hits per folder")
    args = parser.parse_args(argv)
    if not args.tree.is_dir():
        parser.error(f"{args.tree} is not a directory")
    passages = list(read_tree(args.tree))
    if args.list:
        for passage, start in hits(row_named(args.list), passages):
            line = passage.line + passage.text.count("\n", 0, start)
            print(f"{passage.file}:{line}: {sentence(passage.text, start)}")
    elif args.by_folder:
        print(folder_table(passages))
    else:
        print(table(passages))
    return 0


def read_tree(tree: Path) -> Iterator[Passage]:
    """Yield the prose of a tree, in the order of its sorted paths."""
    for path in files(tree):
        name = path.relative_to(tree).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from python_prose(text, name) if path.suffix == ".py" else markdown_prose(text, name)


def files(folder: Path, in_docs: bool = False) -> Iterator[Path]:
    """Yield Python files, README files and everything in Markdown under `docs`; no links."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            if path.name not in SKIPPED_FOLDERS:
                yield from files(path, in_docs or path.name == "docs")
        elif path.suffix == ".py" or (
            path.suffix == ".md" and (in_docs or path.name.startswith("README"))
        ):
            yield path


def python_prose(source: str, file: str) -> Iterator[Passage]:
    """Yield docstrings, comments, messages and help texts of a Python file; none if it is none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for line, kind, text in (*_strings(tree), *_comments(source)):
        text = INLINE_CODE.sub(_blank, text)
        if not CHINESE.search(text):
            yield Passage(file, line, kind, text)


def markdown_prose(source: str, file: str) -> Iterator[Passage]:
    """Yield the paragraphs and tables of a Markdown file without its code blocks."""
    lines, fence, code, blank = [], "", False, True
    for line in source.split("\n"):
        mark = FENCE.match(line)
        if fence:
            lines.append("")
            fence = "" if mark and mark[1].startswith(fence) else fence
            continue
        code = line.startswith("    ") and (blank or code)
        blank = not line.strip()
        fence = mark[1] if mark else ""
        lines.append("" if fence or code else line)
    text = HTML.sub(_blank, INLINE_CODE.sub(_blank, LINK_TARGET.sub("]", "\n".join(lines))))
    start = 1
    for paragraph in re.split(r"(\n\s*\n)", text):
        if paragraph.strip() and not CHINESE.search(paragraph):
            yield Passage(file, start, "markdown", paragraph)
        start += paragraph.count("\n")


def _strings(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(tree):
        for index, statement in enumerate(_body(node)):
            text = isinstance(statement, ast.Expr) and _text(statement.value)
            if text:
                documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                first = index == 0 and isinstance(node, documented)
                kind, indent = "docstring" if first else "field", statement.col_offset
                yield statement.lineno, kind, _without_code(text, indent)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from _literals(node.exc, "raised")
        elif isinstance(node, ast.Assert) and node.msg:
            yield from _literals(node.msg, "raised")
        elif isinstance(node, ast.Call):
            if (getattr(node.func, "attr", "") or getattr(node.func, "id", "")) in LOGGING:
                yield from _literals(node, "logged")
            for keyword in node.keywords:
                if keyword.arg in HELP:
                    yield from _literals(keyword.value, "help")


def _body(node: ast.AST) -> list[ast.stmt]:
    body = getattr(node, "body", None)
    return body if isinstance(body, list) else []


def _literals(node: ast.AST, kind: str) -> Iterator[tuple[int, str, str]]:
    """Yield string literals in an expression; of an f-string, the text around its values."""
    if text := _text(node):
        yield node.lineno, kind, text
    elif not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _literals(child, kind)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) or "_" for value in node.values)
    return ""


def _without_code(docstring: str, indent: int) -> str:
    """Return a docstring without doctests and paragraphs indented further than its quotes."""
    paragraphs = re.split(r"(\n[ \t]*(?=\n))", docstring)
    for i, paragraph in enumerate(paragraphs):
        lines = [line for line in paragraph.split("\n") if line.strip()]
        if ">>>" in paragraph or all(line.startswith(" " * (indent + 4)) for line in lines):
            paragraphs[i] = _blank(paragraph)
    return "".join(paragraphs)


def _comments(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield comments; consecutive full-line comments are joined."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or PRAGMA.match(token.string):
            continue
        alone = not token.line[: token.start[1]].strip()
        if block and not (alone and token.start[0] == last + 1):
            yield start, "comment", "\n".join(block)
            block = []
        start = start if block else token.start[0]
        block.append(token.string.lstrip("# "))
        last = token.start[0]
    if block:
        yield start, "comment", "\n".join(block)


def _blank(found: re.Match | str) -> str:
    """Return a placeholder that is no word, with the line breaks of what it replaces."""
    text = found if isinstance(found, str) else found[0]
    return "_" + "\n" * text.count("\n")


def hits(row: Row, passages: Iterable[Passage]) -> Iterator[tuple[Passage, int]]:
    """Yield each occurrence of a row's idiom: its passage and its offset there."""
    if row.name == "docstrings":
        for passage in passages:
            if passage.kind in ("docstring", "field") and begins_without_subject(passage.text):
                yield passage, 0
        return
    pattern = re.compile(row.pattern, re.IGNORECASE)
    for passage in passages:
        for match in pattern.finditer(passage.text):
            if row.name != "rate" or is_rate(match["before"]):
                yield passage, match.start()


def is_rate(before: str) -> bool:
    """Whether `a step` after this word means per step: after a plural noun or a quantity."""
    word = before.strip("`*()[]\"'").lower()
    plural = re.fullmatch(r"[a-z-]{2,}s", word) and word not in VERBS
    return bool(plural or QUANTITY.fullmatch(before.strip("`*()[]")))


def begins_without_subject(docstring: str) -> bool:
    """Whether the first word of a docstring is neither a verb nor part of a noun phrase."""
    first = re.match(r"\W*([\w'-]*)", docstring)[1]
    return first.lower() in NO_START


def rates(passages: list[Passage], rows: Iterable[Row] = ROWS) -> dict[str, float]:
    """Return each row's hits per 1,000 words; for docstrings, their share in per cent."""
    words = sum(len(WORD.findall(passage.text)) for passage in passages)
    docstrings = sum(passage.kind in ("docstring", "field") for passage in passages)
    found = {row.name: sum(1 for _ in hits(row, passages)) for row in rows}
    return {
        name: 100 * count / max(docstrings, 1)
        if name == "docstrings"
        else 1000 * count / max(words, 1)
        for name, count in found.items()
    }


def in_range(row: Row, rate: float) -> bool:
    """Return whether a rate, at the table's precision, is as good as one of the four others."""
    rate = round(rate) if row.name == "docstrings" else round(rate, 2)
    return rate >= min(row.published) if row.wanted else rate <= max(row.published)


def row_named(name: str) -> Row:
    """Return the row of this name, of either table."""
    return next(row for row in (*ROWS, *WORDS) if row.name == name)


def table(passages: list[Passage]) -> str:
    """Return this tree's rates next to the ranges of OTHERS; `<--` marks a row out of range."""
    ours = rates(passages, (*ROWS, *WORDS))
    lines = [f"{'row':<11} {'here':>6}  {'published':>12}  {'measured':>12}  per 1,000 words"]
    for row in (*ROWS, *WORDS):
        mark = "  <--" if row.published and not in_range(row, ours[row.name]) else ""
        lines.append(
            f"{row.name:<11} {ours[row.name]:6.2f}  {_range(row.published):>12}  "
            f"{_range(row.measured):>12}  {row.idiom}{mark}"
        )
    return "\n".join(lines)


def _range(values: tuple[float, ...] | None) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def folder_table(passages: list[Passage]) -> str:
    """Return the hits of each row per folder, two levels deep."""
    counts: dict[str, Counter] = {}
    for row in (*ROWS, *WORDS):
        for passage, _ in hits(row, passages):
            folder = "/".join(passage.file.split("/")[:-1][:2]) or "."
            counts.setdefault(folder, Counter())[row.name] += 1
    names = [row.name for row in (*ROWS, *WORDS)]
    width = max(map(len, counts), default=0)
    lines = [" " * width + "".join(f"{name:>11}" for name in names)]
    for folder in sorted(counts):
        lines.append(f"{folder:<{width}}" + "".join(f"{counts[folder][n]:>11}" for n in names))
    return "\n".join(lines)


def sentence(text: str, start: int) -> str:
    """Return the sentence, or table cell, of a text in which an offset lies, in one line."""
    begin = max((m.end() for m in SENTENCE_END.finditer(text, 0, start + 1)), default=0)
    end = SENTENCE_END.search(text, start + 1)
    return " ".join(text[min(begin, start) : end.start() if end else None].split())


if __name__ == "__main__":
    sys.exit(main())
