"""GSPO's ratio of a rollout whose tokens several ranks hold: loss and gradient are those of one."""

from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
from ranks import join, on_ranks
from rounding import approx, assert_close

from megatron_prepo.prepo.loss import LossTerms, gspo, policy_loss
from tests.unit.prepo.test_loss import LENGTHS_N, batch

CUTS = {
    # tokens of the ranks, of rollouts of 3, 1, 4 and 2 tokens
    "through two rollouts": (2, 4, 4),
    "between rollouts": (3, 5, 2),
    "a rank without tokens": (10, 0, 0),
    "a rollout over all ranks": (5, 2, 3),
}


def here(cut):
    """Return how many tokens of each rollout lie in this range."""
    ends = list(accumulate(LENGTHS_N.tolist(), initial=0))
    return [max(0, min(b, cut.stop) - max(a, cut.start)) for a, b in pairwise(ends)]


def part(cut, group):
    """Return the loss of some of the tokens, and its gradient."""
    logprobs_T, entropy_T, terms = batch("seq-mean-token-mean")
    mine_T = logprobs_T.detach()[cut].requires_grad_()
    terms = LossTerms(terms.old_logprobs_T, terms.advantage_T, terms.coefficient_T)[cut]
    objective = partial(gspo, here_M=torch.tensor(here(cut)), lengths_M=LENGTHS_N, group=group)
    loss, sums = policy_loss(mine_T, entropy_T[cut], terms, objective=objective)
    return loss.detach(), sums["clipped"], torch.autograd.grad(loss, mine_T)[0]


def parts():
    join(3)
    found = {}
    for name, sizes in CUTS.items():
        ends = list(accumulate(sizes, initial=0))
        cut = slice(*ends[dist.get_rank() : dist.get_rank() + 2])
        found[name] = part(cut, dist.group.WORLD)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results():
    return on_ranks(3, parts)


@pytest.mark.parametrize("name", CUTS)
def test_loss_and_gradient_are_those_of_one_rank(results, name):
    loss, clipped, gradient_T = part(slice(0, 10), None)
    losses, counts, gradients = zip(*(rank[name] for rank in results), strict=True)
    assert sum(losses).item() == approx(loss.item())
    assert sum(counts) == clipped
    assert_close(torch.cat(gradients), gradient_T)


def test_the_mean_of_a_rank_alone_is_another(results):
    """So that the test could fail."""
    _, _, gradient_T = part(slice(0, 10), None)
    _, _, alone_T = part(slice(0, 2), None)
    assert (alone_T - gradient_T[:2]).abs().max() > 1e-3
