"""The same code on CUDA, with no stand-in: against float64, `transformers` and the CPU's claims."""

import pytest
import torch

from megatron_prepo.actor.vocab_parallel import vocab_parallel_logprobs_and_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_bfloat16_head_against_float64(scale):
    """Inputs are bfloat16, logits and statistics float32: values to 1e-3, gradients to bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    hidden_TH = torch.randn(300, 512, device="cuda", generator=generator).bfloat16()
    weight_VH = (
        torch.randn(32000, 512, device="cuda", generator=generator) * scale / 22
    ).bfloat16()
    targets_T = torch.randint(32000, (300,), device="cuda", generator=generator)
    leaves = [hidden_TH.requires_grad_(), weight_VH.requires_grad_()]
    logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, vocab_size=32000, chunk_tokens=128
    )
    grads = torch.autograd.grad((logprobs_T + entropy_T).sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logp_TV = (exact[0] @ exact[1].t()).log_softmax(-1)
    exact_logprobs_T = logp_TV.gather(1, targets_T[:, None])[:, 0]
    exact_entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    exact_grads = torch.autograd.grad((exact_logprobs_T + exact_entropy_T).sum(), exact)
    torch.testing.assert_close(logprobs_T.double(), exact_logprobs_T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(entropy_T.double(), exact_entropy_T, atol=1e-3, rtol=1e-4)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        error = (grad.double() - exact_grad).norm() / exact_grad.norm()
        assert error < 1e-2, f"gradient off by {error:.1e}"


def test_short_run(tmp_path):
    """Convert, train two steps, export, with CUDA throughout; engine and actor agree in float32."""
    from tests.e2e.laptop import SHORT, metrics, train

    assert train(tmp_path / "run", *SHORT, "parallel.tensor=1") == 0
    for step in metrics(tmp_path / "run"):
        assert step["mismatch/logprob_abs_max"] < 5e-3  # TF32 apart
        assert step["loss/grad_norm"] > 0
