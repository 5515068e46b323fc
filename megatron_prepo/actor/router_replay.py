"""Routers that replay the expert choices of a micro-batch's routing instead of choosing themselves.

Megatron-Core delegates the top-k of a router to an object, if it has one (`router_replay`, the same
interface from 0.16 to 0.20).  Megatron's implementation keeps one global list of all routers; ours
get the micro-batch from `replaying`.  Only the choice is replayed: the router continues with the
scores that it asked with, logits or probabilities over all experts (`norm_topk_prob`), so that it
is trained as well.

T tokens of the rank, k experts per token.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router_replay import RouterReplay as MegatronsReplay

from megatron_prepo import internals


class RouterReplay:
    """All routers of this rank; from its construction on, they replay routings."""

    def __init__(self, chunks: Sequence[GPTModel], device: torch.device) -> None:
        self.chunks = [_ChunkRouters(chunk, device) for chunk in chunks]

    @contextmanager
    def replaying(self, chunk: int, routing_TLk: torch.Tensor | None) -> Iterator[None]:
        """Replay a routing during a chunk's forward pass of a micro-batch, and its recomputation.

        `routing_TLk` covers the entire row and all layers; with None, or -1 for a token, the
        routers choose.
        """
        self.chunks[chunk].begin(routing_TLk)
        yield
        self.chunks[chunk].end()

    def check_all_recomputed(self) -> None:
        """Assert, after a pass, that each routing kept for recomputation has been used."""
        left = sum(len(router.kept) for chunk in self.chunks for router in chunk.routers)
        assert left == 0, f"{left} routings were kept for a recomputation that did not happen"

    def forget_choices(self) -> None:
        """Reset the counters."""
        for chunk in self.chunks:
            chunk.counts_2.zero_()

    def routed_differently(self) -> float:
        """Return the share of tokens and layers where the actor would have chosen other experts.

        Covers all scoring passes since `forget_choices`; collective.
        """
        # all ranks hold different tokens or layers: also tensor-parallel ones, since experts are
        # trained only with sequence parallelism
        counts_2 = torch.stack([chunk.counts_2 for chunk in self.chunks]).sum(0)
        dist.all_reduce(counts_2)
        different, total = counts_2.tolist()
        return float(different / max(1, total))


class _ChunkRouters:
    """Routers of a model chunk."""

    def __init__(self, chunk: GPTModel, device: torch.device) -> None:
        self.model, self.device = chunk, device
        self.in_forward = False
        self.counts_2 = torch.zeros(2, dtype=torch.long, device=device)
        """Tokens times layers of scoring passes: those that differ, and the total."""
        layers = chunk.decoder.layers
        self.layers = [layer.layer_number - 1 for layer in layers]
        """Layer numbers in the complete model."""
        self.routers = [_Router(self, number) for number in range(len(layers))]
        for layer, router in zip(layers, self.routers, strict=True):
            internals.replace(layer.mlp.router, "router_replay", router)

    def begin(self, routing_TLk: torch.Tensor | None) -> None:
        if routing_TLk is not None:
            if self.model.config.sequence_parallel:
                ranks = parallel_state.get_tensor_model_parallel_world_size()
                rank = parallel_state.get_tensor_model_parallel_rank()
                routing_TLk = routing_TLk.chunk(ranks)[rank]
            routing_TLk = routing_TLk[:, self.layers].to(self.device)
        self.in_forward, self.routing_TLk = True, routing_TLk

    def end(self) -> None:
        self.in_forward, self.routing_TLk = False, None


class _Router:
    """Substitute for Megatron's RouterReplay in one router."""

    def __init__(self, chunk: _ChunkRouters, number: int) -> None:
        self.chunk, self.number = chunk, number
        self.kept: deque[torch.Tensor | None] = deque()
        """Routings of the micro-batches whose forward pass will be recomputed, in order."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and indices of each token's experts, [T, k], from scores [T, experts]."""
        assert default_compute_topk is not None, "Megatron passes its own choice"
        own_scores_Tk, own_Tk = default_compute_topk(scores, topk, num_groups, group_topk)
        replayed_Tk = self._routing()
        if replayed_Tk is None:
            return own_scores_Tk, own_Tk
        assert len(replayed_Tk) == len(own_Tk), "the routing of another micro-batch"
        real_T1 = replayed_Tk[:, :1] >= 0
        chosen_Tk = torch.where(real_T1, replayed_Tk.long(), own_Tk)
        if not self.chunk.model.training:
            self._count(own_Tk, chosen_Tk, real_T1)
        return scores.gather(1, chosen_Tk), chosen_Tk

    def _routing(self) -> torch.Tensor | None:
        """Return the routing [T, k] of the micro-batch in its forward pass or recomputation.

        Megatron runs a forward pass that it will recompute without a graph, and recomputes it in
        the backward pass; backward passes of a chunk have the order of its forward passes.
        """
        chunk = self.chunk
        if not chunk.in_forward:
            return self.kept.popleft()
        now = None if chunk.routing_TLk is None else chunk.routing_TLk[:, self.number]
        if chunk.model.training and not torch.is_grad_enabled():
            self.kept.append(now)
        return now

    def _count(self, own_Tk: torch.Tensor, chosen_Tk: torch.Tensor, real_T1: torch.Tensor) -> None:
        differs_T = (own_Tk.sort(1).values != chosen_Tk.sort(1).values).any(1)
        self.chunk.counts_2 += torch.stack([differs_T.sum(), real_T1.sum()])


internals.require_form(MegatronsReplay, "get_replay_topk", _Router.get_replay_topk)
