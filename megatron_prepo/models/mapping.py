"""The single table of parameter names, and the operations that split and join their tensors.

A Megatron parameter holds one or several Hugging Face tensors, in one of six ways:

| kind  | Megatron's full tensor                                    | split over tensor parallel |
|-------|-----------------------------------------------------------|----------------------------|
| copy  | the tensor                                                | not split                  |
| stack | tensors of equal shape, one above the other (adapters)    | not split                  |
| row   | the tensor                                                | its columns                |
| vocab | the tensor, zero rows added to a multiple of the ranks    | its rows                   |
| qkv   | q, k, v interleaved: each key-value group's q heads, k, v | its rows                   |
| gated | gate over up                                              | the rows of each half      |

`to_megatron` and `to_hf`, `shard` and `unshard` are exact inverses.  To add a family, add its names
that are not in the table.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

HF_LAYER = "model.layers.{layer}."
QKV = tuple(f"{HF_LAYER}self_attn.{part}_proj" for part in "qkv")

TOP = {
    "embedding.word_embeddings.weight": ("vocab", "model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": ("copy", "model.norm.weight"),
    "output_layer.weight": ("vocab", "lm_head.weight"),
}
"""Parameters outside the layers: Megatron's name -> kind, Hugging Face's name."""

INPUT_NORM = ("copy", (HF_LAYER + "input_layernorm.weight",))
MLP_NORM = ("copy", (HF_LAYER + "post_attention_layernorm.weight",))
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."
EXPERT_FC1 = ("gated", (HF_EXPERT + "gate_proj.weight", HF_EXPERT + "up_proj.weight"))
EXPERT_FC2 = ("row", (HF_EXPERT + "down_proj.weight",))
LAYER = {
    "input_layernorm.weight": INPUT_NORM,
    "self_attention.linear_qkv.layer_norm_weight": INPUT_NORM,  # TransformerEngine's name
    "self_attention.linear_qkv.weight": ("qkv", tuple(n + ".weight" for n in QKV)),
    "self_attention.linear_qkv.bias": ("qkv", tuple(n + ".bias" for n in QKV)),
    "self_attention.q_layernorm.weight": ("copy", (HF_LAYER + "self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("copy", (HF_LAYER + "self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("row", (HF_LAYER + "self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": MLP_NORM,
    "mlp.linear_fc1.layer_norm_weight": MLP_NORM,  # TransformerEngine's name
    "mlp.linear_fc1.weight": (
        "gated",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
    ),
    "mlp.linear_fc2.weight": ("row", (HF_LAYER + "mlp.down_proj.weight",)),
    # mixture of experts: the local spec's names, then TransformerEngine's grouped ones
    "mlp.router.weight": ("copy", (HF_LAYER + "mlp.gate.weight",)),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": EXPERT_FC1,
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": EXPERT_FC2,
    "mlp.experts.linear_fc1.weight{expert}": EXPERT_FC1,
    "mlp.experts.linear_fc2.weight{expert}": EXPERT_FC2,
}
"""Parameters of a layer: Megatron's name -> kind, Hugging Face's names."""

SPLIT_DIM = {"copy": None, "stack": None, "row": 1, "vocab": 0, "qkv": 0, "gated": 0}


@dataclass(frozen=True)
class Mapping:
    """Location of one Megatron parameter in a Hugging Face model."""

    kind: str
    hf_names: tuple[str, ...]
    expert: int | None = None
    """Index of the expert in its layer; such a parameter is split over expert-tensor ranks."""

    def of_expert(self, expert: int) -> "Mapping":
        """Return the mapping of the same parameter of another expert of the layer."""
        names = [
            n.replace(f".experts.{self.expert}.", f".experts.{expert}.") for n in self.hf_names
        ]
        return Mapping(self.kind, tuple(names), expert)

    @property
    def split_dim(self) -> int | None:
        """Dimension that tensor parallelism splits, None if every rank holds the full tensor."""
        return SPLIT_DIM[self.kind]


@dataclass(frozen=True)
class Heads:
    """Attention geometry, needed for interleaving."""

    num_groups: int
    head_dim: int
    queries_per_group: int


def find_mapping(
    megatron_name: str, *, first_layer: int = 0, first_expert: int = 0, tied: bool = False
) -> Mapping:
    """Return the mapping of a parameter by its name in this pipeline stage.

    `first_layer`, `first_expert`: indices in the complete model of the stage's first layer and of
    the rank's first expert.
    `tied`: embedding and output share their tensor, from which a stage's copy of it is read.

    >>> find_mapping("decoder.layers.1.self_attention.linear_proj.weight", first_layer=4).hf_names
    ('model.layers.5.self_attn.o_proj.weight',)

    Raises KeyError for a name that is not in the table.
    """
    if megatron_name == "output_layer.weight" and tied:
        return Mapping("vocab", ("model.embed_tokens.weight",))
    if megatron_name in TOP:
        kind, hf_name = TOP[megatron_name]
        return Mapping(kind, (hf_name,))
    in_layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
    number, name_in_layer = in_layer.groups() if in_layer else ("", "")
    for pattern, (kind, hf_names) in _LAYER_PATTERNS:
        if match := pattern.fullmatch(name_in_layer):
            layer, found = int(number) + first_layer, match.groupdict().get("expert")
            expert = None if found is None else int(found) + first_expert
            names = tuple(name.format(layer=layer, expert=expert) for name in hf_names)
            return Mapping(kind, names, expert)
    raise KeyError(f"no Hugging Face name is known for the Megatron parameter {megatron_name}")


_LAYER_PATTERNS = [
    (re.compile(re.escape(name).replace(r"\{expert\}", r"(?P<expert>\d+)")), entry)
    for name, entry in LAYER.items()
]


def is_adapter(megatron_name: str) -> bool:
    """Return whether a parameter or tensor of a checkpoint belongs to an adapter (`lora.py`)."""
    return ".lora." in megatron_name


def adapter_mappings(weight: Mapping, targets: Sequence[str]) -> tuple[Mapping, Mapping]:
    """Return the mappings of the matrices A and B of an adapted weight's adapter.

    A holds the matrices of the adapted projections, B the rows of all: those of the remaining ones
    are zero.  Names are those of `peft`, without its prefix.
    """
    stems = [name.removesuffix(".weight") for name in weight.hf_names]
    a_names = tuple(f"{s}.lora_A.weight" for s in stems if s.rpartition(".")[2] in targets)
    b_names = tuple(f"{s}.lora_B.weight" for s in stems)
    if weight.kind == "row":
        return Mapping("row", a_names), Mapping("copy", b_names)
    return Mapping("stack", a_names), Mapping(weight.kind, b_names)


def to_megatron(mapping: Mapping, tensors: list[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Return Megatron's full tensor from the Hugging Face tensors, in the order of `hf_names`.

    Raises ValueError if their sizes do not match: joined, they might still have the right shape.
    """
    check_parts(mapping, [tensor.shape for tensor in tensors], heads)
    if mapping.kind == "qkv":
        grouped = [t.reshape(heads.num_groups, -1, heads.head_dim, *t.shape[1:]) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tensors[0].shape[1:])
    return torch.cat(tensors) if mapping.kind in ("gated", "stack") else tensors[0]


def check_parts(mapping: Mapping, shapes: list[torch.Size], heads: Heads) -> None:
    """Raise ValueError if gate and up, or query, key and value, do not have the required sizes."""
    expected = [len(shape) and shape[0] for shape in shapes]
    if mapping.kind == "qkv":
        rows = heads.num_groups * heads.head_dim
        expected = [rows * heads.queries_per_group, rows, rows]
    elif mapping.kind in ("gated", "stack"):
        expected = [shapes[0][0]] * len(shapes)
    for name, shape, rows in zip(mapping.hf_names, shapes, expected, strict=True):
        if shape[:1] != torch.Size([rows])[: len(shape)] or shape[1:] != shapes[0][1:]:
            raise ValueError(f"{name} has shape {tuple(shape)}, but must have {rows} rows")


def to_hf(
    mapping: Mapping, full: torch.Tensor, heads: Heads, vocab_size: int
) -> list[torch.Tensor]:
    """Return the Hugging Face tensors of Megatron's full tensor, in the order of `hf_names`."""
    if mapping.kind == "qkv":
        parts = (heads.queries_per_group, 1, 1)
        grouped = full.reshape(heads.num_groups, sum(parts), heads.head_dim, *full.shape[1:])
        return [t.reshape(-1, *full.shape[1:]).contiguous() for t in grouped.split(parts, dim=1)]
    if mapping.kind in ("gated", "stack"):
        return [part.contiguous() for part in full.chunk(len(mapping.hf_names))]
    return [full[:vocab_size] if mapping.kind == "vocab" else full]


def shard(
    mapping: Mapping, full: torch.Tensor, shape: torch.Size, rank: int, size: int
) -> torch.Tensor:
    """Return a tensor-parallel rank's part of Megatron's full tensor, which must have `shape`."""
    if mapping.kind == "vocab" and (padding := shape[0] * size - full.shape[0]) > 0:
        full = torch.cat([full, full.new_zeros(padding, *full.shape[1:])])
    whole = list(shape)
    if mapping.split_dim is not None:
        whole[mapping.split_dim] *= size
    part = full
    if list(full.shape) == whole:
        if mapping.kind == "gated":
            part = torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
        elif mapping.split_dim is not None:
            part = full.chunk(size, mapping.split_dim)[rank]
    if part.shape != shape or list(full.shape) != whole:
        raise ValueError(
            f"{', '.join(mapping.hf_names)}: part {rank} of {size} has shape {tuple(part.shape)}, "
            f"the Megatron parameter {tuple(shape)}"
        )
    return part.contiguous()


def unshard(mapping: Mapping, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return Megatron's full tensor (including vocabulary padding) from the parts of all ranks."""
    if mapping.split_dim is None or len(parts) == 1:
        return parts[0]
    if mapping.kind == "gated":
        return torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
    return torch.cat(parts, mapping.split_dim)
