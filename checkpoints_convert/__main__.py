"""``python -m checkpoints_convert``: import and export from the command line."""

import argparse
import sys

from checkpoints_convert.convert import export_hf, import_hf
from megatron_prepo.errors import UserError


def main() -> int:
    """Exit code 0, or 2 for something that the user can mend."""
    options = _parser().parse_args()
    try:
        if options.command == "import":
            import_hf(options.hf, options.out, dtype=options.dtype)
        else:
            export_hf(options.megatron, options.hf, options.out, dtype=options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_convert", description="Hugging Face <-> Megatron-Core"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="Hugging Face to Megatron")
    exporter = commands.add_parser("export", help="Megatron to Hugging Face")
    exporter.add_argument("--megatron", required=True, help="checkpoint, or directory of them")
    for parts in (importer, exporter):
        parts.add_argument("--hf", required=True, help="Hugging Face directory")
        parts.add_argument("--out", required=True, help="directory to write; must not exist")
        parts.add_argument(
            "--dtype", choices=("bfloat16", "float32"), help="default: as config.json says"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
