"""Whole conversions: a directory in, a directory out, in one process on the CPU."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from checkpoints_convert.hf_config import read_hf_config
from megatron_prepo.errors import UserError


def import_hf(hf: str | Path, out: str | Path, *, dtype: str | None = None) -> None:
    """Write a Hugging Face model as a Megatron `torch_dist` checkpoint, readable in any layout.

    `dtype`: float32 or bfloat16; None keeps what config.json says.

    Raises UserError for a missing or damaged source, and for an `out` that is not empty.
    """
    from checkpoints_convert.hf_to_megatron import load_hf_weights
    from megatron_prepo.actor import checkpoint

    _must_be_empty(out)
    with _whole_model(hf, dtype) as (model, _):
        load_hf_weights(model, hf)
        checkpoint.save(model, out, step=0)


def export_hf(
    megatron: str | Path, hf: str | Path, out: str | Path, *, dtype: str | None = None
) -> None:
    """Write a Megatron checkpoint as a Hugging Face model.

    `hf`: a directory with the model's configuration and tokenizer (its weights are not read).
    """
    from checkpoints_convert.megatron_to_hf import hf_weights, save_hf
    from megatron_prepo.actor import checkpoint

    _must_be_empty(out)
    with _whole_model(hf, dtype) as (model, settings):
        checkpoint.load_weights(model, megatron)
        save_hf(_with_bar(hf_weights(model, settings["vocab_size"])), hf, out)


@contextmanager
def _whole_model(hf_directory: str | Path, dtype: str | None) -> Iterator[tuple]:
    """A GPTModel on this one rank, its weights still to be loaded, and the HF configuration."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.model import DTYPES, build_model
    from megatron_prepo.config import ModelConfig, ParallelConfig

    settings = read_hf_config(hf_directory)
    dtype = dtype or settings.get("dtype") or settings.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"weights of type {dtype} are not supported; give --dtype bfloat16")
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    try:
        model = ModelConfig(hf=str(hf_directory), dtype=dtype)
        yield build_model(settings, model, layout), settings
    finally:
        parallel.shut_down()


def _with_bar(weights: Iterable[tuple]) -> Iterator[tuple]:
    with tqdm(desc="export", unit="B", unit_scale=True) as bar:
        for name, tensor in weights:
            yield name, tensor
            bar.update(tensor.numel() * tensor.element_size())


def _must_be_empty(out: str | Path) -> None:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty directory; choose another")
