"""The option `--version` of all commands."""

import argparse
import platform
from importlib import metadata
from typing import Any

LIBRARIES = ("torch", "megatron-core", "transformers", "sglang")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--version`, which prints `text` and exits with code 0."""
    parser.add_argument("--version", action=_Show, nargs=0, help="print versions and exit")


def text() -> str:
    """Return our version, and those of Python and the main libraries that are installed."""
    import megatron_prepo

    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"megatron-prepo {megatron_prepo.__version__} ({', '.join(found)})"


class _Show(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(text())
        parser.exit()
