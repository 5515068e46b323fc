"""Bytes per rank in addition to Megatron-Core's own buffers: formulas, with sources.

Activations are counted tensor by tensor as in Korthikanti et al. (arXiv 2205.05198, section 4),
adapted to these models: RMSNorm, grouped queries, a gated MLP, attention that stores no scores, no
dropout.  Numbers are bfloat16, 2 bytes each, unless stated otherwise.  Per token and layer, with
TransformerEngine's layers, a rank keeps

    8 h / s                              inputs and outputs of the two norms
    (4 q + 4 g + 4 a) / t                queries, keys, values; attention's output and its sums
    6 f / t                              gate and up, and their product

and with the torch-native layers, exactly as autograd keeps them (tests run them and count),

    (24 h + 8) / s                       each norm keeps its input twice in float32, and two results
    (6 q + 6 g + 4 a) / t                the joint q, k, v stays alive together with q and k
    10 f / t                             two more intermediates of the activation function

Under context parallelism a rank has its part of the tokens; keys and values are kept once more, as
received from the exchange between ranks, and the joint q, k, v is no longer kept for the keys:
4 r g in place of 4 g and of 6 g, where each head is repeated r times so that every rank gets one.

h hidden size, q query width (heads times head size), g key width, a heads, f MLP width, t tensor
parallel size, s = t under sequence parallelism, else 1.  A mixture of experts keeps, in place of
the last line, k (2 h + 6 f / t) or k (2 h + 12 f / t) for the k experts of a token, if they are
evenly loaded.
Recomputation keeps a layer's input, 2 h / s, and works on one group of layers at a time.

Adapters (LoRA) keep in addition, for each of Megatron's linear layers with p adapted projections
and `out` outputs per rank, 2 p r per token and, if it joins projections, 2 out p r.  This is an
upper bound: sequence parallelism splits some of it, and frozen norms keep less.

Not counted: temporaries of the backward pass, communication buffers, fragmentation; a plan reserves
an allowance for them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_prepo.config import LoraConfig, ParallelConfig
from megatron_prepo.models.shape import Shape

Layers = Literal["torch", "te"]


def layer_activations(
    shape: Shape, parallel: ParallelConfig, layers: Layers, *, tokens: int
) -> float:
    """Return the bytes that one layer keeps for its backward pass, for `tokens` tokens."""
    tensor = parallel.tensor
    replicated = tensor if parallel.sequence else 1
    hidden, queries, keys = shape.hidden, shape.queries, shape.keys
    exchanged = 4 * keys * _repeats(shape, parallel)
    if layers == "te":
        token = 8 * hidden / replicated + (4 * queries + exchanged + 4 * shape.heads) / tensor
    else:
        token = (24 * hidden + 8) / replicated
        kept = 6 * keys if parallel.context == 1 else exchanged
        token += (6 * queries + kept + 4 * shape.heads) / tensor
        if shape.head_norms:
            token += (10 * (queries + keys) + 4 * (shape.heads + shape.groups)) / tensor
        token += 8 * shape.head_size  # sine and cosine, for queries and for keys
    token += _mlp_activations(shape, parallel, layers)
    return token * tokens / parallel.context


def adapter_activations(
    shape: Shape, parallel: ParallelConfig, lora: LoraConfig, *, tokens: int
) -> float:
    """Return the bytes that the adapters of a layer keep in addition, at most."""
    numbers = 0.0
    for joined, adapted, _, outputs in _adapted_layers(shape, lora):
        rows = outputs / parallel.tensor if joined > 1 else 0
        numbers += adapted * lora.rank * (tokens / parallel.context + rows)
    return 2 * numbers


def adapter_parameters(shape: Shape, lora: LoraConfig) -> int:
    """Return the parameters of all adapters as Megatron holds them, over all ranks.

    They are more than those that `peft` counts where only some of joined projections are adapted.
    """
    layer = sum(
        adapted * inputs + outputs for _, adapted, inputs, outputs in _adapted_layers(shape, lora)
    )
    return shape.layers * lora.rank * layer


def _adapted_layers(shape: Shape, lora: LoraConfig) -> Iterator[tuple[int, int, int, int]]:
    """Yield the sizes of Megatron's linear layers with an adapter, of one transformer layer.

    These are the numbers of its projections and of the adapted ones, its inputs and its outputs.
    """
    for names, inputs, outputs in (
        (("q_proj", "k_proj", "v_proj"), shape.hidden, shape.queries + 2 * shape.keys),
        (("o_proj",), shape.queries, shape.hidden),
        (("gate_proj", "up_proj"), shape.hidden, 2 * shape.mlp),
        (("down_proj",), shape.mlp, shape.hidden),
    ):
        if adapted := len(set(names) & set(lora.target_modules)):
            yield len(names), adapted, inputs, outputs


def exchanged_numbers(shape: Shape, parallel: ParallelConfig) -> float:
    """Return the numbers per token and layer that context parallelism sends to other ranks.

    These are queries, keys and values before attention and its output after; a rank keeps its own
    part of each.
    """
    numbers = 2 * shape.queries + 2 * shape.keys * _repeats(shape, parallel)
    return numbers / parallel.tensor * (1 - 1 / parallel.context)


def _repeats(shape: Shape, parallel: ParallelConfig) -> int:
    """Return how often the context ranks hold each key-value head of a tensor rank."""
    heads = max(1, shape.groups // parallel.tensor)
    return math.lcm(heads, parallel.context) // heads


def _mlp_activations(shape: Shape, parallel: ParallelConfig, layers: Layers) -> float:
    """Return bytes per token between the second norm's output and the residual."""
    if not shape.experts:
        return (6 if layers == "te" else 10) * shape.mlp / parallel.tensor
    inputs = 2 * shape.hidden / (1 if parallel.expert == 1 else parallel.tensor)
    inside = (6 if layers == "te" else 12) * shape.mlp / parallel.tensor
    # indices, probabilities and the map of tokens to experts: megatron-core sorts it since 0.17,
    # and 0.16 keeps 3 bytes in place of 8
    routing = (20 * shape.experts_per_token + 8 * shape.experts + 4) / parallel.tensor
    return shape.experts_per_token * (inputs + inside) + routing


def stage_activations(
    shape: Shape,
    parallel: ParallelConfig,
    layers: Layers,
    megatron: Mapping[str, Any],
    *,
    num_layers: int,
    in_flight: int,
    tokens: int,
    lora: LoraConfig | None = None,
) -> float:
    """Return the peak bytes of a pipeline stage with `in_flight` micro-batches.

    `megatron` is the section of that name: `recompute_granularity: full` is counted according to
    `recompute_method` and `recompute_num_layers`.  `selective` has no effect: by default it drops
    attention scores, which these attentions never keep.
    """
    one = layer_activations(shape, parallel, layers, tokens=tokens)
    if lora and lora.rank:
        one += adapter_activations(shape, parallel, lora, tokens=tokens)
    if megatron.get("recompute_granularity") != "full":
        return in_flight * num_layers * one
    split = parallel.tensor if parallel.sequence else 1
    kept = 2 * shape.hidden * tokens / (split * parallel.context)
    group = min(megatron.get("recompute_num_layers") or 1, num_layers)
    if megatron.get("recompute_method") == "block":
        return in_flight * (group * kept + (num_layers - group) * one) + one
    return in_flight * -(-num_layers // group) * kept + group * one


def head_workspace(
    shape: Shape, parallel: ParallelConfig, *, chunk_tokens: int, tokens: int
) -> float:
    """Return the bytes that the output head adds on the last stage, in backward.

    These are a chunk's logits in float32, two copies of the hidden states (gathered, and their
    gradient), and about 100 bytes per token.  The weight's gradient goes into Megatron's buffer.
    """
    tokens = -(-tokens // parallel.context)
    rows = -(-shape.vocabulary // parallel.tensor)
    logits = min(chunk_tokens, tokens) * rows * 4
    return logits + tokens * (2 * shape.hidden * 2 + 100)


def kv_bytes_per_token(shape: Shape, *, tensor: int = 1) -> int:
    """Return bytes of keys and values per token on a GPU of the engine; a head is never split."""
    groups = max(1, shape.groups // tensor)
    return 2 * shape.layers * groups * shape.head_size * 2
