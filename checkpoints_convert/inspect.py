"""Describe the contents of a directory: a Hugging Face model or a Megatron checkpoint."""

from pathlib import Path

from megatron_prepo.models.hf_config import read_hf_config, transformer_settings
from megatron_prepo.models.hf_files import HFTensors
from megatron_prepo.models.torch_dist import TorchDistReader


def describe(directory: str | Path) -> str:
    """Return a line on the architecture, then one line per tensor: name, type, shape, bytes."""
    if (Path(directory) / "config.json").is_file():
        return _describe_hf(directory)
    return _describe_megatron(directory)


def _describe_hf(directory: str | Path) -> str:
    settings = read_hf_config(directory)
    mcore = transformer_settings(settings)
    with HFTensors(directory) as tensors:
        rows = [
            (name, str(place.dtype), place.shape, place.num_bytes)
            for name, place in sorted(tensors.places.items())
        ]
    heading = (
        f"Hugging Face {settings['model_type']}: {mcore['num_layers']} layers, hidden "
        f"{mcore['hidden_size']}, {mcore['num_attention_heads']} heads in "
        f"{mcore['num_query_groups']} groups of size {mcore['kv_channels']}, vocabulary "
        f"{settings['vocab_size']}"
    )
    return _table(heading, rows)


def _describe_megatron(directory: str | Path) -> str:
    from megatron_prepo.actor.checkpoint import newest

    checkpoint = newest(directory)
    reader = TorchDistReader(checkpoint)
    rows = []
    for key, entry in sorted(reader.tensors.items()):
        dtype = entry.properties.dtype
        num_bytes = entry.size.numel() * dtype.itemsize
        rows.append(
            (f"{key} ({len(entry.chunks)} chunks)", str(dtype), tuple(entry.size), num_bytes)
        )
    step = reader.common().get("iteration")
    return _table(f"Megatron torch_dist {checkpoint.name}, iteration {step}", rows)


def _table(heading: str, rows: list[tuple[str, str, tuple[int, ...], int]]) -> str:
    total = sum(row[3] for row in rows)
    lines = [f"{heading}; {len(rows)} tensors, {total / 1e9:.3f} GB"]
    width = max((len(row[0]) for row in rows), default=0)
    for name, dtype, shape, num_bytes in rows:
        kind = dtype.removeprefix("torch.")
        lines.append(f"  {name:{width}}  {kind:9} {shape!s:24} {num_bytes:>14,}")
    return "\n".join(lines) + "\n"
