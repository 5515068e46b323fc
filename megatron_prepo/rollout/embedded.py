"""`transformers` generation inside the training processes, each rank its share of the completions.

It holds a whole model of its own on every rank and gets its weights through weight sync only, under
Hugging Face names, as a server would.  A completion is a function of the weights, the seed, the
prompt and the sample's number: who generates it, and beside what, does not matter (but for float
rounding in a batch of another shape).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from megatron_prepo.records import Prompt, Rollout


class EmbeddedEngine:
    """`gather` gives every rank's value to every rank; `rank` and `num_ranks` split the work."""

    def __init__(
        self,
        hf_directory: str | Path,
        tokenizer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        gather: Callable[[list], list[list]] = lambda mine: [mine],
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_directory))
        self.model = model.to(device, dtype).eval()
        self.tokenizer, self.device, self.batch_size = tokenizer, device, batch_size
        self.rank, self.num_ranks, self.gather = rank, num_ranks, gather
        self.stop_tokens = stop_tokens(hf_directory, tokenizer)
        self.weight_version: int | None = None
        """Optimizer updates behind the weights; None before the first sync."""

    @torch.no_grad()
    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        """Replace all weights by those of the buckets.

        Raises ValueError naming the tensors unless every parameter comes exactly once and fits.
        """
        self.weight_version = None
        # a tied head is the same parameter as the embedding, and comes once, under that name
        missing = dict(self.model.named_parameters())
        for bucket in buckets:
            for name, tensor in bucket:
                if name not in missing:
                    raise ValueError(f"weight sync: the engine has no (further) tensor {name}")
                parameter = missing.pop(name)
                if parameter.shape != tensor.shape:
                    raise ValueError(
                        f"weight sync: {name} has shape {tuple(tensor.shape)}, "
                        f"the engine's {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensor)
        if missing:
            raise ValueError(f"weight sync: no weights came for {sorted(missing)}")
        self.weight_version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        max_new_tokens: int,
        seed: str,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Rollout]:
        """`samples_per_prompt` rollouts of each prompt, in the prompts' order, on every rank.

        `on_progress` is called after each batch with about how many completions all ranks have
        done, and how many there are.
        """
        assert self.weight_version is not None, "the engine has no weights: sync first"
        jobs = [(prompt, sample) for prompt in prompts for sample in range(samples_per_prompt)]
        # neighbours in length share a batch, so that little is padded
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0].tokens))
        mine, done = order[self.rank :: self.num_ranks], []
        for first in range(0, len(mine), self.batch_size):
            batch = mine[first : first + self.batch_size]
            seeds = [f"{seed}/{jobs[i][0].id}/{jobs[i][1]}" for i in batch]
            completions = self._complete(
                [jobs[i][0].tokens for i in batch], seeds, temperature, max_new_tokens
            )
            done += zip(batch, completions, strict=True)
            on_progress(min(len(done) * self.num_ranks, len(jobs)), len(jobs))
        completion_of = {i: c for share in self.gather(done) for i, c in share}
        return [self._rollout(prompt, *completion_of[i]) for i, (prompt, _) in enumerate(jobs)]

    def _rollout(self, prompt: Prompt, tokens: list[int], logprobs: list[float]) -> Rollout:
        return Rollout(
            prompt=prompt,
            tokens=tuple(tokens),
            engine_logprobs=tuple(logprobs),
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            finished=tokens[-1] in self.stop_tokens,
            weight_version=self.weight_version,
        )

    @torch.no_grad()
    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[str],
        temperature: float,
        max_new_tokens: int,
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities, one completion a prompt and seed."""
        width = max(map(len, prompts))
        ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, tokens in enumerate(prompts):
            ids_BS[row, width - len(tokens) :] = torch.tensor(tokens)
            mask_BS[row, width - len(tokens) :] = 1
        sampling = SeededSampling(seeds, temperature, max_new_tokens, self.device)
        out_BS = self.model.generate(
            ids_BS.to(self.device),
            attention_mask=mask_BS.to(self.device),
            logits_processor=LogitsProcessorList([sampling]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.stop_tokens),
                pad_token_id=0,
            ),
        )
        tokens_BT = out_BS[:, width:].tolist()
        logprobs_BT = sampling.logprobs_BT[:, : out_BS.shape[1] - width].tolist()
        completions = []
        for tokens, logprobs in zip(tokens_BT, logprobs_BT, strict=True):
            ends = (t for t, token in enumerate(tokens, 1) if token in self.stop_tokens)
            length = next(ends, len(tokens))
            completions.append((tokens[:length], logprobs[:length]))
        return completions


class SeededSampling(LogitsProcessor):
    """Draws each row's tokens with random numbers of its own, and notes their log-probabilities.

    Generation then is greedy over what was drawn.  Row b draws its t-th token by inverting the
    cumulative distribution at a uniform number that depends on its seed and t alone.
    """

    def __init__(self, seeds: Sequence[str], temperature: float, max_new_tokens: int, device):
        self.temperature, self.position = temperature, 0
        self.uniform_BT = torch.stack([_uniform(seed, max_new_tokens) for seed in seeds]).to(device)
        self.logprobs_BT = torch.zeros(len(seeds), max_new_tokens, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that leave only the drawn token."""
        logprobs_BV = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        cumulative_BV = logprobs_BV.double().exp().cumsum(dim=-1)
        target_B1 = self.uniform_BT[:, self.position, None] * cumulative_BV[:, -1:]
        # right: a token of probability 0 is never drawn, not even by a uniform number of 0
        token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        token_B1 = token_B1.clamp(max=scores.shape[1] - 1)
        self.logprobs_BT[:, self.position] = logprobs_BV.gather(1, token_B1)[:, 0]
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


def stop_tokens(hf_directory: str | Path, tokenizer) -> frozenset[int]:
    """Tokens that end a completion: the generation configuration's, else the tokenizer's."""
    if (Path(hf_directory) / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(hf_directory).eos_token_id
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    assert tokenizer.eos_token_id is not None, "preflight checks that there is a stop token"
    return frozenset([tokenizer.eos_token_id])


def _uniform(seed: str, count: int) -> torch.Tensor:
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
