"""Short runs in several layouts: the same rollouts, the same numbers, and an engine in sync."""

import gzip
import json

import pandas
import pytest
import torch
import yaml
from ranks import on_ranks
from rounding import CHAIN, FACTOR, approx, bound

from megatron_prepo import config as configuration
from megatron_prepo.rollout.weight_sync import TOLERANCE
from megatron_prepo.run import ledger
from megatron_prepo.run.recorder import TRAINING_STAGES
from megatron_prepo.run.texts import ENTROPY_DIGITS, file_name
from tests.e2e.laptop import SHORT, made_by_ranks, metrics, summary, train, train_in_ranks

BY_THE_COMMAND = "TP2"
"""Layout that is trained by the command; of the rest, those of two ranks share a start."""
LAYOUTS = {
    "one rank": ["parallel.tensor=1", "train.share_prefixes=false"],
    "TP2": ["parallel.tensor=2"],
    "TP2 again": ["parallel.tensor=2", "profile.steps=[1]", "profile.ranks=[0,1]"],
    "TP2 SP": ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_tokens=601"],
    "PP2": [
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "train.packing=false",
        "train.share_prefixes=false",
    ],
    "DP2": [
        "parallel.tensor=1",
        "parallel.data=2",
        "optimizer.use_distributed_optimizer=true",
        "train.micro_batch_tokens=400",
    ],
    "CP2": ["parallel.tensor=1", "parallel.context=2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories of each layout; settings that are off by default are on, to be run."""
    more = ["loss.kl_coef=0.01", "loss.entropy_coef=0.001", "loss.importance=truncated"]
    more += ["texts.rollouts=4", "texts.evaluations="]
    directories = {name: tmp_path_factory.mktemp("run") / "run" for name in LAYOUTS}
    assert train(directories[BY_THE_COMMAND], *SHORT, *more, *LAYOUTS[BY_THE_COMMAND]) == 0
    made_by_ranks(directories["one rank"], *SHORT, *more, *LAYOUTS["one rank"])
    others = {
        str(directories[name]): [*SHORT, *more, *layout]
        for name, layout in LAYOUTS.items()
        if name not in (BY_THE_COMMAND, "one rank")
    }
    on_ranks(2, train_in_ranks, 2, others)
    return directories


def test_same_seed_same_ledger(runs):
    ledgers = [(runs[name] / "ledger.jsonl").read_bytes() for name in ("TP2", "TP2 again")]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].count(b"\n") == 2 * 8 * 4
    for kind in ("rollouts", "evaluations"):
        texts = [(runs[name] / file_name(kind)).read_bytes() for name in ("TP2", "TP2 again")]
        assert texts[0] == texts[1] and texts[0].count(b"\n") == 2


def metrics_of_layouts(runs):
    """Metrics of all steps that no layout may change, by layout."""
    apart = ("seconds/", "speed/", "mismatch/", "train/")
    return {
        name: [
            {key: value for key, value in step.items() if not key.startswith(apart)}
            for step in metrics(directory)
        ]
        for name, directory in runs.items()
    }


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "one rank"])
def test_layouts_agree(runs, name):
    """Layouts and the packing of sequences into micro-batches change nothing except for rounding.

    The other layouts show what another order of addition does to a metric, before an update and
    after; to that come the CHAIN float32 operations between the scores of tokens and a metric.
    """
    found = metrics_of_layouts(runs)
    ours, one = found.pop(name), found.pop("one rank")
    for step, (mine, theirs) in enumerate(zip(ours, one, strict=True)):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            others = max(abs(other[step][key] - value) for other in found.values())
            allowed = FACTOR[torch.float32] * others + bound(CHAIN, torch.float32) * abs(value)
            assert abs(mine[key] - value) <= allowed, f"step {step}, {key}"


def texts_of(directory) -> tuple[list, list[float]]:
    """Return the kept texts of a run: all of them with None for fractions, and the fractions."""
    fractions = []

    def without_fractions(value):
        if isinstance(value, float):
            return fractions.append(value)
        if isinstance(value, dict):
            return {key: without_fractions(inner) for key, inner in value.items()}
        return [without_fractions(inner) for inner in value] if isinstance(value, list) else value

    paths = [directory / file_name(kind) for kind in ("rollouts", "evaluations")]
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return without_fractions(lines), fractions


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "one rank"])
def test_layouts_keep_the_same_texts(runs, name):
    """Entropies, weights and perplexities differ by rounding, as in `test_layouts_agree`, and an
    entropy by a unit of its last decimal."""
    found = {layout: texts_of(directory) for layout, directory in runs.items()}
    (ours, mine), (one, theirs) = found.pop(name), found.pop("one rank")
    assert ours == one and len(mine) == len(theirs) > 200
    others = zip(*(fractions for _, fractions in found.values()), strict=True)
    for number, value, rest in zip(mine, theirs, others, strict=True):
        allowed = FACTOR[torch.float32] * max(abs(other - value) for other in rest)
        allowed += bound(CHAIN, torch.float32) * abs(value) + 10**-ENTROPY_DIGITS
        assert abs(number - value) <= allowed


def test_kept_texts_are_those_of_the_ledger(runs):
    """The mean of a completion's entropies is the ledger's, to their decimals."""
    entries = {
        (entry.step, entry.prompt_id, entry.sample): entry
        for entry in ledger.read(runs["TP2"] / "ledger.jsonl")
    }
    for line in (runs["TP2"] / file_name("rollouts")).read_text().splitlines():
        step = json.loads(line)
        assert step["chosen"] == [*range(16 * step["step"], 16 * step["step"] + 8)]
        assert [p["position"] - step["chosen"][0] for p in step["prompts"]] == [0, 2, 4, 7]
        assert len(step["ppl"]) == 24 and step["ppl"] == sorted(step["ppl"])
        for prompt in step["prompts"]:
            assert prompt["ppl"] == step["ppl"][prompt["position"]]
            assert len(prompt["rollouts"]) == 4
            for sample, rollout in enumerate(prompt["rollouts"]):
                entry = entries[step["step"], prompt["id"], sample]
                assert prompt["ppl"] == entry.ppl
                assert len(rollout["pieces"]) == len(rollout["entropy"]) == entry.length
                assert (rollout["reward"], rollout["weight"]) == (entry.reward, entry.weight)
                mean = sum(rollout["entropy"]) / entry.length
                assert abs(mean - entry.mean_entropy) <= 10**-ENTROPY_DIGITS


def test_another_batch_would_be_seen(runs):
    """Almost none of the next step's metrics is within a thousand times the allowed difference."""
    found = metrics_of_layouts(runs)
    one = found.pop("one rank")
    seen = [
        abs(one[1][key] - value)
        > 1000 * max(abs(other[0][key] - value) for other in found.values())
        for key, value in one[0].items()
        if value != one[1][key]
    ]
    assert len(seen) > 20 and sum(seen) > 0.9 * len(seen)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rates_times_seconds_are_the_same_work(runs, name):
    """The work does not depend on the layout.  A KL penalty scores twice, and learns from every
    rollout."""
    ranks = summary(runs[name])["ranks"]
    for one, step in zip(metrics(runs["one rank"]), metrics(runs[name]), strict=True):
        for stage in ("perplexity", "old_logprobs", "update"):
            for unit in ("tokens", "tflops"):
                key = f"speed/{stage}_{unit}"
                work = step[key] * step[f"seconds/{stage}"] * ranks
                assert work == approx(one[key] * one[f"seconds/{stage}"])
        old = step["speed/old_logprobs_tokens"] * step["seconds/old_logprobs"]
        assert old == approx(2 * step["speed/update_tokens"] * step["seconds/update"])


def test_traces_of_a_step_are_each_ranks_with_all_stages(runs):
    """`test_same_seed_same_ledger` shows that tracing changes no result."""
    for rank in range(2):
        file = runs["TP2 again"] / "profile" / f"step_1_rank_{rank}.json.gz"
        trace = json.loads(gzip.decompress(file.read_bytes()))
        assert set(TRAINING_STAGES) <= {event["name"] for event in trace["traceEvents"]}
    assert not (runs["TP2"] / "profile").exists()


@pytest.mark.parametrize("name", LAYOUTS)
def test_engine_follows_the_actor(runs, name):
    """The engine's log-probabilities after every weight sync are the actor's, to the accuracy that
    a sync itself has to achieve; the divergence is half of the square of the difference."""
    for step in metrics(runs[name]):
        assert step["mismatch/logprob_abs/max"] < TOLERANCE["float32"]
        assert step["mismatch/kl"] < step["mismatch/logprob_abs/max"] ** 2


def test_engine_is_not_ahead_of_the_first_update(runs):
    """The first mini-batch is on-policy, the second is not: the ratio differs from 1."""
    first = metrics(runs["TP2"])[0]
    assert 0 < first["loss/kl_to_old"] < 0.1
    assert first["loss/grad_norm"] > 0


def test_what_is_packed_has_no_padding_and_what_is_shared_is_less(runs):
    first = {name: metrics(runs[name])[0] for name in ("one rank", "TP2", "PP2", "DP2")}
    tokens = {name: step["train/tokens"] for name, step in first.items()}
    assert first["one rank"]["train/padding_fraction"] == 0
    assert first["PP2"]["train/padding_fraction"] > 0.01
    assert tokens["TP2"] < 0.6 * tokens["one rank"] < 0.6 * tokens["PP2"]
    assert tokens["DP2"] < tokens["one rank"]
    assert first["TP2"]["train/balance_ratio"] == 1 <= first["DP2"]["train/balance_ratio"]


def test_ledger_is_complete_and_readable(runs):
    table = pandas.read_json(runs["TP2"] / "ledger.jsonl", lines=True)
    assert list(table.step.unique()) == [0, 1]
    groups = table.groupby(["step", "prompt_id"])
    assert (groups.size() == 4).all()
    assert (groups.zero_variance.first() == (groups.reward.nunique() == 1)).all()
    assert (table.weight_version == 2 * table.step).all()  # two mini-batches per step
    assert table.ppl.gt(1).all() and table.mean_entropy.ge(0).all()
    result = summary(runs["TP2"])
    assert (result["rollouts"], result["tokens"]) == (len(table), table.length.sum())


def test_the_window_slides_from_low_to_high(runs):
    first, last = metrics(runs["TP2"])
    assert (first["selection/window_first"], first["selection/window_last"]) == (0, 7)
    assert (last["selection/window_first"], last["selection/window_last"]) == (16, 23)
    assert first["ppl/selected/min"] == first["ppl/candidates/min"]
    assert first["ppl/selected/max"] < first["ppl/candidates/q50"]


def test_run_directory(runs):
    directory = runs["TP2"]
    saved = configuration.from_tree(yaml.safe_load((directory / "config.yaml").read_text()))
    assert saved.selection.num_selected == 8 and saved.loss.kl_coef == 0.01
    assert (directory / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (directory / "pass_rate.png").stat().st_size > 10_000
    weights = json.loads((directory / "hf" / "config.json").read_text())
    assert weights["model_type"] == "qwen3"
    for name in ("pass_rate_before", "pass_rate_after", "pass_rate_after_ci95", "seconds"):
        assert name in summary(directory)


def test_perplexities_of_the_engine_choose_the_same_prompts(runs, tmp_path):
    """Both are computed, and agree, in the first step and where an evaluation follows."""
    overrides = ["selection.ppl_from=engine", "parallel.tensor=1", "parallel.data=2"]
    overrides += ["optimizer.lr=0", "eval.every=2"]
    made_by_ranks(tmp_path / "run", *SHORT, *overrides, num_ranks=2)
    ours, actors = (
        pandas.read_json(directory / "ledger.jsonl", lines=True).query("step == 0")
        for directory in (tmp_path / "run", runs["one rank"])
    )
    assert ours.prompt_id.tolist() == actors.prompt_id.tolist()
    # ln ppl is a mean of log-probabilities
    within = TOLERANCE["float32"]
    assert ours.ppl.tolist() == pytest.approx(actors.ppl.tolist(), rel=within)
    for step in metrics(tmp_path / "run"):
        assert step["ppl/engine_actor_spearman"] > 0.999
        assert 0 < step["ppl/engine_actor_relative/max"] < within


def test_random_pays_no_perplexity_pass(tmp_path):
    overrides = ["selection.method=random", "weighting.method=none", "parallel.tensor=1"]
    overrides.append("sglang={dtype: auto}")
    made_by_ranks(tmp_path / "run", *SHORT, *overrides)
    ledger = pandas.read_json(tmp_path / "run" / "ledger.jsonl", lines=True)
    assert ledger.ppl.isna().all() and (ledger.weight == 1).all()


def test_zero_learning_rate_changes_nothing(tmp_path):
    """Zero learning rate is the control of the learning test: without updates, the numbers before
    and after are the same."""
    overrides = ["parallel.tensor=1", "optimizer.lr=0", "eval.max_prompts=40"]
    made_by_ranks(tmp_path / "run", *SHORT, *overrides)
    result = summary(tmp_path / "run")
    assert result["gain"] == 0.0
    assert 0 < result["pass_rate_before"] == result["pass_rate_after"]
