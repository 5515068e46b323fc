"""Adapters of one rank: formula, gradient, initial values and frozen weights, by hand."""

import re

import pytest
import torch
from megatron.core import tensor_parallel
from rounding import assert_close
from tiny_models import actor_config

from megatron_prepo.actor.dry_run import pretend
from megatron_prepo.actor.model import build_model, check_layout
from megatron_prepo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_prepo.errors import UserError
from megatron_prepo.models import lora
from megatron_prepo.models.hf_to_megatron import attention_heads, stage_parameters
from megatron_prepo.models.mapping import to_hf
from megatron_prepo.models.peft_files import peft_config
from tests.unit.plan.test_memory import DENSE, EXPERTS

SETTINGS = LoraConfig(rank=2, alpha=6)
LAYERS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}


def build(settings=SETTINGS):
    """Return a model with adapters; within `pretend`."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = ModelConfig(hf="", dtype="float32")
    (stage,) = build_model(DENSE, model, ParallelConfig(), lora=settings)
    return stage


def randomized(stage):
    """Return the model in float64 with random parameters."""
    generator = torch.Generator().manual_seed(2)
    for parameter in stage.double().parameters():
        parameter.data.normal_(generator=generator)
    return stage


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("targets", [None, ("v_proj", "up_proj", "o_proj", "down_proj")])
def test_an_adapted_layer_is_the_sum_of_its_projections(name, targets):
    """Output W x + s B A x of each projection, and its gradient in closed form:

    dL/dB = s g (A x)^T and dL/dA = s B^T g x^T for the gradient g of the output.
    """
    settings = LoraConfig(rank=2, alpha=6, **({"target_modules": targets} if targets else {}))
    with pretend(0, 1, ParallelConfig()):
        stage = randomized(build(settings))
        linear = stage.decoder.layers[1].get_submodule(name)
        x_TI = torch.randn(5, 1, linear.weight.shape[1], dtype=torch.float64, requires_grad=True)
        output, bias = linear(x_TI)
        g_TO = torch.randn_like(output)
        output.backward(g_TO)
        with lora.without_adapters([stage]):
            plain, _ = linear(x_TI.detach())
        mapping = next(m for n, m, _ in stage_parameters([stage]) if n.endswith(f"1.{name}.weight"))
        heads = attention_heads(stage.config)
    projections = [p for p in LAYERS[name] if p in settings.target_modules]
    a, b, s = linear.lora.A, linear.lora.B, 3.0
    a_parts, a_grads = (t.chunk(len(projections)) for t in (a, a.grad))
    x_TI, output, plain = (t.squeeze(1) for t in (x_TI.detach(), output.detach(), plain.detach()))
    g_TO = g_TO.squeeze(1)

    def split(tensor):
        return dict(zip(LAYERS[name], to_hf(mapping, tensor, heads, 0), strict=True))

    b_parts, b_grads, g_parts = split(b), split(b.grad), split(g_TO.t())
    added, merged = split((output - plain).t()), split(linear.lora.merged(linear.weight))
    weights = split(linear.weight)
    for p in LAYERS[name]:
        if p not in projections:
            assert not added[p].any() and not b_grads[p].any()
            continue
        i = projections.index(p)
        size = 100.0  # of the terms that cancel
        assert_close(added[p], s * b_parts[p] @ a_parts[i] @ x_TI.t(), scale=size)
        assert_close(b_grads[p], s * g_parts[p] @ (x_TI @ a_parts[i].t()), scale=size)
        assert_close(a_grads[i], s * b_parts[p].t() @ g_parts[p] @ x_TI, scale=size)
        product = (s * b_parts[p] @ a_parts[i]).float()
        assert_close(merged[p].float(), weights[p].float() + product, scale=size)
    assert bias is None and linear.weight.grad is None


def test_only_adapters_are_trained_and_named():
    with pretend(0, 1, ParallelConfig()):
        stage = build()
        trained = {n for n, p in stage.named_parameters() if p.requires_grad}
        names = {name for name, _, _ in lora.adapter_parameters([stage])}
        assert trained == names and len(names) == 4 * len(LAYERS) * 2
        assert lora.trained_parameters([stage]) == lora.adapter_parameters([stage])
        assert not any("lora" in name for name, _, _ in stage_parameters([stage]))
        hf_names = [n for _, m, _ in lora.adapter_parameters([stage]) for n in m.hf_names]
    assert "model.layers.3.self_attn.k_proj.lora_B.weight" in hf_names
    assert len(set(hf_names)) == len(hf_names) == 4 * 7 * 2


def test_adapters_begin_as_those_of_peft():
    """A is uniform within 1 / sqrt(inputs), different for each matrix, and B is zero."""
    with pretend(0, 1, ParallelConfig()):
        stage = build()
        lora.initialize([stage], seed=7)
        matrices = {m.hf_names: p.detach() for _, m, p in lora.adapter_parameters([stage])}
    drawn = {}
    for names, matrix in matrices.items():
        if "lora_B" in names[0]:
            assert not matrix.any()
            continue
        drawn |= dict(zip(names, matrix.chunk(len(names)), strict=True))
    assert len(drawn) == 4 * 7
    for a in drawn.values():
        limit = a.shape[1] ** -0.5
        assert limit * 0.9 < a.abs().max() <= limit and abs(a.mean()) < limit / 5
    assert len({float(a.double().sum()) for a in drawn.values()}) == len(drawn)
    name = "model.layers.2.self_attn.v_proj.lora_A.weight"
    again, other = (lora.initial_matrix(name, seed, (2, 128)) for seed in (7, 8))
    assert torch.equal(drawn[name], again) and not torch.equal(again, other)


def test_adapters_are_switched_on_again_after_an_error():
    with pretend(0, 1, ParallelConfig()):
        stage = build()
        with pytest.raises(KeyboardInterrupt), lora.without_adapters([stage]):
            assert not any(adapter.enabled for adapter in lora.adapters([stage]).values())
            raise KeyboardInterrupt
        assert all(adapter.enabled for adapter in lora.adapters([stage]).values())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": -1}}, "lora.rank=-1 must be at least 0"),
        ({"lora": {"rank": 2, "alpha": 0}}, "lora.alpha=0 must be at least 1"),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "must be some of q_proj"),
        ({"lora": {"target_modules": []}}, "must be some of q_proj"),
        ({"lora": {"rank": 2}, "model": {"layers": "te"}}, "not model.layers=te"),
        (
            {"lora": {"rank": 2}, "model": {"megatron": "imported"}},
            "python -m checkpoints_convert export --megatron imported --hf unused --out DIR",
        ),
        (
            {"lora": {"alpha": 32}},
            "lora.alpha=32 has no effect with lora.rank=0; set lora.rank too",
        ),
        ({"lora": {"target_modules": ["q_proj"]}}, "target_modules=['q_proj'] has no effect with"),
    ],
)
def test_what_cannot_be_adapted_is_refused(sections, message):
    with pytest.raises(UserError, match=re.escape(message)):
        actor_config("unused", **sections)


def test_experts_are_refused():
    config = actor_config("unused", lora={"rank": 2})
    with pytest.raises(UserError, match=r"lora\.rank=2: .*mixture of experts"):
        check_layout(config, EXPERTS)


def test_rank_0_changes_nothing():
    """The model has no adapters, and all weights are trained."""
    with pretend(0, 1, ParallelConfig()):
        stage = build(LoraConfig())
        assert lora.adapters([stage]) == {}
        assert all(p.requires_grad for p in stage.parameters())
        assert lora.trained_parameters([stage]) == stage_parameters([stage])


def test_the_configuration_of_peft():
    written = peft_config(LoraConfig(rank=4, target_modules=("q_proj", "v_proj")), "O/N", "ab12")
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 16)
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert (written["base_model_name_or_path"], written["revision"]) == ("O/N", "ab12")
