"""Prove a conversion: names, configuration, every bit of every tensor, and logits.

Four questions, each with an answer of its own kind:

- *configuration*: does the Megatron model have the architecture that `transformers` reads from the
  same `config.json`, field by field and tensor by tensor?
- *checkpoint*: does every Hugging Face tensor come back out of the Megatron checkpoint bit for bit?
- *layouts*: does it survive being cut for the ranks of each layout and put together again?
- *logits*: does the Megatron model compute what `transformers` computes, also at 2,048 positions,
  where a lost rope scaling shows?  A tiny random model of the same settings is always asked, too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints_convert.convert import (
    ARENA_BYTES,
    PlannedParameter,
    hf_attention_heads,
    hf_tensors,
    plan_export,
    refuse_layout,
    uneven_stages,
)
from megatron_prepo.actor import tiny_instance
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import write_text
from megatron_prepo.models.arena import Arena
from megatron_prepo.models.fit import check_fit
from megatron_prepo.models.hf_config import gpt_settings, read_hf_config
from megatron_prepo.models.hf_files import HFTensors
from megatron_prepo.models.mapping import Mapping, shard, to_hf, to_megatron, unshard
from megatron_prepo.models.record import architecture_record, comparable
from megatron_prepo.models.torch_dist import TorchDistReader

LONG = 2048
"""Positions of the long sequence."""


@dataclass
class Report:
    """What was found; `failures` is empty if all is well."""

    failures: list[str] = field(default_factory=list)
    config: dict[str, dict] = field(default_factory=dict)
    tensors: dict[str, dict] = field(default_factory=dict)
    layouts: list[str] = field(default_factory=list)
    logits: list[dict] = field(default_factory=list)
    tiny: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> str:
        """The manifest."""
        return json.dumps({"passed": not self.failures, **vars(self)}, indent=2) + "\n"


def verify(
    hf: str | Path,
    *,
    megatron: str | Path | None = None,
    layouts: Sequence[tuple[int, int, int]] = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)),
    quick: bool = False,
    logits: bool = True,
    prompts: Sequence[str] = (),
    manifest: str | Path | None = None,
) -> Report:
    """Check a Hugging Face model, and the Megatron checkpoint made from it if one is given.

    `layouts`: (tensor, pipeline, expert) sizes to cut the model for; sizes that the model cannot be
    cut into are reported as skipped.
    `quick`: first, middle and last layer only, no logits; for models larger than the memory.
    `prompts`: texts whose logits are compared, beside seeded random tokens.
    `manifest`: JSON file for the whole report, with the SHA-256 of every tensor that was looked at.
    """
    settings = read_hf_config(hf)
    report = Report()
    _check_config(report, hf, settings, megatron)
    tiny = tiny_instance.compare(hf)
    report.tiny = vars(tiny)
    if not tiny.passed:
        report.failures.append(f"logits of a tiny random model: off by {tiny.ours:.2e}")
    with HFTensors(hf, tied=settings["tie_word_embeddings"]) as tensors:
        check_fit(tensors, settings)
        _check_layouts(report, settings, tensors, layouts, quick=quick)
        if megatron:
            _check_checkpoint(report, settings, tensors, megatron, quick=quick)
    if logits and not quick:
        _check_logits(report, hf, settings, megatron, prompts)
    if manifest:
        write_text(manifest, report.as_json())
    return report


def _check_config(report: Report, hf, settings: dict, megatron) -> None:
    """Megatron's model, built from our reading, beside `transformers`' reading of the same file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_prepo.actor.checkpoint import newest
    from megatron_prepo.actor.dry_run import each_rank
    from megatron_prepo.config import ModelConfig, ParallelConfig

    theirs = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    rope = dict(theirs.rope_parameters)
    with torch.device("meta"):
        their_model = AutoModelForCausalLM.from_config(theirs)
    _, (ours,) = next(each_rank(settings, ModelConfig(hf="", dtype="bfloat16"), ParallelConfig()))
    mcore = ours.config
    biased = any(name.endswith("q_proj.bias") for name, _ in their_model.named_parameters())
    fields = {
        "layers": (theirs.num_hidden_layers, mcore.num_layers),
        "hidden size": (theirs.hidden_size, mcore.hidden_size),
        "feed-forward size": (theirs.intermediate_size, mcore.ffn_hidden_size),
        "attention heads": (theirs.num_attention_heads, mcore.num_attention_heads),
        "key-value heads": (theirs.num_key_value_heads, mcore.num_query_groups),
        "head size": (
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            mcore.kv_channels,
        ),
        "norm epsilon": (theirs.rms_norm_eps, mcore.layernorm_epsilon),
        "rope theta": (float(rope["rope_theta"]), float(ours.rotary_base)),
        "rope scaling": (
            rope.get("factor") if rope["rope_type"] == "llama3" else None,
            gpt_settings(settings).get("rope_scaling_factor"),
        ),
        "rope type": (rope["rope_type"] in ("default", "llama3"), True),
        "query-key-value bias": (biased, mcore.add_qkv_bias),
        "query-key norm": (
            any(".q_norm." in name for name, _ in their_model.named_parameters()),
            mcore.qk_layernorm,
        ),
        "tied embeddings": (
            bool(theirs.tie_word_embeddings),
            ours.share_embeddings_and_output_weights,
        ),
        "experts": (getattr(theirs, "num_experts", None) or None, mcore.num_moe_experts),
        "vocabulary": (theirs.vocab_size, settings["vocab_size"]),
        "parameters": (
            sum(p.numel() for p in their_model.parameters()),
            sum(p.numel() for p in ours.parameters()),
        ),
    }
    if megatron:
        args = TorchDistReader(newest(megatron)).common().get("args")
        # the same names from what config.json says now
        now = comparable(architecture_record(settings)["args"])
        for name, value in comparable(args).items() if args else ():
            if name in now:
                fields[f"checkpoint's {name}"] = (value, now[name])
    for name, (theirs_value, ours_value) in fields.items():
        equal = theirs_value == ours_value
        report.config[name] = {"hf": theirs_value, "megatron": ours_value, "equal": equal}
        if not equal:
            report.failures.append(
                f"configuration: {name} is {theirs_value} in Hugging Face, {ours_value} in Megatron"
            )


def _check_layouts(report, settings, tensors: HFTensors, layouts, *, quick: bool) -> None:
    """Cut every tensor for every layout and put it together again; note its SHA-256."""
    heads, grids = hf_attention_heads(settings), {}
    for layout in layouts:
        name = "tp{} pp{} ep{}".format(*layout)
        try:
            grids[name] = dict(_parts(settings, *layout))
            report.layouts.append(name)
        except (UserError, ValueError, AssertionError) as error:
            report.layouts.append(f"{name}: skipped, {str(error).splitlines()[0]}")
    if not grids:
        raise UserError("none of the layouts fits the model")
    first = next(iter(grids.values()))
    chosen = [names for names in first if not quick or _sampled(names, settings)]
    for names in tqdm(chosen, "layouts"):
        mapping = first[names][0]
        sources = [tensors[name] for name in names]
        try:
            full = to_megatron(mapping, sources, heads)
            for _, shape, size in (parts[names] for parts in grids.values() if names in parts):
                shard(mapping, full, shape, 0, size)
        except ValueError as error:
            raise UserError(f"{tensors.directory} does not fit its config.json: {error}") from error
        for name, source in zip(names, sources, strict=True):
            report.tensors[name] = {
                "sha256": _sha256(source),
                "dtype": str(source.dtype).removeprefix("torch."),
                "shape": list(source.shape),
            }
        for layout, parts in grids.items():
            if names not in parts:
                report.failures.append(f"{layout}: no rank holds {', '.join(names)}")
                continue
            _, shape, size = parts[names]
            pieces = [shard(mapping, full, shape, rank, size) for rank in range(size)]
            back = to_hf(mapping, unshard(mapping, pieces), heads, settings["vocab_size"])
            for name, source, tensor in zip(names, sources, back, strict=True):
                if not _same_bits(source, tensor):
                    report.failures.append(f"{layout}: {name} does not come back bit for bit")


def _parts(
    settings: dict, tensor: int, pipeline: int, expert: int
) -> Iterator[tuple[tuple[str, ...], tuple[Mapping, torch.Size, int]]]:
    """Hugging Face names -> mapping, shape of a rank's part, number of parts, in a layout."""
    from megatron_prepo.actor.dry_run import each_rank
    from megatron_prepo.config import ModelConfig, ParallelConfig
    from megatron_prepo.models.hf_to_megatron import split_group, stage_parameters

    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    refuse_layout(layout, settings)
    uneven = uneven_stages(settings["num_hidden_layers"], pipeline)
    for _, chunks in each_rank(settings, ModelConfig(hf="", dtype="bfloat16"), layout, uneven):
        for _, mapping, parameter in stage_parameters(chunks):
            yield mapping.hf_names, (mapping, parameter.shape, split_group(mapping).size())


def _check_checkpoint(report, settings, tensors: HFTensors, megatron, *, quick: bool) -> None:
    """Every tensor out of the checkpoint, compared with its source."""
    from megatron_prepo.actor.checkpoint import newest

    reader = TorchDistReader(newest(megatron))
    plan, _ = plan_export(settings, reader, None)
    heads = hf_attention_heads(settings)
    arena = Arena(ARENA_BYTES)
    chosen: list[PlannedParameter] = [
        p for p in plan if not quick or _sampled(p.mapping.hf_names, settings)
    ]
    for parameter in tqdm(chosen, "checkpoint"):
        with arena.task():
            for name, tensor in hf_tensors(parameter, reader, heads, settings, arena.empty):
                if not _same_bits(tensors.read(name, arena.empty), tensor):
                    report.failures.append(
                        f"checkpoint: {name} is {tensor.dtype} {tuple(tensor.shape)} with SHA-256 "
                        f"{_sha256(tensor)[:12]}, not that of the Hugging Face file"
                    )


def _check_logits(report, hf, settings, megatron, prompts: Sequence[str]) -> None:
    """Both models in float32 on the same tokens."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_prepo.actor import checkpoint, parallel
    from megatron_prepo.actor.model import build_model, output_weight
    from megatron_prepo.config import ModelConfig, ParallelConfig
    from megatron_prepo.models.hf_to_megatron import load_hf_weights

    generator = torch.Generator().manual_seed(0)
    longest = min(LONG, settings["max_position_embeddings"])
    sequences = {
        f"{n} random tokens": torch.randint(settings["vocab_size"], (n,), generator=generator)
        for n in (32, longest)
    }
    if prompts:
        tokenizer = AutoTokenizer.from_pretrained(
            hf, local_files_only=True, trust_remote_code=False
        )
        sequences |= {p: torch.tensor(tokenizer(p).input_ids) for p in prompts}
    theirs = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, trust_remote_code=False
    ).eval()
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    try:
        (ours,) = build_model(settings, ModelConfig(hf=str(hf), dtype="float32"), layout)
        if megatron:
            checkpoint.load_weights([ours.eval()], megatron, settings)
        else:
            load_hf_weights([ours.eval()], hf)
        for label, tokens in tqdm(sequences.items(), "logits"):
            with torch.no_grad():
                expected_TV = theirs(tokens[None]).logits[0].float()
                positions = torch.arange(len(tokens))[None]
                hidden_TH = ours(tokens[None].to(parallel.device()), positions, None)[0]
                logits_TV = (hidden_TH @ output_weight(ours).t())[:, : settings["vocab_size"]].cpu()
            difference_TV = (logits_TV - expected_TV).abs()
            log_p, log_q = expected_TV.log_softmax(-1), logits_TV.log_softmax(-1)
            found = {
                "tokens": label,
                "max_abs_difference": float(difference_TV.max()),
                "mean_abs_difference": float(difference_TV.mean()),
                "mean_kl": float(
                    F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
                ),
                "spread": float(expected_TV.std()),
            }
            report.logits.append(found)
            # rounding of float32 is some 1e-6 of the logits' spread a layer
            if not found["max_abs_difference"] < 1e-3 * max(found["spread"], 1e-3):
                report.failures.append(
                    f"logits: {label}: off by up to {found['max_abs_difference']:.2e} "
                    f"(spread {found['spread']:.2e}, KL {found['mean_kl']:.2e})"
                )
    finally:
        parallel.shut_down()


def _sampled(names: Sequence[str], settings: dict) -> bool:
    """Outside the layers, and in the first, middle and last layer; of the experts, the first."""
    last = settings["num_hidden_layers"] - 1
    layers = tuple(f"model.layers.{layer}." for layer in {0, last // 2, last})
    in_layer = names[0].startswith("model.layers.")
    return (not in_layer or names[0].startswith(layers)) and (
        ".experts." not in names[0] or ".experts.0." in names[0]
    )


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(_bytes(tensor).numpy())).hexdigest()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
