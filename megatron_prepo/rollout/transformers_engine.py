"""The embedded engine: a `transformers` model inside the training processes.

Each rank holds a complete model, generates its share of the rollouts, and gets weights through
weight sync only, under Hugging Face names, like a server.  A completion is a function of weights,
seed, prompt and sample number; the rank and the batch that generate it do not matter, except for
float rounding in a batch of another shape.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.masking_utils import sdpa_mask

from megatron_prepo import internals
from megatron_prepo.models.fp32_matmul import product
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout.engine import Bucket, Request, Shapes, Tokenizer
from megatron_prepo.rollout.routing_recorder import ChosenExperts
from megatron_prepo.rollout.stopping import Stops

Decoded = tuple[list[int], list[float], bytes | None]
"""Tokens, their log-probabilities, and the routing of prompt and tokens if requested."""
GROUPED = "sdpa_grouped"
"""Name in transformers of the attention on a CPU (`_grouped`)."""


class EmbeddedEngine:
    """Engine that decodes in this process; `gather` returns every rank's value on every rank."""

    def __init__(
        self,
        hf_directory: str | Path,
        tokenizer: Tokenizer,
        *,
        stops: Stops,
        dtype: torch.dtype,
        fp32_lm_head: bool = True,
        device: torch.device,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        gather: Callable[[Any], list[Any]] = lambda mine: [mine],
    ) -> None:
        self.hf = read_hf_config(hf_directory, for_megatron=False)
        settings = AutoConfig.from_pretrained(hf_directory, trust_remote_code=False)
        attention = GROUPED if device.type == "cpu" else "sdpa"
        # `to(dtype)` would also round the rotary frequencies
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
        self.model = model.to(device).eval()
        self.fp32_lm_head: bool | None = fp32_lm_head
        """Whether logits are float32, computed from inputs of `dtype`, or rounded to `dtype`."""
        if fp32_lm_head:
            head = self.model.get_output_embeddings()
            assert head.bias is None, "no supported family has a bias on its output layer"
            internals.replace(head, "forward", MethodType(_fp32_logits, head))
        self.tokenizer, self.stops = tokenizer, stops
        self.device, self.batch_size = device, batch_size
        self.rank, self.num_ranks, self.gather = rank, num_ranks, gather
        self.weight_version: int | None = None
        """Number of optimizer updates in the weights; None before the first sync."""
        self.verified = False
        """Whether the weights have been compared with the actor's, by log-probabilities."""

    @torch.no_grad()
    def load_weights(
        self, buckets: Iterable[Bucket], version: int, shapes: Shapes | None = None
    ) -> None:
        """Replace all weights with those of the buckets; `shapes` is not used here.

        Raises ValueError, which names the tensors, unless every parameter is sent exactly once with
        its shape.
        """
        self.weight_version = None
        # a tied head is the embedding's parameter, and is sent once, under the embedding's name
        missing = _parameters_by_file_name(self.model)
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

    def generate(self, request: Request) -> list[Rollout]:
        """Return the rollouts of the request, in its order, on every rank.

        `on_rollouts` of each rank receives that rank's share, one batch at a time.
        """
        assert self.weight_version is not None, "the engine has no weights: sync first"
        jobs, cached = request.samples(), request.cached
        # prompts of similar length share a batch, which limits padding
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0].tokens))
        mine, done = order[self.rank :: self.num_ranks], []
        # cached rollouts of this rank are complete batches, so the rest is batched as it would have
        # been without them; other batches would round differently
        mine = [i for i in mine if (jobs[i][0].id, jobs[i][1]) not in cached]
        for first in range(0, len(mine), self.batch_size):
            batch = mine[first : first + self.batch_size]
            completions = self._complete_batch([jobs[i] for i in batch], request)
            pairs = list(zip(batch, completions, strict=True))
            request.on_rollouts(
                {(jobs[i][0].id, jobs[i][1]): self._rollout(jobs[i][0], *c) for i, c in pairs}
            )
            done += pairs
            request.on_progress(min(len(done) * self.num_ranks, len(jobs)), len(jobs))
        completion_of = {i: c for share in self.gather(done) for i, c in share}
        return [
            self._rollout(prompt, *completion_of[i])
            if i in completion_of
            else cached[prompt.id, sample]
            for i, (prompt, sample) in enumerate(jobs)
        ]

    def _complete_batch(
        self, batch: Sequence[tuple[Prompt, int]], request: Request
    ) -> list[Decoded]:
        experts = ChosenExperts(self.model) if request.routing else None
        with experts.watched() if experts else nullcontext():
            completions: list[Decoded] = self._complete(
                [prompt.tokens for prompt, _ in batch],
                [f"{request.seed}/{prompt.id}/{sample}" for prompt, sample in batch],
                request,
                experts,
            )
        return completions

    def score_prompts(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return log-probabilities of each prompt's tokens except the first, on every rank."""
        assert self.weight_version is not None, "the engine has no weights: sync first"
        mine = range(self.rank, len(prompts), self.num_ranks)
        scored = [(i, *self.prompt_logprobs(prompts[i].tokens).values()) for i in mine]
        logprobs_of = dict(pair for share in self.gather(scored) for pair in share)
        return [logprobs_of[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def prompt_logprobs(self, tokens: Sequence[int]) -> dict[str, list[float]]:
        """Return the log-probability of every token except the first, given its predecessors."""
        tokens_1S = torch.tensor([tokens], device=self.device)
        logprobs_SV = torch.log_softmax(self.model(tokens_1S).logits[0].float(), dim=-1)
        scored_S1 = logprobs_SV[:-1].gather(1, tokens_1S[0, 1:, None])
        return {f"the embedded engine of rank {self.rank}": scored_S1[:, 0].tolist()}

    def close(self) -> None:
        """Do nothing: there is no process or connection."""

    def _rollout(
        self, prompt: Prompt, tokens: list[int], logprobs: list[float], routing: bytes | None
    ) -> Rollout:
        assert self.weight_version is not None, "the engine has no weights: sync first"
        return Rollout(
            prompt=prompt,
            tokens=tuple(tokens),
            engine_logprobs=tuple(logprobs),
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            finished=self.stops.end(tokens),
            weight_version=self.weight_version,
            routing=routing,
        )

    @torch.inference_mode()
    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[str],
        request: Request,
        experts: ChosenExperts | None,
    ) -> list[Decoded]:
        """Return tokens, their log-probabilities and, with `experts`, the routing of each text.

        One completion per prompt and seed.  Letters: B completions, of which R are in the running
        batch; T new tokens; V vocabulary; S tokens, L layers and k experts per token.
        """
        max_new_tokens = request.max_new_tokens
        uniform_BT = torch.stack([_uniform(seed, max_new_tokens) for seed in seeds]).to(self.device)
        tokens_BT = torch.zeros_like(uniform_BT, dtype=torch.long)
        logprobs_BT = torch.zeros_like(uniform_BT, dtype=torch.float32)
        stop = torch.tensor(sorted(self.stops.tokens), device=self.device)
        lengths_B = torch.full((len(prompts),), max_new_tokens, device=self.device)
        ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        running_R = torch.arange(len(prompts), device=self.device)
        decoder = Decoder(self.model, prompts, self.device, experts)
        chosen_BSLk = [decoder.experts_RSLk] if decoder.experts_RSLk is not None else []
        for t in range(max_new_tokens):
            token_R, logprob_R = draw(
                decoder.logits_RV,
                uniform_BT[running_R, t],
                request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
            )
            tokens_BT[running_R, t], logprobs_BT[running_R, t] = token_R, logprob_R
            ended_R = self._ended(tokens_BT[running_R, : t + 1], stop)
            lengths_B[running_R[ended_R & ~ended_B[running_R]]] = t + 1
            ended_B[running_R] |= ended_R
            going = (~ended_B[running_R]).nonzero().squeeze(1)
            if len(going) == 0 or t + 1 == max_new_tokens:
                break
            if len(going) <= SHRINK_AT * len(running_R):
                running_R, token_R = running_R[going], token_R[going]
                decoder.keep(going)
            decoder.advance(token_R)
            if decoder.experts_RSLk is not None:
                chosen_BSLk.append(torch.zeros_like(chosen_BSLk[0][:, :1]))
                chosen_BSLk[-1][running_R] = decoder.experts_RSLk
        completions = [
            (tokens[:length], logprobs[:length])
            for tokens, logprobs, length in zip(
                tokens_BT.tolist(), logprobs_BT.tolist(), lengths_B.tolist(), strict=True
            )
        ]
        routings: list[bytes | None] = [None] * len(prompts)
        if experts:
            form, width = RoutingFormat.of(self.hf), max(map(len, prompts))  # padded on the left
            routings = [
                form.pack(chosen_SLk[width - len(prompt) : width + len(tokens) - 1])
                for prompt, (tokens, _), chosen_SLk in zip(
                    prompts, completions, torch.cat(chosen_BSLk, dim=1).cpu().numpy(), strict=True
                )
            ]
        return [(*both, routing) for both, routing in zip(completions, routings, strict=True)]

    def _ended(self, tokens_RT: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Return a mask of the rows that end with their last token; `stop`: the stop tokens."""
        ended_R = torch.isin(tokens_RT[:, -1], stop)
        if self.stops.texts:
            last = tokens_RT[:, -self.stops.window :].tolist()
            ended_R |= torch.tensor([self.stops.end(tokens) for tokens in last]).to(self.device)
        return ended_R


SHRINK_AT = 0.9
"""Finished rows are removed once at most this share is unfinished: removal copies the cache."""


class Decoder:
    """Rows of text that grow by one token at a time, with the model's key-value cache.

    A prompt shared by several rows is computed once.  Rows are padded on the left.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        experts: ChosenExperts | None = None,
    ) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.experts = experts
        """Recorder of the chosen experts."""
        self.experts_RSLk: torch.Tensor | None = None
        """Experts of the latest tokens, if recorded."""
        self.logits_RV: torch.Tensor
        number_of = {prompt: u for u, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, number_of))
        ids_US = torch.zeros(len(number_of), width, dtype=torch.long)
        self.mask_RS = torch.zeros_like(ids_US)
        for prompt, u in number_of.items():
            ids_US[u, width - len(prompt) :] = torch.tensor(prompt)
            self.mask_RS[u, width - len(prompt) :] = 1
        self.mask_RS = self.mask_RS.to(device)
        self._forward(ids_US.to(device), (self.mask_RS.cumsum(1) - 1).clamp(min=0))
        self.keep(torch.tensor([number_of[tuple(prompt)] for prompt in prompts], device=device))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.cache.batch_select_indices(rows)
        self.mask_RS, self.logits_RV = self.mask_RS[rows], self.logits_RV[rows]
        if self.experts_RSLk is not None:
            self.experts_RSLk = self.experts_RSLk[rows]

    def advance(self, token_R: torch.Tensor) -> None:
        """Append a token to each row; `logits_RV` then predict the token after it."""
        self.mask_RS = torch.cat([self.mask_RS, self.mask_RS.new_ones(len(token_R), 1)], dim=1)
        self._forward(token_R[:, None], self.mask_RS.sum(1, keepdim=True) - 1)

    def _forward(self, ids_RS: torch.Tensor, positions_RS: torch.Tensor) -> None:
        out = self.model(
            input_ids=ids_RS,
            attention_mask=self.mask_RS,
            position_ids=positions_RS,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits_RV = out.logits[:, -1]
        if self.experts:
            self.experts_RSLk = self.experts.take(len(ids_RS)).short()


def _parameters_by_file_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters, as views, by their names in files.

    In memory, transformers 5 stacks the experts of a layer in two tensors.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".mlp.experts.")
        if not layer:
            parameters[name] = parameter
            continue
        for number, expert in enumerate(parameter):
            parts = {"down_proj": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, view in parts.items():
                parameters[f"{layer}.mlp.experts.{number}.{part}.weight"] = view
    return parameters


def draw(
    logits_RV: torch.Tensor,
    uniform_R: torch.Tensor,
    temperature: float,
    *,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row; returns tokens and their log-probabilities in the full distribution.

    A token is the inverse of the cumulative distribution at the row's uniform number.  At
    temperature 0 it is the most probable one, with its log-probability at temperature 1.
    """
    logprobs_RV = torch.log_softmax(logits_RV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        logprob_R, token_R = logprobs_RV.max(dim=-1)
        return token_R, logprob_R
    chosen_RV = most_probable(logprobs_RV, top_p, top_k) if top_p < 1 or top_k else logprobs_RV
    cumulative_RV = chosen_RV.double().exp().cumsum(dim=-1)
    target_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    # right=True: a token of probability 0 is never drawn, even for a uniform number of 0
    token_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    token_R1 = token_R1.clamp(max=logits_RV.shape[1] - 1)
    return token_R1[:, 0], logprobs_RV.gather(1, token_R1)[:, 0]


def most_probable(logprobs_RV: torch.Tensor, top_p: float, top_k: int | None) -> torch.Tensor:
    """Return the log-probabilities with -inf for all but the most probable tokens of each row.

    A token stays if fewer than `top_k` tokens, which together have at most `top_p`, are more
    probable; the most probable one always does.  Of equal ones the first counts as more probable.
    """
    sorted_RV, order_RV = logprobs_RV.double().exp().sort(dim=-1, descending=True, stable=True)
    outside_RV = torch.zeros_like(sorted_RV, dtype=torch.bool)
    if top_p < 1:
        outside_RV |= sorted_RV.cumsum(dim=-1) - sorted_RV > top_p
    if top_k is not None:
        outside_RV[:, top_k:] = True
    return logprobs_RV.masked_fill(outside_RV.scatter(1, order_RV, outside_RV), -torch.inf)


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Return [B, S, heads, d], attention of [B, heads, S, d] queries on [B, groups, S, d] keys.

    Like transformers' `sdpa`, which with a mask copies keys and values for each head, as CUDA's
    kernels need; the CPU's kernel needs no copies.
    """
    causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(GROUPED, _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def _fp32_logits(
    self: torch.nn.Linear, hidden_BSH: torch.Tensor, /, *_: object, **__: object
) -> torch.Tensor:
    """Replace `torch.nn.Linear.forward`, whose result would have the type of the weight."""
    logits = product(hidden_BSH.flatten(0, 1), self.weight.t())
    return logits.view(*hidden_BSH.shape[:2], -1)


def _uniform(seed: str, count: int) -> torch.Tensor:
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
