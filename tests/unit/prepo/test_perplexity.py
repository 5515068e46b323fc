"""Prompt perplexity: exp of the mean negative log-probability of tokens with a predecessor."""

import math

import pytest
import torch
import torch.nn.functional as F
from rounding import approx, assert_close

from megatron_prepo.actor.actor import Scores
from megatron_prepo.actor.micro_batch import micro_batch
from megatron_prepo.actor.packing import plan_rows
from megatron_prepo.models.shape import Shape
from megatron_prepo.prepo.perplexity import perplexity
from megatron_prepo.records import Prompt
from megatron_prepo.trainer.prompt_scores import (
    check_agreement,
    engine_perplexities,
    joined,
    prompt_scores,
    prompt_span,
)

V = 7
SHAPE = Shape(
    layers=1,
    hidden=1,
    heads=1,
    groups=1,
    head_size=1,
    mlp=1,
    vocabulary=V,
    experts=0,
    experts_per_token=0,
    head_norms=False,
)


class Bigram:
    """Stand-in for the actor: log p(next | previous) from a table, one row at a time."""

    def __init__(self, logits_VV, budget=8):
        self.logprobs_VV = logits_VV.log_softmax(-1)
        self.budget = budget
        self.temperatures, self.num_scored = [], 0

    def score(self, sequences, *, temperature):
        self.temperatures.append(temperature)
        self.num_scored += sum(sequence.num_scored for sequence in sequences)
        scores = [None] * len(sequences)
        plan = plan_rows(sequences, num_ranks=1, budget=self.budget, shape=SHAPE, multiple=4)
        for row in plan.ranks[0]:
            batch = micro_batch(sequences, row, multiple=4)
            scored_T = batch.targets_T >= 0
            logprobs_RV = self.logprobs_VV[batch.tokens_T[scored_T]]
            logprobs_R = logprobs_RV.gather(1, batch.targets_T[scored_T][:, None])[:, 0]
            entropy_R = -torch.special.xlogy(logprobs_RV.exp(), logprobs_RV.exp()).sum(-1)
            lengths = [sequences[i].num_scored for i in batch.index]
            parts = zip(logprobs_R.split(lengths), entropy_R.split(lengths), strict=True)
            for i, part in zip(batch.index, parts, strict=True):
                scores[i] = Scores(*part)
        return scores


def prompt(tokens, content=None):
    return Prompt("id", "text", "answer", tuple(tokens), content or (0, len(tokens)))


def random_bigram(seed=0):
    return Bigram(3 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))


PROMPTS = [prompt(tokens) for tokens in ([1, 2, 3, 4, 5], [6, 0], [2, 2, 2], [0, 5, 1, 3, 6, 6, 4])]


def test_a_uniform_model_has_perplexity_of_the_vocabulary():
    uniform = Bigram(torch.zeros(V, V))
    assert prompt_scores(uniform, PROMPTS)[0].tolist() == approx([V] * 4, dtype=torch.float32)


def test_a_certain_model_has_perplexity_one():
    logits = torch.full((V, V), -math.inf)
    logits[torch.arange(V), (torch.arange(V) + 1) % V] = 0
    assert prompt_scores(Bigram(logits), [prompt([1, 2, 3, 4])])[0].tolist() == [1.0]


def test_by_hand():
    """exp of the mean, not the mean of exponentials: (1/2, 1/8) gives (2 * 8)^(1/2) = 4."""
    assert perplexity(torch.tensor([1 / 2, 1 / 8]).log()).item() == approx(4, dtype=torch.float32)


def test_equals_exp_of_the_language_model_loss():
    model = random_bigram()
    for item, ppl in zip(PROMPTS, prompt_scores(model, PROMPTS)[0], strict=True):
        tokens = torch.tensor(item.tokens)
        loss = F.cross_entropy(model.logprobs_VV[tokens[:-1]], tokens[1:])
        assert ppl.item() == approx(loss.exp().item(), dtype=torch.float32)


def test_entropy_is_the_mean_over_the_same_tokens():
    """log V for the uniform model, 0 for the certain one; content counts as for perplexity."""
    entropy_P = prompt_scores(Bigram(torch.zeros(V, V)), PROMPTS).entropy_P
    assert entropy_P.tolist() == approx([math.log(V)] * 4, dtype=torch.float32)
    model, item = random_bigram(), prompt([5, 6, 1, 2, 0], content=(2, 4))
    expected = [
        torch.distributions.Categorical(logits=model.logprobs_VV[t]).entropy() for t in (6, 1)
    ]
    assert prompt_scores(model, [item], "content")[1].item() == approx(
        float(sum(expected)) / 2, dtype=torch.float32
    )


def test_never_below_one():
    assert (prompt_scores(random_bigram(), PROMPTS)[0] >= 1).all()


@pytest.mark.parametrize("budget", [6, 9, 100])
def test_order_and_packing_of_the_batch_do_not_matter(budget):
    model = random_bigram()
    expected_P = torch.cat([prompt_scores(model, [item])[0] for item in PROMPTS])
    model.budget = budget
    order = [2, 0, 3, 1]
    ppl_P = prompt_scores(model, [PROMPTS[i] for i in order]).ppl_P
    assert_close(ppl_P, expected_P[order])


ALIKE = [prompt([1, 2, 3, *end], (1, 4)) for end in ([4, 5], [4, 5, 6], [0], [0, 2, 2, 1])]
"""The first is the beginning of the second."""


@pytest.mark.parametrize("tokens", ["all", "content"])
@pytest.mark.parametrize(
    ("prompts", "fewer"), [(ALIKE, 2 * 3), (ALIKE[:2], 3), (ALIKE[:1], 0), (PROMPTS, 0)]
)
def test_a_beginning_that_all_prompts_share_is_scored_once(prompts, fewer, tokens):
    """The numbers are the same; of four prompts, three need not score tokens 2 and 3."""
    own, sharing = random_bigram(), random_bigram()
    expected = prompt_scores(own, prompts, tokens)
    shared = prompt_scores(sharing, prompts, tokens, share_prefix=True)
    assert torch.equal(shared.ppl_P, expected.ppl_P)
    assert torch.equal(shared.entropy_P, expected.entropy_P)
    assert own.num_scored - sharing.num_scored == fewer


def test_two_parts_of_a_prompt_have_the_mean_hidden_state_of_the_whole():
    """3 tokens of mean 1 and 1 token of 5: 2."""
    first = Scores(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, -1.0]))
    second = Scores(torch.ones(1), torch.ones(1), torch.tensor([5.0, 3.0]))
    whole = joined(first, second)
    assert whole.hidden_D.tolist() == [2.0, 0.0]
    assert whole.logprobs_T.tolist() == whole.entropy_T.tolist() == [0.0, 0.0, 0.0, 1.0]


class BigramEngine:
    """Stand-in for an engine that has the weights of a `Bigram`."""

    def __init__(self, bigram):
        self.bigram = bigram

    def score_prompts(self, prompts):
        pairs = [[*zip(p.tokens, p.tokens[1:], strict=False)] for p in prompts]
        return [[self.bigram.logprobs_VV[a, b].item() for a, b in row] for row in pairs]


@pytest.mark.parametrize("tokens", ["all", "content"])
def test_the_engines_perplexity_has_the_same_definition(tokens):
    model = random_bigram()
    prompts = [*PROMPTS, prompt([5, 6, 1, 2, 0], content=(2, 4))]
    ppl_P = engine_perplexities(BigramEngine(model), prompts, tokens)
    assert ppl_P.dtype == torch.float64
    assert_close(ppl_P, prompt_scores(model, prompts, tokens)[0])


def test_perplexities_that_rank_prompts_differently_are_refused():
    """Spearman's correlation of (1, 2, 3) with (10, 11, 15) is 1, with (1, 3, 2) is 1/2."""
    actor_P = torch.tensor([1.0, 2.0, 3.0])
    check_agreement(torch.tensor([10.0, 11.0, 15.0]), actor_P, 1.0)
    swapped_P = torch.tensor([1.0, 3.0, 2.0])
    check_agreement(swapped_P, actor_P, 0.5)
    with pytest.raises(ValueError, match=r"is 0\.500 over 3 prompts, below .*ppl_agreement=0\.51"):
        check_agreement(swapped_P, actor_P, 0.51)
    with pytest.raises(ValueError, match=r"is 0\.000 "):
        check_agreement(torch.ones(3), actor_P, 0.1)


def test_the_policy_is_asked_at_temperature_one():
    model = random_bigram()
    prompt_scores(model, PROMPTS)
    assert model.temperatures == [1.0]


def test_content_leaves_the_template_out_of_the_sum():
    """Tokens 2 and 3 are the text: only their log-probabilities count, the first given token 1."""
    model = random_bigram()
    item = prompt([5, 6, 1, 2, 0], content=(2, 4))
    expected = -(model.logprobs_VV[6, 1] + model.logprobs_VV[1, 2]) / 2
    assert prompt_scores(model, [item], "content")[0].item() == approx(
        expected.exp().item(), dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [((0, 5), slice(0, 4)), ((1, 5), slice(0, 4)), ((2, 4), slice(1, 3)), ((4, 5), slice(3, 4))],
)
def test_span_of_content_by_hand(content, expected):
    """Log-probability i belongs to token i + 1; the first token has none."""
    assert prompt_span(prompt(range(5), content), "content") == expected


def test_content_of_the_first_token_alone_still_scores_something():
    """It has no predecessor; the token after it stands in, rather than a mean over nothing."""
    assert prompt_span(prompt(range(5), (0, 1)), "content") == slice(0, 1)


def test_values_that_are_not_finite_are_kept():
    """An impossible token and a NaN are for selection to sort last, and must not be hidden here."""
    assert perplexity(torch.tensor([-1.0, -math.inf])).item() == math.inf
    assert math.isnan(perplexity(torch.tensor([-1.0, math.nan])).item())


def test_a_float32_overflow_is_not_one():
    """In float64, a mean of -200 nats gives a large number, not inf."""
    assert perplexity(torch.tensor([-200.0])).item() == approx(math.exp(200))
