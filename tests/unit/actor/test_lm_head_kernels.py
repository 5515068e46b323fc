"""Both implementations of the head's row operations against their definition in float64.

Triton's kernels run under its interpreter where there is no GPU (`conftest`): slow, and exact.
"""

import math
import re

import pytest
import torch
from rounding import CHAIN, Reference, approx, assert_close, bound

from megatron_prepo.actor import lm_head, lm_head_torch
from megatron_prepo.actor.lm_head import in_place
from tests.unit.actor.compiled_kernels import BLACKWELL, HOPPER, reported
from tests.unit.actor.test_lm_head import full_softmax, values_and_gradients

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, on NaN

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=["torch", "triton"])
def rows(request, monkeypatch):
    """The module with the two operations, so that a row takes several blocks of columns (Triton),
    and a chunk several blocks of rows (torch).
    """
    monkeypatch.setitem(lm_head_torch.BLOCK_ELEMENTS, "cpu", 100)
    if request.param == "torch":
        return lm_head_torch
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels are compared in tests/gpu")
    from megatron_prepo.actor import lm_head_triton

    monkeypatch.setattr(lm_head_triton, "BLOCK", 16)
    return lm_head_triton


def chunk(*, num_rows=7, columns=41, scale=3.0, dtype=torch.float64, seed=0):
    """Return logits, targets of which some are elsewhere, and gradients of both results."""
    generator = torch.Generator().manual_seed(seed)
    z_CV = scale * torch.randn(num_rows, columns, generator=generator, dtype=torch.float64)
    target_C = torch.randint(-5, columns + 5, (num_rows,), generator=generator)
    target_C[:1] = columns - 1
    grads_2C = torch.randn(2, num_rows, generator=generator, dtype=torch.float64)
    return z_CV.to(dtype), target_C, grads_2C.to(dtype)


def statistics(z_CV, target_C, temperature):
    """Compute the definition, row by row, over the logits that are not -inf."""
    expected = []
    for c, z_V in enumerate(z_CV):
        x_V = z_V / (temperature[c] if torch.is_tensor(temperature) else temperature)
        inside = 0 <= target_C[c] < len(z_V)
        at_target = x_V[target_C[c]].item() if inside else -math.inf
        x_V = x_V[x_V > -math.inf]
        top = x_V.max().item() if len(x_V) else -math.inf
        e_V = (x_V - top).exp()
        expected.append([top, e_V.sum().item(), ((x_V - top) * e_V).sum().item(), at_target])
    return torch.tensor(expected, dtype=z_CV.dtype).view(-1, 4).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
@pytest.mark.parametrize(
    ("num_rows", "columns"), [(7, 41), (1, 1), (5, 16), (3, 17), (0, 5), (4, 0)]
)
def test_statistics_by_definition(rows, dtype, temperature, num_rows, columns):
    """Includes zero rows, a rank with zero columns, and targets at and just after a block's end."""
    z_CV, target_C, _ = chunk(num_rows=num_rows, columns=columns, dtype=dtype)
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, num_rows, dtype=dtype)
    before_CV = z_CV.clone()
    stats_4C = rows.row_statistics(z_CV, target_C, temperature)
    assert stats_4C.dtype == dtype and torch.equal(z_CV, before_CV)
    if torch.is_tensor(temperature):
        temperature = temperature.double()
    expected_4C = statistics(z_CV.double(), target_C, temperature)
    # a rounded logit of size 24 moves its exponential by 24 eps, and all columns are added
    assert_close(stats_4C, expected_4C, operations=CHAIN + columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_hard_rows(rows, dtype):
    """Rows with some -inf, only -inf, blocks of -inf, values far below 0 or far apart, and NaN.

    Logits are not rounded here, and differences that count are below 40, in 41 terms of a sum.
    """
    inf = math.inf
    z_CV = torch.full((8, 41), -inf, dtype=dtype)
    z_CV[0, 3], z_CV[0, 40] = 1.0, 2.0
    z_CV[2, 20] = -3.0  # blocks of only -inf come before and after it
    z_CV[3] = torch.linspace(-400.0, -300.0, 41)
    z_CV[4] = 60000.0
    z_CV[5] = torch.linspace(0.0, -2000.0, 41)
    z_CV[6], z_CV[6, 30] = 0.0, math.nan
    z_CV[7], z_CV[7, 30] = 0.0, inf
    target_C = torch.tensor([3, 5, 20, 40, 0, 0, 1, 1])
    stats_4C = rows.row_statistics(z_CV, target_C, 1.0)
    assert stats_4C[1, 6:].isnan().all(), "a logit that is no number must not be lost"
    assert_close(stats_4C[:, :6], statistics(z_CV[:6].double(), target_C, 1.0))
    assert stats_4C[:, 1].tolist() == [-inf, 0, 0, -inf]


def value(z_CV, target_C, temperature, lse_C, entropy_C, grad_logprobs_C, grad_entropy_C):
    """Return what is differentiated: logp and H, with other ranks' columns, in `lse`, constant.

    Their derivatives by hand are those of softmax; autograd gets them from the full formula with
    a column more, whose logit makes up for the other ranks.
    """
    x_CV = z_CV / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    rest_C = (lse_C + (1 - (x_CV - lse_C[:, None]).exp().sum(1)).log()).detach()
    logp_CV = torch.cat([x_CV, rest_C[:, None]], dim=1).log_softmax(1)
    entropy_C = -(logp_CV.exp() * logp_CV).sum(1)
    inside_C = (target_C >= 0) & (target_C < z_CV.shape[1])
    at = target_C.where(inside_C, z_CV.shape[1])
    logprobs_C = logp_CV.gather(1, at[:, None])[:, 0]
    # a target elsewhere: its logit there does not depend on ours
    return (grad_logprobs_C * logprobs_C + grad_entropy_C * entropy_C).sum(), entropy_C.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, "per token"])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_gradient_by_autograd(rows, dtype, temperature, with_entropy, in_place):
    z_CV, target_C, (g_C, h_C) = chunk(dtype=dtype)
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, 7, dtype=dtype)
    x_CV = z_CV / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    lse_C = x_CV.logsumexp(1) + 0.5  # other ranks have some of the mass, too

    def gradient_and_entropy(z_CV, temperature, lse_C, g_C, h_C):
        weight_of_entropy_C = h_C if with_entropy else 0 * h_C
        args = (target_C, temperature, lse_C, None, g_C, weight_of_entropy_C)
        scalar, entropy_C = value(z_CV.requires_grad_(), *args)
        return *torch.autograd.grad(scalar, z_CV), entropy_C

    reference = Reference(gradient_and_entropy, z_CV, temperature, lse_C, g_C, h_C)
    entropy_C = reference.exact[1].to(dtype)
    out_CV = z_CV if in_place else torch.full_like(z_CV, math.nan)
    rows.row_gradient(
        z_CV,
        target_C,
        temperature,
        lse_C,
        entropy_C,
        g_C,
        h_C if with_entropy else None,
        out_CV,
    )
    reference.assert_equals([out_CV])


def test_the_gradient_is_rounded_once(rows):
    """g (1 - p) at a target of almost all probability: rounding g p first would lose it."""
    z_CV = torch.tensor([[9.0, 0.0, 0.0]])
    lse_C = z_CV.logsumexp(1)
    out_CV = torch.empty(1, 3, dtype=torch.bfloat16)
    rows.row_gradient(
        z_CV, torch.tensor([0]), 1.0, lse_C, torch.zeros(1), torch.ones(1), None, out_CV
    )
    p = math.exp(9.0 - lse_C.item())
    # bfloat16's rounding, and that of p to float32, which differs between processors
    assert abs(out_CV[0, 0].item() - (1 - p)) <= 2**-8 * (1 - p) + 2**-23


@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_narrower_gradient_in_the_place_of_its_logits(rows, with_entropy):
    """The same bits as elsewhere: a block of columns is stored over blocks that were loaded."""
    z_CV, target_C, (g_C, h_C) = chunk(columns=70, dtype=torch.float32)
    before_CV, entropy = z_CV.clone(), h_C if with_entropy else None
    lse_C = z_CV.logsumexp(1)
    elsewhere_CV = torch.empty_like(z_CV, dtype=torch.bfloat16)
    for out_CV in (elsewhere_CV, in_place(z_CV, torch.bfloat16)):
        rows.row_gradient(z_CV, target_C, 0.7, lse_C, lse_C, g_C, entropy, out_CV)
    assert torch.equal(in_place(z_CV, torch.bfloat16), elsewhere_CV)
    assert torch.equal(z_CV[:, 35:], before_CV[:, 35:]), "the second half of a row is not written"


def test_gradient_at_logits_of_minus_infinity_is_zero(rows):
    z_CV = torch.full((1, 41), -math.inf)
    z_CV[0, [4, 37]] = 0.5
    out_CV = torch.empty_like(z_CV)
    ones_C = torch.ones(1)
    rows.row_gradient(
        z_CV,
        torch.tensor([4]),
        1.0,
        z_CV.logsumexp(1),
        torch.full((1,), math.log(2)),
        ones_C,
        ones_C,
        out_CV,
    )
    assert out_CV[0, [4, 37]].tolist() == approx([0.5, -0.5], dtype=torch.float32)
    assert (out_CV != 0).sum() == 2


def test_rows_of_a_wider_workspace(rows):
    """Rows need not be contiguous: their distance is the workspace's."""
    wide_CV, target_C, (g_C, h_C) = chunk(columns=60)
    z_CV = wide_CV[:, :41]
    lse_C = z_CV.logsumexp(1)
    packed_CV = z_CV.contiguous()
    stats = [rows.row_statistics(z, target_C, 1.0) for z in (z_CV, packed_CV)]
    assert torch.equal(*stats)
    outs = []
    for z in (z_CV, packed_CV):
        out_CV = torch.zeros(7, 50, dtype=torch.float64)[:, :41]
        rows.row_gradient(z, target_C, 1.0, lse_C, lse_C, g_C, h_C, out_CV)
        outs.append(out_CV)
    assert torch.equal(*outs)


def test_the_whole_head_with_these_rows(rows, monkeypatch):
    """Values and gradients of the complete head, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(9, 16, generator=generator).bfloat16()
    weight_VH = torch.randn(53, 16, generator=generator).bfloat16()
    targets_T = torch.tensor([1, 50, 7, -100, 50, 3, 3, -100, 0])
    monkeypatch.setattr(lm_head, "row_operations", lambda device: rows)
    head = lm_head.vocab_parallel_logprobs_and_entropy
    args, settings = (hidden_TH, weight_VH, targets_T), {"vocab_size": 51, "temperature": 0.7}
    ours = values_and_gradients(head, *args, **settings, chunk_tokens=3)
    Reference(values_and_gradients, full_softmax, *args, **settings).assert_equals(ours)


@pytest.mark.parametrize("words", [152064, 151936, 129920, 248320])
def test_real_vocabularies(rows, words, monkeypatch):
    """Sizes of Qwen2.5, Qwen3 and two that are no multiple of a block; a peaked and a flat row.

    The peaked row has one word at 3 T and all others at -15 T below: a kernel that counts columns
    beyond the vocabulary as logits of 0 is wrong there by orders of magnitude.  Rounding is bounded
    by the number of words, which one sum has as its terms, relative to the largest entry.
    """
    if rows is not lm_head_torch:
        monkeypatch.setattr(rows, "BLOCK", 4096)
    monkeypatch.setattr(lm_head, "row_operations", lambda device: rows)
    weight_VH = torch.zeros(words, 2, dtype=torch.float64)
    weight_VH[:, 0], weight_VH[0, 0] = -15.0, 3.0
    weight_VH[:, 1] = torch.linspace(-1, 1, words)
    hidden_TH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.3]]).double()
    problem = (hidden_TH, weight_VH, torch.tensor([0, words - 1, 17]))
    ours = values_and_gradients(
        lm_head.vocab_parallel_logprobs_and_entropy, *problem, vocab_size=words
    )
    exact = values_and_gradients(full_softmax, *problem, words)
    for value, expected in zip(ours, exact, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=0, atol=bound(words) * largest)


def test_which_rows_compute_is_decided_by_the_device(monkeypatch):
    """It also depends on whether Triton is installed; `describe` logs the choice."""
    assert lm_head.row_operations(torch.device("cpu")) is lm_head_torch
    pytest.importorskip("triton")
    from megatron_prepo.actor import lm_head_triton

    assert lm_head.row_operations(torch.device("cuda")) is lm_head_triton
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert lm_head.row_operations(torch.device("cuda")) is lm_head_torch


def test_compiled_kernels_fit_their_registers(tmp_path):
    """Nothing is spilled for Hopper and Blackwell, of which this machine need not have one, and 64
    registers let four programs of 256 threads work at a time.

    In the gradient a barrier separates loads from stores, which may be to the same memory.
    """
    pytest.importorskip("triton")
    kernels = reported("rows", tmp_path, HOPPER, BLACKWELL)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["registers"] <= 64 and kernel["spilled"] == 0, kernel
        if kernel["kernel"].startswith("_gradient"):
            _, loop = re.split(r"^\$L__BB0_2:", kernel["ptx"], flags=re.MULTILINE)
            accesses = re.findall(r"ld\.global|bar\.sync|st\.global", loop)
            runs = [name for name, last in zip(accesses, [None, *accesses]) if name != last]
            assert runs == ["ld.global", "bar.sync", "st.global"]
