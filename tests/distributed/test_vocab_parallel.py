"""A sharded output head equals the complete one, over gloo: values, gradients and communication.

One start of 4 ranks computes all cases; the tests look at its results.
"""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import join, on_ranks
from rounding import Reference
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prepo.actor.lm_head import (
    IGNORE,
    equal_chunks,
    vocab_parallel_logprobs_and_entropy,
    vocab_parallel_loss,
)

NUM_TOKENS, HIDDEN, CHUNK = 13, 8, 5

CASES = {
    # name: (tensor-parallel ranks, rows of the head on each, words of the vocabulary)
    "one rank": (1, 16, 16),
    "two ranks": (2, 8, 16),
    "four ranks": (4, 4, 16),
    "two ranks, last one padded": (2, 8, 13),
    "four ranks, last one padded": (4, 4, 13),
    "four ranks, last one empty": (4, 3, 9),
    "four ranks, two empty, one padded": (4, 4, 5),
    "four ranks, one all of -inf": (4, 4, 16),
}


def problem(name: str):
    """Return the complete head, hidden states, targets, temperatures and gradients of both
    outputs."""
    ranks, rows, vocab_size = CASES[name]
    generator = torch.Generator().manual_seed(0)
    randn = {"generator": generator, "dtype": torch.float64}
    hidden_TH = torch.randn(NUM_TOKENS, HIDDEN, **randn)
    weight_VH = torch.randn(ranks * rows, HIDDEN, **randn)
    targets_T = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    targets_T[[2, 12]] = IGNORE
    if name.endswith("-inf"):
        hidden_TH = hidden_TH.abs()
        weight_VH[rows : 2 * rows] = -math.inf
        targets_T = targets_T.where((targets_T < rows) | (targets_T >= 2 * rows), 0)
    temperature_T = torch.linspace(0.5, 1.5, NUM_TOKENS, dtype=torch.float64)
    grads_2T = torch.randn(2, NUM_TOKENS, **randn)
    return hidden_TH, weight_VH, targets_T, temperature_T, grads_2T


class Collectives(TorchDispatchMode):
    """Count all traffic through torch's process groups, whichever function requested it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def compute_all():
    """Return, on each rank, {(case, type): results of the ranks that take part}."""
    join(4)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, 4)}
    return {
        (name, dtype): compute(name, dtype, groups[ranks])
        for name, (ranks, _, _) in CASES.items()
        for dtype in (torch.float64, torch.float32)
        if dist.get_rank() < ranks
    }


def compute(name, dtype, group):
    _, rows, vocab_size = CASES[name]
    hidden_TH, weight_VH, targets_T, temperature_T, grads_2T = problem(name)
    mine = slice(group.rank() * rows, (group.rank() + 1) * rows)
    hidden_TH = hidden_TH.to(dtype).requires_grad_()
    weight_VH = weight_VH[mine].to(dtype).requires_grad_()
    settings = {
        "vocab_size": vocab_size,
        "temperature": temperature_T.to(dtype),
        "group": group,
        "chunk_tokens": CHUNK,
    }
    with Collectives() as forward:
        outputs = vocab_parallel_logprobs_and_entropy(hidden_TH, weight_VH, targets_T, **settings)
    with Collectives() as backward:
        torch.autograd.backward(outputs, list(grads_2T.to(dtype)))
    return {
        "logprobs_T": outputs[0].detach(),
        "entropy_T": outputs[1].detach(),
        "grad_hidden_TH": hidden_TH.grad,
        "grad_weight_VH": weight_VH.grad,
        "forward": forward.names,
        "backward": backward.names,
        "loss": compute_loss(hidden_TH, weight_VH, targets_T, grads_2T.to(dtype), settings),
    }


def compute_loss(hidden_TH, weight_VH, targets_T, grads_2T, settings):
    """Compute the same gradients by a loss that is known in the forward pass."""
    a_R, b_R = grads_2T[:, targets_T != IGNORE]
    seen = []

    def token_loss(logprobs_C, entropy_C, scored):
        seen.append(torch.stack([logprobs_C, entropy_C]).detach())
        return (a_R[scored] * logprobs_C + b_R[scored] * entropy_C).sum(), {}

    with Collectives() as forward:
        loss, _ = vocab_parallel_loss(hidden_TH, weight_VH, targets_T, token_loss, **settings)
    with Collectives() as backward:
        grads = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return {
        "loss": loss.detach(),
        "seen": torch.cat(seen, dim=1),
        "grads": grads,
        "forward": forward.names,
        "backward": backward.names,
    }


def full_softmax(name, hidden_TH, whole_VH, temperature_T, grads_2T):
    """Compute it on one rank with autograd, without impossible words, so that no gradient is NaN.

    Returns log-probabilities, entropies, and the gradients of hidden states and head.
    """
    _, _, vocab_size = CASES[name]
    targets_T = problem(name)[2]
    possible = whole_VH[:vocab_size].isfinite().all(dim=1).nonzero().squeeze(1)
    hidden_TH.requires_grad_()
    weight_VH = whole_VH[possible].requires_grad_()
    logits_TV = hidden_TH @ weight_VH.T / temperature_T[:, None]
    logp_TV = logits_TV.log_softmax(-1)
    scored_T = targets_T != IGNORE
    column_T = torch.searchsorted(possible, targets_T.clamp(min=0))
    logprobs_T = logp_TV.gather(1, column_T[:, None])[:, 0].where(scored_T, 0)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1).where(scored_T, 0)
    torch.autograd.backward((logprobs_T, entropy_T), list(grads_2T))
    grad_weight_VH = torch.zeros_like(whole_VH)
    grad_weight_VH[possible] = weight_VH.grad
    return logprobs_T.detach(), entropy_T.detach(), hidden_TH.grad, grad_weight_VH


@pytest.fixture(scope="module")
def results():
    """Return {(case, type): [result of each of its ranks]}."""
    on_each_rank = on_ranks(4, compute_all)
    return {
        (name, dtype): [rank[name, dtype] for rank in on_each_rank[:ranks]]
        for name, (ranks, _, _) in CASES.items()
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_equals_the_full_softmax(results, name, dtype):
    """Gradients of hidden states are partial on each rank, by contract: their sum is compared."""
    ranks = results[name, dtype]
    if name.endswith("-inf"):  # 0 * -inf: the hidden gradient is not defined on the rank of -inf
        assert ranks[1]["grad_hidden_TH"].isnan().any()
        ranks[1]["grad_hidden_TH"] = torch.zeros_like(ranks[1]["grad_hidden_TH"])
    ours = (
        ranks[-1]["logprobs_T"],
        ranks[-1]["entropy_T"],
        sum(rank["grad_hidden_TH"] for rank in ranks),
        torch.cat([rank["grad_weight_VH"] for rank in ranks]),
    )
    hidden_TH, weight_VH, _, temperature_T, grads_2T = problem(name)
    inputs = (value.to(dtype) for value in (hidden_TH, weight_VH, temperature_T, grads_2T))
    reference = Reference(full_softmax, name, *inputs)
    reference.assert_equals(ours)
    if len(ranks) > 1:  # a rank that is not summed would be seen
        reference.errors = [1000 * error for error in reference.errors]
        with pytest.raises(AssertionError, match="result 2: off by"):
            reference.assert_equals((*ours[:2], ranks[0]["grad_hidden_TH"]))


@pytest.mark.parametrize("name", CASES)
def test_padding_has_no_gradient(results, name):
    _, _, vocab_size = CASES[name]
    grad_VH = torch.cat([rank["grad_weight_VH"] for rank in results[name, torch.float32]])
    assert grad_VH[vocab_size:].eq(0).all()


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_values_bit_for_bit(results, name):
    first, *others = results[name, torch.float32]
    for other in others:
        assert torch.equal(other["logprobs_T"], first["logprobs_T"])
        assert torch.equal(other["entropy_T"], first["entropy_T"])


@pytest.mark.parametrize("name", CASES)
def test_one_all_gather_forward_and_nothing_backward(results, name):
    """The number of chunks does not matter; one rank alone communicates nothing."""
    ranks, _, _ = CASES[name]
    assert NUM_TOKENS > 2 * CHUNK
    for rank in results[name, torch.float32]:
        assert rank["forward"] == ([] if ranks == 1 else ["c10d::allgather_"])
        assert rank["backward"] == []


# `vocab_parallel_loss`, on the same problems


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_loss_and_its_gradients_are_those_of_the_full_softmax(results, name, dtype):
    """Recomputed ones are compared above, from other chunks and slabs."""
    losses = [rank["loss"] for rank in results[name, dtype]]
    grads = [loss["grads"] for loss in losses]
    parts = [hidden_TH for hidden_TH, _ in grads]
    if name.endswith("-inf"):  # as above: not defined on the rank of -inf
        parts[1] = torch.zeros_like(parts[1])
    hidden_TH, weight_VH, _, temperature_T, grads_2T = problem(name)
    inputs = (value.to(dtype) for value in (hidden_TH, weight_VH, temperature_T, grads_2T))
    values_2T = torch.zeros(2, NUM_TOKENS, dtype=dtype)
    values_2T[:, problem(name)[2] != IGNORE] = losses[-1]["seen"]
    ours = (*values_2T, sum(parts), torch.cat([weight_VH for _, weight_VH in grads]))
    Reference(full_softmax, name, *inputs).assert_equals(ours)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_compute_the_same_loss_from_the_same_values(results, name):
    first, *others = results[name, torch.float32]
    for other in others:
        assert torch.equal(other["loss"]["loss"], first["loss"]["loss"])
        assert torch.equal(other["loss"]["seen"], first["loss"]["seen"])


@pytest.mark.parametrize("name", CASES)
def test_a_loss_takes_one_all_gather_a_chunk_and_nothing_backward(results, name):
    ranks, _, _ = CASES[name]
    chunks = len(equal_chunks(NUM_TOKENS - 2, CHUNK))
    assert chunks == 3
    for rank in results[name, torch.float32]:
        assert rank["loss"]["forward"] == ([] if ranks == 1 else ["c10d::allgather_"] * chunks)
        assert rank["loss"]["backward"] == []
