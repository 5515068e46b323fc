"""Hugging Face folders from GGUF files, the format of llama.cpp.

`transformers` reads configuration and weights: it dequantizes to float32 and undoes llama.cpp's
permutation of Llama's query and key rows.  Whatever its reader ignores and could change a logit,
such as Llama 3.1's rope factors, is an error here.

The tokenizer is built from the file's own tables (`gguf_tokenizer.py`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files import ownership
from megatron_prepo.models.gguf_tokenizer import tokenizer
from megatron_prepo.models.hf_config import listed
from megatron_prepo.models.hf_files import INDEX, SINGLE

PACKAGES = ("gguf", "accelerate")
"""Packages that `transformers` needs to read a GGUF file: the extra `real`."""
PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$")
"""End of the name of one of several files of a model."""
LAYER = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)
"""Tensors of a layer in every family."""
OF_FAMILY = {
    "llama": (),
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
}
"""Further tensors of a layer, by architecture."""
REQUIRED = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),  # without it rows stay permuted
    *("attention.layer_norm_rms_epsilon", "rope.freq_base"),
}
"""Keys of an architecture that the reader replaces with a default of its own if they are absent."""
HEAD_SIZES = {"rope.dimension_count", "attention.key_length", "attention.value_length"}
"""Keys that must all be the size of a head, which is what the reader assumes."""
NO_CHANGE = {"rope.scaling.type": "none"}
"""Further keys that are accepted with these values."""
REMEDY = "use the model's Hugging Face folder"


@contextmanager
def hf_folder(source: str | Path, beside: str | Path) -> Iterator[Path]:
    """Yield the Hugging Face folder of a model: `source` itself, or what a GGUF file becomes.

    The latter is `BESIDE.hf.partial`, removed at the end; a killed process's is replaced.
    """
    file = gguf_file(source)
    if file is None:
        yield Path(source)
        return
    beside = Path(beside).absolute().resolve()
    folder = ownership.begin(beside.with_name(beside.name + ".hf"))
    try:
        write_hf(file, folder)
        yield folder
    finally:
        ownership.abandon(folder)


def gguf_file(source: str | Path) -> Path | None:
    """Return the GGUF file that `source` is or contains; None for a folder to be read as it is.

    Weights in Hugging Face format come first.  Raises UserError for another file, for a model in
    several files, and for a folder with several models.
    """
    source = Path(source)
    if source.is_dir() and any((source / name).is_file() for name in (SINGLE, INDEX)):
        return None
    files = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
    if parts := [file.name for file in files if PART.search(file.name)]:
        raise UserError(
            f"{source}: a GGUF model in several files is not supported ({listed(parts)}); join "
            "them: llama-gguf-split --merge FIRST_FILE OUT.gguf"
        )
    if len(files) > 1:
        names = listed([file.name for file in files])
        raise UserError(f"{source} has several GGUF files, {names}: choose one, --hf FILE")
    return files[0] if files else None


def write_hf(file: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder in float32, and print what is dequantized.

    All weights are in memory at once.  Raises UserError for a file that is not supported.
    """
    from transformers import AutoModelForCausalLM

    reader = _open(file)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
        _check_fields(file, fields)
        _check_tensors(file, fields, {tensor.name for tensor in reader.tensors})
        words = tokenizer(file, fields)
    except UserError:
        raise
    except Exception as error:  # whatever wrong types, numbers and bytes lead to
        raise UserError(f"{file} is damaged: {one_line(error)}") from error
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{file}: {len(reader.tensors)} tensors ({counts}), dequantized to float32", flush=True)
    words.save_pretrained(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype="float32",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # theirs are of all kinds for a file that does not fit
        raise UserError(f"{file}: transformers rejects it: {one_line(error)}") from error
    if lost := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise UserError(f"{file}: transformers finds no weights for {listed(lost)}")
    model.save_pretrained(folder)


def _open(file: Path) -> Any:
    """Return the `GGUFReader` of a file; UserError if it is none, or packages are missing."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file; --hf is one, or a Hugging Face folder")
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"{file}: transformers reads GGUF with the packages {' and '.join(PACKAGES)}; missing: "
            f"{', '.join(absent)}; pip install -c constraints.txt -e '.[real]'"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # what numpy raises where a damaged file leads it
        raise UserError(f"{file} is damaged or truncated: {one_line(error)}") from error
    return reader


def _check_fields(file: Path, fields: Mapping[str, Any]) -> None:
    """Raise UserError for a model, or a computation, that would not be read completely."""
    from transformers import Qwen3Config

    family = fields.get("general.architecture")
    if family not in OF_FAMILY:
        raise UserError(
            f"{file}: architecture {family!r} is not supported; {', '.join(OF_FAMILY)} are"
        )
    if fields.get("split.count", 0) > 1:
        raise UserError(f"{file} is one of {fields['split.count']} files of a model; join them")
    prefix = f"{family}."
    own = {n.removeprefix(prefix): v for n, v in fields.items() if n.startswith(prefix)}
    if missing := sorted(REQUIRED - own.keys()):
        raise UserError(f"{file} lacks {listed(prefix + name for name in missing)}")
    others = own.keys() - REQUIRED - HEAD_SIZES - {"vocab_size"}
    if unread := sorted(name for name in others if NO_CHANGE.get(name) != own[name]):
        raise UserError(
            f"{file}: transformers' reader ignores {listed(prefix + name for name in unread)}, "
            f"which may change what the model computes; {REMEDY}"
        )
    head = own["embedding_length"] // own["attention.head_count"]
    if family == "llama":
        head = own.get("rope.dimension_count", head)
    if family == "qwen3":  # key_length is not read
        head = Qwen3Config().head_dim
    for name in sorted(HEAD_SIZES & own.keys()):
        if own[name] != head:
            raise UserError(
                f"{file}: {prefix}{name} is {own[name]}, but transformers' reader takes heads of "
                f"{head}; {REMEDY}"
            )


def _check_tensors(file: Path, fields: Mapping[str, Any], names: set[str]) -> None:
    """Raise UserError unless the file has just the tensors of its architecture."""
    family = fields["general.architecture"]
    expected = {"token_embd.weight", "output_norm.weight"} | (names & {"output.weight"})
    layers = min(fields[f"{family}.block_count"], len(names))  # more are missing in any case
    for layer in range(layers):
        expected |= {f"blk.{layer}.{part}" for part in (*LAYER, *OF_FAMILY[family])}
    if missing := sorted(expected - names):
        raise UserError(f"{file} lacks {listed(missing)}")
    if surplus := sorted(names - expected):
        raise UserError(
            f"{file}: transformers' reader ignores {listed(surplus)} (rope_freqs: the rope scaling "
            f"of Llama 3.1 and later); {REMEDY}"
        )
