"""Records that the stages exchange: typed and immutable.

Letters: P candidate prompts, K selected prompts, G rollouts per prompt, N = K*G rollouts.
Rollouts are always in their prompts' order: with G each, ``k*G + g`` is sample g of prompt k.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A question with a verifiable answer."""

    id: str
    """Unique within the run."""
    text: str
    """The user's text."""
    answer: str
    """The answer with which the reward function compares; empty if its line has none."""
    tokens: tuple[int, ...]
    """The model's input: the text with special tokens and, if configured, the chat template."""
    content: tuple[int, int]
    """Span of `tokens` that holds the user's text."""
    record: str = "{}"
    """Its line of the prompt file, a JSON object, for a reward function that takes the record."""


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, as the engine returned it."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """Completion, its end-of-sequence token included when `finished`."""
    engine_logprobs: tuple[float, ...]
    """Log-probability of each token under the engine, at the sampling temperature, in nats."""
    text: str
    """The completion without special tokens."""
    finished: bool
    """Whether it ended with a stop token; False: cut at the limit of new tokens, or `aborted`."""
    weight_version: int
    """Number of optimizer updates of the weights that generated it."""
    aborted: bool = False
    """Whether it was cut off because it took too long (`servers.straggler_seconds`)."""
    routing: bytes | None = None
    """The experts of all tokens of prompt and completion but the last (`routing.RoutingFormat`), if
    they were requested (`rollout.router_replay`)."""

    def __post_init__(self) -> None:
        assert self.tokens, f"prompt {self.prompt.id}: an engine returned an empty completion"
        assert len(self.tokens) == len(self.engine_logprobs), (
            f"prompt {self.prompt.id}: {len(self.tokens)} tokens, "
            f"{len(self.engine_logprobs)} log-probabilities"
        )


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens for the actor to score: ``tokens[start:]``, each given all preceding tokens."""

    tokens: tuple[int, ...]
    start: int
    routing: bytes | None = None
    """The experts of all tokens but the last, as many bytes each; None: the actor chooses."""

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.tokens), (
            f"start={self.start} must leave a predecessor and a token of {len(self.tokens)}"
        )
        assert self.routing is None or len(self.routing) % (len(self.tokens) - 1) == 0, (
            f"{len(self.routing)} bytes of routing do not divide by {len(self.tokens) - 1} tokens"
        )

    @property
    def num_scored(self) -> int:
        """Number of tokens that get a log-probability."""
        return len(self.tokens) - self.start

    def routing_of_first(self, count: int) -> bytes | None:
        """Return the experts of the first `count` tokens."""
        if self.routing is None:
            return None
        return self.routing[: count * (len(self.routing) // (len(self.tokens) - 1))]


def scored_sequence(rollout: Rollout) -> ScoredSequence:
    """Return prompt and completion as a sequence whose completion is scored."""
    prompt = rollout.prompt.tokens
    return ScoredSequence(prompt + rollout.tokens, len(prompt), rollout.routing)
