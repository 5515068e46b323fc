"""Experts as bytes: read back as they were, and nothing else than experts."""

import numpy as np
import pytest
import torch
from tiny_models import actor_config, qwen3_moe

from megatron_prepo.actor.actor import TrainingSequence
from megatron_prepo.actor.model import check_layout
from megatron_prepo.debug.dump import from_tensors, to_tensors
from megatron_prepo.errors import UserError
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import ScoredSequence


@pytest.mark.parametrize(("experts", "bytes_each"), [(8, 1), (256, 1), (257, 2), (512, 2)])
def test_packed_and_unpacked_it_is_the_same(experts, bytes_each):
    """Numbers go up to the last expert, and keep the order in which they were chosen."""
    form, random = RoutingFormat(3, 4, experts), np.random.default_rng(1)
    experts_TLk = random.random((5, 3, experts)).argsort(-1)[..., :4]
    experts_TLk[0, 0] = [experts - 1, 0, 2, 1]
    packed = form.pack(experts_TLk)
    assert len(packed) == 5 * 3 * 4 * bytes_each
    assert (form.unpack(packed) == experts_TLk).all()
    sequence = ScoredSequence((1, 2, 3, 4, 5, 6), 4, packed)
    assert (form.unpack(sequence.routing_of_first(3)) == experts_TLk[:3]).all()
    assert sequence.routing_of_first(0) == b""


@pytest.mark.parametrize(
    ("experts_TLk", "message"),
    [
        ([[[0, 1]]], r"shape \(1, 1, 2\), not \[tokens, 2 layers, 2 per token\]"),
        ([[[0, 1], [2, 8]]], "experts 0 to 8 of 8"),
        ([[[0, 1], [-1, 2]]], "experts -1 to 2 of 8"),
        ([[[0, 1], [3, 3]]], "one expert twice"),
    ],
)
def test_what_no_router_chooses_is_refused(experts_TLk, message):
    with pytest.raises(ValueError, match=message):
        RoutingFormat(2, 2, 8).pack(np.array(experts_TLk))


def test_bytes_that_are_not_shared_out_over_the_tokens_are_refused():
    with pytest.raises(AssertionError, match="7 bytes of routing"):
        ScoredSequence((1, 2, 3), 1, bytes(7))


@pytest.mark.parametrize("routed", [True, False])
def test_a_dump_gives_every_sequence_its_routing_back(routed):
    """Sequences have different lengths, and six bytes per token."""
    batch = [
        TrainingSequence(
            ScoredSequence(tokens, 2, bytes(range(n, n + 6 * len(tokens) - 6)) if routed else None),
            torch.zeros(len(tokens) - 2),
            0.5,
            1.0,
        )
        for n, tokens in enumerate([(1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11, 12)], start=200)
    ]
    tensors = to_tensors(batch)
    assert ("routing" in tensors) is routed
    assert [s.sequence for s in from_tensors(tensors)] == [s.sequence for s in batch]


@pytest.mark.parametrize(
    "name",
    ["moe_router_fusion", "moe_router_force_load_balancing", "moe_router_load_balancing_type"],
)
def test_routers_that_would_not_ask_are_refused(name):
    hf = qwen3_moe().config.to_dict() | {"model_type": "qwen3_moe", "num_experts": 8}
    value = "sinkhorn" if name.endswith("type") else True
    for replay in (True, False):
        config = actor_config(
            "unused",
            rollout={"max_new_tokens": 4, "router_replay": replay},
            megatron={name: value},
        )
        if not replay:
            check_layout(config, hf)
            continue
        with pytest.raises(UserError, match=rf"router_replay=true .* megatron\.{name}={value}:"):
            check_layout(config, hf)
