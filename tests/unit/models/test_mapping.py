"""The table of names: splitting and joining are exact inverses, and nothing is missed."""

import pytest
import torch

from megatron_prepo.models.mapping import (
    LAYER,
    TOP,
    Heads,
    Mapping,
    find_mapping,
    shard,
    to_hf,
    to_megatron,
    unshard,
)

HIDDEN, FFN, VOCAB, LAYERS = 12, 20, 29, 3
HEADS = Heads(num_groups=4, head_dim=5, queries_per_group=3)  # 5 != 12 / 12: Qwen3's freedom

NORMS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
"""TransformerEngine's names of the two norms that are separate in torch-native layers."""


def rows(part):
    return HEADS.num_groups * HEADS.head_dim * (HEADS.queries_per_group if part == "q" else 1)


def hf_tensors(kind, seed=0):
    """Return random tensors of the shapes that make up a parameter of this kind."""
    shapes = {
        "copy": [(HIDDEN,)],
        "row": [(HIDDEN, rows("q"))],
        "vocab": [(VOCAB, HIDDEN)],
        "qkv": [(rows(part), HIDDEN) for part in "qkv"],
        "qkv bias": [(rows(part),) for part in "qkv"],
        "gated": [(FFN, HIDDEN)] * 2,
        "stack": [(3, HIDDEN)] * 2,
    }
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes[kind]]


def mapping_and_tensors(kind):
    tensors = hf_tensors(kind)
    return Mapping(kind.split()[0], tuple(f"t{i}" for i in range(len(tensors)))), tensors


KINDS = ["copy", "stack", "row", "vocab", "qkv", "qkv bias", "gated"]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_identity(kind, size):
    """Hugging Face -> Megatron -> ranks -> Megatron -> Hugging Face."""
    mapping, tensors = mapping_and_tensors(kind)
    full = to_megatron(mapping, tensors, HEADS)
    padded = -(-len(full) // size) * size if kind == "vocab" else len(full)
    shape = list(full.shape)
    if mapping.split_dim is not None:
        shape[mapping.split_dim] = (padded if mapping.split_dim == 0 else shape[1]) // size
    parts = [shard(mapping, full, torch.Size(shape), rank, size) for rank in range(size)]
    joined = unshard(mapping, parts)
    assert torch.equal(joined[: len(full)], full) and len(joined) == padded
    back = to_hf(mapping, joined, HEADS, VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    assert all(tensor.is_contiguous() for tensor in [*parts, *back])


@pytest.mark.parametrize("kind", KINDS)
def test_back_and_there_is_the_identity(kind):
    """Megatron -> Hugging Face -> Megatron: no freedom is left in the layout."""
    mapping, tensors = mapping_and_tensors(kind)
    full = torch.rand_like(to_megatron(mapping, tensors, HEADS))
    assert torch.equal(to_megatron(mapping, to_hf(mapping, full, HEADS, VOCAB), HEADS), full)


def test_qkv_is_interleaved_by_group():
    """Each key-value group has its query heads, its key head and its value head, by hand."""
    heads = Heads(num_groups=2, head_dim=1, queries_per_group=2)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20]), torch.tensor([100, 200])
    full = to_megatron(Mapping("qkv", ("q", "k", "v")), [q, k, v], heads)
    assert full.tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_a_rank_gets_whole_groups():
    full = torch.tensor([1, 2, 10, 100, 3, 4, 20, 200])
    part = shard(Mapping("qkv", ("q", "k", "v")), full, torch.Size([4]), 1, 2)
    assert part.tolist() == [3, 4, 20, 200]


def test_gate_and_up_are_split_each_on_its_own():
    """A rank multiplies its part of gate with the same part of up."""
    mapping = Mapping("gated", ("gate", "up"))
    full = to_megatron(mapping, [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])], HEADS)
    assert full.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    parts = [shard(mapping, full, torch.Size([4]), rank, 2) for rank in range(2)]
    assert [part.tolist() for part in parts] == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_a_row_parallel_matrix_is_split_by_its_columns():
    """A rank multiplies them with its part of the input."""
    full = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    part = shard(Mapping("row", ("o",)), full, torch.Size([2, 2]), 1, 2)
    assert part.tolist() == [[3, 4], [7, 8]]


def test_vocabulary_is_padded_by_zero_rows():
    mapping, (full,) = mapping_and_tensors("vocab")
    parts = [shard(mapping, full, torch.Size([8, HIDDEN]), rank, 4) for rank in range(4)]
    assert torch.equal(parts[3][:5], full[24:]) and parts[3][5:].eq(0).all()


def test_padding_of_the_vocabulary_is_not_exported():
    """Training may have changed its values."""
    mapping, (full,) = mapping_and_tensors("vocab")
    (back,) = to_hf(mapping, torch.cat([full, torch.full((3, HIDDEN), 7.0)]), HEADS, VOCAB)
    assert torch.equal(back, full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_that_does_not_fit_raises_and_names_the_tensors(kind):
    mapping, tensors = mapping_and_tensors(kind)
    full = to_megatron(mapping, tensors, HEADS)
    size = 1 if mapping.split_dim is None else 2
    wrong = torch.Size([n + 1 for n in full.shape]) if kind != "vocab" else torch.Size([15, 99])
    with pytest.raises(ValueError, match=f"t0.*part 0 of {size}"):
        shard(mapping, full, wrong, 0, size)


def parameter_names(engine, layers=LAYERS):
    """Return all Megatron names of an untied model, with torch-native or TransformerEngine
    layers."""
    plain = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    grouped = ("mlp.experts.linear_fc1.weight{expert}", "mlp.experts.linear_fc2.weight{expert}")
    local = tuple(name for name in LAYER if "local_experts" in name)
    absent = (*NORMS, *grouped) if engine == "torch" else (*plain, *local)
    inside = [name.format(expert=0) for name in LAYER if name not in absent]
    return [*TOP, *(f"decoder.layers.{i}.{name}" for i in range(layers) for name in inside)]


@pytest.mark.parametrize("engine", ["torch", "te"])
def test_every_hf_name_comes_from_exactly_one_parameter(engine):
    names = [n for name in parameter_names(engine) for n in find_mapping(name).hf_names]
    assert len(names) == len(set(names)) == 3 + LAYERS * 18


def test_both_layer_implementations_are_made_of_the_same_hf_tensors():
    torch_native, te = (
        {n for name in parameter_names(engine) for n in find_mapping(name).hf_names}
        for engine in ("torch", "te")
    )
    assert torch_native == te


def test_layers_of_a_later_stage_are_counted_from_its_first():
    assert find_mapping("decoder.layers.1.mlp.linear_fc1.weight", first_layer=10) == Mapping(
        "gated", ("model.layers.11.mlp.gate_proj.weight", "model.layers.11.mlp.up_proj.weight")
    )


@pytest.mark.parametrize(
    "name",
    ["mlp.experts.local_experts.3.linear_fc2.weight", "mlp.experts.linear_fc2.weight3"],
)
def test_experts_of_a_rank_are_counted_from_its_first(name):
    mapping = find_mapping(f"decoder.layers.1.{name}", first_layer=2, first_expert=8)
    assert mapping.hf_names == ("model.layers.3.mlp.experts.11.down_proj.weight",)
    assert mapping.of_expert(5).hf_names == ("model.layers.3.mlp.experts.5.down_proj.weight",)


def test_a_tied_output_layer_is_the_embedding():
    assert find_mapping("output_layer.weight", tied=True).hf_names == ("model.embed_tokens.weight",)
    assert find_mapping("output_layer.weight").hf_names == ("lm_head.weight",)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.router.expert_bias",
        "decoder.layers.0.mlp.experts.local_experts.x.linear_fc1.weight",
        "decoder.layers.x.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.weight.extra",
        "decoder.layers.0",
        "encoder.layers.0.mlp.linear_fc1.weight",
        "embedding.position_embeddings.weight",
        "",
    ],
)
def test_an_unknown_name_raises(name):
    with pytest.raises(KeyError, match="no Hugging Face name is known"):
        find_mapping(name)
