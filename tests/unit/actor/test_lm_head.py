"""The output head on one rank equals a full softmax in float64, in values and gradients.

Letters as in `lm_head`: T tokens, H hidden, V rows of the head, of which `vocab_size` count.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from rounding import Reference, approx, assert_close, assert_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prepo.actor import lm_head, lm_head_torch
from megatron_prepo.actor.lm_head import (
    IGNORE,
    chunk_tokens_within,
    equal_chunks,
    vocab_parallel_logprobs_and_entropy,
    vocab_parallel_loss,
)


def problem(*, tokens=11, hidden=16, rows=40, scale=1.0, dtype=torch.float64, seed=0):
    """Return hidden states, head and targets; `scale` is the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    weight_VH *= scale / hidden**0.5
    targets_T = torch.randint(0, rows, (tokens,), generator=generator)
    return hidden_TH.to(dtype), weight_VH.to(dtype), targets_T


def full_softmax(hidden_TH, weight_VH, targets_T, vocab_size, temperature=1.0):
    """Compute the definition: logits, less the logarithm of their sum of exponentials; -sum p ln
    p."""
    if torch.is_tensor(temperature):
        temperature = temperature[:, None]
    logits_TV = hidden_TH @ weight_VH[:vocab_size].T / temperature
    logp_TV = logits_TV - logits_TV.logsumexp(-1, keepdim=True)
    scored_T = targets_T != IGNORE
    logprobs_T = logp_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logprobs_T.where(scored_T, 0), entropy_T.where(scored_T, 0)


def softmax_of_the_product(hidden_TH, weight_VH, targets_T, vocab_size):
    """Compute the definition; in float32 from the logits that the head's own product gives.

    Tensor cores truncate where float32 rounds, so that no other computation errs as much.
    """
    if hidden_TH.dtype is torch.float32:
        pair = hidden_TH.bfloat16(), weight_VH.bfloat16().T
        assert all((a == b).all() for a, b in zip(pair, (hidden_TH, weight_VH.T), strict=True))
        logits_TV = lm_head.product(*pair)[:, :vocab_size].double()
    else:
        logits_TV = hidden_TH @ weight_VH[:vocab_size].T
    logp_TV = logits_TV.log_softmax(-1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def values_and_gradients(function, hidden_TH, weight_VH, *args, seed=1, **settings):
    """Return both outputs, and the gradients of a random combination of all their entries."""
    hidden_TH = hidden_TH.detach().clone().requires_grad_()
    weight_VH = weight_VH.detach().clone().requires_grad_()
    logprobs_T, entropy_T = function(hidden_TH, weight_VH, *args, **settings)
    generator = torch.Generator().manual_seed(seed)
    a_T, b_T = torch.randn(2, len(hidden_TH), generator=generator).to(logprobs_T)
    (a_T * logprobs_T + b_T * entropy_T).sum().backward()
    return logprobs_T.detach(), entropy_T.detach(), hidden_TH.grad, weight_VH.grad


def assert_equals_full_softmax(hidden_TH, weight_VH, targets_T, vocab_size, **settings):
    """Assert that values and gradients are equal, up to what rounding does to the definition."""
    ours = values_and_gradients(
        vocab_parallel_logprobs_and_entropy,
        hidden_TH,
        weight_VH,
        targets_T,
        vocab_size=vocab_size,
        **settings,
    )
    settings.pop("chunk_tokens", None)
    args = (full_softmax, hidden_TH, weight_VH, targets_T, vocab_size)
    Reference(values_and_gradients, *args, **settings).assert_equals(ours)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0, 33.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_full_softmax(scale, temperature, dtype):
    """Logits from almost flat to +-100; per-token temperatures from 0.5 to 1.5."""
    hidden_TH, weight_VH, targets_T = problem(scale=scale, dtype=dtype)
    assert scale < 33 or (hidden_TH @ weight_VH.T).abs().max() > 50
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, len(targets_T), dtype=dtype)
    assert_equals_full_softmax(
        hidden_TH, weight_VH, targets_T, 40, temperature=temperature, chunk_tokens=4
    )


@pytest.mark.parametrize("mistake", ["a row too few", "the next target", "temperature", "-grad"])
def test_a_mistake_is_thousands_of_times_what_rounding_may_do(mistake):
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.float32)
    reference = Reference(
        values_and_gradients, full_softmax, hidden_TH, weight_VH, targets_T, 40, temperature=0.9
    )
    settings = {"vocab_size": 40, "temperature": 0.9}
    if mistake == "a row too few":
        settings["vocab_size"] = 39
        targets_T = targets_T.clamp(max=38)
    elif mistake == "the next target":
        targets_T = targets_T.roll(1)
    elif mistake == "temperature":
        settings["temperature"] = 0.91
    ours = values_and_gradients(
        vocab_parallel_logprobs_and_entropy, hidden_TH, weight_VH, targets_T, **settings
    )
    if mistake == "-grad":
        ours = (*ours[:2], -ours[2], -ours[3])
    reference.errors = [1000 * error for error in reference.errors]
    with pytest.raises(AssertionError, match="off by"):
        reference.assert_equals(ours)


def test_two_words_by_hand():
    """Logits (2, 0): p = 1 / (1 + e^-2), and everything follows."""
    hidden_TH = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-2))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(
        hidden_TH, torch.eye(2).double(), torch.tensor([1]), vocab_size=2
    )
    assert logprobs_T.item() == approx(math.log(1 - p))
    assert entropy_T.item() == approx(entropy)


def test_a_zero_head_is_the_uniform_distribution():
    """A sum of 259 equal terms, and a few operations more."""
    hidden_TH, weight_VH, targets_T = problem(rows=259)
    logprobs_T, entropy_T, _, _ = values_and_gradients(
        vocab_parallel_logprobs_and_entropy, hidden_TH, 0 * weight_VH, targets_T, vocab_size=259
    )
    assert_close(logprobs_T, torch.full_like(logprobs_T, -math.log(259)), operations=300)
    assert_close(entropy_T, torch.full_like(entropy_T, math.log(259)), operations=300)


@pytest.mark.parametrize("oracle", ["cross_entropy", "linear_cross_entropy"])
def test_log_probability_equals_torchs_cross_entropy(oracle):
    """Oracles written by others, with their own `ignore_index`; the second came with 2.13."""
    if not hasattr(F, oracle):
        pytest.skip(f"torch {torch.__version__} has no {oracle}")
    hidden_TH, weight_VH, targets_T = problem(scale=6)
    targets_T[3] = IGNORE
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    logprobs_T, _ = vocab_parallel_logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, vocab_size=40, chunk_tokens=3
    )
    ours = torch.autograd.grad(-logprobs_T.sum(), (hidden_TH, weight_VH))

    def loss_and_gradients(hidden_TH, weight_VH):
        inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
        settings = {"reduction": "none", "ignore_index": -100}
        if oracle == "linear_cross_entropy":
            loss_T = F.linear_cross_entropy(*inputs, targets_T, **settings)
        else:
            loss_T = F.cross_entropy(hidden_TH @ weight_VH.T, targets_T, **settings)
        return loss_T.detach(), *torch.autograd.grad(loss_T.sum(), inputs)

    reference = Reference(loss_and_gradients, hidden_TH, weight_VH)
    reference.assert_equals((-logprobs_T.detach(), *ours))


@pytest.mark.parametrize("temperature", [0.7, "per token"])
def test_gradcheck(temperature):
    """Finite differences, of both outputs together."""
    hidden_TH, weight_VH, targets_T = problem(tokens=5, hidden=3, rows=7)
    targets_T = torch.tensor([0, IGNORE, 5, 3, 3])
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def function(hidden_TH, weight_VH):
        return vocab_parallel_logprobs_and_entropy(
            hidden_TH, weight_VH, targets_T, vocab_size=6, temperature=temperature, chunk_tokens=2
        )

    # log-probabilities and entropies are below 10
    assert_gradients(function, (hidden_TH.requires_grad_(), weight_VH.requires_grad_()), scale=10)


def test_rows_beyond_the_vocabulary_take_no_part():
    """Padding rows are never read (they may be NaN), and their gradient is exactly 0."""
    hidden_TH, weight_VH, targets_T = problem(rows=48)
    targets_T %= 37
    assert_equals_full_softmax(hidden_TH, weight_VH, targets_T, 37)
    weight_VH[37:] = math.nan
    logprobs_T, _, grad_TH, grad_VH = values_and_gradients(
        vocab_parallel_logprobs_and_entropy, hidden_TH, weight_VH, targets_T, vocab_size=37
    )
    assert logprobs_T.isfinite().all() and grad_TH.isfinite().all()
    assert grad_VH[37:].eq(0).all() and grad_VH[:37].ne(0).all()


def test_ignored_tokens_give_zero_and_do_not_leak():
    """Their hidden states may be NaN; the other tokens are unaffected."""
    hidden_TH, weight_VH, targets_T = problem()
    ignored_T = torch.zeros(11, dtype=torch.bool)
    ignored_T[[0, 4, 5, 10]] = True
    args = (full_softmax, hidden_TH[~ignored_T], weight_VH, targets_T[~ignored_T], 40)
    reference = Reference(values_and_gradients, *args)
    hidden_TH[ignored_T] = math.nan
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T.masked_fill(ignored_T, IGNORE), vocab_size=40
    )
    assert logprobs_T[ignored_T].eq(0).all() and entropy_T[ignored_T].eq(0).all()

    a_T, b_T = torch.randn(2, 7, generator=torch.Generator().manual_seed(1)).double()
    kept_sum = (a_T * logprobs_T[~ignored_T] + b_T * entropy_T[~ignored_T]).sum()
    (kept_sum + 5 * logprobs_T[ignored_T].sum() + 5 * entropy_T[ignored_T].sum()).backward()
    assert hidden_TH.grad[ignored_T].eq(0).all()
    kept = (value_T[~ignored_T].detach() for value_T in (logprobs_T, entropy_T))
    reference.assert_equals((*kept, hidden_TH.grad[~ignored_T], weight_VH.grad))


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_score_gives_zeros_and_zero_gradients(tokens):
    """No token at all, or all of them ignored."""
    hidden_TH, weight_VH, _ = problem(tokens=tokens)
    logprobs_T, entropy_T, grad_TH, grad_VH = values_and_gradients(
        vocab_parallel_logprobs_and_entropy,
        hidden_TH * math.nan,
        weight_VH,
        torch.full((tokens,), IGNORE),
        vocab_size=40,
    )
    zeros_T = torch.zeros(tokens, dtype=torch.float64)
    assert torch.equal(logprobs_T, zeros_T) and torch.equal(entropy_T, zeros_T)
    assert grad_TH.eq(0).all() and grad_VH.eq(0).all()


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1024])
def test_any_number_of_tokens_in_chunks_of_any_size(tokens, chunk_tokens):
    """One token, fewer than a chunk, exactly one or two chunks, and one token more."""
    hidden_TH, weight_VH, targets_T = problem(tokens=tokens)
    assert_equals_full_softmax(hidden_TH, weight_VH, targets_T, 40, chunk_tokens=chunk_tokens)


def test_chunk_size_changes_rounding_only():
    """Float32, logits up to +-30: a matrix product of another shape may add in another order."""
    hidden_TH, weight_VH, targets_T = problem(tokens=50, scale=6, dtype=torch.float32)
    for chunk_tokens in (50, 1, 7, 16, 1024):
        assert_equals_full_softmax(hidden_TH, weight_VH, targets_T, 40, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunk_size_changes_nothing_where_the_product_is_exact(dtype):
    """Hidden states of one 1 pick a column of the head: no sum to be rounded, so that everything
    after the product has to be the same, bit for bit.
    """
    _, weight_VH, targets_T = problem(tokens=50, hidden=50, rows=300, scale=6, dtype=dtype)
    whole, *others = (
        vocab_parallel_logprobs_and_entropy(
            torch.eye(50, dtype=dtype),
            weight_VH,
            targets_T,
            vocab_size=300,
            temperature=0.7,
            chunk_tokens=chunk_tokens,
        )
        for chunk_tokens in (50, 1, 7, 16)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, whole, strict=True))


def test_two_calls_agree_bit_for_bit():
    args = problem(dtype=torch.float32, scale=6)
    first, second = (
        values_and_gradients(
            vocab_parallel_logprobs_and_entropy, *args, vocab_size=40, chunk_tokens=3
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that any operation creates."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        sizes = [t.numel() for t in made if isinstance(t, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return out


def test_no_more_logits_than_those_of_a_chunk_exist_at_once(monkeypatch):
    monkeypatch.setitem(lm_head_torch.BLOCK_ELEMENTS, "cpu", 500)
    hidden_TH, weight_VH, targets_T = problem(tokens=64, hidden=2, rows=500)
    args, settings = (hidden_TH, weight_VH, targets_T), {"vocab_size": 500, "chunk_tokens": 4}
    with LargestTensor() as largest:
        vocab_parallel_logprobs_and_entropy(*args, **settings)
    assert largest.size == 4 * 500
    with LargestTensor() as largest:
        values_and_gradients(vocab_parallel_logprobs_and_entropy, *args, **settings)
    assert 1500 < largest.size <= 4 * 500


class Made(TorchDispatchMode):
    """Record the shapes of what named operations create."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.shapes = names, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().split("::")[1].split(".")[0] in self.names:
            self.shapes.append(tuple(out.shape))
        return out


def test_all_chunks_share_one_workspace():
    """The gradient of another type takes the place of its logits."""
    hidden_TH, weight_VH, targets_T = problem(tokens=64, hidden=2, rows=500, dtype=torch.bfloat16)
    settings = {"vocab_size": 500, "chunk_tokens": 4}
    with Made("new_empty") as made:
        vocab_parallel_logprobs_and_entropy(hidden_TH, weight_VH, targets_T, **settings)
    assert [shape for shape in made.shapes if len(shape) == 1] == [(4 * 500,)]
    with Made("new_empty") as made:
        outputs = vocab_parallel_logprobs_and_entropy(
            hidden_TH.requires_grad_(), weight_VH, targets_T, **settings
        )
        outputs[0].sum().backward()
    (forward,), (backward,) = [shape for shape in made.shapes if len(shape) == 1]
    assert 1500 < forward == backward <= 4 * 500


@pytest.mark.parametrize(
    ("tokens", "chunks", "slabs"), [(8192, 1, 12), (32768, 4, 12), (2048, 1, 3), (100, 1, 1)]
)
def test_blocks_of_backward_move_few_bytes_within_the_memory(tokens, chunks, slabs):
    """Qwen2.5-7B on one rank, 8,192 tokens: chunks of 1,024 would read and write 35 GB of float32
    gradients, nearly all the weight's, and blocks do 7.
    """
    rows, hidden = 152064, 3584
    weight_VH = torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")
    rows_R = torch.arange(tokens)
    head = lm_head._Head(rows_R, rows_R, 1.0, rows, None, chunk_tokens_within(640, weight_VH))
    scored, columns = head.fewest_bytes(weight_VH)
    assert (len(scored), len(columns)) == (chunks, slabs)
    longest, widest = (max(part.stop - part.start for part in cut) for cut in (scored, columns))
    assert [longest % 128, widest % 128] == [0, 0] or tokens < 128
    assert longest * (4 * widest + 4 * hidden + 2 * hidden) <= 640 * 2**20
    if tokens == 8192:
        assert 2 * 4 * hidden * (rows * chunks + tokens * slabs) < 7.2e9
        assert 2 * 4 * hidden * (rows * 8 + tokens) > 35e9


def test_equal_chunks_cover_every_token_once():
    for num_tokens in [*range(40), 127, 128, 129, 1000, 1024, 1025, 5000]:
        for chunk_tokens in (1, 3, 127, 128, 200, 1024):
            chunks = equal_chunks(num_tokens, chunk_tokens)
            sizes = [chunk.stop - chunk.start for chunk in chunks]
            assert [t for c in chunks for t in range(c.start, c.stop)] == list(range(num_tokens))
            assert max(sizes) <= chunk_tokens
            if chunk_tokens < 128:
                assert max(sizes) - min(sizes) <= 1
            else:
                assert all(size % 128 == 0 and size > 0 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("memory_mib", "rows", "dtype", "expected"),
    [
        (640, 152064, torch.bfloat16, 1024),  # Qwen2.5-7B on one rank
        (640, 152064 // 4, torch.bfloat16, 4352),
        (640, 152064, torch.float32, 1024),
        (640, 152064, torch.float64, 512),
        (67, 152064, torch.bfloat16, 115),
        (0.001, 152064, torch.bfloat16, 1),
    ],
)
def test_tokens_within_a_memory_budget(memory_mib, rows, dtype, expected):
    weight_VH = torch.empty(rows, 1, dtype=dtype)
    tokens = chunk_tokens_within(memory_mib, weight_VH)
    assert tokens == expected
    if (memory_mib, tokens) == (640, 1024):
        assert tokens * rows * 4 < 0.7e9


def test_bfloat16_inputs_lose_nothing_in_values():
    """Logits are accumulated and kept in float32, and so values err as float32 does.

    Gradients are rounded to bfloat16, and those of their logits before.
    """
    hidden_TH, weight_VH, targets_T = problem(
        tokens=64, hidden=64, rows=200, scale=6, dtype=torch.bfloat16
    )
    ours = values_and_gradients(
        vocab_parallel_logprobs_and_entropy, hidden_TH, weight_VH, targets_T, vocab_size=200
    )
    args = (full_softmax, hidden_TH, weight_VH, targets_T, 200)
    reference = Reference(values_and_gradients, *args)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == torch.bfloat16
    reference.assert_equals(ours)


# Logits that break naive formulas


def product_that_truncates(a, b, *, out=None):
    """Add 16 products at a time, and keep 22 bits of each sum, as tensor cores do."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for columns, rows in zip(a.double().split(16, dim=1), b.double().split(16, dim=0)):
        total += columns @ rows
        unit = torch.exp2(total.abs().clamp(min=1e-30).log2().floor() - 22)
        total = (total / unit).trunc() * unit
    return total.float() if out is None else out.copy_(total)


def test_a_head_errs_as_its_product_does(monkeypatch):
    """Errors exceed a chosen number, such as 1e-5, where logits are large and a product truncates.

    So the bound is computed with the same product.
    """
    monkeypatch.setattr(lm_head, "product", product_that_truncates)
    hidden_TH, weight_VH, targets_T = problem(
        tokens=16, hidden=2048, rows=300, scale=8.0, dtype=torch.bfloat16
    )
    ours = vocab_parallel_logprobs_and_entropy(hidden_TH, weight_VH, targets_T, vocab_size=300)
    reference = Reference(softmax_of_the_product, hidden_TH, weight_VH, targets_T, vocab_size=300)
    reference.assert_equals(ours)
    assert (ours[0].double() - reference.exact[0]).abs().mean() > 1e-5


def score(hidden_TH, weight_VH, targets, **settings):
    return vocab_parallel_logprobs_and_entropy(
        hidden_TH, weight_VH, torch.tensor(targets), vocab_size=len(weight_VH), **settings
    )


def test_logits_of_minus_infinity_have_no_share():
    """A row of the head of -inf under positive hidden states: that word is impossible, H is finite.

    The head's gradient is that of a softmax without the word, and 0 in its row.  (The gradient of
    the hidden states is not defined: it would be 0 * -inf, here as in a full softmax.)
    """
    hidden_TH, weight_VH, _ = problem(tokens=3, rows=6, dtype=torch.float32)
    hidden_TH = hidden_TH.abs()
    masked_VH = weight_VH.clone()
    masked_VH[[1, 4]] = -math.inf
    masked_VH.requires_grad_()
    possible = [0, 2, 3, 5]
    logprobs_T, entropy_T = score(hidden_TH, masked_VH, [2, 1, 5])
    assert logprobs_T[1] == -math.inf
    scored_T = logprobs_T[[0, 2]]
    (grad_VH,) = torch.autograd.grad(scored_T.sum() + entropy_T.sum(), masked_VH)
    assert grad_VH[[1, 4]].eq(0).all()

    def of_possible_words(hidden_TH, weight_VH):
        weight_VH.requires_grad_()
        logprobs_T, entropy_T = full_softmax(hidden_TH, weight_VH, torch.tensor([1, 0, 3]), 4)
        scored_T = logprobs_T[[0, 2]]
        gradient = torch.autograd.grad(scored_T.sum() + entropy_T.sum(), weight_VH)
        return scored_T.detach(), entropy_T.detach(), *gradient

    reference = Reference(of_possible_words, hidden_TH, weight_VH[possible])
    reference.assert_equals((scored_T.detach(), entropy_T.detach(), grad_VH[possible]))


def test_one_possible_word_has_entropy_zero():
    hidden_TH = torch.ones(1, 4)
    weight_VH = torch.full((5, 4), -math.inf)
    weight_VH[3] = -2.0
    logprobs_T, entropy_T = score(hidden_TH, weight_VH, [3])
    assert logprobs_T.tolist() == [0.0] and entropy_T.tolist() == [0.0]


def test_all_logits_far_below_minus_100():
    """Formulas that start their running maximum at -100, or at 0, underflow here."""
    hidden_TH, weight_VH, targets_T = problem(scale=1.0)
    hidden_TH[:, 0], weight_VH[:, 0] = 1.0, -400.0
    assert (hidden_TH @ weight_VH.T).max() < -300
    assert_equals_full_softmax(hidden_TH, weight_VH, targets_T, 40)


@pytest.mark.parametrize("top", [60000.0, -60000.0])
def test_very_large_logits(top):
    """Float16 would overflow and exp in float32 too; ln(1 + e^-2) must survive.

    Float32 is spaced by 2^-8 at 60000, so the log-sum-exp there is right to half of that; entropy,
    taken in shifted form, has no such limit.
    """
    weight_VH = torch.tensor([[top], [top - 2], [top - 300]])
    logprobs_T, entropy_T = score(torch.ones(1, 1), weight_VH, [0])
    p = 1 / (1 + math.exp(-2))
    assert abs(logprobs_T.item() - math.log(p)) <= 2**-9
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy_T.item() == approx(entropy, dtype=torch.float32)


def test_a_target_outside_the_vocabulary_is_impossible():
    """Targets beyond the vocabulary, in the padding or negative give -inf; H is unchanged."""
    hidden_TH, weight_VH, _ = problem(tokens=5)
    targets_T = torch.tensor([3, 38, 40, 10**6, -7])
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, vocab_size=38, chunk_tokens=2
    )
    inside_T = torch.full((5,), 3)
    reference = Reference(full_softmax, hidden_TH, weight_VH, inside_T, 38)
    assert logprobs_T[1:].tolist() == [-math.inf] * 4
    reference.assert_equals((logprobs_T.where(targets_T == 3, reference.exact[0]), entropy_T))


def test_a_real_vocabulary_with_a_peaked_row():
    """152064 words: a flat row, one peaked on word 0, and those between.

    A gradient of hidden states is a sum of 152064 products, which a matrix product of few rows may
    add one by one, and another may not: the definition is given as many rows at a time.
    """
    generator = torch.Generator().manual_seed(0)
    weight_VH = 0.3 * torch.randn(152064, 16, generator=generator)
    weight_VH[:, 0], weight_VH[0, 0] = -5.0, 1.0
    hidden_TH = torch.randn(6, 16, generator=generator)
    hidden_TH[:, 0] = torch.tensor([0.0, 0.1, 1.0, 2.0, 4.0, 15.0])
    targets_T = torch.tensor([0, 0, 0, 151935, 77, 152063])

    def in_chunks(hidden_TH, weight_VH):
        chunks = zip(hidden_TH.split(4), targets_T.split(4), strict=True)
        parts = [full_softmax(chunk_CH, weight_VH, t_C, 152064) for chunk_CH, t_C in chunks]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    reference = Reference(values_and_gradients, in_chunks, hidden_TH, weight_VH)
    assert reference.exact[1][0] > 10 and reference.exact[1][-1] < 2**-66
    for dtype in (torch.float32, torch.float64):
        ours = values_and_gradients(
            vocab_parallel_logprobs_and_entropy,
            hidden_TH.to(dtype),
            weight_VH.to(dtype),
            targets_T,
            vocab_size=152064,
            chunk_tokens=4,
        )
        reference.assert_equals(ours)


# What autograd may ask for


@pytest.mark.parametrize("wanted", [0, 1], ids=["log-probability", "entropy"])
def test_gradient_of_one_output_alone(wanted):
    hidden_TH, weight_VH, targets_T = problem()
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    outputs = vocab_parallel_logprobs_and_entropy(*inputs, targets_T, vocab_size=40, chunk_tokens=4)
    ours = torch.autograd.grad(outputs[wanted].square().sum(), inputs)

    def gradients(hidden_TH, weight_VH):
        inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
        outputs = full_softmax(*inputs, targets_T, 40)
        return torch.autograd.grad(outputs[wanted].square().sum(), inputs)

    Reference(gradients, *inputs).assert_equals(ours)


class Unused(torch.autograd.Function):
    """Use both values, and pass no gradient back."""

    @staticmethod
    def forward(ctx, a, b):
        return (a + b).sum()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def test_gradient_of_neither_output_is_zero():
    hidden_TH, weight_VH, targets_T = problem()
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    outputs = vocab_parallel_logprobs_and_entropy(*inputs, targets_T, vocab_size=40)
    # anchored, so that there is a gradient to ask for
    loss = Unused.apply(*outputs) + 0 * hidden_TH.sum() + 0 * weight_VH.sum()
    for grad in torch.autograd.grad(loss, inputs):
        assert grad.eq(0).all()


def test_no_gradient_is_recorded_without_grad_mode():
    hidden_TH, weight_VH, targets_T = problem()
    with torch.no_grad():
        outputs = vocab_parallel_logprobs_and_entropy(
            hidden_TH.requires_grad_(), weight_VH, targets_T, vocab_size=40
        )
    assert not any(output.requires_grad for output in outputs)


def test_backward_twice_over_a_retained_graph_gives_the_same():
    hidden_TH, weight_VH, targets_T = problem()
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(*inputs, targets_T, vocab_size=40)
    loss = logprobs_T.sum() + entropy_T.sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("known_gradient", [False, True])
def test_double_backward_raises(known_gradient):
    """An error is raised rather than the first gradient treated as a constant."""
    hidden_TH, weight_VH, targets_T = problem()
    hidden_TH.requires_grad_()
    if known_gradient:
        loss, _ = vocab_parallel_loss(hidden_TH, weight_VH, targets_T, some_loss(), vocab_size=40)
    else:
        logprobs_T, _ = vocab_parallel_logprobs_and_entropy(
            hidden_TH, weight_VH, targets_T, vocab_size=40
        )
        loss = logprobs_T.sum()
    (grad_TH,) = torch.autograd.grad(loss.square(), hidden_TH, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TH.sum().backward()


def test_tokens_without_a_gradient_are_left_out_of_backward():
    """Backward neither reads nor multiplies their hidden states, which are NaN here."""
    hidden_TH, weight_VH, targets_T = problem(tokens=9)
    hidden_TH[[1, 4, 5]] = math.nan
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(*inputs, targets_T, vocab_size=40)
    weight_T = torch.tensor([1.0, 0, 2, 0, 0, 0, 3, 0, -1]).double()
    bonus_T = torch.tensor([0.0, 0, 1, 2, 0, 0, 0, 0, 0]).double()
    with Made("index_select") as made:
        ours = torch.autograd.grad([logprobs_T, entropy_T], inputs, [weight_T, bonus_T])
    assert (5, 16) in made.shapes, "tokens 0, 2, 3, 6, 8"
    kept = [0, 2, 3, 6, 7, 8]

    def gradients(few_TH, weight_VH, weight_R, bonus_R):
        inputs = (few_TH.requires_grad_(), weight_VH.requires_grad_())
        outputs = full_softmax(*inputs, targets_T[kept], 40)
        return torch.autograd.grad(outputs, inputs, (weight_R, bonus_R))

    args = (hidden_TH[kept], weight_VH, weight_T[kept], bonus_T[kept])
    assert ours[0][[1, 4, 5, 7]].eq(0).all()
    Reference(gradients, *args).assert_equals((ours[0][kept], ours[1]))


# The loss, whose gradient is known while the logits exist


def some_loss(tokens=11, entropy=True):
    """A `token_loss` with other terms for each scored token, and two sums besides."""
    a_R, b_R = torch.randn(2, tokens, generator=torch.Generator().manual_seed(3))

    def token_loss(logprobs_C, entropy_C, scored):
        loss = (a_R[scored].to(logprobs_C) * (0.1 * logprobs_C).exp()).sum()
        if entropy:
            loss = loss + (b_R[scored].to(entropy_C) * entropy_C.square()).sum()
        return loss, {"entropy": entropy_C.sum(), "tokens": torch.tensor(float(len(logprobs_C)))}

    return token_loss


def loss_by_definition(hidden_TH, weight_VH, targets_T, token_loss, **settings):
    """The loss, the sum of entropies, and the gradients."""
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    scored_T = targets_T != IGNORE
    values = (value_T[scored_T] for value_T in full_softmax(*inputs, targets_T, **settings))
    loss, sums = token_loss(*values, slice(None))
    return loss.detach(), sums["entropy"].detach(), *torch.autograd.grad(loss, inputs)


def both_ways(hidden_TH, weight_VH, targets_T, token_loss, factor=1.0, **settings):
    """[(loss, sums, gradients)] by `vocab_parallel_loss` and by recomputation."""
    scored = (targets_T != IGNORE).nonzero().squeeze(1)

    def recompute(*args, loss_scale, **settings):
        values = vocab_parallel_logprobs_and_entropy(*args, **settings)
        return token_loss(*(value_T[scored] for value_T in values), slice(None))

    results = []
    for function in (vocab_parallel_loss, recompute):
        inputs = [t.detach().clone().requires_grad_() for t in (hidden_TH, weight_VH)]
        args = (*inputs, targets_T)
        if function is vocab_parallel_loss:
            args = (*args, token_loss)
        loss, sums = function(*args, loss_scale=factor, **settings)
        grads = torch.autograd.grad(factor * loss, inputs)
        assert not any(value.requires_grad for value in sums.values()) or function is recompute
        results.append((loss.detach(), sums, grads))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("chunk_tokens", [3, 1024])
def test_known_gradient_equals_recomputation(dtype, entropy, chunk_tokens):
    """Bit for bit where one chunk has all tokens; otherwise up to rounding, since recomputation
    has other chunks.  So have loss and sums.
    """
    hidden_TH, weight_VH, targets_T = problem(scale=3, dtype=dtype)
    targets_T[[0, 6]] = IGNORE
    targets_T.clamp_(max=36)
    token_loss = some_loss(9, entropy)
    settings = {"vocab_size": 37, "temperature": torch.linspace(0.5, 1.5, 11)}
    known, recomputed = both_ways(
        hidden_TH, weight_VH, targets_T, token_loss, 4.0, chunk_tokens=chunk_tokens, **settings
    )
    assert known[1]["tokens"] == 9
    args = (hidden_TH, weight_VH, targets_T, token_loss)
    reference = Reference(loss_by_definition, *args, **settings)
    for loss, sums, grads in (known, recomputed):
        reference.assert_equals((loss, sums["entropy"], *(grad / 4 for grad in grads)))
    for ours, theirs in zip(known[2], recomputed[2], strict=True):
        assert ours.dtype == dtype and (chunk_tokens == 3 or torch.equal(ours, theirs))


def test_known_gradient_against_float64_autograd():
    hidden_TH, weight_VH, targets_T = problem(scale=6)
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    settings = {"vocab_size": 40, "chunk_tokens": 4}
    loss, sums = vocab_parallel_loss(*inputs, targets_T, some_loss(), **settings)
    ours = (loss.detach(), sums["entropy"], *torch.autograd.grad(loss, inputs))
    args = (*inputs, targets_T, some_loss())
    Reference(loss_by_definition, *args, vocab_size=40).assert_equals(ours)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_loss_of_no_token(tokens):
    """`token_loss` is still called, so that its sums exist; gradients are zero."""
    hidden_TH, weight_VH, _ = problem(tokens=tokens)
    inputs = ((math.nan * hidden_TH).requires_grad_(), weight_VH.requires_grad_())
    loss, sums = vocab_parallel_loss(
        *inputs, torch.full((tokens,), IGNORE), some_loss(0), vocab_size=40
    )
    assert loss == 0 and sums["tokens"] == 0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, inputs))


def test_without_main_grad_any_gradient_may_arrive_and_more_than_once():
    hidden_TH, weight_VH, targets_T = problem()
    inputs = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    loss, _ = vocab_parallel_loss(*inputs, targets_T, some_loss(), vocab_size=40, loss_scale=8.0)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, inputs)
    reference = Reference(loss_by_definition, *inputs, targets_T, some_loss(), vocab_size=40)
    for ours in (first, [grad / 3 for grad in tripled]):
        reference.assert_equals((*reference.exact[:2], *ours))


# Megatron's main_grad


def parameter(weight_VH, main_dtype=torch.float32):
    """Return a parameter as prepared by Megatron's DDP: marked, with a non-zero gradient buffer."""
    weight_VH = torch.nn.Parameter(weight_VH)
    weight_VH.main_grad = torch.full_like(weight_VH, 0.5, dtype=main_dtype)
    weight_VH.grad_added_to_main_grad = False
    return weight_VH


@pytest.mark.parametrize("known_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_micro_batches_add_up_in_main_grad(known_gradient, dtype):
    """Gradients are added in float32, also for bfloat16 weights, without rounding in between.

    With such weights, gradients of logits are rounded to bfloat16 once, by at most 2^-8 of their
    size.
    """
    hidden_TH, weight_VH, targets_T = problem(tokens=22, scale=3, dtype=dtype)
    weight_VH = parameter(weight_VH)
    token_loss = some_loss()
    settings = {"vocab_size": 37, "chunk_tokens": 4}
    targets_T %= 37
    for half in (slice(0, 11), slice(11, 22)):
        part_TH = hidden_TH[half].detach().requires_grad_()
        if known_gradient:
            args = (part_TH, weight_VH, targets_T[half], token_loss)
            loss, _ = vocab_parallel_loss(*args, loss_scale=2.0, **settings)
        else:
            args = (part_TH, weight_VH, targets_T[half])
            loss, _ = token_loss(
                *vocab_parallel_logprobs_and_entropy(*args, **settings), slice(None)
            )
        (2 * loss).backward()
        assert part_TH.grad.norm() > 0
    assert weight_VH.grad is None and weight_VH.grad_added_to_main_grad

    def gradient(hidden_TH, weight_VH):
        halves = zip(hidden_TH.split(11), targets_T.split(11), strict=True)
        parts = [
            loss_by_definition(h_TH, weight_VH, t_T, token_loss, vocab_size=37)
            for h_TH, t_T in halves
        ]
        return [0.5 + 2 * sum(part[3] for part in parts)]

    reference = Reference(gradient, hidden_TH, weight_VH)
    if dtype == torch.float32:
        reference.assert_equals([weight_VH.main_grad])
    else:
        error_VH = weight_VH.main_grad - reference.exact[0]
        assert error_VH.norm() < 2**-8 * (reference.exact[0] - 0.5).norm()
    assert weight_VH.main_grad[37:].eq(0.5).all()


@pytest.mark.parametrize(
    ("main_dtype", "into_main_grad"), [(torch.bfloat16, True), (torch.float32, False)]
)
@pytest.mark.parametrize("known_gradient", [True, False])
def test_where_main_grad_is_not_used(main_dtype, into_main_grad, known_gradient):
    """If it would round every chunk, or the caller disabled it, autograd gets the gradient."""
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.bfloat16)
    weight_VH = parameter(weight_VH, main_dtype)
    settings = {"vocab_size": 40, "into_main_grad": into_main_grad}
    if known_gradient:
        token_loss = some_loss()
        loss, _ = vocab_parallel_loss(hidden_TH, weight_VH, targets_T, token_loss, **settings)
    else:
        loss = vocab_parallel_logprobs_and_entropy(hidden_TH, weight_VH, targets_T, **settings)[0]
    loss.sum().backward()
    assert weight_VH.grad.norm() > 0 and weight_VH.grad.dtype == torch.bfloat16
    assert weight_VH.main_grad.eq(0.5).all() and not weight_VH.grad_added_to_main_grad


@pytest.mark.parametrize("arriving", [1.0, 2.0002, -2.0, 0.0, math.nan])
def test_another_gradient_than_announced_is_refused_once_main_grad_has_it(arriving):
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.float32)
    token_loss = some_loss()
    args = (hidden_TH.requires_grad_(), parameter(weight_VH), targets_T, token_loss)
    loss, _ = vocab_parallel_loss(*args, vocab_size=40, loss_scale=2.0)
    with pytest.raises(RuntimeError, match="another gradient arrived"):
        (arriving * loss).backward()


def test_the_rounding_of_megatrons_schedule_is_no_other_gradient():
    """The loss is multiplied by the number of micro-batches, then divided: 49 (1/49) is not 1."""
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.float32)
    for num_micro_batches in range(1, 200):
        arriving = torch.ones(()) / num_micro_batches * 3 * num_micro_batches
        loss, _ = vocab_parallel_loss(
            hidden_TH[:1].requires_grad_(),
            parameter(weight_VH),
            targets_T[:1],
            some_loss(1),
            vocab_size=40,
            loss_scale=3.0,
        )
        loss.backward(arriving)


def test_a_second_backward_is_refused_once_main_grad_has_the_first():
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.float32)
    token_loss = some_loss()
    args = (hidden_TH.requires_grad_(), parameter(weight_VH), targets_T, token_loss)
    loss, _ = vocab_parallel_loss(*args, vocab_size=40)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in main_grad already"):
        loss.backward()


def test_a_loss_without_grad_mode_touches_no_gradient():
    hidden_TH, weight_VH, targets_T = problem(dtype=torch.float32)
    weight_VH = parameter(weight_VH)
    token_loss = some_loss()
    with torch.no_grad():
        loss, sums = vocab_parallel_loss(hidden_TH, weight_VH, targets_T, token_loss, vocab_size=40)
    expected, _ = vocab_parallel_loss(
        hidden_TH, weight_VH, targets_T, token_loss, vocab_size=40, into_main_grad=False
    )
    assert torch.equal(loss, expected) and sums["tokens"] == 11
    assert weight_VH.main_grad.eq(0.5).all() and not weight_VH.grad_added_to_main_grad


# Rounded logits


def test_logits_rounded_to_the_type_of_the_weights():
    """Engines without a float32 head have such logits; backward treats rounding as identity."""
    hidden_TH, weight_VH, targets_T = problem(
        tokens=64, hidden=64, rows=200, scale=6, dtype=torch.bfloat16
    )
    settings = {"vocab_size": 200, "chunk_tokens": 16}
    rounded, kept = (
        values_and_gradients(
            vocab_parallel_logprobs_and_entropy,
            hidden_TH,
            weight_VH,
            targets_T,
            fp32_logits=fp32,
            **settings,
        )
        for fp32 in (False, True)
    )
    rounded_TV = hidden_TH @ weight_VH.T
    args = (rounded_TV, torch.eye(200), targets_T, 200)  # logits that are no products
    Reference(full_softmax, *args).assert_equals(rounded[:2])
    # of logits between 8 and 16, which are 2^-4 apart, half of that on average half
    assert 2**-9 < (rounded[0] - kept[0]).abs().mean() < 2**-4
    for ours, theirs in zip(rounded[2:], kept[2:], strict=True):
        assert (ours - theirs).double().norm() < 0.1 * theirs.double().norm()
