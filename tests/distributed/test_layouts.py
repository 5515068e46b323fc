"""Two updates of the actor equal those computed in float64 on one rank, under every layout.

The reference is `transformers`, autograd and `torch.optim.AdamW`, with the loss written out below.
Each layout is run on separate ranks, when the first test needs it.

What a layout may err by is measured: the reference is computed in float32, too, and ours may be off
by `rounding.FACTOR` times as much.

Adam's first step is lr * sign(g) wherever |g| is far above `adam_eps`, and rounding could flip the
sign of a small g.  An `adam_eps` of 1e-2 makes the update smooth in the gradient.
"""

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from types import MethodType

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from rounding import allowance, approx, bound
from tiny_models import VOCAB, actor_config
from transformers_scores import ATTENTIONS, model_of

from megatron_prepo.config.schema import PROJECTIONS
from megatron_prepo.models.lora import initial_matrix
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class Scenario:
    """A model, a batch of rollouts and the settings of the loss and the optimizer."""

    model: str
    lengths: tuple[int, ...]
    temperature: float = 1.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    importance: bool = False
    policy: str = "clipped"
    token_advantages: bool = False
    """Whether tokens have advantages, as for a KL penalty in the reward: then it is not in the
    loss."""
    clip_grad: float = 100.0
    weight_decay: float = 0.0
    start: int = 3
    """Tokens of a prompt."""
    num_prompts: int | None = None
    """Number of prompts that the rollouts share in turn; None: each has its own."""
    lora: dict | None = None
    """Settings of adapters, which are trained in place of the weights."""
    routed: bool = False
    """Whether all tokens go to experts that are drawn in advance, in two ways for each prompt."""
    layouts: tuple[str, ...] = ()


LR, EPS, BETAS, CLIP_LOW, CLIP_HIGH = 1e-2, 1e-2, (0.9, 0.95), 0.2, 0.28
DUAL_CLIP = 1.4
MICRO_BATCH_TOKENS = 24
SHARED = {"train": {"share_prefixes": True, "micro_batch_tokens": 40}}
FULL_RECOMPUTATION = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LAYOUTS = {
    # name: (parallel settings, other settings)
    "tp1": ({}, {}),
    "tp1 smallest micro-batches": ({}, {"train": {"micro_batch_tokens": 20}}),
    "tp1 one micro-batch": ({}, {"train": {"micro_batch_tokens": 128}}),
    "tp1 padded": ({}, {"train": {"packing": False, "micro_batch_tokens": 40}}),
    "tp1 chunks of 3 tokens": ({}, {"loss": {"head_memory_mib": 3.1 * 4 * VOCAB / 2**20}}),
    "tp1 recompute": ({}, {"loss": {"head": "recompute"}}),
    "tp1 overlapped reduction": (
        {},
        {"megatron": {"overlap_grad_reduce": True}, "train": {"micro_batch_tokens": 128}},
    ),
    "tp2": ({"tensor": 2}, {}),
    "tp2 sp": ({"tensor": 2, "sequence": True}, {}),
    "tp2 sp recompute": ({"tensor": 2, "sequence": True}, {"loss": {"head": "recompute"}}),
    "pp2": ({"pipeline": 2}, {}),
    "pp2 dp2 recompute": ({"pipeline": 2, "data": 2}, {"loss": {"head": "recompute"}}),
    "dp2": ({"data": 2}, {}),
    "dp2 padded": ({"data": 2}, {"train": {"packing": False, "micro_batch_tokens": 40}}),
    "dp2 distributed optimizer": ({"data": 2}, {"optimizer": {"use_distributed_optimizer": True}}),
    "tp2 pp2": ({"tensor": 2, "pipeline": 2}, {}),
    "tp2 pp2 sp": ({"tensor": 2, "pipeline": 2, "sequence": True}, {}),
    "tp2 sp dp2": ({"tensor": 2, "sequence": True, "data": 2}, {}),
    "pp2 dp2 distributed optimizer": (
        {"pipeline": 2, "data": 2},
        {"optimizer": {"use_distributed_optimizer": True}},
    ),
    "dp4": ({"data": 4}, {}),
    "pp4": ({"pipeline": 4}, {}),
}
SHARED_LAYOUTS = {
    "tp1 shared": ({}, SHARED),
    "tp1 shared recompute": ({}, SHARED | {"megatron": FULL_RECOMPUTATION}),
    "tp2 shared": ({"tensor": 2}, SHARED),
    "tp2 sp shared": ({"tensor": 2, "sequence": True}, SHARED),
    "pp2 shared": ({"pipeline": 2}, SHARED),
    "dp2 shared": ({"data": 2}, SHARED),
    "tp2 pp2 sp shared": ({"tensor": 2, "pipeline": 2, "sequence": True}, SHARED),
}
EXPERT_LAYOUTS = {
    "dp2 ep2": ({"data": 2, "expert": 2}, {}),
    "dp2 ep2 shared": ({"data": 2, "expert": 2}, SHARED),
    "tp2 sp ep2 shared": ({"tensor": 2, "sequence": True, "expert": 2}, SHARED),
}
DISTRIBUTED = {"optimizer": {"use_distributed_optimizer": True}}


def offloaded(fraction, **further):
    """Settings of an optimizer of which this fraction is on the host."""
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    return {"megatron": offload | further}


PASSED_ON = {
    # what is Megatron's own, under its own names
    "tp1 overlapped micro-batches": ({}, {"megatron": {"overlap_grad_reduce": True}}),
    "dp2 overlapped": ({"data": 2}, {"megatron": {"overlap_grad_reduce": True}}),
    "dp4 overlapped": ({"data": 4}, {"megatron": {"overlap_grad_reduce": True}}),
    "pp2 dp2 overlapped": (
        {"pipeline": 2, "data": 2},
        DISTRIBUTED | {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "dp2 gathered late": (
        {"data": 2},
        DISTRIBUTED | {"megatron": {"overlap_param_gather": True}},
    ),
    "tp1 offloaded": ({}, DISTRIBUTED | offloaded(0.5)),
    "pp2 dp2 offloaded": (
        {"pipeline": 2, "data": 2},
        DISTRIBUTED | offloaded(1.0, overlap_cpu_optimizer_d2h_h2d=True, overlap_param_gather=True),
    ),
    "pp2 full recomputation": ({"pipeline": 2}, {"megatron": FULL_RECOMPUTATION}),
    "tp1 selective recomputation": (
        {},
        {
            "megatron": {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "mlp"],
            }
        },
    ),
    "tp2 sp ep2 recomputed experts": (
        {"tensor": 2, "sequence": True, "expert": 2},
        {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    ),
}
PASSED_ON_TO_DENSE = [
    name for name in PASSED_ON if name not in ("dp4 overlapped", "tp2 sp ep2 recomputed experts")
]
INTERLEAVED = {
    "pp2 x 2": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pp2 x 2 padded": (
        {"pipeline": 2, "virtual_pipeline": 2},
        {"train": {"packing": False, "micro_batch_tokens": 40}},
    ),
    "tp2 pp2 x 2 sp": (
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True},
        {"megatron": FULL_RECOMPUTATION},
    ),
    "pp2 x 2 dp2 overlapped": (
        {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
        DISTRIBUTED | {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "pp2 x 2 dp2 ep2": ({"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}, SHARED),
    "pp2 x 2 recomputed experts": (
        {"pipeline": 2, "virtual_pipeline": 2},
        {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    ),
}
CONTEXT = {
    # 4 heads of queries, 2 of keys and values, which cp4 and tp2 cp2 repeat
    "cp2": ({"context": 2}, {}),
    "cp2 padded": ({"context": 2}, {"train": {"packing": False, "micro_batch_tokens": 40}}),
    "cp2 recompute": (
        {"context": 2},
        {"loss": {"head": "recompute"}, "megatron": FULL_RECOMPUTATION},
    ),
    "cp4": ({"context": 4}, {}),
    "tp2 cp2": ({"tensor": 2, "context": 2}, {}),
    "tp2 cp2 sp": ({"tensor": 2, "context": 2, "sequence": True}, {}),
    "pp2 cp2": ({"pipeline": 2, "context": 2}, {}),
    "pp2 x 2 cp2": ({"pipeline": 2, "virtual_pipeline": 2, "context": 2}, {}),
    "dp2 cp2 overlapped": (
        {"data": 2, "context": 2},
        DISTRIBUTED | {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "cp2 shared": ({"context": 2}, SHARED),
    "cp4 shared": ({"context": 4}, SHARED),
    "cp2 ep2": ({"context": 2, "expert": 2}, {}),
    "tp2 cp2 sp ep4 shared": (
        {"tensor": 2, "context": 2, "sequence": True, "expert": 4},
        SHARED,
    ),
    "pp2 cp2 ep2 recomputed experts": (
        {"pipeline": 2, "context": 2, "expert": 2},
        {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    ),
}
CONTEXT_OF_DENSE = tuple(CONTEXT)[:9]
CONTEXT_OF_GROUPS = ("cp2", "tp2 cp2 sp", "cp2 shared", "cp4 shared")
CONTEXT_OF_EXPERTS = tuple(CONTEXT)[-3:]
LENGTHS = (14, 9, 7, 20, 11)
FEW_LAYOUTS = ("tp2", "cp2")
MORE_LAYOUTS = ("tp1 chunks of 3 tokens", "tp2 pp2 sp", "dp2 padded", "dp2 cp2 overlapped")
SCENARIOS = {
    "plain": Scenario(
        "qwen2",
        (9, 14, 5, 7, 20, 11, 6),
        clip_grad=2.0,
        layouts=(*LAYOUTS, *PASSED_ON_TO_DENSE, *list(INTERLEAVED)[:4], *CONTEXT_OF_DENSE),
    ),
    "all terms": Scenario(
        "qwen3",
        (12, 6, 17, 8, 10),
        temperature=0.8,
        entropy_coef=0.05,
        kl_coef=0.1,
        importance=True,
        weight_decay=0.1,
        layouts=(*LAYOUTS, "tp2 cp2 sp", "cp2 recompute"),
    ),
    "groups": Scenario(
        "qwen3",
        (12, 17, 10, 11, 15, 19, 14, 10, 20, 13),
        start=9,
        num_prompts=3,
        layouts=("tp1", "tp1 padded", *SHARED_LAYOUTS, *CONTEXT_OF_GROUPS),
    ),
    "experts": Scenario(
        "qwen3_moe",
        (14, 17, 10, 11, 15, 19, 12),
        start=9,
        num_prompts=3,
        layouts=(
            *("tp1", "pp2", "tp1 shared", *EXPERT_LAYOUTS),
            *("tp2 sp ep2 recomputed experts", "pp2 x 2 dp2 ep2"),
            *CONTEXT_OF_EXPERTS,
        ),
    ),
    "routed": Scenario(
        "qwen3_moe",
        (14, 17, 10, 11, 15, 19, 12, 13),
        temperature=0.8,
        start=9,
        num_prompts=2,
        kl_coef=0.1,
        routed=True,
        layouts=(
            *("tp1", "tp1 smallest micro-batches", "tp1 padded", "tp1 shared recompute"),
            *("dp2 ep2 shared", "tp2 sp ep2 shared", "tp2 sp ep2 recomputed experts"),
            *("pp2 full recomputation", "tp2 pp2 x 2 sp"),
            *("pp2 x 2 dp2 ep2", "pp2 x 2 recomputed experts"),
            *CONTEXT_OF_EXPERTS,
        ),
    ),
    "experts not normalized": Scenario(
        "qwen3_moe not normalized",
        (14, 17, 10, 11, 15, 19, 12),
        start=9,
        num_prompts=3,
        layouts=("tp1", "tp2 sp ep2 shared"),
    ),
    "routed not normalized": Scenario(
        "qwen3_moe not normalized",
        (14, 17, 10, 11, 15, 19, 12, 13),
        temperature=0.8,
        start=9,
        num_prompts=2,
        kl_coef=0.1,
        routed=True,
        layouts=("tp1 shared recompute",),
    ),
    "fewer rollouts than ranks": Scenario(
        "qwen2", (9, 5, 7), layouts=("tp1", "dp4", "dp4 overlapped", "dp2 cp2 overlapped")
    ),
    "advantages of zero": Scenario("qwen2", (9, 5, 7), layouts=("tp1", "tp2 pp2", "dp4", "cp4")),
    "dual clip": Scenario("qwen2", LENGTHS, policy="dual-clip", layouts=FEW_LAYOUTS),
    "clipped weights": Scenario("qwen2", LENGTHS, policy="cispo", layouts=FEW_LAYOUTS),
    "advantages of tokens": Scenario(
        "qwen2", LENGTHS, kl_coef=0.1, token_advantages=True, layouts=FEW_LAYOUTS
    ),
    "adapters": Scenario(
        "qwen2", LENGTHS, weight_decay=0.1, lora={"rank": 3, "alpha": 6}, layouts=("tp1", "tp2 sp")
    ),
    "some adapters": Scenario(
        "qwen3",
        LENGTHS,
        temperature=0.8,
        kl_coef=0.1,
        lora={"rank": 2, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
        layouts=("tp2",),
    ),
    "rollout ratios": Scenario(
        "qwen3",
        (12, 17, 10, 14, 20, 11),
        start=9,
        num_prompts=2,
        policy="gspo",
        layouts=("tp1", "tp2", "cp2", "cp2 shared"),
    ),
}
SLOW = {
    # layouts of a scenario that only the slow tests run
    "dual clip": MORE_LAYOUTS,
    "clipped weights": MORE_LAYOUTS,
    "advantages of tokens": MORE_LAYOUTS,
    "adapters": (
        *("tp2", "pp2", "dp2", "tp1 recompute", "tp2 pp2 sp", "pp2 dp2 distributed optimizer"),
        *("pp2 full recomputation", "tp1 selective recomputation", "tp1 offloaded", "pp2 x 2"),
        *("pp2 dp2 overlapped", "tp2 pp2 x 2 sp", "tp2 cp2 sp", "dp2 cp2 overlapped"),
    ),
    "some adapters": ("tp1", "tp2 pp2 sp", "cp2"),
    "rollout ratios": (
        *("tp1 smallest micro-batches", "tp2 pp2 sp", "dp2 padded", "dp4", "cp4", "cp4 shared"),
        *("cp2 padded", "tp2 cp2 sp", "pp2 cp2", "pp2 x 2 cp2", "dp2 cp2 overlapped"),
    ),
}
RESHARDED = {
    # layout that writes a checkpoint: layouts that read it
    "tp2": ("tp1", "pp2", "tp2 pp2", "pp2 x 2"),
    "pp2 dp2 distributed optimizer": ("tp1", "tp2"),
    "pp2 x 2 dp2 overlapped": ("tp1", "pp2 x 2"),
    "dp2 cp2 overlapped": ("tp1", "tp2 cp2"),
}
RECOMPUTED = {
    # how often a micro-batch goes through each part
    ("plain", "pp2 full recomputation"): {"input_layernorm": 2, "core_attention": 2, "mlp": 2},
    ("plain", "tp1 selective recomputation"): {"input_layernorm": 1, "core_attention": 2, "mlp": 2},
    ("experts", "tp2 sp ep2 recomputed experts"): {
        "input_layernorm": 1,
        "core_attention": 1,
        "mlp": 1,
        "experts": 2,
    },
}
MISTAKES = {
    # mistake: scenario, layout, which tensors it concerns
    "parts of norms are not summed": ("plain", "tp2 sp", "layernorm"),
    "parts of adapters are not summed": ("adapters", "tp2 sp", "o_proj"),
    "ranks do not sum": ("plain", "dp2", ""),
    "stages do not sum the embedding": ("plain", "pp2", "embed_tokens"),
    "one rollout twice": ("all terms", "tp1", ""),
    "advantages of the next rollout": ("groups", "tp1 shared", ""),
    "probabilities normalized": ("routed not normalized", "tp1 shared recompute", ""),
}
CHOOSING = (
    "tp1 shared",
    "tp1 padded",
    "pp2",
    "tp2 sp ep2 shared",
    "pp2 x 2 dp2 ep2",
    "tp2 cp2 sp ep4 shared",
)
AUXILIARY = ("tp1", "cp2 ep2", "tp2 cp2 sp ep4 shared")
BFLOAT16_LAYOUTS = (
    *("tp1", "tp2 pp2 sp", "pp2 dp2 distributed optimizer"),
    *("tp1 offloaded", "pp2 dp2 offloaded"),
)
CASES = [(name, layout) for name, scenario in SCENARIOS.items() for layout in scenario.layouts]
CASES += [
    pytest.param(name, layout, marks=pytest.mark.slow)
    for name, layouts in SLOW.items()
    for layout in layouts
]
ROUTING = RoutingFormat(layers=4, experts_per_token=2, experts=8)
MODELS = {
    "qwen2": lambda: tiny_models.qwen2(),
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "qwen3_moe": lambda: tiny_models.qwen3_moe(),
    "qwen3_moe not normalized": lambda: tiny_models.qwen3_moe(normalized=False),
}


@dataclass(frozen=True)
class Batch:
    """The rollouts of a scenario, their completions scored, and what the loss needs."""

    sequences: list[ScoredSequence] = field(default_factory=list)
    old_T: list[torch.Tensor] = field(default_factory=list)
    importance_T: list[torch.Tensor] = field(default_factory=list)
    reference_T: list[torch.Tensor] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    advantage_T: list[torch.Tensor] = field(default_factory=list)
    coefficient: list[float] = field(default_factory=list)


def make_batch(name, model):
    """Rollouts whose old log-probabilities differ from the model's by 0.1 or 0.4: some ratios are
    clipped, and in the first update none is near its clip."""
    scenario, batch = SCENARIOS[name], Batch()
    generator = torch.Generator().manual_seed(8)
    start, num_prompts = scenario.start, scenario.num_prompts or len(scenario.lengths)
    for i, length in enumerate(scenario.lengths):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        if i >= num_prompts:
            tokens[:start] = batch.sequences[i - num_prompts].tokens[:start]
        batch.sequences.append(ScoredSequence(tuple(tokens), start))
        if scenario.routed:
            # the first two rollouts of each prompt share its routing; that of the remaining ones
            # differs
            drawn = draw_routing(generator, length - 1)
            if 0 <= i - num_prompts < num_prompts:
                earlier = batch.sequences[i - num_prompts].routing_of_first(start - 1)
                drawn = earlier + drawn[len(earlier) :]
            batch.sequences[i] = replace(batch.sequences[i], routing=drawn)
        logprobs_T, *_ = score(model, batch.sequences[-1], scenario.temperature)
        noise = torch.rand(3, len(logprobs_T), generator=generator)
        moved_T = torch.tensor([-0.4, -0.1, 0.1, 0.4])[(4 * noise[0]).long()]
        batch.old_T.append(logprobs_T.detach().float() + moved_T)
        batch.importance_T.append(0.5 + noise[1])
        batch.reference_T.append(logprobs_T.detach().float() + 2 * noise[2] - 1)
        zero = i == 2 or name == "advantages of zero"
        batch.advantage.append(0.0 if zero else (-1.0) ** i * (0.5 + 0.25 * i))
        batch.advantage_T.append(batch.advantage[-1] + 2 * noise[1] - 1)
        batch.coefficient.append((0.4 + 0.3 * i) / len(scenario.lengths))
    return batch


def draw_routing(generator, num_tokens):
    shape = (num_tokens, ROUTING.layers, ROUTING.experts)
    experts_TLk = torch.rand(shape, generator=generator).argsort(-1)[
        ..., : ROUTING.experts_per_token
    ]
    return ROUTING.pack(experts_TLk.numpy())


# The reference


@contextmanager
def routed_by(model, routing):
    """Make transformers' routers take these experts, or without any those of their largest logits,
    which are then added to the list.  The routers compute in the precision of the model."""
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    chosen_by = []
    for number, router in enumerate(routers):
        experts_Tk = None
        if routing is not None:
            experts_Tk = torch.from_numpy(ROUTING.unpack(routing)[:, number]).long()
            # the last token is routed somewhere, and nothing depends on it
            experts_Tk = torch.cat([experts_Tk, experts_Tk[-1:]])
        router.forward = MethodType(forward_of_router(experts_Tk, chosen_by), router)
    yield chosen_by
    for router in routers:
        del router.forward


def forward_of_router(experts_Tk, chosen_by):
    def forward(self, hidden_TH):
        logits_TE = hidden_TH @ self.weight.t()
        chosen_Tk = experts_Tk
        if chosen_Tk is None:
            chosen_Tk = logits_TE.topk(self.top_k).indices
            chosen_by.append(logits_TE.detach())
        probs_Tk = logits_TE.softmax(-1).gather(1, chosen_Tk)
        if self.norm_topk_prob:
            probs_Tk = probs_Tk / probs_Tk.sum(-1, keepdim=True)
        return logits_TE, probs_Tk, chosen_Tk

    return forward


def score(model, sequence, temperature):
    """Log-probabilities, entropies and the logits that routers chose by.

    In a bfloat16 model the vocabulary's logits are float32.
    """
    tokens = torch.tensor(sequence.tokens)
    with routed_by(model, sequence.routing) as chosen_by:
        hidden_TH = model.model(tokens[None]).last_hidden_state[0, sequence.start - 1 : -1]
    logits_TV = wide(hidden_TH) @ wide(model.lm_head.weight).t() / temperature
    logp_TV = logits_TV.log_softmax(-1)
    logprobs_T = logp_TV.gather(1, tokens[sequence.start :, None])[:, 0]
    return logprobs_T, -(logp_TV.exp() * logp_TV).sum(-1), chosen_by


def wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def policy_terms(policy, logprobs_T, old_T, advantage):
    """Return the objective of each token, whether its ratio is clipped, and that ratio."""
    ratio_T = (logprobs_T - old_T).exp()
    if policy == "gspo":
        ratio_T = (logprobs_T - old_T).mean().exp().expand(len(old_T))
    inside_T = ratio_T.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    if policy == "cispo":
        return inside_T.detach() * advantage * logprobs_T, inside_T != ratio_T, ratio_T
    plain_T, clipped_T = ratio_T * advantage, inside_T * advantage
    objective_T = torch.minimum(plain_T, clipped_T)
    if policy == "dual-clip" and advantage < 0:
        bounded_T = ratio_T > DUAL_CLIP
        objective_T = objective_T.clamp(min=DUAL_CLIP * advantage)
        return objective_T, (clipped_T < plain_T) | bounded_T, ratio_T
    return objective_T, clipped_T < plain_T, ratio_T


def terms_of(model, scenario, batch, i):
    """Return {metric: terms by token} of a rollout, unpadded: the paper's formula and extra terms.

    And the ratios that are clipped, and the logits that routers chose by.
    """
    logprobs_T, entropy_T, chosen_by = score(model, batch.sequences[i], scenario.temperature)
    advantage = (batch.advantage_T if scenario.token_advantages else batch.advantage)[i]
    ratio_T = (logprobs_T - batch.old_T[i]).exp()
    objective_T, clipped_T, clipped_by_T = policy_terms(
        scenario.policy, logprobs_T, batch.old_T[i], advantage
    )
    if scenario.importance:
        objective_T = objective_T * batch.importance_T[i]
    to_reference_T = batch.reference_T[i] - logprobs_T
    kl_T = to_reference_T.exp() - 1 - to_reference_T
    kl_coef = 0.0 if scenario.token_advantages else scenario.kl_coef
    objective_T = objective_T + scenario.entropy_coef * entropy_T - kl_coef * kl_T
    # statistics are of tokens that there is something to learn from
    other_terms = scenario.entropy_coef or scenario.kl_coef or "moe" in scenario.model
    counts = slice(None if other_terms or advantage else 0)
    terms = {
        "loss/policy": -batch.coefficient[i] * objective_T,
        "loss/clip_fraction": clipped_T[counts].to(ratio_T.dtype),
        "loss/ratio": ratio_T[counts],
        "loss/kl_to_old": (ratio_T - 1 - ratio_T.log())[counts],
    }
    if scenario.kl_coef:
        terms["loss/kl_to_reference"] = kl_T[counts]
    return terms, clipped_by_T[counts], chosen_by


@dataclass(frozen=True)
class Update:
    """What the reference computes in an update, by name, in the precision of its model."""

    terms: dict[str, torch.Tensor]
    """Metrics, term by term: the loss is their sum, all others are their mean."""
    gradient: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    """Weights after the update."""
    clipped_ratios: torch.Tensor
    """Ratio of each token that the clips apply to."""
    router_logits: list[torch.Tensor]
    """Router logits of every rollout and layer in which a router chose the experts."""

    def metrics(self):
        # a mean over no token is no metric
        counted = {name: terms_T for name, terms_T in self.terms.items() if len(terms_T)}
        numbers = {name: terms_T.mean() for name, terms_T in counted.items()}
        numbers["loss/policy"] = self.terms["loss/policy"].sum()
        numbers["loss/grad_norm"] = norm(self.gradient)
        return {name: number.item() for name, number in numbers.items()}


def norm(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors.values()).sqrt()


def difference(one, other):
    return {name: one[name].double() - other[name].double() for name in other}


class Adapted(torch.nn.Module):
    """A linear layer with an adapter, written out."""

    def __init__(self, base, name, rank, alpha=16):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = torch.nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.lora_B = torch.nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        torch.nn.init.zeros_(self.lora_B.weight)
        with torch.no_grad():
            first = initial_matrix(f"{name}.lora_A.weight", 1, self.lora_A.weight.shape)
            self.lora_A.weight.copy_(first)

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def with_adapters(model, lora):
    """Add adapters to a model, and freeze its weights."""
    model.requires_grad_(False)
    targets = lora.get("target_modules", PROJECTIONS)
    settings = {name: value for name, value in lora.items() if name != "target_modules"}
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in targets:
            setattr(model.get_submodule(parent), last, Adapted(module, name, **settings))
    return model


@torch.no_grad()
def whole_weights(model):
    """Return a copy of all weights, with adapters merged."""
    whole = {
        name.replace(".base.", "."): p.clone()
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            product = layer.lora_B.weight @ layer.lora_A.weight
            whole[f"{name}.weight"] += layer.scale * product
    return {name: tensor for item in whole.items() for name, tensor in expert_by_expert(*item)}


def reference_updates(scenario, batch, model):
    """Return the weights before two updates, and the updates.  Gradients are accumulated, and
    weights updated, in float32 at least, as in Megatron."""
    if scenario.lora:
        model = with_adapters(model, scenario.lora)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mains = {name: wide(p.detach().clone()) for name, p in parameters.items()}
    matrices = [main for main in mains.values() if main.dim() > 1]
    vectors = [main for main in mains.values() if main.dim() == 1]  # Megatron does not decay them
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": scenario.weight_decay}, {"params": vectors}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
    )

    before, updates = whole_weights(model), []
    for _ in range(2):
        for main in mains.values():
            main.grad = torch.zeros_like(main)
        terms, ratios, router_logits = [], [], []
        for i in range(len(batch.sequences)):
            of_rollout, clipped_by_T, chosen_by = terms_of(model, scenario, batch, i)
            terms.append(of_rollout)
            ratios.append(clipped_by_T.detach())
            router_logits += chosen_by
            of_rollout["loss/policy"].sum().backward()
            for name, p in parameters.items():
                mains[name].grad += p.grad
                p.grad = None
        gradient = {name: main.grad.clone() for name, main in mains.items()}
        torch.nn.utils.clip_grad_norm_(mains.values(), scenario.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(mains[name])
        updates.append(
            Update(
                {name: torch.cat([t[name].detach() for t in terms]) for name in terms[0]},
                gradient,
                whole_weights(model),
                torch.cat(ratios),
                router_logits,
            )
        )
    return before, updates


def expert_by_expert(name, tensor):
    """Return tensors as files name them: transformers holds all experts' matrices in one tensor."""
    if ".experts." not in name:
        return [(name, tensor)]
    prefix, kind = name.rsplit(".", 1)
    parts = tensor.chunk(2, dim=1) if kind == "gate_up_proj" else (tensor,)
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    return [
        (f"{prefix}.{e}.{k}.weight", part[e])
        for k, part in zip(kinds, parts, strict=True)
        for e in range(len(tensor))
    ]


# What the ranks do


@dataclass(frozen=True)
class Case:
    """A scenario under a layout, as its ranks get it."""

    name: str
    layout: str
    hf: str
    batch: Batch

    def config(self, **sections):
        every_layout = LAYOUTS | SHARED_LAYOUTS | EXPERT_LAYOUTS | PASSED_ON | INTERLEAVED | CONTEXT
        scenario, (parallel_settings, settings) = SCENARIOS[self.name], every_layout[self.layout]
        merged = {
            "parallel": parallel_settings,
            "lora": scenario.lora or {},
            "data": {"max_prompt_tokens": 16},
            "rollout": {
                "temperature": scenario.temperature,
                "max_new_tokens": 4,
                "router_replay": scenario.routed,
            },
            "train": {"micro_batch_tokens": MICRO_BATCH_TOKENS},
            "loss": {
                "policy": scenario.policy,
                "dual_clip": DUAL_CLIP,
                "head": "recompute" if scenario.policy == "gspo" else "known-gradient",
                "entropy_coef": scenario.entropy_coef,
                "kl_coef": scenario.kl_coef,
                "kl_in_reward": scenario.token_advantages,
                "clip_low": CLIP_LOW,
                "clip_high": CLIP_HIGH,
            },
            "optimizer": {
                "lr": LR,
                "adam_eps": EPS,
                "adam_beta1": BETAS[0],
                "adam_beta2": BETAS[1],
                "clip_grad": scenario.clip_grad,
                "weight_decay": scenario.weight_decay,
            },
        }
        for section, values in (*settings.items(), *sections.items()):
            merged[section] = merged.get(section, {}) | values
        return actor_config(self.hf, **merged)

    @contextmanager
    def actor(self, **sections):
        from megatron_prepo.actor import parallel
        from megatron_prepo.actor.actor import Actor

        config = self.config(**sections)
        join(config.parallel.num_ranks)
        parallel.initialize(config.parallel, seed=1)
        yield Actor(config)
        parallel.shut_down()

    def rollouts(self):
        from megatron_prepo.actor.actor import TrainingSequence

        scenario, batch = SCENARIOS[self.name], self.batch
        return [
            TrainingSequence(
                sequence,
                batch.old_T[i],
                batch.advantage[i],
                batch.coefficient[i],
                importance_T=batch.importance_T[i] if scenario.importance else None,
                reference_logprobs_T=batch.reference_T[i] if scenario.kl_coef else None,
                advantage_T=batch.advantage_T[i] if scenario.token_advantages else None,
            )
            for i, sequence in enumerate(batch.sequences)
        ]


def exported(actor):
    return {name: tensor.clone() for name, tensor in actor.hf_weights()}


def trained(actor):
    return [p for chunk in actor.chunks for p in chunk.parameters() if p.requires_grad]


def two_updates(case, dtype="float32"):
    with case.actor(model={"dtype": dtype}) as actor:
        rollouts = case.rollouts()
        metrics, weights = [], []
        for _ in range(2):
            metrics.append(actor.update(rollouts))
            weights.append(exported(actor))
        first_rank = torch.distributed.get_rank() == 0
        return {
            "metrics": metrics,
            "weights": weights if first_rank else None,
            "main gradients": {p.main_grad.dtype for p in trained(actor)},
            "reduced early": actor.ddp[0].ddp_config.overlap_grad_reduce,
            "offloaded": offloaded_fraction(actor),
            "gathered late": bool(actor.ddp[0].remove_forward_pre_hook_handles),
        }


def first_update(case, dtype):
    with case.actor(model={"dtype": dtype}) as actor:
        computed = actor.backward(case.rollouts())
        gradient = {name: tensor.clone() for name, tensor in actor.hf_gradients()}
        return {
            "metrics": actor.step(computed),
            "gradient": gradient,
            "weights": exported(actor),
            "main gradients": {p.main_grad.dtype for p in trained(actor)},
        }


def mistaken(case, mistake):
    """Return the weights after an update that contains a mistake."""
    with case.actor() as actor:
        rollouts = case.rollouts()
        if mistake.startswith("parts of"):
            for parameter in actor.chunks[0].parameters():
                parameter.sequence_parallel = False
        elif mistake in ("ranks do not sum", "stages do not sum the embedding"):
            actor.mcore.finalize_model_grads_func = lambda *_, **__: None
        elif mistake == "probabilities normalized":
            actor.chunks[0].config.moe_router_pre_softmax = False
        elif mistake == "one rollout twice":
            rollouts[0] = replace(rollouts[0], coefficient=2 * rollouts[0].coefficient)
        elif mistake == "advantages of the next rollout":
            advantages = [r.advantage for r in rollouts[1:] + rollouts[:1]]
            rollouts = [replace(r, advantage=a) for r, a in zip(rollouts, advantages, strict=True)]
        actor.update(rollouts)
        return exported(actor)


def offloaded_fraction(actor):
    """Return the offloaded fraction of the numbers that this rank's optimizer updates."""
    parts = [part.optimizer for part in actor.optimizer.chained_optimizers]
    all_of_them = sum(p.numel() for o in parts for g in o.param_groups for p in g["params"])
    hosts = [o.gpu_params_map_cpu_copy for o in parts if hasattr(o, "cpu_optimizers")]
    return sum(p.numel() for host in hosts for p in host) / all_of_them


def recomputed(case):
    """Count computations of each part of a rank's first layer in a backward pass, per
    micro-batch."""
    with case.actor() as actor:
        layer, calls = actor.chunks[0].decoder.layers[0], Counter()
        for part in ("input_layernorm", "self_attention.core_attention", "mlp"):
            layer.get_submodule(part).register_forward_hook(
                lambda *_, part=part: calls.update([part.split(".")[-1]])
            )
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_hook(lambda *_: calls.update(["experts"]))
        plan = actor.backward(case.rollouts()).plan
        return {part: count / len(plan.ranks[0]) for part, count in calls.items()}


def other_numbers_of_micro_batches(case):
    """Return the gradient norms of three updates: of all rollouts, of two and of all."""
    with case.actor() as actor:
        rollouts = case.rollouts()
        return [actor.update(part)["loss/grad_norm"] for part in (rollouts, rollouts[:2], rollouts)]


def own_choice(case):
    """Return the results of a plain actor of one rank, and of one that replays its routing."""
    plain = [replace(r, sequence=replace(r.sequence, routing=None)) for r in case.rollouts()]
    results, routings = {}, None
    for name, setting in (("plain", False), ("asked", True), ("replayed", True)):
        with case.actor(rollout={"router_replay": setting}) as actor:
            if name == "asked":
                routings = recorded_choice(actor, [r.sequence for r in plain])
            elif name == "replayed":
                plain = [
                    replace(r, sequence=replace(r.sequence, routing=routing))
                    for r, routing in zip(plain, routings, strict=True)
                ]
            scores = actor.score([r.sequence for r in plain], temperature=0.8)
            results[name] = {
                "scores": torch.cat([torch.cat([s.logprobs_T, s.entropy_T]) for s in scores]),
                "routed differently": actor.routed_differently(),
                "norm": actor.backward(plain).norm,
                "gradients": {n: g.clone() for n, g in actor.hf_gradients()},
            }
    return results | {"routings": tuple(routings)}


def recorded_choice(actor, sequences):
    """Return the routing of each sequence that the actor chooses, all in one row."""
    [row] = actor.plan(sequences).ranks[0]
    chosen = []
    for router in actor.router_replay.chunks[0].routers:
        router.get_replay_topk = lambda scores, topk, groups, group_topk, default: recorded(
            default(scores, topk, groups, group_topk)
        )

    def recorded(choice):
        chosen.append(choice[1])
        return choice

    actor.score(sequences, temperature=0.8)
    parts = torch.stack(chosen, dim=1).split([piece.tokens for piece in row.pieces])
    routing_of = dict(zip(row.index, parts, strict=True))
    return [ROUTING.pack(routing_of[i].numpy()) for i in range(len(sequences))]


def counted(case, routings):
    """Return the measured and the expected share of tokens and layers that differ: only the last
    layer's routing of scored tokens is not the plain actor's choice."""
    with case.actor() as actor:
        sequences = [
            replace(sequence, routing=turned(routing, first=sequence.start - 1))
            for sequence, routing in zip(case.batch.sequences, routings, strict=True)
        ]
        actor.score(sequences, temperature=0.8)
        load = actor.plan(sequences).load
        return actor.routed_differently(), load.scored / (4 * (load.tokens - load.padding))


def turned(routing, first):
    """Return the routing with other experts in the last layer from token `first` on, and in another
    order before it."""
    experts_TLk = ROUTING.unpack(routing).copy()
    experts_TLk[:first, -1] = experts_TLk[:first, -1, ::-1]
    for experts_k in experts_TLk[first:, -1]:
        experts_k[1] = next(e for e in range(8) if e not in experts_k)
    return ROUTING.pack(experts_TLk)


def auxiliary_loss(case):
    """Return gradient norms without and with the experts' balance; one row without padding."""
    norms = []
    for coefficient in (0.0, 10.0):
        megatron = {
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": coefficient,
        }
        train = {"micro_batch_tokens": 64, "share_prefixes": False}
        with case.actor(megatron=megatron, train=train) as actor:
            gradient = actor.backward(case.rollouts()[:4])
            assert (gradient.plan.load.tokens, gradient.plan.load.padding) == (48, 0)
            norms.append(gradient.norm)
    return norms


def not_finite(case):
    """Make an update with a NaN, then one without."""
    with case.actor() as actor:
        rollouts = case.rollouts()
        before = exported(actor)
        try:
            actor.update([replace(rollouts[0], advantage=float("nan")), *rollouts[1:]])
            message = None
        except FloatingPointError as error:
            message = str(error)
        after = exported(actor)
        metrics = actor.update(rollouts)
        return {
            "message": message,
            "unchanged": all(torch.equal(before[name], after[name]) for name in before),
            "next": metrics,
        }


def reference_policy(case):
    """Return scores before and after updates, by the current and by the initial weights."""
    with case.actor() as actor:
        rollouts = case.rollouts()
        sequences = [rollout.sequence for rollout in rollouts]

        def scores(function):
            return torch.cat([s.logprobs_T for s in function(sequences, temperature=0.8)])

        result = {"before": scores(actor.score)}
        actor.update(rollouts)
        result["after"] = scores(actor.score)
        result["initial"] = scores(actor.reference_score)
        result["after again"] = scores(actor.score)
        return result


def saved(case, directory):
    """Save a checkpoint after an update, and return the weights in it."""
    with case.actor() as actor:
        actor.update(case.rollouts())
        actor.save(directory, step=1)
        return exported(actor)


def loaded(case, directory):
    with case.actor(model={"megatron": directory}) as actor:
        return exported(actor)


# The tests


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.save(make(), root / name) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def batches(directories):
    return {
        name: make_batch(name, model_of(directories[scenario.model]))
        for name, scenario in SCENARIOS.items()
    }


@dataclass(frozen=True)
class Expected:
    """The reference in float64, and by two implementations of attention in the precision of ours:
    the error of one of them may be small by chance.
    """

    before: dict[str, torch.Tensor]
    updates: list[Update]
    imprecise: list[list[Update]]
    dtype: torch.dtype

    def metric(self, name, number=0):
        """Return a metric of the given update and its allowed error: that of all its terms, if all
        their errors have one sign, and that of rounding to float32."""
        exact, errors = self.updates[number], []
        for other in (updates[number] for updates in self.imprecise):
            terms = {n: e.abs() for n, e in difference(other.terms, exact.terms).items()}
            gradient = difference(other.gradient, exact.gradient)
            errors.append(replace(exact, terms=terms, gradient=gradient).metrics()[name])
        value = exact.metrics()[name]
        rounded = bound(1, torch.float32) * abs(value)
        return value, allowance(max(errors), abs(value), self.dtype) + rounded

    def errors_of_weights(self, number, weights):
        """Return {tensor: error of its change, as a fraction of what is allowed} after the
        update."""
        exact = self.updates[number].weights
        others = [updates[number].weights for updates in self.imprecise]
        return self._errors(weights, exact, others, difference(exact, self.before))

    def errors_of_gradient(self, gradient):
        """Return the same for the first update's gradient."""
        exact = self.updates[0].gradient
        return self._errors(gradient, exact, [u[0].gradient for u in self.imprecise], exact)

    def _errors(self, ours, exact, others, sizes):
        """Return the errors; a tensor may err as much as any of its kind, relative to its size."""
        assert ours.keys() == exact.keys()
        size = {name: tensor.norm().item() for name, tensor in sizes.items()}
        relative = {}
        for other in others:
            for name, error in difference(other, exact).items():
                share = error.norm().item() / size[name] if size[name] else 0.0
                relative[kind(name)] = max(relative.get(kind(name), 0.0), share)
        errors = {}
        for name, error in difference(ours, exact).items():
            allowed = allowance(relative[kind(name)] * size[name], size[name], self.dtype)
            errors[name] = error.norm().item() / allowed if error.any() and allowed else 0.0
            assert allowed or not error.any(), f"{name} must not change"
        return errors


def kind(name):
    """Return the name that the tensors of all layers and experts of a kind share."""
    return re.sub(r"\d+", "*", name)


@pytest.fixture(scope="module")
def expected(directories, batches):
    """Return what the reference computes for a scenario; computed on first use."""

    @cache
    def expected(name, dtype=torch.float32):
        def updates(*model):
            directory = directories[SCENARIOS[name].model]
            return reference_updates(SCENARIOS[name], batches[name], model_of(directory, *model))

        imprecise = [updates(dtype, attention)[1] for attention in ATTENTIONS]
        return Expected(*updates(), imprecise, dtype)

    return expected


@pytest.fixture(scope="module")
def run(directories, batches):
    """Return the results of a function of a case on each rank; run on first use."""

    @cache
    def run(function, name, layout, *args):
        case = Case(name, layout, directories[SCENARIOS[name].model], batches[name])
        return on_ranks(case.config().parallel.num_ranks, function, case, *args)

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_metrics_equal_the_float64_reference(run, expected, name, layout):
    """Metrics of both updates, on every rank; they are sums of a hundred terms of either sign."""
    for number in range(2):
        reference = expected(name)
        names = reference.updates[number].metrics().keys()
        exact = {key: reference.metric(key, number) for key in names}
        for result in run(two_updates, name, layout):
            ours = dict(result["metrics"][number])
            assert ours.pop("loss/learning_rate") == LR
            ours = {key: value for key, value in ours.items() if not key.startswith("train/")}
            assert ours.keys() == exact.keys()
            for key, (value, allowed) in exact.items():
                assert abs(ours[key] - value) <= allowed, f"update {number + 1}, {key}"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_weight_equals_the_float64_reference(run, expected, name, layout):
    """The change of each tensor after one and after two updates.

    Among them the norms of query and key, whose gradients are parts on tensor-parallel ranks, the
    tied embedding on the first and last stage, and norms under sequence parallelism: a sum over
    ranks that is missing, or done twice, is an error of the order of the change.
    """
    for number, weights in enumerate(run(two_updates, name, layout)[0]["weights"]):
        errors = expected(name).errors_of_weights(number, weights)
        assert max(errors.values()) <= 1, f"update {number + 1}: {too_large(errors)}"


def too_large(errors):
    return {name: round(error, 2) for name, error in errors.items() if error > 1}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_hundreds_of_times_what_is_allowed(run, expected, mistake):
    """The mistake shows in every tensor that it concerns, after one update."""
    name, layout, concerned = MISTAKES[mistake]
    errors = expected(name).errors_of_weights(0, run(mistaken, name, layout, mistake)[0])
    found = {tensor: error for tensor, error in errors.items() if concerned in tensor}
    assert found and min(found.values()) > 100


@pytest.mark.parametrize(
    ("name", "layout"),
    [*(("plain", layout) for layout in BFLOAT16_LAYOUTS), ("adapters", "tp2 sp")],
)
def test_bfloat16_stays_near_the_float64_reference(run, expected, name, layout):
    """Loss and gradient of the first update, which activations of 8 bits move by some percent.

    As many layers as there are average this out; a sum that is missing is an error of half.
    """
    reference = expected(name, torch.bfloat16)
    for result in run(first_update, name, layout, "bfloat16"):
        for key in ("loss/policy", "loss/grad_norm"):
            value, allowed = reference.metric(key)
            assert abs(result["metrics"][key] - value) <= allowed, key
        errors = reference.errors_of_gradient(result["gradient"])
        assert max(errors.values()) <= 1, too_large(errors)


@pytest.mark.parametrize("layout", BFLOAT16_LAYOUTS)
def test_bfloat16_weights_are_those_of_the_float32_optimizer(run, directories, layout):
    """Weights equal AdamW's with our gradient, in float32 from rounded weights, rounded again.

    Float32 errs by some 2^-24 of a number, which moves it across the middle of two bfloat16
    numbers, 2^-7 of it apart, in a few of 2^17 cases: fewer than one in 2^12 are one number off.
    """
    model = model_of(directories[SCENARIOS["plain"].model], torch.bfloat16)
    [result, *_] = run(first_update, "plain", layout, "bfloat16")
    mains = {name: p.detach().float() for name, p in model.named_parameters()}
    for name, main in mains.items():
        main.grad = result["gradient"][name].clone()
    torch.nn.utils.clip_grad_norm_(mains.values(), SCENARIOS["plain"].clip_grad)
    torch.optim.AdamW(mains.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0).step()
    differing = 0
    for name, weight in result["weights"].items():
        assert weight.dtype == torch.bfloat16
        expected = mains[name].bfloat16()
        differing += (weight != expected).sum()
        neighbour = torch.finfo(torch.bfloat16).eps * expected.abs()
        assert ((weight.float() - expected.float()).abs() <= neighbour).all(), name
    assert differing <= sum(main.numel() for main in mains.values()) / 2**12


@pytest.mark.parametrize(("name", "layout"), RECOMPUTED)
def test_what_is_to_be_recomputed_is(run, name, layout):
    for result in run(recomputed, name, layout):
        assert result == RECOMPUTED[name, layout]


@pytest.mark.parametrize("layout", PASSED_ON_TO_DENSE)
def test_communication_overlaps_where_it_was_asked_for(run, layout):
    asked = PASSED_ON[layout][1].get("megatron", {})
    for result in run(two_updates, "plain", layout):
        assert result["reduced early"] == asked.get("overlap_grad_reduce", False)
        assert result["gathered late"] == asked.get("overlap_param_gather", False)


@pytest.mark.parametrize(
    ("layout", "least", "most"),
    [("tp1 offloaded", 0.5, 0.9), ("pp2 dp2 offloaded", 1.0, 1.0), ("tp1", 0.0, 0.0)],
)
def test_the_optimizer_is_offloaded_as_far_as_it_was_asked_for(run, layout, least, most):
    """Megatron offloads parameter after parameter until the fraction is reached."""
    for result in run(two_updates, "plain", layout):
        assert least <= result["offloaded"] <= most


def test_gradients_are_reduced_once_whole_whatever_the_number_of_micro_batches(run, expected):
    """Megatron remembers how often a gradient was added to in its first update."""
    plain, overlapped = (
        run(other_numbers_of_micro_batches, "plain", layout) for layout in ("dp2", "dp2 overlapped")
    )
    rounding = relative_error_of_norm(expected("plain"))
    for norms, others in zip(overlapped, plain, strict=True):
        assert norms == pytest.approx(others, rel=rounding)


def relative_error_of_norm(reference):
    value, allowed = reference.metric("loss/grad_norm")
    return allowed / value


@pytest.mark.parametrize("layout", AUXILIARY[1:])
def test_the_balance_of_experts_is_that_of_the_whole_row(run, expected, layout):
    """Megatron multiplies its loss by the context ranks, and its gradient is averaged over them."""
    [(without, balanced)] = run(auxiliary_loss, "experts", "tp1")
    rounding = relative_error_of_norm(expected("experts"))
    assert abs(balanced / without - 1) > 100 * rounding
    for norms in run(auxiliary_loss, "experts", layout):
        assert norms == pytest.approx([without, balanced], rel=rounding)


def test_gradients_add_up_in_float32_whatever_the_weights_are(run):
    for layout in BFLOAT16_LAYOUTS:
        for result in run(first_update, "plain", layout, "bfloat16"):
            assert result["main gradients"] == {torch.float32}


def test_scenarios_cover_what_they_promise(expected):
    """Some ratios are clipped and some are not, and the gradient norm is clipped in one of them."""
    for name in ("plain", "all terms"):
        for update in expected(name).updates:
            assert 0.1 < update.metrics()["loss/clip_fraction"] < 0.9
    norms = {name: expected(name).updates[0].metrics()["loss/grad_norm"] for name in SCENARIOS}
    assert norms["plain"] > SCENARIOS["plain"].clip_grad
    assert norms["all terms"] < SCENARIOS["all terms"].clip_grad
    names = expected("all terms").before.keys()
    assert any("q_norm" in n for n in names) and any("lm_head" in n for n in names)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_rounding_decides_about_a_clip_or_an_expert(expected, name):
    """The reference is a judge only while both make the same decisions."""
    clips = [1 - CLIP_LOW, 1 + CLIP_HIGH, *[DUAL_CLIP] * (SCENARIOS[name].policy == "dual-clip")]
    clips = torch.tensor(clips, dtype=torch.float64).log()
    reference = expected(name)
    for exact, *others in zip(reference.updates, *reference.imprecise, strict=True):
        log_ratio_T, logits_TE = (f(exact) for f in (log_ratios, router_logits))
        for other in others:
            from_clip_T = (log_ratio_T[:, None] - clips).abs()
            assert_far(from_clip_T, (log_ratios(other) - log_ratio_T).abs())
            *_, last_T, next_T = logits_TE.topk(ROUTING.experts_per_token + 1).values.T
            assert_far(last_T - next_T, (router_logits(other) - logits_TE).abs())


def log_ratios(update):
    return update.clipped_ratios.double().log()


def router_logits(update):
    return torch.cat([torch.empty(0, ROUTING.experts), *update.router_logits]).double()


def assert_far(distances, errors):
    if len(distances):
        assert distances.min() > allowance(errors.max().item(), size=distances.mean().item())


def test_without_advantages_no_weight_moves(run, expected):
    before = expected("advantages of zero").before
    for layout in SCENARIOS["advantages of zero"].layouts:
        for weights in run(two_updates, "advantages of zero", layout)[0]["weights"]:
            assert all(torch.equal(weights[name].double(), before[name]) for name in before)


def test_a_loss_that_is_not_finite_is_refused_on_all_ranks_and_leaves_no_trace(run):
    """No trace in the weights or in the next update, under TP2 x PP2."""
    never = run(two_updates, "plain", "tp2 pp2")
    for refused, other in zip(run(not_finite, "plain", "tp2 pp2"), never, strict=True):
        assert (
            "update 1: non-finite loss or gradient (loss=nan" in refused["message"]
            and refused["unchanged"]
        )
        assert refused["next"] == other["metrics"][0]


@pytest.mark.parametrize("name", ["all terms", "some adapters"])
def test_the_initial_policy_is_kept_and_the_current_one_restored(run, name):
    """Bit for bit; the update in between was large enough to tell them apart."""
    for result in run(reference_policy, name, "tp2"):
        assert torch.equal(result["initial"], result["before"])
        assert torch.equal(result["after"], result["after again"])
        assert (result["after"] - result["before"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("written", "read"),
    [(source, target) for source, reads in RESHARDED.items() for target in reads],
)
def test_a_checkpoint_is_read_under_another_layout_bit_for_bit(run, checkpoints, written, read):
    """All weights as exported before saving and after loading, after an update."""
    directory = str(checkpoints / written.replace(" ", "-"))
    before = run(saved, "plain", written, directory)[0]
    after = run(loaded, "plain", read, directory)[0]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("name", ["routed", "routed not normalized"])
def test_a_replay_of_the_actors_own_choice_is_the_plain_pass_bit_for_bit(run, name):
    """Scores, and the gradient of every tensor; and no choice is counted as another."""
    [own] = run(own_choice, name, "tp1 one micro-batch")
    assert own["plain"]["routed differently"] is None
    for name in ("asked", "replayed"):
        assert own[name]["routed differently"] == 0.0
        assert torch.equal(own[name]["scores"], own["plain"]["scores"])
        assert own[name]["norm"] == own["plain"]["norm"]
        for tensor, gradient in own["plain"]["gradients"].items():
            assert torch.equal(own[name]["gradients"][tensor], gradient), tensor


@pytest.mark.parametrize("layout", CHOOSING)
def test_other_choices_are_counted_as_sets_once_a_token_and_layer(run, layout):
    """No router's input depends on the last layer, the only one that is changed."""
    [own] = run(own_choice, "routed", "tp1 one micro-batch")
    for share, expected in run(counted, "routed", layout, own["routings"]):
        assert 0.05 < expected < 0.25
        assert share == approx(expected)


def test_some_prompts_of_a_group_were_routed_alike_and_some_were_not(batches):
    from megatron_prepo.actor.packing import make_pieces

    sizes = [len(piece.index) for piece in make_pieces(batches["routed"].sequences, most=40)]
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2]
