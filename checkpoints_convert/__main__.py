# PYTHON_ARGCOMPLETE_OK
"""``python -m checkpoints_convert``: import, export, verify and inspect from the command line."""

import argparse
import sys
from pathlib import Path

from megatron_prepo.config import completion
from megatron_prepo.errors import UserError
from megatron_prepo.files import json_lines
from megatron_prepo.files.existing import existing
from megatron_prepo.files.rows import SUFFIXES, read_records
from megatron_prepo.inputs import hub
from megatron_prepo.process import activity, version
from megatron_prepo.process.command import in_one_line

SOURCE = "Hugging Face directory, or name on the hub; or a GGUF file, or a directory with one"


@in_one_line
def main() -> int:
    """Return the exit code: 0, 1 if a verification failed, or 2 for an error the user can fix."""
    parser = _parser()
    completion.answer_shell(parser)
    options = parser.parse_args()
    try:
        exit_code: int = options.run(options)
        return exit_code
    except OSError as error:  # full disk, lost mount: no output that looks complete remains
        print(f"error: {error}", file=sys.stderr)
        return 2


def _import(options: argparse.Namespace) -> int:
    from checkpoints_convert.convert import import_hf, must_be_empty
    from megatron_prepo.actor import tiny_instance
    from megatron_prepo.models.gguf_to_hf import hf_folder
    from megatron_prepo.models.record import HF_FILES

    must_be_empty(Path(options.out))
    source = hub.model(options.hf)
    layout = {"tensor": options.tp, "pipeline": options.pp, "expert": options.ep}
    with activity.doing("reading the model"), hf_folder(source, options.out) as hf:
        tiny_instance.check(hf)
        with activity.doing("planning the import"):
            warnings = import_hf(hf, options.out, dtype=options.dtype, **layout)
        stored = "" if hf == source else f"model.hf={Path(options.out) / HF_FILES} "
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {options.out}; a run starts from it with {stored}model.megatron={options.out}")
    print(
        f"to compare: python -m checkpoints_convert verify --hf {options.hf} "
        f"--megatron {options.out}"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from checkpoints_convert.convert import export_hf, must_be_empty

    if options.private and not options.push:
        raise UserError("--private is about an upload; name its repository: --push OWNER/NAME")
    must_be_empty(Path(options.out))
    if options.push:  # what the hub refuses is found before the export
        hub.prepare(options.push, private=options.private)
    with activity.doing("planning the export"):
        like = options.hf and hub.model(options.hf)
        export_hf(options.megatron, options.out, hf=like, dtype=options.dtype)
    print(f"wrote {options.out}")
    if options.push:
        with activity.doing(f"uploading to {options.push}"):
            print(f"uploaded: {hub.upload(options.out, options.push)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from checkpoints_convert.verify import verify
    from megatron_prepo.models.gguf_to_hf import hf_folder

    source = hub.model(options.hf)
    beside = options.megatron or source
    with activity.doing("verifying"), hf_folder(source, beside) as hf:
        report = verify(
            hf,
            megatron=options.megatron,
            layouts=[_layout(text) for text in options.layouts.split(",")],
            quick=options.quick,
            logits=not options.no_logits,
            prompts=_prompts(options.prompts) if options.prompts else (),
            manifest=options.manifest,
        )
    print(f"\n{'configuration':28} {'Hugging Face':>16} {'Megatron':>16}")
    for name, row in report.config.items():
        mark = "" if row["equal"] else "   <- differs"
        print(f"{name:28} {row['hf']!s:>16} {row['megatron']!s:>16}{mark}")
    print(f"\n{len(report.tensors)} tensors through the layouts {'; '.join(report.layouts)}")
    print(
        f"logits of a tiny random model: largest difference {report.tiny['ours']:.1e}, rounding "
        f"{report.tiny['rounding']:.1e}"
    )
    for row in report.logits:
        print(
            f"logits of {row['tokens'][:40]}: largest error {row['max_abs_difference']:.1e}, mean "
            f"{row['mean_abs_difference']:.1e}; of transformers in float32 "
            f"{row['max_abs_rounding']:.1e} and {row['mean_abs_rounding']:.1e}; KL "
            f"{row['mean_kl']:.1e}"
        )
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print("failed" if report.failures else "verified")
    return int(bool(report.failures))


def _inspect(options: argparse.Namespace) -> int:
    from checkpoints_convert.inspect import describe

    print(describe(options.directory), end="")
    return 0


def _prompts(path: str) -> list[str]:
    """Return the prompts of a file such as `data.train`, or the lines of a text file."""
    if path.endswith(SUFFIXES):
        return [record.prompt for record in read_records(path, needs_answer=False)]
    return [line for _, line in json_lines.lines(path)]


def _model(word: str) -> str:
    """Return a model's place; NoSuchPath if nothing is there, and it is no name on the hub."""
    if hub.Name.of(word, "model") is None:
        existing()(word)
    return word


def _layout(text: str) -> tuple[int, int, int]:
    try:
        tensor, pipeline, expert = (int(n) for n in f"{text}x1x1".split("x")[:3])
    except ValueError:
        raise UserError(f"--layouts: {text!r} must look like 2x1 or 2x2x4 (TPxPPxEP)") from None
    return tensor, pipeline, expert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_convert", description="Hugging Face <-> Megatron-Core"
    )
    version.add_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    importer = commands.add_parser("import", help="Hugging Face to Megatron")
    importer.add_argument("--hf", type=_model, required=True, help=SOURCE)
    importer.add_argument("--tp", type=int, default=1, help="tensor-parallel chunks (default 1)")
    importer.add_argument("--pp", type=int, default=1, help="pipeline-parallel chunks (default 1)")
    importer.add_argument("--ep", type=int, default=1, help="expert-parallel chunks (default 1)")
    importer.set_defaults(run=_import)

    exporter = commands.add_parser("export", help="Megatron to Hugging Face")
    exporter.add_argument(
        "--megatron", type=existing(), required=True, help="checkpoint, or directory of them"
    )
    exporter.add_argument(
        "--hf",
        type=_model,
        help="configuration and tokenizer; default: those stored with the checkpoint",
    )
    exporter.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the result to this name on the hub"
    )
    exporter.add_argument("--private", action="store_true", help="with --push: not for everyone")
    exporter.set_defaults(run=_export)
    for converter in (importer, exporter):
        converter.add_argument("--out", required=True, help="directory to write; must not exist")
        converter.add_argument(
            "--dtype", choices=("bfloat16", "float32"), help="default: keep the types of tensors"
        )

    verifier = commands.add_parser("verify", help="check that a conversion lost nothing")
    verifier.add_argument("--hf", type=_model, required=True, help=SOURCE)
    verifier.add_argument("--megatron", type=existing(), help="checkpoint converted from it")
    verifier.add_argument(
        "--layouts", default="1x1,2x1,1x2,2x2", help="TPxPP or TPxPPxEP, ... (default %(default)s)"
    )
    verifier.add_argument(
        "--prompts",
        type=existing(),
        help="prompts for the logits: a file as data.train, or a text, one per line",
    )
    verifier.add_argument("--quick", action="store_true", help="sampled layers, no logits")
    verifier.add_argument("--no-logits", action="store_true", help="do not build the models")
    verifier.add_argument("--manifest", help="JSON file to write, with every SHA-256")
    verifier.set_defaults(run=_verify)

    inspector = commands.add_parser("inspect", help="describe the contents of a directory")
    inspector.add_argument("directory", type=existing())
    inspector.set_defaults(run=_inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
