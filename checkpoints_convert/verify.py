"""Prove a conversion: names, configuration, every bit of every tensor, and logits.

There are four checks:

- *configuration*: the Megatron model has the architecture that `transformers` reads from the same
  `config.json`, field by field and tensor by tensor.
- *checkpoint*: the Megatron checkpoint gives every Hugging Face tensor back, bit for bit.
- *layouts*: every tensor, split for the ranks of each layout and joined again, is bit-identical.
- *logits*: the Megatron model computes the logits that `transformers` computes, also at 2,048
  positions, where a missing rope scaling is visible.  Both in float32; the exact logits are those
  of `transformers` in float64, and the error of `transformers` in float32 on this machine, times
  `FACTOR`, is what ours may err by.  A tiny random model with the same settings is always compared
  as well.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
from megatron_prepo.actor.tiny_instance import FACTOR
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.models.arena import Arena
from megatron_prepo.models.fit import check_fit
from megatron_prepo.models.float64 import computing_in_float64
from megatron_prepo.models.hf_config import gpt_settings, read_hf_config
from megatron_prepo.models.hf_files import HFTensors
from megatron_prepo.models.mapping import Mapping, shard, to_hf, to_megatron, unshard
from megatron_prepo.models.raw import tensor_bytes
from megatron_prepo.models.record import architecture_record, comparable, stored_adapters
from megatron_prepo.models.torch_dist import TorchDistReader
from megatron_prepo.process import progress

LONG = 2048
"""Positions of the long sequence."""
RankParts = dict[tuple[str, ...], tuple[Mapping, torch.Size, int]]
"""Parts of a layout: Hugging Face names -> mapping, shape of a rank's part, number of parts."""
NEGLIGIBLE = 1 / 100
"""Largest mean allowance in parts of the logits' spread: a larger one would let mistakes pass."""
ROWS = 64
"""Number of rows of logits compared at a time: all of them, in float64, are gigabytes."""


@dataclass
class Report:
    """Results of the checks; `failures` is empty if all passed."""

    failures: list[str] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    layouts: list[str] = field(default_factory=list)
    logits: list[dict[str, Any]] = field(default_factory=list)
    tiny: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return the content of the manifest."""
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

    `layouts`: (tensor, pipeline, expert) sizes to split the model for; sizes that do not fit the
    model are reported as skipped.
    `quick`: first, middle and last layer only, no logits; for models larger than the memory.
    `prompts`: texts whose logits are compared, in addition to those of seeded random tokens.
    `manifest`: JSON file for the report, with the SHA-256 of every compared tensor; replaces that
    of an earlier call and no other file.

    Raises UserError if the files do not fit their `config.json`, if no layout fits the model, or if
    the checkpoint has adapters.
    """
    if manifest:
        ownership.earlier_result(manifest, json.loads(Report().as_json()))
    if megatron:
        _refuse_adapters(megatron)
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


def _refuse_adapters(megatron: str | Path) -> None:
    """Raise UserError if a checkpoint has adapters: merged, its weights are not those of `hf`."""
    from megatron_prepo.actor.checkpoint import newest

    if stored_adapters(TorchDistReader(newest(megatron))):
        raise UserError(
            f"--megatron {megatron} has adapters (lora.rank) that were trained since its weights "
            "were those of --hf; export it by `python -m checkpoints_convert export --out DIR`, "
            "and verify --hf DIR without --megatron"
        )


def _check_config(
    report: Report, hf: str | Path, settings: dict[str, Any], megatron: str | Path | None
) -> None:
    """Compare the Megatron model built from `settings` with `transformers`' reading of the file."""
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
        "sliding window": (
            vars(theirs).get("sliding_window"),
            mcore.window_size and mcore.window_size[0] + 1,
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
        # the same fields, computed from the current config.json
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


def _check_layouts(
    report: Report,
    settings: dict[str, Any],
    tensors: HFTensors,
    layouts: Sequence[tuple[int, int, int]],
    *,
    quick: bool,
) -> None:
    """Split every tensor for every layout and join it again; record its SHA-256."""
    heads, grids = hf_attention_heads(settings), _fitting_layouts(report, settings, layouts)
    first = next(iter(grids.values()))
    chosen = [names for names in first if not quick or _sampled(names, settings)]
    for names in progress.bar(chosen, "layouts"):
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
            report.failures += [
                f"{layout}: {name} does not come back bit for bit"
                for name, source, tensor in zip(names, sources, back, strict=True)
                if not _same_bits(source, tensor)
            ]


def _fitting_layouts(
    report: Report, settings: dict[str, Any], layouts: Sequence[tuple[int, int, int]]
) -> dict[str, RankParts]:
    """Return the parts of each layout that fits the model, by name; report the remaining ones."""
    grids: dict[str, RankParts] = {}
    for layout in layouts:
        name = "tp{} pp{} ep{}".format(*layout)
        try:
            grids[name] = _rank_parts(settings, *layout)
            report.layouts.append(name)
        except (UserError, ValueError, AssertionError) as error:
            report.layouts.append(f"{name}: skipped, {str(error).splitlines()[0]}")
    if not grids:
        raise UserError("none of the layouts fits the model")
    return grids


def _rank_parts(settings: dict[str, Any], tensor: int, pipeline: int, expert: int) -> RankParts:
    """Return the parts of every parameter of the model in a layout."""
    from megatron_prepo.actor.dry_run import each_rank
    from megatron_prepo.config import ModelConfig, ParallelConfig
    from megatron_prepo.models.hf_to_megatron import split_group, stage_parameters

    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    refuse_layout(layout, settings)
    uneven = uneven_stages(settings["num_hidden_layers"], pipeline)
    model = ModelConfig(hf="", dtype="bfloat16")
    return {
        mapping.hf_names: (mapping, parameter.shape, split_group(mapping).size())
        for _, chunks in each_rank(settings, model, layout, uneven)
        for _, mapping, parameter in stage_parameters(chunks)
    }


def _check_checkpoint(
    report: Report,
    settings: dict[str, Any],
    tensors: HFTensors,
    megatron: str | Path,
    *,
    quick: bool,
) -> None:
    """Compare every tensor of the checkpoint with its source."""
    from megatron_prepo.actor.checkpoint import newest

    reader = TorchDistReader(newest(megatron))
    plan, _ = plan_export(settings, reader, None)
    heads = hf_attention_heads(settings)
    arena = Arena(ARENA_BYTES)
    chosen: list[PlannedParameter] = [
        p for p in plan if not quick or _sampled(p.mapping.hf_names, settings)
    ]
    for parameter in progress.bar(chosen, "checkpoint"):
        with arena.task():
            for name, tensor in hf_tensors(parameter, reader, heads, settings, arena.empty):
                if not _same_bits(tensors.read(name, arena.empty), tensor):
                    report.failures.append(
                        f"checkpoint: {name} is {tensor.dtype} {tuple(tensor.shape)} with SHA-256 "
                        f"{_sha256(tensor)[:12]}, not that of the Hugging Face file"
                    )


def _check_logits(
    report: Report,
    hf: str | Path,
    settings: dict[str, Any],
    megatron: str | Path | None,
    prompts: Sequence[str],
) -> None:
    """Compare the logits of both models, in float32, and those of `transformers` in float64."""
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
    theirs.set_experts_implementation("eager")  # its grouped products know no float64
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    try:
        (ours,) = build_model(settings, ModelConfig(hf=str(hf), dtype="float32"), layout)
        if megatron:
            checkpoint.load_weights([ours.eval()], megatron, settings)
        else:
            load_hf_weights([ours.eval()], hf)
        for label, tokens in progress.bar(sequences.items(), "logits"):
            with torch.no_grad():
                theirs_TV = theirs(tokens[None]).logits[0]
                with computing_in_float64(theirs):
                    exact_TV = theirs(tokens[None]).logits[0]
                positions = torch.arange(len(tokens))[None]
                hidden_TH = ours(tokens[None].to(parallel.device()), positions, None)[0]
                ours_TV = (hidden_TH @ output_weight(ours).t())[:, : settings["vocab_size"]].cpu()
            found = {"tokens": label} | compare_logits(ours_TV, theirs_TV, exact_TV)
            report.logits.append(found)
            if problem := logits_problem(found):
                report.failures.append(f"logits: {label}: {problem}")
    finally:
        parallel.shut_down()


def compare_logits(
    ours_TV: torch.Tensor, theirs_TV: torch.Tensor, exact_TV: torch.Tensor
) -> dict[str, float]:
    """Return the largest and mean error of our logits, and of theirs (`rounding`), in float64.

    Also the mean divergence of our distribution from the exact one in nats, and the standard
    deviation of the logits.
    """
    blocks = (logits_TV.split(ROWS) for logits_TV in (ours_TV, theirs_TV, exact_TV))
    largest, total = torch.zeros(2).double(), torch.zeros(3).double()
    for block in zip(*blocks, strict=True):
        ours, theirs, exact = (logits.double() for logits in block)
        errors = [(logits - exact).abs() for logits in (ours, theirs)]
        log_p, log_q = exact.log_softmax(-1), ours.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        largest = torch.maximum(largest, torch.stack([error.max() for error in errors]))
        total += torch.stack([*(error.sum() for error in errors), divergence])
    means = total[:2] / exact_TV.numel()
    return {
        "max_abs_difference": float(largest[0]),
        "mean_abs_difference": float(means[0]),
        "max_abs_rounding": float(largest[1]),
        "mean_abs_rounding": float(means[1]),
        "mean_kl": float(total[2] / len(exact_TV)),
        "spread": float(exact_TV.std()),
    }


def logits_problem(found: dict[str, float]) -> str | None:
    """Return why the logits are not those of `transformers`, or None; NaN never agrees."""
    ours, theirs = (
        [found[f"{which}_abs_{kind}"] for which in ("max", "mean")]
        for kind in ("difference", "rounding")
    )
    numbers = (
        f"off by up to {ours[0]:.2e}, {ours[1]:.1e} on average, where transformers in float32 is "
        f"off by {theirs[0]:.2e} and {theirs[1]:.1e} (spread {found['spread']:.2e}, KL "
        f"{found['mean_kl']:.2e})"
    )
    if not FACTOR * theirs[1] <= NEGLIGIBLE * found["spread"]:
        return f"rounding of float32 would hide mistakes: {numbers}"
    agree = all(one <= FACTOR * other for one, other in zip(ours, theirs, strict=True))
    return None if agree else numbers


def _sampled(names: Sequence[str], settings: dict[str, Any]) -> bool:
    """Return whether a tensor is outside the layers, or in the first, middle or last layer.

    Of the experts, only the first is included.
    """
    last = settings["num_hidden_layers"] - 1
    layers = tuple(f"model.layers.{layer}." for layer in {0, last // 2, last})
    in_layer = names[0].startswith("model.layers.")
    return (not in_layer or names[0].startswith(layers)) and (
        ".experts." not in names[0] or ".experts.0." in names[0]
    )


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor.contiguous())).hexdigest()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return bool(torch.equal(a, b))
