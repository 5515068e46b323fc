"""The head's benchmark, as far as it needs no GPU: its arithmetic, its checks, and a small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import Reference, allowance, approx, bound

from megatron_prepo.actor import parallel
from megatron_prepo.config import ParallelConfig
from tools.bench import head, head_goals, head_providers, head_stages
from tools.bench.head_case import Shape, make_case
from tools.bench.head_providers import (
    EPILOGUE,
    FORWARD,
    FORWARD_BACKWARD,
    KNOWN_GRADIENT,
    Outcome,
    tasks_of,
)

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture
def one_rank():
    parallel.initialize(ParallelConfig(), seed=0)
    yield torch.distributed.group.WORLD
    parallel.shut_down()


def small_case(group=None, dtype=torch.float32, entropy_gradient=True):
    shape = Shape("small", 64, 512, 1, 48)
    return make_case(shape, "cpu", dtype, entropy_gradient=entropy_gradient, group=group)


def test_flops_by_hand():
    """2 x 3 tokens x 5 hidden x (8 / 2) columns = 120 per product."""
    shape = Shape("hand", 5, 8, 2, 3)
    assert shape.columns == 4
    assert shape.matmul_flops(1) == 120
    assert shape.matmul_flops(4) == 480


def test_bare_runs_as_many_products_as_it_is_said_to():
    case = small_case()
    for task, run in head_providers.BARE.items():
        with torch.profiler.profile() as record:
            run(case)
        products = sum(event.count for event in record.key_averages() if event.key == "aten::mm")
        assert products == head_providers.PRODUCTS[task]


@pytest.mark.parametrize("hidden", [256, 1024])
def test_inputs_are_peaked_and_targets_likely(hidden):
    case = make_case(Shape("peaked", hidden, 8192, 1, 256), "cpu", torch.bfloat16)
    assert 1 < case.exact.entropy_R.mean() < 2
    assert 19 < case.exact.logit_abs_max < 21
    # drawn from the distribution itself: on average, a log-probability is minus the entropy
    assert (case.exact.logprobs_R + case.exact.entropy_R).mean().abs() < 0.3


def test_exact_answer_is_pytorchs_in_float64():
    case = small_case()

    def by_torch(hidden_TH, weight_VH):
        of_words = torch.distributions.Categorical(logits=hidden_TH @ weight_VH.t())
        return of_words.log_prob(case.targets_T), of_words.entropy()

    reference = Reference(by_torch, case.hidden_TH, case.weight_VH)
    reference.assert_equals((case.exact.logprobs_R, case.exact.entropy_R))


def reference_of(case):
    """Return log-probabilities, entropies, and the gradients of hidden states and head."""

    def function(hidden_TH, weight_VH, grad_logprobs_T, grad_entropy_T):
        leaves = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
        logprobs_TV = (leaves[0] @ leaves[1].t()).log_softmax(1)
        logprobs_T = logprobs_TV.gather(1, case.targets_T[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
        loss = logprobs_T @ grad_logprobs_T
        if grad_entropy_T is not None:
            loss = loss + entropy_T @ grad_entropy_T
        return logprobs_T.detach(), entropy_T.detach(), *torch.autograd.grad(loss, leaves)

    return Reference(function, *case.leaves, case.grad_logprobs_T, case.grad_entropy_T)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("tasks", [tasks_of(head_providers.naive), head_providers.OURS])
def test_providers_agree_with_float64(one_rank, tasks, entropy_gradient):
    """Values and gradients agree; otherwise a faster provider could be a wrong one."""
    case = small_case(one_rank, entropy_gradient=entropy_gradient)
    reference = reference_of(case)
    for task, run in tasks.items():
        case.weight_VH.main_grad.zero_()
        outcome = run(case)
        gradients = () if task == FORWARD else outcome.gradients
        ours = (outcome.logprobs_T, outcome.entropy_T, *gradients)
        reference.assert_equals([value.detach() for value in ours])


def test_errors_are_against_the_exact_rows(one_rank):
    case = small_case(one_rank)
    exact_T = case.exact.logprobs_R  # 48 tokens: every row is exact
    errors = head.errors_of(case, Outcome(exact_T + 0.25, None, ()))
    assert errors.keys() == {"logprob"}
    assert errors["logprob"]["mean"] == approx(0.25)
    broken_T = exact_T.clone()
    broken_T[0], broken_T[1] = torch.nan, exact_T[1] + 1
    error = head.errors_of(case, Outcome(broken_T, None, ()))["logprob"]
    assert error == {"mean": approx(1 / 47), "max": approx(1), "not_finite": 1}


def test_peak_memory_counts_what_is_live_together(one_rank):
    """Two tensors of 1 MiB together, a third after one of them, and a gradient that is no extra."""

    def task(case):
        a, b = torch.empty(2**18), torch.empty(2**18)
        del a
        gradient = torch.empty(2**18)
        return Outcome(None, b, (gradient,))

    assert head.peak_extra_bytes(small_case(one_rank), task) == 2**20


@pytest.mark.parametrize(("entropy_gradient", "times"), [(False, 3), (True, 4)])
def test_naive_holds_a_few_times_the_float32_logits(one_rank, entropy_gradient, times):
    """The logits, their softmax, the product of both, and a copy; `naive_bytes` allows one more."""
    shape = Shape("wide", 8, 4096, 1, 64)
    case = make_case(shape, "cpu", torch.float32, entropy_gradient=entropy_gradient, group=one_rank)
    logits_bytes = 4 * 64 * 4096
    runs = tasks_of(head_providers.naive)
    peak = max(head.peak_extra_bytes(case, run) for run in runs.values())
    assert peak / logits_bytes == pytest.approx(times, abs=0.2)
    assert head_providers.naive_bytes(case) == (times + 1) * logits_bytes


def test_goals_are_met_missed_or_not_measured():
    assert head_goals.at_least("g", 2.0, 2.0)["verdict"] == "met"
    assert head_goals.at_least("g", 2.0, 1.9)["verdict"] == "missed"
    assert head_goals.at_most("g", 2.0, 2.1)["verdict"] == "missed"
    assert head_goals.at_most("g", 2.0, 0.0)["verdict"] == "met"
    assert head_goals.at_most("g", 2.0, None)["verdict"] == "not measured"
    for bad in (float("inf"), float("nan")):
        row = head_goals.at_most("g", 2.0, bad)
        assert (row["verdict"], row["measured"]) == ("missed", None)


def reference_case(tokens, cut=None, not_finite=0, **medians):
    """Return a case where goals are judged: medians by provider, forward, and twice for both."""
    error = {"mean": 1e-6, "max": 1e-5, "not_finite": not_finite}
    return {
        "shape": {"model": "Qwen2.5-7B", "tensor": 1, "tokens": tokens},
        "cut": cut,
        "runs": {
            provider: {
                task: {
                    "milliseconds": {"median": median * times},
                    "peak_extra_bytes": 2**29,
                    "errors": {"logprob": error},
                }
                for task, times in ((FORWARD, 1), (FORWARD_BACKWARD, 2))
            }
            for provider, median in medians.items()
        },
    }


def verdicts(*cases):
    return {row["goal"]: row for row in head_goals.judge("cuda", list(cases))}


def test_speed_is_the_others_time_over_ours():
    rows = verdicts(reference_case(8192, ours=10.0, bare=9.0, naive=20.0))
    forward = rows["N = 8192: forward, speed over that of bare's forward"]
    assert (forward["measured"], forward["verdict"]) == (approx(0.9), "met")
    assert rows["N = 8192: forward, speed over that of naive's forward"]["verdict"] == "missed"
    assert rows["N = 8192: forward, speed over that of verl's forward"]["verdict"] == "not measured"
    assert rows["N = 8192: mean log-prob error"]["verdict"] == "met"
    at_32768 = {row["verdict"] for goal, row in rows.items() if "32768" in goal}
    assert at_32768 == {"not measured"}


def test_the_known_gradient_is_judged_against_verls_two_passes():
    goal = "N = 8192: known gradient, speed over that of verl's forward+backward"
    case = reference_case(8192, ours=10.0, verl=19.0)
    assert verdicts(case)[goal]["verdict"] == "not measured"
    case["runs"]["ours"][KNOWN_GRADIENT] = {"milliseconds": {"median": 20.0}}
    assert verdicts(case)[goal] | {"goal": ""} == head_goals.at_least("", 1.9, 1.9)


def test_the_epilogue_is_kept_where_its_best_right_tile_is_faster():
    goal = "N = 8192: forward, speed of the best epilogue over ours, to be kept"
    assert verdicts(reference_case(8192, ours=10.0))[goal]["verdict"] == "not measured"
    names = [f"{EPILOGUE} {tile}" for tile in ("128 x 256", "128 x 128")]
    case = reference_case(8192, ours=10.0, **dict(zip(names, (8.0, 5.0))))
    assert verdicts(case)[goal] | {"goal": ""} == head_goals.at_least("", 1.0, 2.0)
    case["runs"][names[1]][FORWARD]["errors"] = {"logprob": {"mean": 1e-3, "not_finite": 0}}
    assert verdicts(case)[goal]["measured"] == 1.25
    case["runs"][names[0]][FORWARD]["milliseconds"]["median"] = 16.0
    assert verdicts(case)[goal]["verdict"] == "missed"


def test_a_case_cut_short_is_judged_by_its_samples_and_says_so():
    cut = "after 3 of 30 samples"
    rows = verdicts(reference_case(32768, cut=cut, ours=1.0, bare=1.0))
    speed = rows["N = 32768: forward, speed over that of bare's forward"]
    assert (speed["verdict"], speed["cut"]) == ("met", cut)
    unknown = rows["N = 32768: forward, speed over that of verl's forward"]
    assert (unknown["verdict"], unknown["cut"]) == ("not measured", None)
    assert rows["N = 32768: mean log-prob error"]["cut"] is None


def test_one_number_that_is_none_fails_the_error_goal():
    rows = verdicts(reference_case(8192, not_finite=1, ours=1.0))
    assert rows["N = 8192: mean log-prob error"]["verdict"] == "missed"


def test_absent_peers_say_why(tmp_path):
    providers, absent = head_providers.available("cuda", verl=None)
    assert absent["verl"] == "no --verl FOLDER given"
    names = {name.split(" 128")[0] for name in providers.keys() | absent.keys()}  # without tiles
    assert names == {"bare", "ours", EPILOGUE, "naive", "verl", "liger", "torch"}
    assert not providers.keys() & absent.keys()
    _, absent = head_providers.available("cuda", verl=tmp_path)
    assert absent["verl"] == "the --verl folder has no linear_cross_entropy.py"


def test_verls_kernel_is_called_as_verl_calls_it(tmp_path, monkeypatch):
    """The directory has the same imports and signature, and its kernel is plain PyTorch."""
    pytest.importorskip("triton")
    for name in ("", ".utils", ".utils.device", ".utils.kernel"):
        monkeypatch.setitem(sys.modules, f"verl{name}", None)  # put back as it was, afterwards
    monkeypatch.setitem(sys.modules, "verl.utils.kernel.kernels", None)
    monkeypatch.delitem(sys.modules, "verl.utils.kernel.kernels")
    (tmp_path / "kernels.py").write_text(
        "from verl.utils.device import get_device_capability, get_device_name, is_cuda_available\n"
        "from verl.utils.device import get_torch_device\n"
    )
    (tmp_path / "linear_cross_entropy.py").write_text(
        "from . import kernels\n"
        "def linear_cross_entropy(hidden, weight, labels, temperature, reduction, group):\n"
        "    assert isinstance(temperature, float) and reduction == 'none' and group is None\n"
        "    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)\n"
        "    entropy = -(logprobs.exp() * logprobs).sum(-1)\n"
        "    return logprobs.gather(1, labels[:, None])[:, 0], entropy\n"
    )
    case = small_case()
    logprobs_T, _ = head_providers.load_verl(tmp_path)(case)
    reference_of(case).assert_equals([logprobs_T.detach()])


def test_torchs_own_agrees_with_float64():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    case = small_case()
    logprobs_T, entropy_T = head_providers.load_torch()(case)
    assert entropy_T is None
    reference_of(case).assert_equals([logprobs_T.detach()])


def test_a_peer_that_fails_is_absent_with_its_error_and_costs_the_others_nothing(one_rank):
    def fails(case):
        raise AssertionError

    case = small_case(one_rank, entropy_gradient=False)
    providers = {
        "bare": head_providers.BARE,
        "peer": head_providers.OURS | {FORWARD: fails},
    }
    result = head.measure(case, providers, warm_ups=0, samples=2)
    assert result["absent"] == {"peer, forward": "AssertionError: raise AssertionError"}
    assert result["runs"]["peer"].keys() == {FORWARD_BACKWARD, KNOWN_GRADIENT}
    assert len(result["runs"]["bare"][FORWARD]["milliseconds"]["samples"]) == 2
    with pytest.raises(AssertionError):
        head.measure(case, providers | {"ours": {FORWARD: fails}}, 0, 1)


def test_a_case_without_time_is_cut_and_says_so(one_rank):
    case = small_case(one_rank)
    result = head.measure(case, {"bare": head_providers.BARE}, 0, 2, deadline=1e-9)
    assert result["cut"] == "after 0 of 2 samples"
    assert result["runs"]["bare"][FORWARD]["milliseconds"]["median"] is None


def test_every_round_is_kept(one_rank):
    """What a killed process leaves: all errors and peaks, and the samples of complete rounds."""
    kept = []
    case = small_case(one_rank)
    providers = {"bare": head_providers.BARE}
    head.measure(case, providers, 1, 2, keep=lambda result: kept.append(json.dumps(result)))
    kept = [json.loads(text) for text in kept]
    assert [k["cut"] for k in kept[:2]] == ["after 0 of 2 samples", "after 1 of 2 samples"]
    assert kept[-1]["cut"] is None
    assert all(run["peak_extra_bytes"] >= 0 for run in kept[0]["runs"]["bare"].values())
    assert len(kept[1]["runs"]["bare"][FORWARD]["milliseconds"]["samples"]) == 1


def test_stages_are_the_heads_products_and_row_operations(one_rank):
    """One product per chunk and stage, so that their operations are those of the rates."""
    case = small_case(one_rank, entropy_gradient=False)
    tasks = head_stages.stages(case)
    for name, run in tasks.items():
        with torch.profiler.profile() as record:
            run(case)
        counts = {event.key: event.count for event in record.key_averages()}
        products = counts.get("aten::mm", 0) + counts.get("aten::addmm_", 0)
        assert products == (name in head_stages.MATRIX_PRODUCTS), name
    times = {name: head.summary([2.0]) for name in tasks}
    table = head_stages.describe(case, times, {})["stages"]["table"]
    assert table[head_stages.WEIGHT]["tflops"] == case.shape.matmul_flops(1) / 2e-3 / 1e12
    elements = 48 * 512
    assert table[head_stages.STATISTICS]["gigabytes_per_second"] == 4 * elements / 2e-3 / 1e9


def test_percentiles():
    row = head.summary([float(n) for n in range(1, 12)])
    assert (row["p10"], row["median"], row["p90"]) == (2, 6, 10)


def test_the_cpu_run_from_end_to_end(tmp_path):
    """Two ranks, valid JSON, every goal with a verdict, and a table with every task."""
    out = tmp_path / "new" / "head.json"
    command = [sys.executable, "tools/bench/head.py", "--cpu", "--out", str(out)]
    command += ["--tokens", "64", "--vocab", "256", "--hidden", "16,32"]
    command += ["--warm-ups", "0", "--samples", "2", "--stages", "--chunks", "8,32,128"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert [case["shape"]["hidden"] for case in result["cases"]] == [16, 32]
    assert result["cases"][0]["shape"]["columns"] == 128
    assert result["absent"].keys() == {EPILOGUE, "verl", "liger", "torch"}
    assert len(result["goals"]) == 12
    assert {row["verdict"] for row in result["goals"]} <= {"met", "missed"}
    assert str(tmp_path) not in out.read_text()
    first, second = result["cases"]
    assert len(first["stages"]["table"]) == 6 and "stages" not in second
    swept = [(row["chunk_tokens"], row["task"]) for row in first["chunks"]]
    tasks = (FORWARD, FORWARD_BACKWARD, KNOWN_GRADIENT)
    assert sorted(swept) == [(chunk, task) for chunk in (8, 32) for task in sorted(tasks)]
    for case in result["cases"]:
        errors = {}
        for provider in ("ours", "naive"):
            run = case["runs"][provider][FORWARD_BACKWARD]
            errors[provider] = run["errors"]["logprob"]["max"]
            assert len(run["milliseconds"]["samples"]) == 2
        # log-probabilities of 20 nats and less
        assert errors["ours"] <= allowance(errors["naive"] + bound(20, torch.float32), size=1.0)
    text = out.with_suffix(".md").read_text()
    assert text.strip() in done.stdout
    assert all(f"| {p} | {FORWARD_BACKWARD} |" in text for p in ("bare", "ours", "naive"))
    assert "- verl: absent, needs CUDA" in text
