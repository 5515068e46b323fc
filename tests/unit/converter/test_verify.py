"""What `verify` allows logits: what `transformers` in float32 errs by on the same tokens."""

import copy

import pytest
import tiny_models
import torch
from rounding import approx

from checkpoints_convert import verify
from megatron_prepo.models.float64 import computing_in_float64

MODELS = {
    "tied": lambda: tiny_models.qwen2(tied=True),
    "untied": lambda: tiny_models.qwen3(tied=False),
    "window": lambda: tiny_models.mistral(window=8),
    "experts": tiny_models.qwen3_moe,
}
TOKENS_1S = torch.arange(40)[None] * 7 % tiny_models.VOCAB


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_cast_in_turn_are_the_model_in_float64(name):
    model = MODELS[name]()
    model.set_experts_implementation("eager")
    weights = copy.deepcopy(model.state_dict())
    single_1SV = model(TOKENS_1S).logits
    with computing_in_float64(model):
        exact_1SV = model(TOKENS_1S).logits
    whole = copy.deepcopy(model).double()
    whole.model.rotary_emb.float()  # as `transformers` has it in any type
    assert exact_1SV.dtype == torch.float64 and torch.equal(exact_1SV, whole(TOKENS_1S).logits)
    assert 0 < (exact_1SV - single_1SV).abs().max() < 1e-3 * exact_1SV.std()
    now = model.state_dict()
    assert all(
        now[name].dtype == t.dtype and torch.equal(now[name], t) for name, t in weights.items()
    )
    assert torch.equal(model(TOKENS_1S).logits, single_1SV)


def test_a_model_that_fails_in_float64_is_left_in_its_own_type():
    model = tiny_models.qwen2()
    with pytest.raises(IndexError), computing_in_float64(model):
        model(torch.tensor([[tiny_models.VOCAB]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(TOKENS_1S)


def logits(seed: int, scale: float = 1.0, rows: int = 150) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, 11, generator=generator, dtype=torch.float64)


def test_numbers_of_all_rows_are_those_of_blocks():
    exact_TV = logits(0)
    ours_TV, theirs_TV = exact_TV + logits(1, 1e-5), exact_TV + logits(2, 1e-6)
    found = verify.compare_logits(ours_TV, theirs_TV, exact_TV)
    log_p, log_q = exact_TV.log_softmax(-1), ours_TV.log_softmax(-1)
    expected = {
        "max_abs_difference": (ours_TV - exact_TV).abs().max(),
        "mean_abs_difference": (ours_TV - exact_TV).abs().mean(),
        "max_abs_rounding": (theirs_TV - exact_TV).abs().max(),
        "mean_abs_rounding": (theirs_TV - exact_TV).abs().mean(),
        "spread": exact_TV.std(),
    }
    for name, value in expected.items():
        assert found[name] == approx(value.item(), exact_TV.numel()), name
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert found["mean_kl"] == approx(kl.item(), exact_TV.numel(), scale=1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "problem"),
    [
        (8e-6, 2e-6, None),
        (2e-4, 2e-6, "off by up to"),  # a fifth of what a chosen limit would have allowed
        (0.0, 0.0, None),
        (1e-9, 0.0, "off by up to"),
        (float("nan"), 2e-6, "off by up to"),
        (2e-6, float("nan"), "would hide mistakes"),
        (2e-3, 2e-3, "would hide mistakes"),
    ],
)
def test_ours_may_err_by_what_theirs_errs_by_times_the_factor(ours, theirs, problem):
    exact_TV = logits(0)
    ours_TV, theirs_TV = exact_TV + logits(1, ours), exact_TV + logits(2, theirs)
    found = verify.logits_problem(verify.compare_logits(ours_TV, theirs_TV, exact_TV))
    assert found is None if problem is None else problem in found


def test_one_wrong_row_of_many_is_not_lost_in_the_mean():
    exact_TV = logits(0)
    ours_TV, theirs_TV = exact_TV + logits(1, 1e-6), exact_TV + logits(2, 1e-6)
    ours_TV[-1, 3] += 1e-4
    assert verify.logits_problem(verify.compare_logits(ours_TV, theirs_TV, exact_TV))
