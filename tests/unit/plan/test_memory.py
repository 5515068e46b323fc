"""A plan's formulas against what autograd and the allocator really keep."""

import weakref
from contextlib import contextmanager

import megatron.core
import pytest
import torch
from megatron.core import tensor_parallel
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prepo.actor.context_parallel import context_group
from megatron_prepo.actor.dry_run import pretend
from megatron_prepo.actor.lm_head import vocab_parallel_logprobs_and_entropy
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.model import build_model
from megatron_prepo.actor.packing import Piece, Row
from megatron_prepo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_prepo.config.schema import PROJECTIONS
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan.memory import (
    adapter_activations,
    adapter_parameters,
    head_workspace,
    kv_bytes_per_token,
    layer_activations,
    stage_activations,
)
from megatron_prepo.records import ScoredSequence

DENSE = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
NORMED = DENSE | {"model_type": "qwen3", "head_dim": 24}
EXPERTS = NORMED | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TOKENS = 128
MAP_UNSORTED = Version(megatron.core.__version__) < Version("0.17")
"""Whether megatron-core keeps 3 bytes per token and expert, and not 8."""


def kept_by_autograd(
    hf: dict, parallel: ParallelConfig, megatron: dict, layers: int, lora: LoraConfig | None = None
) -> int:
    """Return the bytes of distinct tensors, weights excluded, that a real forward pass saves."""
    with pretend(0, parallel.replica, parallel):
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        shape = hf | {"num_hidden_layers": layers}
        (model,) = build_model(shape, ModelConfig(hf="", layers="torch"), parallel, megatron, lora)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # alive, so that no address is reused
            return tensor

        # one sequence is one call of attention, as one call of a GPU's kernel is for any number of
        # them
        sequence = ScoredSequence(tuple(range(TOKENS + 1)), 1)
        piece = Piece(index=(0,), prefix=0, scored=(TOKENS,))
        batch = micro_batch([sequence], Row((piece,), (0,)), context=context_group())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch.tokens_T[None], None, None, packed_seq_params=batch.layout)
        return sum(storage.nbytes() for storage in kept.values())


MODELS = {"qwen2": DENSE, "qwen3": NORMED, "qwen3_moe": EXPERTS}
SPLITS = [(1, False, 1), (2, False, 1), (2, True, 1), (1, False, 2), (1, False, 4), (2, True, 4)]


@pytest.mark.parametrize(
    ("name", "tensor", "sequence", "context"),
    # Megatron's experts need sequence parallelism with tensor parallelism
    [
        (n, *split)
        for n in MODELS
        for split in SPLITS
        if n != "qwen3_moe" or split[:2] != (2, False)
    ],
)
def test_a_layers_activations_are_what_autograd_keeps(name, tensor, sequence, context):
    hf = MODELS[name]
    parallel = ParallelConfig(tensor=tensor, sequence=sequence, context=context)
    two, three = (kept_by_autograd(hf, parallel, {}, layers) for layers in (2, 3))
    predicted = layer_activations(Shape.of(hf), parallel, "torch", tokens=TOKENS)
    if hf is EXPERTS and MAP_UNSORTED:
        predicted -= 5 * hf["num_experts"] * TOKENS / (tensor * context)
    # routing probabilities of experts are not split over tensor ranks: 2 bytes per token
    assert predicted == pytest.approx(three - two, rel=1e-3 if hf is EXPERTS else 0)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True)])
def test_adapters_keep_at_most_what_is_predicted(name, tensor, sequence):
    """And no less than three quarters of it: frozen norms keep fewer numbers of each token."""
    hf, lora = MODELS[name], LoraConfig(rank=8)
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    two, three = (kept_by_autograd(hf, parallel, {}, layers, lora) for layers in (2, 3))
    predicted = layer_activations(Shape.of(hf), parallel, "torch", tokens=TOKENS)
    predicted += adapter_activations(Shape.of(hf), parallel, lora, tokens=TOKENS)
    assert 0.75 * predicted < three - two <= predicted


@pytest.mark.parametrize("targets", [PROJECTIONS, ("v_proj", "o_proj"), ("up_proj", "down_proj")])
def test_adapters_have_the_parameters_that_are_predicted(targets):
    lora, parallel = LoraConfig(rank=3, target_modules=targets), ParallelConfig()
    with pretend(0, 1, parallel):
        (model,) = build_model(NORMED, ModelConfig(hf="", layers="torch"), parallel, {}, lora)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(Shape.of(NORMED), lora) == real


@pytest.mark.parametrize(
    ("tensor", "sequence", "context"), [(1, False, 1), (2, True, 1), (2, True, 2)]
)
def test_full_recomputation_keeps_the_layers_inputs(tensor, sequence, context):
    parallel = ParallelConfig(tensor=tensor, sequence=sequence, context=context)
    two, four = (kept_by_autograd(DENSE, parallel, FULL, layers) for layers in (2, 4))
    shape = Shape.of(DENSE)
    one = layer_activations(shape, parallel, "torch", tokens=TOKENS)
    stage = stage_activations(
        shape, parallel, "torch", FULL, num_layers=4, in_flight=3, tokens=TOKENS
    )
    assert stage == 3 * 2 * (four - two) + one


def test_recomputation_of_groups_and_of_the_first_layers():
    shape, parallel = Shape.of(DENSE), ParallelConfig()
    one = layer_activations(shape, parallel, "torch", tokens=TOKENS)
    kept = 2 * 128 * TOKENS

    def stage(megatron: dict) -> float:
        return stage_activations(
            shape, parallel, "torch", megatron, num_layers=5, in_flight=2, tokens=TOKENS
        )

    assert stage({}) == stage({"recompute_granularity": "selective"}) == 10 * one
    assert stage(FULL | {"recompute_num_layers": 2}) == 2 * 3 * kept + 2 * one
    block = FULL | {"recompute_method": "block", "recompute_num_layers": 2}
    assert stage(block) == 2 * (2 * kept + 3 * one) + one


def test_transformer_engines_layers_by_hand():
    """One token, all numbers small: 8 h + 4 q + 4 g + 4 a + 6 f, over tensor 2 except 8 h."""
    shape = Shape.of(DENSE)
    count = {"tokens": 1}
    assert (shape.queries, shape.keys) == (128, 32)
    rest = 4 * 128 + 4 * 32 + 4 * 8 + 6 * 192
    whole = layer_activations(shape, ParallelConfig(), "te", **count)
    assert whole == 8 * 128 + rest
    split = layer_activations(shape, ParallelConfig(tensor=2), "te", **count)
    assert split == 8 * 128 + rest / 2
    both = layer_activations(shape, ParallelConfig(tensor=2, sequence=True), "te", **count)
    assert both == (8 * 128 + rest) / 2


def test_experts_spread_over_ranks_get_their_share_of_the_tokens():
    """Expert parallelism: a token's experts are complete on one rank."""
    shape = Shape.of(EXPERTS)
    count = {"tokens": 1}
    both = ParallelConfig(tensor=2, sequence=True)
    together = layer_activations(shape, both, "te", **count)
    apart = layer_activations(
        shape, ParallelConfig(tensor=2, expert=4, sequence=True), "te", **count
    )
    assert together - apart == 2 * (2 * 128) / 2  # the inputs of a token's 2 experts, halved


class Live(TorchDispatchMode):
    """Count the bytes of live storages that were created since it began, and their maximum."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


@contextmanager
def live():
    mode = Live()
    with mode:
        yield mode


@pytest.mark.parametrize(("chunk", "tokens"), [(64, 512), (512, 512), (64, 2048)])
def test_the_heads_workspace_covers_its_peak(chunk, tokens):
    shape = Shape.of(DENSE | {"vocab_size": 4096})
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4096, 128, dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.zeros(4096, 128)
    targets = torch.randint(0, 4096, (tokens,))
    there = [tensor.untyped_storage() for tensor in (hidden, weight, weight.main_grad, targets)]
    with live() as mode:
        mode.known.update(there)
        logprobs, entropy = vocab_parallel_logprobs_and_entropy(
            hidden, weight, targets, vocab_size=4096, chunk_tokens=chunk
        )
        (logprobs.sum() + entropy.sum()).backward()
    predicted = head_workspace(shape, ParallelConfig(), chunk_tokens=chunk, tokens=tokens)
    # on a CPU operands are copied to float32 first, which CUDA's matrix product does not need
    copies = 4 * (4096 * 128 + chunk * 4096 + chunk * 128)
    assert 0.9 * predicted <= mode.most <= predicted + copies, (predicted, mode.most, copies)


def test_key_value_cache_by_hand():
    """Qwen2.5-7B, a published figure: 56 KiB per token; heads are distributed, never divided."""
    shape = Shape.of(
        DENSE
        | {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
    )
    assert kv_bytes_per_token(shape) == 56 * 1024
    assert kv_bytes_per_token(shape, tensor=4) == kv_bytes_per_token(shape, tensor=7) == 14 * 1024
