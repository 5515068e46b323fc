"""The embedded engine against a loop that computes every token of every completion from scratch."""

import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from rounding import approx
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers_scores import judged

from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.stopping import Stops
from megatron_prepo.rollout.transformers_engine import (
    SHRINK_AT,
    EmbeddedEngine,
    _uniform,
    draw,
    most_probable,
)

SAMPLES, NEW_TOKENS, TEMPERATURE, SEED = 5, 24, 0.9, "7/rollouts/3"
STOP = frozenset(range(0, tiny_models.VOCAB, 16))
"""Tokens that end a completion, about one in sixteen: some end with the first token, some never."""
MODELS = {
    "qwen2": tiny_models.qwen2,
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "llama3": tiny_models.llama3,
    "qwen3_moe": tiny_models.qwen3_moe,
    "sliding window": lambda: sliding_window(),
    "mistral": lambda: tiny_models.mistral(window=6),
}


def sliding_window():
    """Return a model of which two of four layers look 6 tokens back, less than a prompt's
    length."""
    settings = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    config = Qwen2Config(**tiny_models.SHAPE, **settings, max_position_embeddings=256)
    return tiny_models.randomized(Qwen2ForCausalLM(config))


def prompts():
    """Prompts of 3 to 14 tokens; two have the same."""
    generator = torch.Generator().manual_seed(2)
    lengths = (9, 14, 3, 9, 12, 8)
    texts = [tuple(torch.randint(3, 259, (n,), generator=generator).tolist()) for n in lengths]
    texts.append(texts[0])
    return [Prompt(f"p{i}", "", "", tokens, (0, 0)) for i, tokens in enumerate(texts)]


def engine_of(model, directory, **settings):
    """Return an engine with the model's weights."""
    engine = EmbeddedEngine(
        tiny_models.save(model, directory),
        SimpleNamespace(eos_token_id=0, decode=lambda tokens, **_: ""),
        stops=Stops(STOP),
        dtype=torch.float32,
        device=torch.device("cpu"),
        **{"batch_size": 256} | settings,
    )
    files = load_file(directory / "model.safetensors")
    engine.load_weights([list(files.items())], 1)
    for (name, theirs), (_, ours) in zip(
        model.named_parameters(), engine.model.named_parameters(), strict=True
    ):
        assert torch.equal(theirs, ours), name
    return engine


def request(**options) -> Request:
    return Request(
        prompts=prompts(),
        temperature=TEMPERATURE,
        max_new_tokens=NEW_TOKENS,
        seed=SEED,
        **{"samples_per_prompt": SAMPLES} | options,
    )


def generate(engine, **options):
    rollouts = engine.generate(request(**options))
    return [(r.prompt.id, r.tokens, r.engine_logprobs) for r in rollouts]


@torch.no_grad()
def log_probabilities(model, tokens):
    """Return those of the next token, without cache, padding or batch."""
    logits_V = model(torch.tensor([tokens])).logits[0, -1].double()
    return (logits_V / TEMPERATURE).log_softmax(-1)


def from_scratch(model):
    """Return one completion after the other."""
    completions = []
    for prompt in prompts():
        for sample in range(SAMPLES):
            tokens, logprobs = [], []
            for uniform in _uniform(f"{SEED}/{prompt.id}/{sample}", NEW_TOKENS):
                logp_V = log_probabilities(model, [*prompt.tokens, *tokens])
                tokens.append(int((logp_V.exp().cumsum(0) <= uniform).sum()))
                logprobs.append(float(logp_V[tokens[-1]]))
                if tokens[-1] in STOP:
                    break
            completions.append((prompt.id, tuple(tokens), tuple(logprobs)))
    return completions


def assert_same(ours, theirs, model, directory):
    """Assert the same tokens; log-probabilities may both err as float32 does over the sequences.

    A uniform number that lies as close to the edge between two tokens as the probabilities below
    it err draws either of them; from there on the two completions are different texts.
    """
    start = {prompt.id: prompt.tokens for prompt in prompts()}
    sequences = [ScoredSequence(start[i] + tokens, len(start[i])) for i, tokens, _ in ours]
    [(_, allowed)] = judged(str(directory), sequences, (TEMPERATURE,))
    for row, ((i, ours_T, logp_T), (same, theirs_T, expected_T)) in enumerate(
        zip(ours, theirs, strict=True)
    ):
        assert i == same
        pairs = list(zip(ours_T, theirs_T, strict=False))
        length = next((t for t, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if (ours_T, theirs_T) != (ours_T[:length], theirs_T[:length]):
            assert length < len(pairs), "one ended where the other went on"
            uniform = _uniform(f"{SEED}/{i}/{row % SAMPLES}", NEW_TOKENS)[length]
            edges_V = log_probabilities(model, [*start[i], *ours_T[:length]]).exp().cumsum(0)
            between = edges_V[min(pairs[length]) : max(pairs[length])]
            assert (between - uniform).abs().max() <= math.expm1(2 * allowed)
        assert logp_T[:length] == pytest.approx(expected_T[:length], rel=0, abs=2 * allowed)


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_those_computed_from_scratch(name, tmp_path):
    model = MODELS[name]()
    ours = generate(engine_of(model, tmp_path))
    assert_same(ours, from_scratch(model), model, tmp_path)
    lengths = [len(tokens) for _, tokens, _ in ours]
    assert min(lengths) < 3 and max(lengths) > 15, "rows are to end early and late"


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_a_completion_does_not_depend_on_its_batch(batch_size, tmp_path):
    model = MODELS["qwen3"]()
    assert_same(
        generate(engine_of(model, tmp_path, batch_size=batch_size)),
        generate(engine_of(model, tmp_path, batch_size=7)),
        model,
        tmp_path,
    )


def test_a_completion_does_not_depend_on_its_rank(tmp_path):
    model, shares = MODELS["qwen3"](), []

    def collect(mine):
        shares.append(mine)
        return [mine]

    for rank in range(3):
        engine = engine_of(model, tmp_path, rank=rank, num_ranks=3, gather=collect)
        if rank < 2:
            with pytest.raises(KeyError):  # the rollouts of other ranks are still missing
                generate(engine)
    engine.gather = lambda mine: [*shares, mine]
    assert_same(generate(engine), generate(engine_of(model, tmp_path)), model, tmp_path)


def test_samples_of_unequal_groups_are_those_of_equal_ones(tmp_path):
    """On two ranks, in a second round: all samples but the first of every other prompt."""
    model, shares = MODELS["qwen3"](), []
    whole = generate(engine_of(model, tmp_path))
    numbers = [range(k % 2, SAMPLES) for k in range(7)]

    def collect(mine):
        shares.append(mine)
        return shares

    ranks = [engine_of(model, tmp_path, rank=r, num_ranks=2, gather=collect) for r in (1, 0)]
    with pytest.raises(KeyError):  # the rollouts of the other rank are still missing
        generate(ranks[0], samples_per_prompt=numbers)
    found = generate(ranks[1], samples_per_prompt=numbers)
    same = [whole[k * SAMPLES + n] for k, of_prompt in enumerate(numbers) for n in of_prompt]
    assert [row[:2] for row in found] == [row[:2] for row in same]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_in_a_batch_of_prompts_it_generates_the_rest_to_the_bit(num_ranks, tmp_path):
    """Each rank generates one batch at a time, kept completely or not at all; none is repeated."""
    model, whole, kept = MODELS["qwen3"](), {}, {}
    for rank in range(num_ranks):
        engine = engine_of(model, tmp_path, rank=rank, num_ranks=num_ranks, batch_size=4)
        engine.gather = lambda mine: [[(i, ([0], [0.0], None)) for i in range(99)], mine]
        batches = []
        generate(engine, on_rollouts=batches.append)
        whole |= {key: rollout for batch in batches for key, rollout in batch.items()}
        assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        kept |= batches[rank]  # the second rank has received another one
    again, shares = {}, []
    for rank in range(num_ranks):
        engine = engine_of(model, tmp_path, rank=rank, num_ranks=num_ranks, batch_size=4)
        engine.gather = lambda mine: shares.append(mine) or shares
        if rank + 1 < num_ranks:
            with pytest.raises(KeyError):  # the rollouts of other ranks are still missing
                generate(engine, cached=kept, on_rollouts=again.update)
    assert len(whole) == len(prompts()) * SAMPLES and 0 < len(kept) < len(whole)
    rest = generate(engine, cached=kept, on_rollouts=again.update)
    assert again.keys() == whole.keys() - kept.keys()
    expected = [whole[prompt.id, sample] for prompt in prompts() for sample in range(SAMPLES)]
    assert rest == [(r.prompt.id, r.tokens, r.engine_logprobs) for r in expected]
    assert all(again[key] == whole[key] for key in again)


def test_scores_of_prompts_are_the_models_own_and_complete_on_every_rank(tmp_path):
    model, shares = MODELS["qwen3"](), []

    def collect(mine):
        shares.append(mine)
        return [mine]

    engine = engine_of(model, tmp_path, rank=0, num_ranks=2, gather=collect)
    with pytest.raises(KeyError):  # the other's share is still missing
        engine.score_prompts(prompts())
    engine = engine_of(model, tmp_path, rank=1, num_ranks=2, gather=lambda mine: [*shares, mine])
    sequences = [ScoredSequence(prompt.tokens, 1) for prompt in prompts()]
    [(exact, allowed)] = judged(str(tmp_path), sequences, (1.0,))
    for ours, (logprobs_T, _) in zip(engine.score_prompts(prompts()), exact, strict=True):
        assert ours == pytest.approx(logprobs_T.tolist(), rel=0, abs=allowed)


def test_a_prompt_is_computed_once_and_ended_rows_leave(tmp_path):
    engine, shapes = engine_of(MODELS["qwen3"](), tmp_path), []
    engine.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape))
    )
    lengths = [len(tokens) for _, tokens, _ in generate(engine)]
    (first_rows, first_width), *steps = shapes
    assert (first_rows, first_width) == (6, 14), "seven prompts, of which two are the same"
    assert len(steps) == NEW_TOKENS - 1 and {width for _, width in steps} == {1}
    for t, (rows, _) in enumerate(steps, 1):
        going = sum(length > t for length in lengths)
        assert going <= rows <= going / SHRINK_AT


def test_a_routing_is_that_of_the_whole_sequence_but_its_last_token(tmp_path):
    """The reference is one pass over each sequence; rows leave the batch, prompts are padded."""
    model = MODELS["qwen3_moe"]()
    engine, form = engine_of(model, tmp_path), RoutingFormat(4, 2, 8)
    plain = engine.generate(request())
    assert all(rollout.routing is None for rollout in plain)
    routed = engine.generate(request(routing=True))
    assert [r.tokens for r in routed] == [r.tokens for r in plain]
    for rollout in routed:
        tokens_1S = torch.tensor([rollout.prompt.tokens + rollout.tokens[:-1]])
        logits = model(tokens_1S, output_router_logits=True).router_logits
        expected_SLk = torch.stack([layer.topk(2).indices for layer in logits], dim=1)
        assert (form.unpack(rollout.routing) == expected_SLk.numpy()).all()
    assert not any(layer.mlp.gate._forward_hooks for layer in engine.model.model.layers)


def test_draw_never_takes_a_token_of_probability_0():
    logits_RV = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]]).expand(3, 4)
    uniform_R = torch.tensor([0.0, 1 - 2.0**-53, 0.7], dtype=torch.float64)
    token_R, logprob_R = draw(logits_RV, uniform_R, 0.5)
    probability = 1 / (1 + torch.tensor(-2.0).exp())  # of token 1, at half the temperature
    assert token_R.tolist() == [1, 2, 1]
    assert logprob_R[0].exp() == approx(float(probability), dtype=torch.float32)


def test_the_most_probable_tokens_are_those_of_the_full_distribution():
    """Two tokens are equally probable; of these the first counts as more probable."""
    logprobs_RV = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1]]).log()

    def kept(top_p=1.0, top_k=None):
        chosen_RV = most_probable(logprobs_RV, top_p, top_k)
        assert chosen_RV[chosen_RV > -torch.inf].equal(logprobs_RV[chosen_RV > -torch.inf])
        return (chosen_RV[0] > -torch.inf).nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert [kept(top_k=k) for k in (1, 2, 9)] == [[1], [1, 2], [0, 1, 2, 3, 4]]
    assert [kept(top_p=p) for p in (0.01, 0.5, 0.7, 0.85)] == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]
    # of the full distribution: among three tokens alone, two would have a probability of 0.75
    assert kept(top_p=0.7, top_k=3) == [1, 2, 3]
    assert kept(top_p=0.7, top_k=2) == [1, 2]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"temperature": 0.0}, [1, 1, 1, 1]),
        ({"temperature": 1.0, "top_k": 1}, [1, 1, 1, 1]),
        # 0.4 and 0.2 become 2/3 and 1/3
        ({"temperature": 1.0, "top_k": 2}, [1, 1, 2, 2]),
        ({"temperature": 1.0}, [0, 1, 2, 4]),
    ],
)
def test_tokens_are_drawn_from_what_is_left(settings, tokens):
    logits_RV = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1]]).log().repeat(4, 1) + 3
    uniform_R = torch.tensor([0.0, 0.45, 0.69, 0.95], dtype=torch.float64)
    token_R, logprob_R = draw(logits_RV, uniform_R, **settings)
    assert token_R.tolist() == tokens
    expected_R = logits_RV.log_softmax(-1).gather(1, token_R[:, None])[:, 0]
    assert logprob_R.equal(expected_R), "in the full distribution"


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_in_bfloat16_it_computes_what_transformers_does_to_the_bit(name, tmp_path):
    """Rotary frequencies are not weights: rounded to 8 bits, they would turn by other angles."""
    tiny_models.save(MODELS[name](), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    engine = EmbeddedEngine(
        tmp_path,
        SimpleNamespace(eos_token_id=0),
        stops=Stops(STOP),
        dtype=torch.bfloat16,
        fp32_lm_head=False,
        device=torch.device("cpu"),
        batch_size=1,
    )
    engine.load_weights([list(load_file(tmp_path / "model.safetensors").items())], 1)
    tokens_1S = torch.arange(200)[None]
    with torch.no_grad():
        assert torch.equal(engine.model(tokens_1S).logits, theirs(tokens_1S).logits)


def test_greedy_completions_are_those_of_transformers(tmp_path):
    model = tiny_models.qwen3(tied=False)
    engine = engine_of(model, tmp_path)
    greedy = Request(
        prompts=prompts(), samples_per_prompt=1, temperature=0.0, max_new_tokens=12, seed="any"
    )
    for rollout in engine.generate(greedy):
        generated = model.generate(
            torch.tensor([rollout.prompt.tokens]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(STOP),
            pad_token_id=0,
        )
        assert tuple(generated[0, len(rollout.prompt.tokens) :].tolist()) == rollout.tokens
