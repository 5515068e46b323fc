"""The model that the actor builds, where no stand-in of the CPU helps."""

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe import moe_utils

from megatron_prepo.actor.dry_run import pretend
from megatron_prepo.actor.model import build_model
from megatron_prepo.config import ModelConfig, ParallelConfig
from tests.unit.plan.test_memory import EXPERTS


def test_a_router_needs_neither_transformer_engine_nor_the_cpus_stand_ins(monkeypatch):
    """This is the case on a GPU: megatron-core 0.16 leaves `te_general_gemm` unbound.

    The product is held against float64 to n u / (1 - n u) sum |x w|, the bound of any order of a
    sum of n float32 products with unit roundoff u.
    """
    parallel = ParallelConfig()
    with pretend(0, 1, parallel):  # installs the CPU's stand-ins, unless they already are
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
        model = ModelConfig(hf="", layers="torch", dtype="float32")
        (chunk,) = build_model(EXPERTS, model, parallel)
        router = chunk.decoder.layers[0].mlp.router
        x_TH = torch.randn(5, 1, EXPERTS["hidden_size"])
        logits_TE = router.gating(x_TH).double()
    x_TH, weight_EH = x_TH.double(), router.weight.double()
    rounding = EXPERTS["hidden_size"] * 2.0**-24
    allowed_TE = rounding / (1 - rounding) * (x_TH.abs() @ weight_EH.abs().t())
    assert logits_TE.shape == (5, 1, EXPERTS["num_experts"])
    assert ((logits_TE - x_TH @ weight_EH.t()).abs() <= allowed_TE).all()
