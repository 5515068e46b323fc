"""Request and response of one completion."""

import base64
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import Prompt
from megatron_prepo.rollout.sglang.fleet import ServerFailed, StaleWeights
from megatron_prepo.rollout.stopping import Stops

FINISHES = ("stop", "length", "abort")


@dataclass(frozen=True)
class CompletionJob:
    """One completion to generate."""

    number: int
    """Position among the completions of the call, each of which is generated once."""
    prompt: Prompt
    seed: str
    """Text from which the random numbers are derived; different for every job."""


@dataclass(frozen=True)
class Completion:
    """A server's response, checked."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    """`stop`: by a stop token or string; `length`: at the limit of new tokens; `abort`: by us."""
    routing: bytes | None = None
    """Experts of prompt and completion, if requested."""


@dataclass(frozen=True)
class Sampling:
    """Settings shared by all completions of a call."""

    temperature: float
    max_new_tokens: int
    stops: Stops
    weight_version: str
    """The servers' name for the actor's weights."""
    vocab_size: int
    routing: RoutingFormat | None = None
    """Format of the routing to request; None: request none."""
    top_p: float = 1.0
    top_k: int | None = None
    can_be_cut = True
    """Whether a partial completion is usable."""

    def request(self, job: CompletionJob, request_id: str) -> dict[str, Any]:
        """Return the body of `POST /generate`.

        It requests log-probabilities of new tokens only: with those of the prompt, SGLang would not
        reuse the prompt's cached prefix.
        """
        digest = hashlib.sha256(job.seed.encode()).digest()
        return {
            "rid": request_id,
            "input_ids": list(job.prompt.tokens),
            "return_logprob": True,
            **({"return_routed_experts": True} if self.routing else {}),
            "sampling_params": {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": -1 if self.top_k is None else self.top_k,
                "min_p": 0.0,
                "max_new_tokens": self.max_new_tokens,
                "stop_token_ids": sorted(self.stops.tokens),
                **({"stop": self.stops.texts, "no_stop_trim": True} if self.stops.texts else {}),
                "sampling_seed": int.from_bytes(digest[:8], "little") >> 1,
            },
        }

    def read(self, answer: Any, job: CompletionJob, *, cut: bool, server: str) -> Completion:
        """Return the completion in a response of `POST /generate`.

        `cut`: an abort was requested.  Raises StaleWeights for a response by other weights, and
        ServerFailed for anything that is not a complete response to this request.
        """

        def require(truth: object, what: str) -> None:
            if not truth:
                raise ServerFailed(f"{server} answered a request for {job.prompt.id!r} with {what}")

        try:
            meta, tokens = answer["meta_info"], tuple(answer["output_ids"])
            finish, version = meta["finish_reason"]["type"], meta["weight_version"]
            spans = [span["version"] for span in meta.get("weight_versions") or ()]
            triples = meta["output_token_logprobs"]
            logprobs, ids = tuple(t[0] for t in triples), tuple(t[1] for t in triples)
            num_prompt_tokens = meta["prompt_tokens"]
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            require(False, f"something else than a completion: {error!r} in {str(answer)[:200]}")
        if any(v != self.weight_version for v in (version, *spans)):
            raise StaleWeights(
                f"{server} answered by weights {version} (in turn: {spans}), and the actor's are "
                f"{self.weight_version}"
            )
        require(num_prompt_tokens == len(job.prompt.tokens), f"{num_prompt_tokens} prompt tokens")
        require(tokens, f"no token (finish {finish})")
        require(len(tokens) <= self.max_new_tokens, f"{len(tokens)} tokens, more than asked for")
        require(ids == tokens, "log-probabilities of other tokens than the completion's")
        require(
            all(type(t) is int and 0 <= t < self.vocab_size for t in tokens),
            "tokens outside of the vocabulary",
        )
        require(
            all(isinstance(p, float | int) and math.isfinite(p) and p < 1e-3 for p in logprobs),
            "log-probabilities that are none",
        )
        require(finish in FINISHES, f"the unknown finish {finish!r}")
        require(finish != "abort" or cut, "an abort that we did not ask for")
        require(
            finish != "length" or len(tokens) == self.max_new_tokens,
            f"{len(tokens)} of {self.max_new_tokens} tokens, cut for length",
        )
        routing = None
        if self.routing:
            try:
                routing = self._routing(meta.get("routed_experts"), num_prompt_tokens + len(tokens))
            except ValueError as error:
                require(False, f"a routing (rollout.router_replay) that is none: {error}")
        completion = Completion(tokens, tuple(map(float, logprobs)), finish, routing)
        return self._until_stop(completion, num_prompt_tokens)

    def _until_stop(self, completion: Completion, num_prompt_tokens: int) -> Completion:
        """Return a completion up to its first stop string.

        SGLang looks for one in the last tokens, as many as its own encoding of the string has, and
        misses it where the policy wrote it in more.
        """
        length = self.stops.length(completion.tokens) if self.stops.texts else None
        if length is None:
            return completion
        routing = completion.routing
        if routing is not None:
            one = len(routing) // (num_prompt_tokens + len(completion.tokens) - 1)
            routing = routing[: one * (num_prompt_tokens + length - 1)]
        return replace(
            completion,
            tokens=completion.tokens[:length],
            logprobs=completion.logprobs[:length],
            finish="stop",
            routing=routing,
        )

    def _routing(self, encoded: object, num_tokens: int) -> bytes:
        """Return the routing in a response; raises ValueError unless it has this many tokens.

        SGLang stores it with keys and values: for cached tokens it is the routing of the pass that
        computed them, and so that of every completion that uses them.
        """
        assert self.routing is not None, "routing was requested"
        if not isinstance(encoded, str):
            raise ValueError(f"{str(encoded)[:50]}; is enable_return_routed_experts set?")
        numbers: NDArray[np.int32] = np.frombuffer(base64.b64decode(encoded, validate=True), "<i4")
        # the last token's routing would be returned with its successor, which does not exist
        shape = (num_tokens - 1, self.routing.layers, self.routing.experts_per_token)
        return self.routing.pack(numbers.reshape(shape))
