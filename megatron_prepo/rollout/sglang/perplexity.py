"""Request and response of a server that scores a prompt.

A probe is a prefill only.  With log-probabilities of the prompt, SGLang does not reuse what it has
cached of the prompt, but caches what it computes, which the rollouts of the selected prompts then
reuse.  Servers do not return entropies.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_prepo.rollout.sglang.completion import CompletionJob
from megatron_prepo.rollout.sglang.fleet import ServerFailed, StaleWeights


@dataclass(frozen=True)
class Probing:
    """Settings shared by all probes of a call."""

    weight_version: str
    """The servers' name for the actor's weights."""
    vocab_size: int
    can_be_cut = False

    def request(self, job: CompletionJob, request_id: str) -> dict[str, Any]:
        """Return the body of `POST /generate`; the temperature is always 1."""
        return {
            "rid": request_id,
            "input_ids": list(job.prompt.tokens),
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }

    def read(self, answer: Any, job: CompletionJob, *, cut: bool, server: str) -> list[float]:
        """Return the log-probability of each of the prompt's tokens except the first.

        Raises StaleWeights for a response by other weights, and ServerFailed for anything that is
        not a complete response to this request.
        """
        tokens, where = job.prompt.tokens, f"{server} scored the prompt {job.prompt.id!r}"
        try:
            version = answer["meta_info"]["weight_version"]
            triples = answer["meta_info"]["input_token_logprobs"]
            logprobs, ids = [t[0] for t in triples[1:]], [t[1] for t in triples]
        except (TypeError, KeyError, IndexError) as error:
            raise ServerFailed(f"{where} with {error!r} in {str(answer)[:200]}") from error
        if version != self.weight_version:
            raise StaleWeights(
                f"{where} by weights {version}, and the actor's are {self.weight_version}"
            )
        # SGLang returns the number 0 for the last token of the vocabulary, with the right value
        numbered = [0 if token == self.vocab_size - 1 else token for token in tokens]
        if ids not in (list(tokens), numbered):
            raise ServerFailed(f"{where} with log-probabilities of other tokens than the prompt's")
        if not all(isinstance(p, float | int) and math.isfinite(p) and p < 1e-3 for p in logprobs):
            raise ServerFailed(f"{where} with log-probabilities that are none")
        return [float(p) for p in logprobs]
