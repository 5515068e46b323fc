"""Build this rank's part of a Megatron-Core GPTModel from a Hugging Face configuration.

Layers are TransformerEngine's if it is installed, torch-native ones otherwise.  The model returns
hidden states instead of logits: `lm_head` computes log-probabilities and entropies from them, so
that the logits of a batch never exist all at the same time.
"""

import dataclasses
import importlib.util
import json
import reprlib
from enum import Enum
from types import MethodType
from typing import Any, get_type_hints

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_prepo import internals
from megatron_prepo.actor import cpu_shim, lm_head_torch
from megatron_prepo.actor.attention import CausalAttention, RMSNorm, rotate_by_position
from megatron_prepo.actor.cpu_offload import check_offload
from megatron_prepo.actor.lm_head import row_operations
from megatron_prepo.config import Config, LoraConfig, ModelConfig, ParallelConfig, nearest
from megatron_prepo.config import OptimizerConfig as OptimizerSettings
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import gpt_settings, num_experts, transformer_settings
from megatron_prepo.models.lora import add_adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_SETTINGS = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "params_dtype": "model.dtype",
    "bf16": "model.dtype",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert",
    "moe_enable_routing_replay": "rollout.router_replay",
} | {field.name: f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerSettings)}
"""Megatron's names with a setting of ours, which must be used instead."""
OTHER_FUNCTION = {
    *("rotary_interleaved", "layernorm_zero_centered_gamma", "softmax_scale", "softmax_type"),
    *("window_size", "window_attn_skip_freq", "no_rope_freq", "activation_func"),
    *("activation_func_clamp_value", "glu_linear_offset", "multi_latent_attention"),
    *("moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_enable_expert_bias"),
    *("moe_expert_capacity_factor", "moe_apply_probs_on_input"),
}
"""Megatron's names that would make the actor compute another function than `config.json`."""
FOR_TRAINING = {"hidden_dropout", "attention_dropout", "moe_router_load_balancing_type"}
"""Names that are derived from `config.json` but may differ: the engine computes without them."""
REFUSED = {
    "cp_comm_type": "parallel.context exchanges heads around every attention, and nothing else",
    "hybrid_context_parallel": "parallel.context is the same for every micro-batch",
    "overlap_param_gather_with_optimizer_step": "set megatron.overlap_param_gather=true",
    "use_torch_optimizer_for_cpu_offload": "megatron-core ignores it and always uses torch's AdamW "
    "on the host",
}
"""Megatron's names that would break our assumptions, and the reason or remedy."""


def check_layout(config: Config, hf: dict[str, Any]) -> None:
    """Raise UserError if `parallel` does not fit the model, or `megatron:` has an invalid name."""
    _check_tensor(config.parallel, hf)
    _check_pipeline(config.parallel, config.megatron, hf)
    _check_experts(config.parallel, hf)
    if config.rollout.router_replay:
        _check_router_replay(config.megatron, num_experts(hf))
    if config.lora.rank and num_experts(hf):
        raise UserError(
            f"lora.rank={config.lora.rank}: adapters of a mixture of experts are not supported; "
            "set lora.rank=0"
        )
    _check_megatron_settings(config.megatron, config.optimizer, hf)
    check_offload(
        config.megatron,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
    )


def _check_tensor(parallel: ParallelConfig, hf: dict[str, Any]) -> None:
    heads = hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    for name, count in (
        ("num_attention_heads", heads),
        ("intermediate_size", hf["intermediate_size"]),
    ):
        if count % parallel.tensor:
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {name}={count}; "
                "choose a tensor-parallel size that divides it"
            )
    if heads % (parallel.tensor * parallel.context):
        raise UserError(
            f"parallel.context={parallel.context} x parallel.tensor={parallel.tensor} does not "
            f"divide the model's num_attention_heads={heads}, which context-parallel ranks share; "
            "choose sizes whose product divides it"
        )
    if groups % parallel.tensor and parallel.tensor % groups:
        raise UserError(
            f"parallel.tensor={parallel.tensor} neither divides nor is a multiple of the model's "
            f"num_key_value_heads={groups}"
        )


def _check_pipeline(parallel: ParallelConfig, megatron: dict[str, Any], hf: dict[str, Any]) -> None:
    uneven = any(name.startswith("num_layers_in_") for name in megatron)
    if hf["num_hidden_layers"] % parallel.pipeline and not uneven:
        raise UserError(
            f"parallel.pipeline={parallel.pipeline} does not divide the model's "
            f"num_hidden_layers={hf['num_hidden_layers']}; choose a divisor, or set another number "
            "for the first or last stage by megatron.num_layers_in_first_pipeline_stage or "
            "megatron.num_layers_in_last_pipeline_stage"
        )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and (uneven or hf["num_hidden_layers"] % chunks):
        raise UserError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs {chunks} chunks with the "
            f"same number of layers: num_hidden_layers={hf['num_hidden_layers']} must be divisible "
            "by it, and no stage may be given another number"
        )


def _check_experts(parallel: ParallelConfig, hf: dict[str, Any]) -> None:
    if (experts := num_experts(hf)) % parallel.expert or (parallel.expert > 1 and not experts):
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the model's {experts} experts"
        )
    if experts and hf["moe_intermediate_size"] % parallel.expert_tensor:
        raise UserError(
            f"parallel.tensor={parallel.tensor} does not divide the model's "
            f"moe_intermediate_size={hf['moe_intermediate_size']}; choose a tensor-parallel size "
            "that divides it, or distribute complete experts (parallel.expert)"
        )
    if experts and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel.sequence=false: with parallel.tensor={parallel.tensor} megatron-core needs "
            "sequence parallelism to train experts; set parallel.sequence=true"
        )


def _check_megatron_settings(
    megatron: dict[str, Any], optimizer: OptimizerSettings, hf: dict[str, Any]
) -> None:
    decided = OTHER_FUNCTION | transformer_settings(hf).keys()
    for name in megatron:
        if name in OWN_SETTINGS:
            raise UserError(f"megatron.{name}: set {OWN_SETTINGS[name]} instead")
        known = [n for kind in _MEGATRON_CONFIGS for n in _field_names(kind)]
        if name not in known:
            raise UserError(
                f"unknown setting megatron.{name}{nearest(name, known)}; megatron-core's "
                "TransformerConfig, DistributedDataParallelConfig and OptimizerConfig have no such "
                "field"
            )
        if name in decided - FOR_TRAINING:
            raise UserError(
                f"megatron.{name}: it is set by the model's config.json, also for the engine and "
                "the export; change config.json"
            )
        if name in REFUSED and megatron[name]:
            raise UserError(f"megatron.{name} is not supported: {REFUSED[name]}")
    for kind in _MEGATRON_CONFIGS:
        megatron_overrides(megatron, kind)
    split = optimizer.use_distributed_optimizer
    if megatron.get("overlap_param_gather") and not split:
        raise UserError(
            "megatron.overlap_param_gather=true has no effect without "
            "optimizer.use_distributed_optimizer=true"
        )


def _check_router_replay(megatron: dict[str, Any], experts: int) -> None:
    """Raise UserError if the model has no routers, or routers that cannot replay a choice."""
    if not experts:
        raise UserError(
            "rollout.router_replay=true: the model has no experts; set rollout.router_replay=false"
        )
    for name, value, why in (
        ("moe_router_fusion", True, "the fused kernel chooses experts itself"),
        ("moe_router_load_balancing_type", "sinkhorn", "a solver chooses the experts"),
        ("moe_router_force_load_balancing", True, "it draws logits at random"),
    ):
        if megatron.get(name) == value:
            raise UserError(
                f"rollout.router_replay=true is incompatible with megatron.{name}={value}: {why}; "
                "remove one of them"
            )


def megatron_overrides(megatron: dict[str, Any], kind: type) -> dict[str, Any]:
    """Return the settings in the `megatron:` section that are fields of a Megatron dataclass.

    Raises UserError for a value that does not have its field's type.
    """
    types, known = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    return {
        name: value if value is None is known[name].default else _convert(name, value, types[name])
        for name, value in megatron.items()
        if name in known
    }


def _convert(name: str, value: object, kind: Any) -> Any:
    """Convert a value to a type: a list to a tuple, a name to a member of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value not in list(kind.__members__):
            raise UserError(
                f"setting megatron.{name}={reprlib.repr(value)}: Input should be "
                f"{' or '.join(kind.__members__)}"
            )
        return kind[value]
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        wanted = " or ".join(
            dict.fromkeys(
                "a configuration cannot express it"
                if e["type"] == "needs_python_object"
                else e["msg"]
                for e in error.errors()
            )
        )
        of_megatron = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise UserError(
            f"setting megatron.{name}={reprlib.repr(value)}: {wanted} ({of_megatron} to Megatron)"
        ) from None


def transformer_config(
    hf: dict[str, Any], model: ModelConfig, parallel: ParallelConfig, megatron: dict[str, Any]
) -> TransformerConfig:
    """Return Megatron's TransformerConfig for a model, a layout and the `megatron:` section."""
    dtype = DTYPES[model.dtype]
    settings = transformer_settings(hf) | {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_size,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.sequence,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "activation_func": torch.nn.functional.silu,
        "attention_softmax_in_fp32": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # required by the line above, also if dense
    }
    if not torch.cuda.is_available():
        settings |= cpu_shim.model_settings()
    elif importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:  # NVIDIA apex
        settings["gradient_accumulation_fusion"] = False
    if parallel.virtual_size is not None:
        # One message at a time between two ranks: with several, a pipeline of two ranks confuses
        # them if their lengths differ (megatron-core 0.16.1, _communicate_shapes).
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if not _uses_te(model):
        settings["persist_layer_norm"] = False
    settings |= megatron_overrides(megatron, TransformerConfig)
    try:
        mcore = TransformerConfig(**settings)
    except (ValueError, AssertionError) as error:  # raised for incompatible settings
        raise UserError(f"megatron-core rejected the model's settings: {error}") from error
    without_te = {"layernorm", "moe_act"}.intersection(mcore.recompute_modules)
    if mcore.recompute_granularity == "selective" and without_te and not _uses_te(model):
        raise UserError(
            f"megatron.recompute_modules={sorted(without_te)}: megatron-core needs "
            "TransformerEngine to drop these outputs; recompute core_attn, mlp or moe instead"
        )
    return mcore


def build_model(
    hf: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    megatron: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> list[GPTModel]:
    """Build this rank's part of the model, without loading weights.

    One chunk, or `parallel.virtual_pipeline` chunks: with P pipeline ranks, chunk v of rank p is
    stage v * P + p.  With `lora.rank`, adapters are added and all other weights frozen.
    """
    if lora and lora.rank:
        model = dataclasses.replace(model, layers="torch")
    mcore = transformer_config(hf, model, parallel, megatron or {})
    stages = [None] if parallel.virtual_size is None else list(range(parallel.virtual_size))
    chunks = [_build_chunk(hf, model, parallel, mcore, stage) for stage in stages]
    if lora and lora.rank:
        for chunk in chunks:
            add_adapters(chunk, lora)
    return chunks


def _build_chunk(
    hf: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    mcore: TransformerConfig,
    virtual_stage: int | None,
) -> GPTModel:
    spec = _te_spec(mcore) if _uses_te(model) else _torch_spec(mcore, virtual_stage)
    of_stage = {"ignore_virtual": False, "vp_stage": virtual_stage}
    stage = GPTModel(
        config=mcore,
        transformer_layer_spec=spec,
        vocab_size=-(-hf["vocab_size"] // parallel.tensor) * parallel.tensor,
        pre_process=parallel_state.is_pipeline_first_stage(**of_stage),
        post_process=parallel_state.is_pipeline_last_stage(**of_stage),
        vp_stage=virtual_stage,
        parallel_output=True,
        **gpt_settings(hf),
    )
    rotate_by_position(stage.rotary_pos_emb)
    if stage.post_process:
        head = stage.output_layer
        internals.replace(head, "forward", MethodType(_hidden_states, head))
    return stage


def describe(config: Config) -> str:
    """Return one line on the actor's backend, layout and precision, for the start of a run."""
    where = "CUDA" if torch.cuda.is_available() else "the CPU over gloo"
    lora = config.lora
    layers = "TransformerEngine's" if not lora.rank and _uses_te(config.model) else "torch-native"
    logits = "float32" if config.model.fp32_lm_head else config.model.dtype
    chunks = config.parallel.virtual_pipeline
    rows = row_operations(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return (
        f"actor: megatron-core {megatron.core.__version__} on {where}, {layers} layers, "
        f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline}"
        f"{f' x {chunks} chunks' if chunks > 1 else ''}"
        f"{f' x context {context}' if (context := config.parallel.context) > 1 else ''}"
        f"{' with sequence parallelism' if config.parallel.sequence else ''}, "
        f"{config.model.dtype}; {f'adapters of rank {lora.rank}; ' if lora.rank else ''}"
        f"{config.loss.head} head with {logits} logits, rows in "
        f"{'torch' if rows is lm_head_torch else 'Triton'}"
    )


def output_weight(model: GPTModel) -> torch.Tensor:
    """Return the last stage's rows of the output embedding, tied or not."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _hidden_states(
    self: torch.nn.Module, hidden_states: torch.Tensor, /, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Return the hidden states unchanged, in place of `ColumnParallelLinear.forward`.

    Works with every megatron-core from 0.16; the layer keeps its weight, names and sharded state.
    """
    return hidden_states, None


def _te_spec(mcore: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=mcore.num_moe_experts,
        moe_grouped_gemm=mcore.moe_grouped_gemm,
        qk_layernorm=mcore.qk_layernorm,
    )
    attention = layer.submodules.self_attention.submodules
    if mcore.params_dtype is torch.float32:  # TransformerEngine packs only 16-bit types
        attention.core_attention = CausalAttention
    else:
        from megatron_prepo.actor.te_attention import PackedTEAttention

        attention.core_attention = PackedTEAttention
    return layer


def _torch_spec(mcore: TransformerConfig, virtual_stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=mcore.num_moe_experts,
        qk_layernorm=mcore.qk_layernorm,
        normalization="RMSNorm",
    )
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    if mcore.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if mcore.num_moe_experts:
        # Megatron saves this norm under a name that its TransformerEngine layers do not use
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        # The router multiplies with TransformerEngine unless this is None; without it,
        # megatron-core 0.16 leaves the name unbound, and the first forward raises NameError.
        moe_utils.te_general_gemm = None
    layers_here = get_num_layers_to_build(mcore, virtual_stage, pp_rank=_pipeline_rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)


def _pipeline_rank() -> int:
    rank: int = parallel_state.get_pipeline_model_parallel_rank()
    return rank


def _uses_te(model: ModelConfig) -> bool:
    installed = importlib.util.find_spec("transformer_engine") is not None
    if model.layers == "te" and not installed:
        raise UserError(
            "model.layers=te, but TransformerEngine is not installed; install the extra `te` or "
            "set model.layers=torch"
        )
    return model.layers != "torch" and installed and torch.cuda.is_available()


_MEGATRON_CONFIGS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


def _field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
