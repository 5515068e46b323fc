"""The formula of operations against what torch counts while real models run."""

import pytest
import torch
from tiny_models import SHAPE, actor_config, llama3, mistral, qwen2, qwen3, qwen3_moe, save
from torch.utils.flop_counter import FlopCounterMode

from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.models.flops import FlopCount
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.records import ScoredSequence

FAMILIES = {
    "qwen2": qwen2,
    "qwen3": lambda: qwen3(tied=True),
    "llama3": llama3,
    "mistral": lambda: mistral(window=5),
    "qwen3_moe": qwen3_moe,
}
SEQUENCES, LENGTH = 3, 17


@pytest.mark.parametrize("family", FAMILIES)
def test_against_torchs_counter_on_transformers(family, tmp_path):
    """Eager attention multiplies full squares of scores, and the head processes every token."""
    model = FAMILIES[family]()
    shape = Shape.of(read_hf_config(save(model, tmp_path)))
    model.set_attn_implementation("eager")
    if shape.experts:
        model.set_experts_implementation("eager")
    tokens = torch.randint(SHAPE["vocab_size"], (SEQUENCES, LENGTH))
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    num_tokens = SEQUENCES * LENGTH
    expected = FlopCount(num_tokens, num_tokens, num_tokens * LENGTH).flops(shape)
    # the computation of the rotary embedding's angles in transformers is not part of the model
    with FlopCounterMode(display=False) as angles:
        model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None])
    assert forward.get_total_flops() - angles.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected


def test_the_actor_takes_the_heads_product_of_scored_tokens_only(tmp_path):
    """Attention is not counted: torch's counter supports its kernel on a CPU only from 2.15 on."""
    config = actor_config(save(qwen3(tied=True), tmp_path))
    sequences = [ScoredSequence(tuple(range(LENGTH)), start=6)] * SEQUENCES
    parallel.initialize(config.parallel, seed=0)
    try:
        actor = Actor(config)
        with FlopCounterMode(display=False) as counter:
            actor.score(sequences, temperature=1.0)
    finally:
        parallel.shut_down()
    work = FlopCount.of(sequences)
    assert work == FlopCount(SEQUENCES * LENGTH, SEQUENCES * 11, SEQUENCES * 153)
    # the last token of a sequence predicts nothing, and is in no row
    passed = FlopCount(work.tokens - SEQUENCES, work.scored)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operator, n in counts.items() if "attention" not in str(operator))
    assert products == passed.flops(Shape.of(actor.hf))
