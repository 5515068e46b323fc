"""Stream a Megatron model out under Hugging Face names, for weight sync and for export alike."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from checkpoints_convert.hf_to_megatron import heads_of, stage_parameters
from checkpoints_convert.mapping import to_hf, unshard
from megatron_prepo.durable import rename_tree


@torch.no_grad()
def hf_weights(model: torch.nn.Module, vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor) of every Hugging Face tensor, one Megatron parameter at a time.

    Collective: every rank must consume it to the end; all ranks of a data-parallel replica get the
    same full tensors in the same order.  Each name comes once; tied embeddings have no `lm_head`.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    mine = stage_parameters(model)
    stages = [None] * pp_group.size()
    dist.all_gather_object(
        stages, [(mapping, tuple(p.shape), p.dtype) for mapping, p in mine], group=pp_group
    )
    heads, seen = heads_of(model.config), set()
    for stage, plan in enumerate(stages):
        for position, (mapping, shape, dtype) in enumerate(plan):
            if seen.issuperset(mapping.hf_names):  # the last stage's copy of tied embeddings
                continue
            seen.update(mapping.hf_names)
            if stage == pp_group.rank():
                part = mine[position][1].detach().contiguous()
            else:
                part = torch.empty(shape, dtype=dtype, device=mine[0][1].device)
            if pp_group.size() > 1:
                dist.broadcast(part, dist.get_global_rank(pp_group, stage), group=pp_group)
            full = unshard(mapping, _gather(mapping, part, tp_group))
            yield from zip(mapping.hf_names, to_hf(mapping, full, heads, vocab_size), strict=True)


def save_hf(
    weights: Iterable[tuple[str, torch.Tensor]],
    like: str | Path,
    directory: str | Path,
    *,
    shard_bytes: int = 5 << 30,
    write: bool = True,
) -> None:
    """Write streamed weights as a Hugging Face directory; every rank consumes, one writes.

    `like`: the directory that the model came from; its configuration and tokenizer files are
    carried over.  Written aside and renamed when whole, so `directory` never looks complete before
    it is; one that exists is replaced.
    """
    directory = Path(directory)
    aside = directory.with_name(directory.name + ".partial")
    if write:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    files: list[list[str]] = []
    total = 0
    for number, bucket in enumerate(buckets(weights, shard_bytes)):
        if write:
            save_file(
                {name: tensor.cpu().clone() for name, tensor in bucket},
                aside / f"part-{number}",
                metadata={"format": "pt"},
            )
        files.append([name for name, _ in bucket])
        total += sum(t.numel() * t.element_size() for _, t in bucket)
    if not write:
        return
    index = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        final = final if len(files) > 1 else "model.safetensors"
        (aside / f"part-{number}").rename(aside / final)
        index |= dict.fromkeys(names, final)
    if len(files) > 1:
        (aside / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        )
    for file in Path(like).iterdir():
        weights_file = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights_file:
            shutil.copy2(file, aside / file.name)
    if directory.exists():
        shutil.rmtree(directory)
    rename_tree(aside, directory)


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one comes alone."""
    bucket, size = [], 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket


def _gather(mapping, part: torch.Tensor, group) -> list[torch.Tensor]:
    if mapping.split_dim is None or group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return parts
