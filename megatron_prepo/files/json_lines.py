"""JSON Lines files from other sources: prompts, data sets.  Errors name the file and the line.

Strict where JSON allows two readings: duplicate keys, NaN and texts that are not valid Unicode are
errors, and numbers keep all their digits.  Only line feeds end a line: JSON allows Unicode's other
line separators within a text.  The run's own logs are read by `atomic.read_lines`.
"""

import json
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError, one_line

OTHER_FORMATS = {
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; give it a name that ends with .parquet",
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}
"""First bytes of formats that are sometimes mistaken for JSON Lines, and the remedy for each."""

MAX_EXPONENT = 300
"""Largest absolute power of ten of an answer; a number outside this range is an error."""


def read(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each non-blank line.

    Fractions are `Decimal`, with all their digits.  Raises UserError naming file and line.
    """
    for number, line in lines(path):
        yield number, parsed(line, f"{path}, line {number}")


def parsed(line: str, where: str) -> dict[str, Any]:
    """Return the object of a line; fractions are `Decimal`.  Raises UserError that begins `where`.

    >>> parsed('{"prompt": "1 + 0.5", "answer": 1.50}', "FILE, line 1")
    {'prompt': '1 + 0.5', 'answer': Decimal('1.50')}
    """
    try:
        record = json.loads(
            line, object_pairs_hook=_object, parse_float=_fraction, parse_constant=_no_number
        )
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # also raised for integers of thousands of digits
        raise UserError(f"{where}: not valid JSON ({one_line(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object, such as {{"prompt": ...}}')
    return record


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of each non-blank line of a UTF-8 file."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _check_format(path, line)
                    line = line.removeprefix(b"\xef\xbb\xbf")  # UTF-8 byte order mark, on Windows
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number}: not UTF-8 text ({error})") from error
                if text.strip(" \t"):
                    yield number, text
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    """Return the value of a field that must be a non-empty text."""
    value = _given(record, field, where)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field `{field}` must be a text, but is {kind(value)}; correct or remove "
            "the line"
        )
    return _checked(value, field, where)


def answer_field(record: dict[str, Any], field: str, where: str) -> str:
    """Return an answer or id, a text or a finite number: 18.0 is 18; no digits are lost."""
    value = _given(record, field, where)
    if not has_answer(record, field):
        raise UserError(
            f"{where}: field `{field}` must be a text or a number, but is {kind(value)}; write "
            "it as a text, or remove the line"
        )
    if isinstance(value, str):
        return _checked(value, field, where)
    number = digits(value)
    if number is None:
        raise UserError(
            f"{where}: field `{field}`={one_line(value)[:40]} is not a finite number between "
            f"1e-{MAX_EXPONENT} and 1e{MAX_EXPONENT}; correct or remove the line"
        )
    return number


def has_answer(record: dict[str, Any], field: str) -> bool:
    """Return whether a record has an answer of a kind that `answer_field` reads."""
    value = record.get(field)
    return isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)


def digits(number: int | float | Decimal) -> str | None:
    """Format a number in the shortest form without an exponent, all digits kept.

    The result is None for numbers that are not finite or exceed MAX_EXPONENT.

    >>> digits(Decimal("18.0")), digits(-0.0), digits(1e-7), digits(10**20), digits(float("nan"))
    ('18', '0', '0.0000001', '100000000000000000000', None)
    """
    if isinstance(number, int):
        return str(number)
    exact = Decimal(repr(number)) if isinstance(number, float) else number
    if not exact.is_finite() or (exact and abs(exact.adjusted()) > MAX_EXPONENT):
        return None
    if not exact:
        return "0"
    text = format(exact, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _given(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise UserError(f"{where}: field `{field}` is missing; the line has {names(record)}")
    return record[field]


def _checked(text: str, field: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: field `{field}` is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(
            f"{where}: field `{field}` is not valid Unicode: it contains half a surrogate pair; "
            "write the character itself"
        )
    return text


def kind(value: object) -> str:
    """Return what a JSON value other than a text is, for an error."""
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def names(record: dict[str, Any]) -> str:
    """Return the names of a record's fields, for an error."""
    return one_line(", ".join(sorted(map(str, record))))[:200] or "none"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return record


def _fraction(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation:  # an exponent of more than 18 digits
        raise ValueError(f"{digits[:40]} is out of range") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _check_format(path: str | Path, start: bytes) -> None:
    for mark, what in OTHER_FORMATS.items():
        if start.startswith(mark):
            raise UserError(f"{path}, line 1: not UTF-8 text, but {what}")
