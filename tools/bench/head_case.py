"""One head to measure: its shape, inputs as peaked as those of a language model, and exact results.

Random hidden states give flat logits, which hide rounding errors.  Here a token's hidden state is
the combination of its CANDIDATES' rows of the weight that gives the first of them the logit TOP and
each next one a decrement less, which is drawn from STEP per token; logits of the remaining
vocabulary are around 0, with the noise of random rows.  The target is drawn from the candidates'
softmax.  The resulting mean entropy and largest logit are reported with every result.

On a GPU, tensor parallel n is one rank's share of the work: V/n rows in place of the full
vocabulary, without communication.  On the CPU the ranks are real.

Letters: T tokens, V vocabulary rows of this rank, H hidden, J candidates, R tokens with exact
results.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist

CANDIDATES = 8
TOP, STEP = 20.0, (0.3, 0.9)
BLOCK = 1024
"""Number of tokens whose candidates' rows are gathered at a time."""
EXACT_ROWS = 256
EXACT_COLUMNS = 8192
"""Number of rows of the weight that are in float64 at a time."""


@dataclass(frozen=True)
class Shape:
    """A model's output head, one of `tensor` parts of it, and a number of tokens."""

    model: str
    hidden: int
    vocab: int
    tensor: int
    tokens: int

    @property
    def columns(self) -> int:
        """Vocabulary rows per rank."""
        return self.vocab // self.tensor

    def matmul_flops(self, products: int) -> int:
        """Return the floating-point operations of a number of [T, H] x [H, V] products per rank."""
        return products * 2 * self.tokens * self.hidden * self.columns


@dataclass(frozen=True)
class Exact:
    """Results in float64 for the tokens `rows_R`, and statistics of the inputs."""

    rows_R: torch.Tensor
    logprobs_R: torch.Tensor
    entropy_R: torch.Tensor
    logit_abs_max: float


@dataclass(frozen=True)
class Case:
    """Inputs of one head on one rank, and the gradients that its outputs receive.

    The weight has Megatron's `main_grad`, in float32, for providers that support it.
    """

    shape: Shape
    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    targets_T: torch.Tensor
    grad_logprobs_T: torch.Tensor
    grad_entropy_T: torch.Tensor | None
    vocab_size: int
    group: dist.ProcessGroup | None
    exact: Exact

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Return the tensors whose gradients are computed."""
        return [self.hidden_TH, self.weight_VH]


def make_case(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    *,
    entropy_gradient: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Case:
    """Create the same inputs on every rank of `group`; each keeps its rows of the weight.

    `entropy_gradient`: the loss also depends on the entropy, as with an entropy bonus.  PREPO's
    weights are detached, so that only the log-probability has a gradient.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    assert ranks in (1, shape.tensor), "one rank stands for all, or all are present"
    vocab_size = shape.columns * ranks
    random = torch.Generator(device).manual_seed(1)
    weight_VH = _randn(random, vocab_size, shape.hidden).mul_(shape.hidden**-0.5).to(dtype)
    hidden_TH, targets_T = _peaked(random, weight_VH, shape.tokens)
    exact = exact_answer(hidden_TH, weight_VH, targets_T)
    own_VH = weight_VH[rank * shape.columns :][: shape.columns].clone()
    own_VH.requires_grad_().main_grad = torch.zeros_like(own_VH, dtype=torch.float32)
    grads_2T = _randn(random, 2, shape.tokens)
    return Case(
        shape=shape,
        hidden_TH=hidden_TH.requires_grad_(),
        weight_VH=own_VH,
        targets_T=targets_T,
        grad_logprobs_T=grads_2T[0],
        grad_entropy_T=grads_2T[1] if entropy_gradient else None,
        vocab_size=vocab_size,
        group=group,
        exact=exact,
    )


def exact_answer(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor
) -> Exact:
    """Compute log-probability and entropy in float64 of EXACT_ROWS evenly spaced tokens."""
    last = len(hidden_TH) - 1
    rows_R = torch.linspace(0, last, min(EXACT_ROWS, last + 1)).round().long().to(hidden_TH.device)
    hidden_RH = hidden_TH[rows_R].double()
    logits_RV = torch.cat(
        [hidden_RH @ part_VH.double().t() for part_VH in weight_VH.split(EXACT_COLUMNS)], dim=1
    )
    logit_abs_max = logits_RV.abs().max().item()
    logprobs_RV = logits_RV.log_softmax(dim=1)
    return Exact(
        rows_R=rows_R,
        logprobs_R=logprobs_RV.gather(1, targets_T[rows_R, None])[:, 0],
        entropy_R=-(logprobs_RV.exp() * logprobs_RV).sum(dim=1),
        logit_abs_max=logit_abs_max,
    )


def describe(case: Case) -> dict:
    """Return the parameters of the case, for the result."""
    return dataclasses.asdict(case.shape) | {
        "columns": case.shape.columns,
        "dtype": str(case.hidden_TH.dtype).removeprefix("torch."),
        "entropy_mean": case.exact.entropy_R.mean().item(),
        "logit_abs_max": case.exact.logit_abs_max,
        "exact_rows": len(case.exact.rows_R),
    }


def _peaked(random: torch.Generator, weight_VH, num_tokens):
    """Return hidden states whose softmax has its mass on a few candidates, and targets of these."""
    vocab_size, device = len(weight_VH), weight_VH.device
    numbers_J = torch.arange(CANDIDATES, device=device)
    first_T = torch.randint(vocab_size, (num_tokens,), device=device, generator=random)
    candidates_TJ = (first_T[:, None] + numbers_J * (vocab_size // CANDIDATES)) % vocab_size
    low, high = STEP
    step_T1 = low + (high - low) * torch.rand(num_tokens, 1, device=device, generator=random)
    logits_TJ = TOP - step_T1 * numbers_J
    parts = []
    for tokens in torch.arange(num_tokens, device=device).split(BLOCK):
        rows_TJH = weight_VH[candidates_TJ[tokens]].float()
        shares_TJ = torch.linalg.solve(rows_TJH @ rows_TJH.mT, logits_TJ[tokens])
        parts.append((shares_TJ[:, None] @ rows_TJH)[:, 0].to(weight_VH.dtype))
    chosen_T1 = torch.multinomial(logits_TJ.softmax(1), 1, generator=random)
    return torch.cat(parts), candidates_TJ.gather(1, chosen_T1)[:, 0]


def _randn(random: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=random.device, generator=random)
