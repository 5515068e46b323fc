"""Fill a Megatron model from Hugging Face safetensors; each rank reads what it holds."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open

from checkpoints_convert.mapping import Heads, Mapping, mapping_of, shard, to_megatron
from megatron_prepo.errors import UserError


def stage_parameters(model: torch.nn.Module) -> list[tuple[Mapping, torch.nn.Parameter]]:
    """Every parameter of this rank's (unwrapped) GPTModel with its mapping."""
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    tied = model.share_embeddings_and_output_weights
    return [
        (mapping_of(name, first_layer=first_layer, tied=tied), parameter)
        for name, parameter in model.named_parameters()
    ]


def heads_of(config) -> Heads:
    """The attention geometry of a TransformerConfig."""
    return Heads(
        num_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        queries_per_group=config.num_attention_heads // config.num_query_groups,
    )


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, directory: str | Path) -> None:
    """Copy a Hugging Face checkpoint into this rank's (unwrapped) GPTModel.

    Collective over the pipeline stages, which together must have used every tensor of the files.
    Raises UserError for a missing file or tensor, a shape that does not fit, a tensor left over.
    """
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    heads = heads_of(model.config)
    with HFTensors(directory) as tensors:
        for mapping, parameter in stage_parameters(model):
            full = to_megatron(mapping, [tensors[name] for name in mapping.hf_names], heads)
            try:
                part = shard(mapping, full, parameter.shape, rank, size)
            except ValueError as error:
                raise UserError(f"{directory} does not fit its config.json: {error}") from error
            parameter.copy_(part)
        used = [None] * pp_group.size()
        mine = [name for mapping, _ in stage_parameters(model) for name in mapping.hf_names]
        dist.all_gather_object(used, mine, group=pp_group)
        ignored = {"lm_head.weight"} if model.share_embeddings_and_output_weights else set()
        left = tensors.names() - ignored - set().union(*used)
        left = sorted(name for name in left if not name.endswith(".rotary_emb.inv_freq"))
    if left:
        raise UserError(f"{directory} has tensors that the model has no place for: {left}")


class HFTensors:
    """The tensors of a Hugging Face directory by name, read when asked for."""

    def __init__(self, directory: str | Path):
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise UserError(f"no weights in {directory}: it holds no *.safetensors file")
        self._handles, self._where = [], {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
            self._handles.append(handle)
            self._where |= dict.fromkeys(handle.keys(), handle)
        self.directory = directory

    def __enter__(self) -> "HFTensors":
        return self

    def __exit__(self, *_) -> None:
        self._where.clear()
        self._handles.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise UserError(f"{self.directory} has no tensor {name}")
        return self._where[name].get_tensor(name)

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._where)
