"""Attention on rows of sequences: each token sees its own sequence, and positions restart."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from packaging.version import Version
from rounding import Reference

from megatron_prepo.actor import attention, cpu_shim
from megatron_prepo.actor.attention import CausalAttention, rotate_by_position
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.packing import plan_rows
from megatron_prepo.records import ScoredSequence
from tests.unit.actor.test_micro_batch import SHAPE

HEADS, GROUPS, SIZE = 4, 2, 8
CONFIG = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, window_size=None)
A, B = ScoredSequence((1, 2, 3, 4, 5), 3), ScoredSequence((1, 2, 3, 6, 7, 8), 3)
C = ScoredSequence((9, 10, 11), 1)
WAYS = [{}, {"share_prefixes": True}, {"packing": False}]


def packed_row(way):
    plan = plan_rows([A, C, B], num_ranks=1, budget=16, shape=SHAPE, multiple=4, **way)
    return micro_batch([A, C, B], plan.ranks[0][0]).layout


def random_qkv(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, 1, heads, SIZE, dtype=dtype, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def written_out(query, key, value, lengths, left=-1):
    """Attend with a block-diagonal causal mask over complete sequences: [W, heads, d] and so on.

    `left`: number of earlier tokens that a token attends to, all if negative.
    """
    sequence_W = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = len(sequence_W)
    seen_WW = (sequence_W[:, None] == sequence_W) & torch.ones(total, total).tril().bool()
    distance_WW = torch.arange(total)[:, None] - torch.arange(total)
    seen_WW &= (distance_WW <= left) | (left < 0)
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    weights = scores.masked_fill(~seen_WW, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def expected_output(qkv, layout, left):
    whole = (layout.whole(x[:, 0]) for x in qkv)
    return layout.row(written_out(*whole, layout.lengths, left))[:, None]


def assert_is_attention(ours, qkv, layout, left=-1):
    """Assert that the output, and gradients of its weighted sum, equal those of the formula."""

    def with_gradients(out, qkv):
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)

    def expected(*qkv):
        qkv = [x.requires_grad_() for x in qkv]
        return with_gradients(expected_output(qkv, layout, left), qkv)

    Reference(expected, *qkv).assert_equals(with_gradients(ours, qkv))


def causal_attention(left=-1):
    window = None if left < 0 else (left, 0)
    config = SimpleNamespace(**vars(CONFIG) | {"window_size": window})
    return CausalAttention(config, 1, None, "self")


@pytest.mark.parametrize("left", [-1, 2, 1])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_sequence_attends_to_itself(way, left):
    """A window of 3 tokens, less than two of the three sequences, or of 2."""
    layout = packed_row(way)
    assert max(layout.lengths) > 3
    qkv = random_qkv(len(layout.positions_T))
    ours = causal_attention(left)(*qkv, packed_seq_params=layout)
    assert_is_attention(ours, qkv, layout, left)


@pytest.mark.parametrize("left", [-1, 2])
def test_a_plain_batch_is_what_it_always_was(left):
    """Tensors are [s, b, ...] without a layout, which is what the checkpoint converter feeds."""
    qkv = random_qkv(12)
    batch = [x.view(6, 2, *x.shape[2:]) for x in qkv]
    ours = causal_attention(left)(*batch)
    for b in range(2):
        alone = Reference(lambda *x: [written_out(*x, (6,), left)], *(x[:, b] for x in batch))
        alone.assert_equals([ours[:, b].detach()])


@pytest.mark.parametrize("left", [-1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keys_are_repeated_for_a_kernel_without_groups(monkeypatch, way, left):
    """The output and the gradients are the same."""
    kernel, heads = torch.nn.functional.scaled_dot_product_attention, set()

    def told(query, key, value, **options):
        heads.add((query.shape[1], key.shape[1], value.shape[1], options["enable_gqa"]))
        return kernel(query, key, value, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", told)
    monkeypatch.setattr(attention, "_takes_groups", lambda query, mask: False)
    layout = packed_row(way)
    qkv = random_qkv(len(layout.positions_T))
    ours = causal_attention(left)(*qkv, packed_seq_params=layout)
    assert_is_attention(ours, qkv, layout, left)
    assert heads == {(HEADS, HEADS, HEADS, False)}


@pytest.mark.parametrize(
    ("is_cuda", "bytes_each", "masked", "expected"),
    [
        (True, 2, False, True),  # flash
        (True, 2, True, False),
        (True, 4, False, False),
        (True, 4, True, False),
        (False, 4, True, True),
        (False, 2, False, True),
    ],
)
def test_keys_are_grouped_where_a_fast_kernel_takes_them(is_cuda, bytes_each, masked, expected):
    """Groups with a mask or in float32 would on CUDA select products that keep all scores."""
    query = SimpleNamespace(is_cuda=is_cuda, element_size=lambda: bytes_each)
    mask = torch.ones(1, 1, dtype=torch.bool) if masked else None
    assert attention._takes_groups(query, mask) == expected


class Kernel:
    """Stand-in for torch's variable-length kernel and for TransformerEngine's: same contract."""

    def __call__(
        self, query, key, value, starts_q, starts_k, max_q, max_k, *, window_size, enable_gqa
    ):
        left, right = window_size
        assert right == 0 and enable_gqa
        assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k)
        lengths = starts_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        return written_out(query, key, value, lengths, left).view_as(query)


def kernel_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """Stand-in for a kernel that accepts grouped heads, and no argument for them."""
    starts = (cu_seq_q, cu_seq_k, max_q, max_k)
    return Kernel()(query, key, value, *starts, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("left", [-1, 2])
@pytest.mark.parametrize("kernel", [Kernel(), kernel_of_torch_2_11], ids=["newer", "torch 2.11"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_kernel_is_told_the_same_sequences(monkeypatch, way, kernel, left):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    layout = packed_row(way)
    qkv = random_qkv(len(layout.positions_T))
    whole = [layout.whole(x[:, 0]) for x in qkv]
    ours = layout.row(attention._attend_in_one_kernel(*whole, layout, left))[:, None]
    assert_is_attention(ours, qkv, layout, left)


class TransformerEngines(torch.nn.Module):
    """Stand-in for `TEDotProductAttention` with the arguments that Megatron passes, for `thd`."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads, config.num_query_groups
        self.window = config.window_size or (-1, 0)  # as Megatron's class passes it on

    def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params=None):
        assert attention_mask is None and attn_mask_type == "causal"
        params = packed_seq_params
        assert params.qkv_format == "thd" and type(params).__name__ == "PackedSeqParams"
        starts = (params.cu_seqlens_q, params.cu_seqlens_kv)
        longest = (params.max_seqlen_q, params.max_seqlen_kv)
        kernel = Kernel()
        settings = {"window_size": self.window, "enable_gqa": True}
        return kernel(query, key, value, *starts, *longest, **settings)


@pytest.fixture
def te_attention(monkeypatch):
    """Return the module `te_attention` with a stand-in for TransformerEngine."""
    monkeypatch.setattr(
        transformer_engine, "TEDotProductAttention", TransformerEngines, raising=False
    )
    monkeypatch.delitem(sys.modules, "megatron_prepo.actor.te_attention", raising=False)
    module = importlib.import_module("megatron_prepo.actor.te_attention")
    monkeypatch.delitem(sys.modules, "megatron_prepo.actor.te_attention")
    return module


def te_config(tensor, heads, groups, left=-1):
    return SimpleNamespace(
        num_attention_heads=heads,
        num_query_groups=groups,
        tensor_model_parallel_size=tensor,
        window_size=None if left < 0 else (left, 0),
    )


@pytest.mark.parametrize("left", [-1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_transformer_engine_is_told_the_same_sequences(te_attention, way, left):
    """The number of earlier tokens in a window is the same as for our own attention."""
    layout = packed_row(way)
    qkv = random_qkv(len(layout.positions_T))
    module = te_attention.PackedTEAttention(te_config(1, HEADS, GROUPS, left))
    ours = module(*qkv, None, attn_mask_type="causal", packed_seq_params=layout)
    assert_is_attention(ours, qkv, layout, left)


@pytest.mark.parametrize(
    ("tensor", "context", "heads", "groups", "told"),
    [
        (1, 1, 28, 4, (28, 4)),
        (1, 2, 28, 4, (14, 2)),
        (4, 7, 28, 4, (4, 4)),  # one head per rank, and its group's keys and values
        (2, 4, 32, 8, (8, 2)),
        (1, 8, 32, 4, (4, 1)),
        (8, 2, 64, 8, (32, 8)),
    ],
)
def test_transformer_engine_is_told_the_heads_of_a_context_rank(
    monkeypatch, te_attention, tensor, context, heads, groups, told
):
    """The numbers are for all tensor-parallel ranks together; TransformerEngine divides by them."""
    monkeypatch.setattr(
        te_attention.parallel_state, "get_context_parallel_world_size", lambda: context
    )
    config = te_config(tensor, heads, groups, left=7)
    module = te_attention.PackedTEAttention(config)
    assert (module.heads, module.window) == (told, (7, 0))
    assert (config.num_attention_heads, config.num_query_groups) == (heads, groups)


def test_the_kernel_for_rows_is_found_in_every_torch_that_has_it(monkeypatch):
    """Without it, a GPU computes sequence by sequence, with the same result."""
    for kernel in (Kernel(), kernel_of_torch_2_11):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        assert attention._has_kernel.__wrapped__()
    monkeypatch.undo()
    assert attention._has_kernel() or Version(torch.__version__) < Version("2.11.0.dev0")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_angles_are_those_of_the_positions(way):
    if not torch.cuda.is_available():
        cpu_shim.install()
    rotary = RotaryEmbedding(SIZE, 1.0, use_cpu_initialization=True)
    plain = rotary(32).clone()
    rotate_by_position(rotary)
    layout = packed_row(way)
    length = rotary.get_rotary_seq_len(None, None, None, None, layout)
    assert torch.equal(rotary(length, packed_seq=False, cp_group=None), plain[layout.positions_T])
    assert torch.equal(rotary(32), plain)


def test_angles_of_many_lengths_are_not_kept():
    """Megatron keeps those of 32 lengths, which a run of other lengths never looks up again."""
    if not torch.cuda.is_available():
        cpu_shim.install()
    rotary = RotaryEmbedding(SIZE, 1.0, use_cpu_initialization=True)
    rotate_by_position(rotary)
    kept = RotaryEmbedding.forward.cache_info().currsize
    rotary(packed_row(WAYS[0]))
    assert RotaryEmbedding.forward.cache_info().currsize == kept
