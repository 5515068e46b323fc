"""The same code on CUDA, with no stand-in: against float64, `transformers` and the CPU's claims."""

import math
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from ranks import on_ranks
from rounding import Reference, assert_close

from megatron_prepo.actor import attention
from megatron_prepo.actor import lm_head_torch as row_statistics
from megatron_prepo.actor.lm_head import (
    chunk_tokens_within,
    in_place,
    vocab_parallel_logprobs_and_entropy,
    vocab_parallel_loss,
)
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.packing import plan_rows
from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.unit.actor.test_lm_head import (
    full_softmax,
    softmax_of_the_product,
    values_and_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_bfloat16_head_against_float64(scale):
    """Inputs are bfloat16, logits and statistics float32, gradients bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    hidden_TH = torch.randn(300, 512, device="cuda", generator=generator).bfloat16()
    weight_VH = (
        torch.randn(32000, 512, device="cuda", generator=generator) * scale / 22
    ).bfloat16()
    targets_T = torch.randint(32000, (300,), device="cuda", generator=generator)
    settings = {"vocab_size": 32000}
    args = (hidden_TH, weight_VH, targets_T)
    *values, grad_TH, grad_VH = values_and_gradients(
        vocab_parallel_logprobs_and_entropy, *args, **settings, chunk_tokens=128
    )
    Reference(softmax_of_the_product, *args, **settings).assert_equals(values)

    def gradients(*args, **settings):
        return values_and_gradients(full_softmax, *args, **settings)[2:]

    Reference(gradients, *args, **settings).assert_equals([grad_TH, grad_VH])


def head_problem(tokens, words, hidden, *, scale, seed=1):
    """bfloat16 hidden states and head, logits of standard deviation `scale`, and targets."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    made = {"device": "cuda", "generator": generator}
    hidden_TH = torch.randn(tokens, hidden, **made).bfloat16()
    weight_VH = torch.randn(words, hidden, **made).mul_(scale / hidden**0.5).bfloat16()
    return hidden_TH, weight_VH, torch.randint(words, (tokens,), **made)


@pytest.mark.parametrize("temperature", [1.0, "per token"])
@pytest.mark.parametrize(("num_rows", "columns"), [(7, 5000), (1, 1), (3, 4096), (5, 152064)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_kernels_against_torch_rows(temperature, num_rows, columns, out_dtype):
    """Compiled kernels against the torch rows in float64: the same numbers as the interpreter's."""
    from megatron_prepo.actor import lm_head_triton as row_kernels

    generator = torch.Generator(device="cuda").manual_seed(2)
    z_CV = 6 * torch.randn(num_rows, columns, device="cuda", generator=generator)
    z_CV[:, columns // 2 + 1 :: 7] = -math.inf
    target_C = torch.randint(columns, (num_rows,), device="cuda", generator=generator)
    target_C[-1:] = -3
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, num_rows, device="cuda")

    def statistics(z_CV, temperature):
        stats_4C = row_statistics.row_statistics(z_CV, target_C, temperature)
        return *stats_4C[:3], stats_4C[3].nan_to_num(neginf=0.0)

    reference = Reference(statistics, z_CV, temperature)
    stats_4C = row_kernels.row_statistics(z_CV, target_C, temperature)
    reference.assert_equals((*stats_4C[:3], stats_4C[3].nan_to_num(neginf=0.0)))
    assert stats_4C[3, -1] == -math.inf

    _, sum_C, weighted_C, _ = reference.exact
    entropy_C = sum_C.log() - weighted_C / sum_C
    lse_C = reference.exact[0] + sum_C.log()
    g_C, h_C = torch.randn(2, num_rows, device="cuda", generator=generator).double()

    def gradient(z_CV, temperature, *per_row):
        out_CV = torch.empty_like(z_CV)
        row_statistics.row_gradient(z_CV, target_C, temperature, *per_row, out_CV)
        return [out_CV]

    per_row = [value_C.float() for value_C in (lse_C, entropy_C, g_C, h_C)]
    out_CV = torch.empty_like(z_CV, dtype=out_dtype)
    row_kernels.row_gradient(z_CV, target_C, temperature, *per_row, out_CV)
    Reference(gradient, z_CV, temperature, *per_row).assert_equals([out_CV])


@pytest.mark.parametrize("columns", [152064, 5000, 4099])
def test_a_narrower_gradient_in_the_place_of_its_logits(columns):
    """The same bits as elsewhere, though other threads' logits lie where a thread stores."""
    from megatron_prepo.actor import lm_head_triton as row_kernels

    generator = torch.Generator(device="cuda").manual_seed(4)
    z_CV = 6 * torch.randn(1024, columns, device="cuda", generator=generator)
    target_C = torch.randint(columns, (1024,), device="cuda", generator=generator)
    g_C, h_C = torch.randn(2, 1024, device="cuda", generator=generator)
    lse_C = z_CV.logsumexp(1)
    elsewhere_CV = torch.empty_like(z_CV, dtype=torch.bfloat16)
    for out_CV in (elsewhere_CV, in_place(z_CV, torch.bfloat16)):
        row_kernels.row_gradient(z_CV, target_C, 0.7, lse_C, lse_C, g_C, h_C, out_CV)
    assert torch.equal(in_place(z_CV, torch.bfloat16), elsewhere_CV)


def test_offsets_beyond_32_bits():
    """Rows of a workspace of 2.2 billion logits, of which the last is checked."""
    from megatron_prepo.actor import lm_head_triton as row_kernels

    wide_CV = torch.empty(3, 1_100_000_000, device="cuda")
    z_CV = wide_CV[:, :1000]
    z_CV.copy_(torch.randn(3, 1000, device="cuda"))
    target_C = torch.tensor([1, 2, 3], device="cuda")
    assert_close(
        row_kernels.row_statistics(z_CV, target_C, 1.0),
        row_statistics.row_statistics(z_CV.contiguous(), target_C, 1.0),
        operations=1000,
    )


def test_log_probabilities_of_a_peaked_batch():
    """Errors, where logits reach 40, are those of the product of tensor cores."""
    args = head_problem(256, 152064, 3584, scale=8)
    ours = vocab_parallel_logprobs_and_entropy(*args, vocab_size=152064, chunk_tokens=128)
    Reference(softmax_of_the_product, *args, vocab_size=152064).assert_equals(ours)


@pytest.mark.parametrize("known_gradient", [True, False])
def test_memory_is_bounded_by_the_chunk(known_gradient):
    """Memory is at most 0.7 GB more than inputs, gradients and a few numbers per token, for 8,192
    tokens and 32,768.

    Hidden size 256 keeps the inputs small; Qwen2.5-7B's vocabulary decides.
    """
    extra = []
    for tokens in (8192, 32768):
        hidden_TH, weight_VH, targets_T = head_problem(tokens, 152064, 256, scale=1)
        hidden_TH, weight_VH = hidden_TH.requires_grad_(), torch.nn.Parameter(weight_VH)
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        settings = {"vocab_size": 152064, "chunk_tokens": chunk_tokens_within(640, weight_VH)}
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        args = (hidden_TH, weight_VH, targets_T)
        if known_gradient:
            loss, _ = vocab_parallel_loss(*args, lambda logp, h, _: (logp.sum(), {}), **settings)
        else:
            loss = vocab_parallel_logprobs_and_entropy(*args, **settings)[0].sum()
        loss.backward()
        gradient = hidden_TH.numel() * hidden_TH.element_size()
        per_token = 200 * tokens
        peak = torch.cuda.max_memory_allocated() - before
        extra.append(peak - gradient - per_token)
        assert weight_VH.main_grad.norm() > 0 and hidden_TH.grad.norm() > 0
        del loss, args, hidden_TH, weight_VH, targets_T
    assert max(extra) <= 0.7e9, f"{[f'{e / 1e6:.0f} MB' for e in extra]}"
    assert abs(extra[1] - extra[0]) <= 2e7


@pytest.mark.parametrize("with_main_grad", [True, False])
def test_known_gradient_equals_recomputation(with_main_grad):
    """Bit for bit, on the device too, where one chunk has all tokens: products and kernels are the
    same.
    """
    hidden_TH, weight_VH, targets_T = head_problem(500, 32000, 512, scale=3)
    gradients = []
    for known_gradient in (True, False):
        inputs = (hidden_TH.clone().requires_grad_(), torch.nn.Parameter(weight_VH.clone()))
        if with_main_grad:
            inputs[1].main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        settings = {"vocab_size": 32000, "temperature": 0.7, "chunk_tokens": 1024}
        if known_gradient:
            loss, _ = vocab_parallel_loss(
                *inputs, targets_T, lambda logp, h, _: ((logp - 0.1 * h).sum(), {}), **settings
            )
        else:
            logp, h = vocab_parallel_logprobs_and_entropy(*inputs, targets_T, **settings)
            loss = (logp - 0.1 * h).sum()
        loss.backward()
        gradients.append(
            [inputs[0].grad, inputs[1].main_grad if with_main_grad else inputs[1].grad]
        )
    for known, recomputed in zip(*gradients, strict=True):
        assert torch.equal(known, recomputed)


@pytest.mark.parametrize("way", [{}, {"share_prefixes": True}], ids=str)
def test_attention_of_a_packed_row_against_float64(way):
    """Attention and its gradients in bfloat16, against each sequence alone in float64: by torch's
    kernel, or sequence by sequence with a torch that does not have it.

    Probabilities and the output are rounded to bfloat16, by at most 2^-8 each; in the gradients,
    those of probabilities and of scores are, too.
    """
    prompt, draw = tuple(range(70)), range(100)
    sequences = [ScoredSequence((*prompt, *draw[:n]), 70) for n in (1, 33, 100, 64)]
    plan = plan_rows(
        sequences, num_ranks=1, budget=1000, shape=Shape(1, 1, 1, 1, 1, 1, 1, 0, 0, False), **way
    )
    layout = micro_batch(sequences, plan.ranks[0][0], device="cuda").layout
    generator = torch.Generator(device="cuda").manual_seed(3)
    size = len(layout.positions_T)
    qkv = [
        torch.randn(size, 1, heads, 64, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    ]
    qkv = [x.requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    settings = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0)
    core = attention.CausalAttention(settings, 1, None, "self")
    assert attention._has_kernel() or Version(torch.__version__) < Version("2.11.0.dev0")
    outs = [core(*inputs, packed_seq_params=layout) for inputs in (qkv, exact)]
    assert (outs[0].double() - outs[1]).norm() <= 2 * 2**-8 * outs[1].norm()
    given = torch.randn(outs[1].shape, device="cuda", generator=generator).bfloat16()
    grads = torch.autograd.grad(outs[0], qkv, given)
    exact_grads = torch.autograd.grad(outs[1], exact, given.double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert (grad.double() - exact_grad).norm() <= 4 * 2**-8 * exact_grad.norm()


def test_short_run(tmp_path):
    """A run converts, trains two steps and exports, all on CUDA; both sides agree in float32."""
    from tests.e2e.laptop import SHORT, metrics, train

    assert train(tmp_path / "run", *SHORT, "parallel.tensor=1") == 0
    for step in metrics(tmp_path / "run"):
        assert step["mismatch/logprob_abs/mean"] < TOLERANCE["float32"]
        assert step["loss/grad_norm"] > 0


def offloaded_and_not(directory):
    """Return weights before and after three updates, and after the last by a resumed actor."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from tests import tiny_models
    from tests.distributed.test_resume import DISTRIBUTED, SECTIONS, batch, state_of

    hf = tiny_models.save(tiny_models.qwen3(tied=True), directory / "hf")
    results = {}
    for fraction in (0.0, 0.5, 1.0):
        offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
        sections = SECTIONS | {
            "model": {"dtype": "bfloat16"},
            "optimizer": SECTIONS["optimizer"] | DISTRIBUTED["optimizer"],
            "megatron": offload if fraction else {},
        }
        config = tiny_models.actor_config(hf, **sections)
        parallel.initialize(config.parallel, seed=1)
        actor, resumed = Actor(config), Actor(config)
        first = state_of(actor)
        for _ in range(2):
            actor.update(batch())
        resumed.load(actor.save(directory / f"{fraction}", step=2))
        for other in (actor, resumed):
            other.update(batch())
        hosts = [part.optimizer for part in actor.optimizer.chained_optimizers]
        devices = {
            tensor.device.type
            for host in hosts
            for state in host.state.values()
            for name, tensor in state.items()
            if name != "step"
        }
        results[fraction] = (devices, first, state_of(actor), state_of(resumed))
        parallel.shut_down()
    return results


def test_an_offloaded_optimizer_updates_and_resumes_as_the_other(tmp_path):
    """Two Adams in bfloat16 may round differently by the last bit of a weight: much less than half
    of its change.  A resumed one continues bit for bit."""
    (results,) = on_ranks(1, offloaded_and_not, tmp_path, deadline_s=150.0)
    assert [results[fraction][0] for fraction in results] == [{"cuda"}, {"cuda", "cpu"}, {"cpu"}]
    _, first, expected, _ = results[0.0]
    for _, before, weights, resumed in results.values():
        for name, weight in expected.items():
            assert torch.equal(before[name], first[name]) and torch.equal(
                resumed[name], weights[name]
            )
            change = (weight.double() - first[name].double()).norm()
            assert (weights[name].double() - weight.double()).norm() < 0.5 * change


@pytest.mark.parametrize(
    ("tokens", "words", "hidden"), [(1000, 32000, 512), (130, 5001, 520), (1, 300, 8)]
)
def test_statistics_in_the_epilogue(tokens, words, hidden):
    """Each tile that this GPU has, by sizes that no tile divides; the last 7 words are padding.

    Last, since an illegal access of a kernel that has not run yet would end all tests after it.
    """
    from tools.bench.head_epilogue import TILES, logprobs_and_entropy

    device = torch.cuda.get_device_properties()
    hidden_TH, weight_VH, targets_T = head_problem(tokens, words, hidden, scale=6)
    args, vocab_size = (hidden_TH, weight_VH, targets_T.clamp(max=words - 8)), words - 7
    for tile in TILES.get(device.major, ()):
        settings = {"tile": tile, "multiprocessors": device.multi_processor_count}
        ours = logprobs_and_entropy(*args, vocab_size=vocab_size, **settings)
        Reference(softmax_of_the_product, *args, vocab_size=vocab_size).assert_equals(ours)
