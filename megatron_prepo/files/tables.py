"""Parquet and Arrow files from other sources, row by row as JSON.  Errors name the file and row."""

import importlib
import json
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError, one_line

SUFFIXES = (".parquet", ".arrow")
ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format; its stream has none."""
INSTALL = 'pip install -e ".[data]"'
"""Command that installs pyarrow."""


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield the number of each row, counted from 1, its fields and its JSON text.

    An `.arrow` file is a stream, as `save_to_disk` of `datasets` writes it, or of Arrow's file
    format.  Raises UserError without pyarrow, for a damaged file, for two columns of one name, and
    for a value that JSON cannot hold, such as bytes.
    """
    try:
        pyarrow = importlib.import_module("pyarrow")
        for name in ("pyarrow.parquet", "pyarrow.ipc"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: {INSTALL}") from error
    number = 0
    try:
        with open(path, "rb") as file:
            for batch in _batches(file, path.suffix, pyarrow):
                _refuse_repeated(batch.schema.names, path)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, _json(row, f"{path}, row {number}")
    # of pyarrow for damaged files, and for values that Python cannot represent
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; copy it again") from error


def _batches(file: BufferedReader, suffix: str, pyarrow: Any) -> Iterator[Any]:
    """Yield the record batches of an open file."""
    if suffix != ".arrow":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches()
    elif file.peek(len(ARROW_FILE)).startswith(ARROW_FILE):
        table = pyarrow.ipc.open_file(file)
        yield from map(table.get_batch, range(table.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(file)


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: column `{twice}` is there twice; rename or remove one")


def _json(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        name = next(name for name, value in row.items() if not _is_json(value))
        raise UserError(
            f"{where}: field `{name}` holds a value that JSON has no form for (bytes, a date, "
            "NaN); remove the column, or write it as text"
        ) from None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
