"""The actor's log-probabilities and entropies are those of `transformers`, under every layout.

One start of 4 ranks scores and exports all models under all layouts; the tests look at its results.
"""

import math
from collections import Counter

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from rounding import allowance, largest_difference
from safetensors.torch import load_file
from tiny_models import VOCAB, actor_config
from transformers_scores import ATTENTIONS, judged, largest_of_all, model_of, scores

from megatron_prepo.records import ScoredSequence
from megatron_prepo.trainer.prompt_scores import projection

MODELS = {
    "qwen2": lambda: tiny_models.qwen2(),
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "qwen3 tied": lambda: tiny_models.qwen3(tied=True),
    "llama3": lambda: tiny_models.llama3(),
    "llama3 tied": lambda: tiny_models.llama3(tied=True),
    "mistral": lambda: tiny_models.mistral(),
    "mistral window": lambda: tiny_models.mistral(window=8),  # less than most sequences
    "qwen3 moe": lambda: tiny_models.qwen3_moe(),
    "qwen3 moe not normalized": lambda: tiny_models.qwen3_moe(normalized=False),
}
PADDED, SHARED = {"packing": False}, {"share_prefixes": True}
LAYOUTS = {
    # name: (parallel settings, how sequences are laid into micro-batches)
    "tp1": ({}, {}),
    "tp1 padded": ({}, PADDED),
    "tp2": ({"tensor": 2}, {}),
    "pp2": ({"pipeline": 2}, {}),
    "tp2 sp": ({"tensor": 2, "sequence": True}, {}),
    "tp2 sp shared": ({"tensor": 2, "sequence": True}, SHARED),
    "tp2 pp2": ({"tensor": 2, "pipeline": 2}, {}),
    "dp2": ({"data": 2}, {}),
    "pp2 dp2 shared": ({"pipeline": 2, "data": 2}, SHARED),
}
EXPERT_LAYOUTS = {"dp2 ep2 shared": ({"data": 2, "expert": 2}, SHARED)}
CONTEXT_LAYOUTS = {"tp2 cp2": ({"tensor": 2, "context": 2}, {})}
SOME_LAYOUTS = {
    "mistral": ("tp2",),
    "mistral window": ("tp1 padded", "tp2 sp shared", "pp2"),
    "qwen3 moe not normalized": ("tp1", "tp2 sp shared"),
}
CASES = [(name, layout) for name in MODELS for layout in SOME_LAYOUTS.get(name, LAYOUTS)]
CASES += [("qwen3 moe", layout) for layout in EXPERT_LAYOUTS]
CASES += [(name, layout) for name in ("qwen2", "llama3") for layout in CONTEXT_LAYOUTS]
TEMPERATURES = (1.0, 0.7)


def sequences(name):
    """Return sequences of varied lengths, scored from the start or the middle, three with the same
    beginning.

    Llama's scaling slows down rotations whose period is thousands of tokens: only a sequence of
    such a length shows whether it is applied.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 31, 2, 17, 5, 24, 2100 if name == "llama3" else 60)
    tokens = [tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    sequences = [
        ScoredSequence(t, start) for t, start in zip(tokens, (1, 3, 1, 16, 4, 1, 1), strict=True)
    ]
    same = [ScoredSequence(tokens[3] + end, 16) for end in (tokens[2], tokens[5])]
    return [*sequences, *same]


# What the ranks do


def score_and_export_all(directories):
    """Return {(model, layout): scores by temperature, and anomalies of the exported weights}."""
    from megatron.core import parallel_state

    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor

    results = {}
    axes = ("tensor", "pipeline", "data", "context")
    for layout, (settings, way) in (LAYOUTS | EXPERT_LAYOUTS | CONTEXT_LAYOUTS).items():
        num_ranks = math.prod(settings.get(axis, 1) for axis in axes)
        if not join(num_ranks):
            continue
        for name, hf in directories.items():
            if (name, layout) not in CASES:
                continue
            config = actor_config(
                hf,
                parallel=settings,
                data={"max_prompt_tokens": 60},
                train={"micro_batch_tokens": 2200 if name == "llama3" else 64} | way,
            )
            parallel.initialize(config.parallel, seed=1)
            actor = Actor(config)
            projection_HD = directions(actor.hf["hidden_size"])
            scores = {
                t: actor.score(sequences(name), temperature=t, projection_HD=projection_HD)
                for t in TEMPERATURES
            }
            results[name, layout] = {
                "scores": {
                    t: [(s.logprobs_T, s.entropy_T) for s in list_of_scores]
                    for t, list_of_scores in scores.items()
                },
                "hidden": {
                    t: torch.stack([s.hidden_D for s in list_of_scores])
                    for t, list_of_scores in scores.items()
                },
                "export": oddities(actor.hf_weights(), hf),
            }
            parallel_state.destroy_model_parallel()  # the next model in the same process group
        parallel.shut_down()
    return results


def directions(hidden_size):
    """Return `projection_HD` of three directions, in which the mean hidden states are compared."""
    return projection(hidden_size, 3, seed=7)


def oddities(weights, hf):
    """Return names that a stream of weights repeats, lacks, adds, or has with other bits."""
    source = load_file(f"{hf}/model.safetensors")
    streamed, changed = Counter(), []
    for name, tensor in weights:
        streamed[name] += 1
        if name in source and not torch.equal(tensor, source[name]):
            changed.append(name)
    return {
        "repeated": [name for name, count in streamed.items() if count > 1],
        "missing": sorted(source.keys() - streamed.keys()),
        "unknown": sorted(streamed.keys() - source.keys()),
        "changed": changed,
    }


# Scores by transformers


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.save(make(), root / name.replace(" ", "_"))
        for name, make in MODELS.items()
    }


@pytest.fixture(scope="module")
def expected(directories):
    """Scores in float64 and our allowed error, {(model, temperature): (scores, error)}."""
    return {
        (name, temperature): answer
        for name, hf in directories.items()
        for temperature, answer in zip(
            TEMPERATURES, judged(hf, sequences(name), TEMPERATURES), strict=True
        )
    }


@pytest.fixture(scope="module")
def results(directories):
    """Results of each rank, [{(model, layout): ...}]."""
    return on_ranks(4, score_and_export_all, directories)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_scores_equal_those_of_transformers(results, expected, name, layout):
    """Scores are equal on every rank, in the order of the sequences, at two temperatures, alone or
    in a batch."""
    in_layout = [rank for rank in results if (name, layout) in rank]
    assert in_layout
    for rank in in_layout:
        for temperature in TEMPERATURES:
            ours = rank[name, layout]["scores"][temperature]
            exact, allowed = expected[name, temperature]
            error = largest_of_all(ours, exact)
            assert error <= allowed, f"{error / allowed:.2f} of what is allowed at {temperature}"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_exported_weights_are_the_source_bit_for_bit(results, name, layout):
    """Each name occurs once, on every rank; tied embeddings have no `lm_head`."""
    for rank in results:
        if (name, layout) in rank:
            export = rank[name, layout]["export"]
            assert export == {"repeated": [], "missing": [], "unknown": [], "changed": []}


@torch.no_grad()
def mean_hidden_states(model, name):
    """Return those that predict the scored tokens, `[sequences, D]`, in float64."""
    means = []
    for sequence in sequences(name):
        hidden_TH = model.model(torch.tensor([sequence.tokens])).last_hidden_state[0]
        means.append(hidden_TH[sequence.start - 1 : -1].double().mean(dim=0))
    hidden_SH = torch.stack(means)
    return hidden_SH @ directions(hidden_SH.shape[1]).double()


@pytest.fixture(scope="module")
def expected_hidden(directories):
    """Mean hidden states in float64 and our allowed error, {model: (states, error)}."""
    found = {}
    for name, hf in directories.items():
        exact_SD = mean_hidden_states(model_of(hf), name)
        others = (mean_hidden_states(model_of(hf, torch.float32, a), name) for a in ATTENTIONS)
        error = max(largest_difference(other_SD, exact_SD) for other_SD in others)
        found[name] = exact_SD, allowance(error, exact_SD.abs().mean().item())
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_mean_hidden_states_are_those_of_transformers(results, expected_hidden, name, layout):
    """At any temperature; two sequences of one beginning differ by far more than is allowed."""
    exact_SD, allowed = expected_hidden[name]
    for rank in results:
        if (name, layout) in rank:
            for hidden_SD in rank[name, layout]["hidden"].values():
                assert largest_difference(hidden_SD, exact_SD) <= allowed
    assert largest_difference(exact_SD[7], exact_SD[8]) > 100 * allowed


# That a mistake would be seen


def test_leaving_out_the_rope_scaling_would_be_seen(expected):
    unscaled = scores(tiny_models.llama3(scaled=False), sequences("llama3"), 1.0)
    exact, allowed = expected["llama3", 1.0]
    assert largest_of_all(unscaled, exact) > 100 * allowed


@pytest.mark.parametrize("window", [None, 7, 9])
def test_another_sliding_window_would_be_seen(expected, window):
    """Also one that is larger or smaller by one token."""
    other = scores(tiny_models.mistral(window=window), sequences("mistral window"), 1.0)
    exact, allowed = expected["mistral window", 1.0]
    assert largest_of_all(other, exact) > 100 * allowed


@pytest.mark.parametrize("normalized", [False, True])
def test_the_other_form_of_the_experts_probabilities_would_be_seen(expected, normalized):
    """Neither form may be taken for the other."""
    other = scores(tiny_models.qwen3_moe(normalized=normalized), sequences("qwen3 moe"), 1.0)
    exact, allowed = expected["qwen3 moe not normalized" if normalized else "qwen3 moe", 1.0]
    assert largest_of_all(other, exact) > 1000 * allowed


def test_a_norm_or_a_bias_left_at_its_default_would_be_seen(expected):
    for name, kind, value in (
        ("qwen2", "q_proj.bias", 0.0),
        ("qwen2", "k_proj.bias", 0.0),
        ("qwen2", "v_proj.bias", 0.0),
        ("qwen2", "post_attention_layernorm.weight", 1.0),
        ("qwen3", "q_norm.weight", 1.0),
        ("qwen3", "k_norm.weight", 1.0),
        ("llama3 tied", "model.norm.weight", 1.0),
    ):
        model = MODELS[name]()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(kind):
                    parameter.fill_(value)
        exact, allowed = expected[name, 1.0]
        error = largest_of_all(scores(model, sequences(name), 1.0), exact)
        assert error > 100 * allowed, f"{name}: {kind}"


def test_entropies_of_the_models_tell_something(expected):
    """Entropies neither vanish nor reach the maximum: the weights of the models are neither too
    small nor too large."""
    for exact, _ in expected.values():
        entropy_T = torch.cat([entropy for _, entropy in exact])
        assert 0.5 < entropy_T.mean() < 5.4 and entropy_T.std() > 0.02
