"""The product with statistics in its epilogue, interpreted, against a float64 softmax; compiled.

The interpreter cannot multiply bfloat16: half precision stands for it.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from rounding import Reference

pytest.importorskip("triton")

from megatron_prepo.actor import lm_head, lm_head_torch
from tests.unit.actor.compiled_kernels import BLACKWELL, HOPPER, reported
from tests.unit.actor.test_lm_head import full_softmax, problem
from tests.unit.tools.bench.test_head import reference_of, small_case
from tools.bench import head_epilogue, head_providers
from tools.bench.head_epilogue import TILES, Tile, fewest_waves, product_statistics

# numpy's, on NaN
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
]
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(params=["interpreted"])
def tile(request):
    """A tile so small that tokens, words and width take several."""
    if torch.cuda.is_available():
        pytest.skip("the compiled kernel is compared in tests/gpu")
    return Tile(tokens=8, words=16, width=16, warps=4, stages=2, programs=1)


def statistics(hidden_RH, weight_VH, target_R, temperature=1.0):
    """Compute the statistics of stored logits; 0 for a target elsewhere, of which none may be."""
    stats_4R = lm_head_torch.row_statistics(hidden_RH @ weight_VH.T, target_R, temperature)
    return *stats_4R[:3], stats_4R[3].nan_to_num(neginf=0.0)


def combined(*args, tile, parts=2):
    """Return the statistics [4, R] of all parts."""
    return lm_head._combine(product_statistics(*args, tile=tile, parts=parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "scale"),
    [(11, 41, 24, 1.0), (1, 40, 16, 6.0), (8, 32, 16, 33.0), (17, 5, 8, 0.1)],
)
def test_equals_the_full_softmax(tile, dtype, temperature, tokens, rows, hidden, scale):
    """Sizes that no tile divides, one token, and logits from almost flat to +-100."""
    hidden_TH, weight_VH, targets_T = problem(
        tokens=tokens, rows=rows, hidden=hidden, scale=scale, dtype=dtype
    )
    targets_T[2:4] = lm_head.IGNORE
    targets_T[-1] = rows - 2  # the last word that is no padding
    if temperature == "per token":
        temperature = torch.linspace(0.5, 1.5, tokens)
    settings = {"vocab_size": rows - 1, "temperature": temperature}
    args = hidden_TH, weight_VH, targets_T.clamp(max=rows - 2)
    ours = head_epilogue.logprobs_and_entropy(*args, **settings, tile=tile, multiprocessors=4)
    Reference(full_softmax, *args, **settings).assert_equals(ours)


@pytest.mark.parametrize("parts", [1, 2, 5, 64])
def test_statistics_of_a_rank_are_those_of_its_rows(tile, parts):
    """Two ranks, of which each has some targets; merged, they are the full softmax."""
    hidden_RH, weight_VH, targets_R = problem(rows=74, scale=6.0, dtype=torch.float32)
    ranks = []
    for rank in (0, 1):
        args = hidden_RH, weight_VH[37 * rank :][:37], targets_R - 37 * rank
        ranks.append(stats_4R := combined(*args, 0.7, tile=tile, parts=parts))
        here_R = (args[2] >= 0) & (args[2] < 37)
        assert torch.equal(stats_4R[3] == -math.inf, ~here_R) and 0 < here_R.sum() < len(here_R)
        at_target_R = stats_4R[3].nan_to_num(neginf=0.0)
        reference = Reference(statistics, *args, temperature=0.7)
        reference.assert_equals((*stats_4R[:3], at_target_R))
    _, entropy_R, logprobs_R = lm_head._merge(torch.stack(ranks))
    args = hidden_RH, weight_VH, targets_R
    softmax = Reference(full_softmax, *args, vocab_size=74, temperature=0.7)
    softmax.assert_equals((logprobs_R, entropy_R))


def test_a_rank_of_padding_and_a_call_without_tokens(tile):
    hidden_RH, weight_VH, target_R = problem(dtype=torch.float32)
    stats_4R = combined(hidden_RH, weight_VH[:0], target_R, 1.0, tile=tile)
    expected_4R = lm_head_torch.row_statistics(hidden_RH @ weight_VH[:0].T, target_R, 1.0)
    assert torch.equal(stats_4R, expected_4R)
    nothing = combined(hidden_RH[:0], weight_VH, target_R[:0], 1.0, tile=tile)
    assert nothing.shape == (4, 0)


def test_logits_without_a_share_and_logits_that_are_no_number(tile):
    """A tile of only -inf before and after others; NaN stays NaN."""
    hidden_RH, weight_VH, target_R = problem(rows=64, dtype=torch.float32)
    weight_VH[:17], weight_VH[40:] = -math.inf, -math.inf
    target_R[:] = torch.arange(11) + 20
    args = hidden_RH.abs(), weight_VH, target_R
    reference = Reference(statistics, args[0], weight_VH[17:40], target_R - 17)
    reference.assert_equals(combined(*args, 1.0, tile=tile))
    weight_VH[63] = math.nan
    assert combined(*args, 1.0, tile=tile)[1].isnan().all()


def test_the_provider_agrees_with_float64(tile, monkeypatch):
    """It is called as `available` offers it on Hopper, and is absent on GPUs without TMA."""
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setitem(TILES, 9, (tile._replace(tokens=16, words=128, width=32),))
    [(name, tasks)] = head_providers.load_epilogues().items()
    assert name == "ours, epilogue 16 x 128"
    case = small_case()
    outcome = tasks[head_providers.FORWARD](case)
    reference_of(case).assert_equals([outcome.logprobs_T, outcome.entropy_T])
    device.major = 8
    with pytest.raises(head_providers.Absent, match=r"compute capability 8\.0"):
        head_providers.load_epilogues()


def test_waves_by_hand():
    """64 x 594 tiles on 132 multiprocessors: 288 of each, as 16 x 18; one token: 10 tiles of 60."""
    large = TILES[9][0]
    assert fewest_waves(large, 8192, 152064, 132) == 33
    assert fewest_waves(large, 1, 152064, 132) == 60
    assert fewest_waves(large, 0, 0, 132) == 1


@pytest.mark.parametrize("capability", [HOPPER, pytest.param(BLACKWELL, marks=pytest.mark.slow)])
def test_the_compiled_kernel_fits_a_multiprocessor(tmp_path, capability):
    """Nothing is spilled, tensor cores multiply what TMA loads, and as many programs fit as a tile
    states: 65,536 registers and 227 KiB of shared memory, of which each takes one more.
    """
    tiles = TILES[capability // 10]
    kernels = reported("epilogue", tmp_path, capability)
    assert [kernel["kernel"] for kernel in kernels] == [str(tile) for tile in tiles]
    multiplies = {HOPPER: "wgmma.mma_async", BLACKWELL: "tcgen05.mma"}[capability]
    for tile, kernel in zip(tiles, kernels, strict=True):
        ptx = kernel.pop("ptx")
        assert multiplies in ptx and "cp.async.bulk.tensor" in ptx
        assert kernel["registers"] <= 255 and kernel["spilled"] == 0, kernel
        assert tile.programs * tile.warps * 32 * kernel["registers"] <= 65536, kernel
        assert tile.programs * (kernel["shared"] + 1024) <= 228 * 1024, kernel
