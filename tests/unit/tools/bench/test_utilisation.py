"""The benchmark of utilisation: its arms compute the same, and its goal names the best of them."""

import importlib.util

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from rounding import Reference, allowance, bound

from megatron_prepo.actor.actor import TrainingSequence
from megatron_prepo.actor.attention import RMSNorm
from tests.unit.tools.bench.test_train import measure_utilisation
from tools.bench import utilisation


def case(model, **mfu):
    arms = {name: {"update": {"mfu": value}} for name, value in mfu.items()}
    return {"model": model, "arms": arms | {"too large": {"failed": "out of memory"}}}


@pytest.mark.parametrize(
    ("mfu", "goal", "measured", "verdict"),
    [
        ({"packed": 0.40, "fused": 0.47, "padded": 0.1}, ", fused", 0.47, "met"),
        ({"packed": 0.40, "fused": None}, ", packed", 0.40, "missed"),
        ({"packed": None}, "", None, "not measured"),
        ({}, "", None, "not measured"),
    ],
)
def test_the_goal_names_the_arm_that_it_is_judged_by(mfu, goal, measured, verdict):
    cases = [case("another", packed=0.9), case(utilisation.GOAL_MODEL, **mfu)]
    (row,) = utilisation.goals(cases)
    assert row["goal"] == f"{utilisation.GOAL_MODEL}, update, model FLOPs utilisation{goal}"
    assert (row["measured"], row["verdict"]) == (measured, verdict)


FUSED = ("all fused", "fused activation", "fused norm", "fused rope")


def results_of(arms, monkeypatch, tmp_path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the scores and the gradient of each arm."""
    results = []

    def passes(actor, sequences):
        scores = actor.score(sequences, temperature=1.0)
        actor.backward(
            [
                TrainingSequence(s, score.logprobs_T, (-1.0) ** i, 1 / len(sequences))
                for i, (s, score) in enumerate(zip(sequences, scores, strict=True))
            ]
        )
        gradients = [p.main_grad.flatten() for c in actor.chunks for p in c.parameters()]
        scores_T = torch.cat([score.logprobs_T for score in scores])
        results.append({"scores": scores_T, "gradient": torch.cat(gradients).clone()})
        return {"seconds": {"score": [1.0], "update": [1.0]}, "peak_bytes": None}

    monkeypatch.setattr(utilisation, "passes", passes)
    measured = measure_utilisation(monkeypatch, tmp_path, "--arms", ",".join(arms))
    assert not [a for a in measured["cases"][0]["arms"].values() if "failed" in a]
    return dict(zip(arms, results, strict=True))


def assert_the_same(results, arms):
    """Assert that arms equal `packed` up to what `padded`, which adds in another order, errs by."""
    for name, exact in results["packed"].items():
        size = exact.norm().item()
        error = (results["padded"][name] - exact).norm().item()
        allowed = allowance(max(error, bound(4, torch.float32) * size), size)
        assert size > 0
        for arm in arms:
            assert (results[arm][name] - exact).norm() <= allowed, (arm, name)


def test_fused_arms_compute_the_same(monkeypatch, tmp_path):
    """Scores and gradient; what is compiled on a GPU runs here as it is written."""
    calls = []
    rope = utilisation.MEGATRONS_ROPE
    monkeypatch.setattr(
        utilisation, "MEGATRONS_ROPE", lambda *a, **k: calls.append(1) or rope(*a, **k)
    )
    utilisation._compiled_rope.cache_clear()
    with torch.compiler.set_stance("force_eager"):
        results = results_of(("packed", "padded", *FUSED), monkeypatch, tmp_path)
    utilisation._compiled_rope.cache_clear()
    assert calls, "the arm does not reach Megatron's rotation"
    assert_the_same(results, FUSED)


@pytest.mark.slow
def test_compiled_arms_compute_the_same(monkeypatch, tmp_path):
    results = results_of(("packed", "padded", "all fused"), monkeypatch, tmp_path)
    assert_the_same(results, ["all fused"])


def test_an_arm_whose_library_is_absent_is_reported(monkeypatch, tmp_path):
    absent = "fused weight gradient", "Liger norm"
    needed = [name for arm in absent for name in utilisation.ARMS[arm].needs]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in needed else find(name, *_)
    )
    (measured,) = measure_utilisation(monkeypatch, tmp_path, "--arms", ",".join(absent))["cases"]
    assert measured["arms"] == {
        "fused weight gradient": {
            "failed": "needs transformer_engine or fused_weight_gradient_mlp_cuda"
        },
        "Liger norm": {"failed": "needs liger_kernel"},
    }


def values_and_gradients(norm, x_TH, weight_H, grad_TH):
    """Return a norm's result for a module with this weight, and its two gradients."""
    shape = TransformerConfig(num_layers=1, hidden_size=x_TH.shape[1], num_attention_heads=1)
    module = RMSNorm(shape, x_TH.shape[1])
    module.weight = torch.nn.Parameter(weight_H)
    y_TH = norm(module, x_TH.requires_grad_())
    return y_TH.detach(), *torch.autograd.grad(y_TH, [x_TH, module.weight], grad_TH)


def plain_norm(self, x):
    """Compute the definition, in the type of its input."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def norm_inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*size, generator=generator) for size in ((7, 48), (48,), (7, 48))]


@pytest.mark.parametrize("norm", [utilisation.torchs_norm, RMSNorm.forward])
def test_torchs_norm_is_ours(norm):
    reference = Reference(lambda *args: values_and_gradients(plain_norm, *args), *norm_inputs())
    reference.assert_equals(values_and_gradients(norm, *norm_inputs()))


def test_ligers_norm_is_ours(monkeypatch):
    """Interpreted, with what Triton's compiler has and its interpreter has not: numbers that can be
    cast, and CUDA's rsqrt.
    """
    pytest.importorskip("liger_kernel")
    import triton.language as tl
    from triton.runtime import interpreter

    class Number(float):
        def to(self, dtype):
            return self

    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter, "_implicit_cvt", lambda a: Number(a) if type(a) is float else convert(a)
    )
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))
    reference = Reference(lambda *args: values_and_gradients(plain_norm, *args), *norm_inputs())
    reference.assert_equals(values_and_gradients(utilisation.ligers_norm, *norm_inputs()))
