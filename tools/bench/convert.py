"""Measure time and memory of a conversion, compared with a plain copy of the same bytes.

    python tools/bench/convert.py --out benchmarks/results/convert_NAME.json [--model qwen2.5-1.5b]

Creates a random-weight model of a real shape.  Then, in `--rounds` rounds in random order, each in
a new process: copy its files, import, export, verify (checkpoint and layouts, no logits), load into
a Megatron model and, if mbridge is installed, the same with mbridge.  Reports median seconds, the
ratio to the copy of the same round, and peak resident memory.  All output is flushed to disk,
including that of the copy.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.files.ownership import new_file

REPOSITORY = Path(__file__).resolve().parents[2]
SETTLE_SECONDS = 3
"""Pause before each task, for disks whose burst write speed exceeds their sustained speed."""
SHAPES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
"""Shapes: hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied embeddings."""


def main() -> int:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=new_file(), help="JSON file to write")
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="directory with room for four copies of the model")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return _task(*options.task)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(Path(scratch), options.model, options.rounds, options.tasks.split(","))
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(scratch: Path, model: str, rounds: int, tasks: list[str]) -> dict:
    """Return seconds and memory of each task, measured in interleaved order."""
    from megatron_prepo.process import machine

    # in a separate process: a child's peak memory starts at that of its parent
    maker = [sys.executable, __file__, "--task", f"make {model}", str(scratch)]
    subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
    num_bytes = sum(f.stat().st_size for f in (scratch / "hf").glob("*.safetensors"))
    assert "copy" in tasks, "all are compared with the copy"
    if "mbridge load" in tasks and not importlib.util.find_spec("mbridge"):
        tasks = [task for task in tasks if task != "mbridge load"]
    runs: dict[str, list[dict]] = {task: [] for task in tasks}
    _run("import", scratch)  # input of export and verify
    (scratch / "out").rename(scratch / "megatron")
    order = random.Random(1)
    for _ in range(rounds):
        for task in order.sample(tasks, len(tasks)):
            os.sync()
            time.sleep(SETTLE_SECONDS)
            runs[task].append(_run(task, scratch))
            shutil.rmtree(scratch / "out", ignore_errors=True)
    copy = statistics.median(run["seconds"] for run in runs["copy"])
    hidden, _, _, _, _, vocab, _ = SHAPES[model]
    return {
        "model": model,
        "gigabytes": num_bytes / 1e9,
        "largest_tensor_group_gigabytes": vocab * hidden * 2 / 1e9,
        "machine": machine.describe(),
        "rounds": rounds,
        "tasks": {
            task: {
                "seconds": statistics.median(run["seconds"] for run in of_task),
                "seconds_all": [round(run["seconds"], 3) for run in of_task],
                "times_the_copy": statistics.median(
                    run["seconds"] / other["seconds"]
                    for run, other in zip(of_task, runs["copy"], strict=True)
                ),
                "gigabytes_a_second": num_bytes / 1e9 / copy
                if task == "copy"
                else num_bytes / 1e9 / statistics.median(run["seconds"] for run in of_task),
                "peak_gigabytes": max(run["peak_bytes"] for run in of_task) / 1e9,
                "idle_gigabytes": max(run["idle_bytes"] for run in of_task) / 1e9,
            }
            for task, of_task in runs.items()
        },
    }


def _run(task: str, scratch: Path) -> dict:
    command = [sys.executable, __file__, "--task", task, str(scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_model(directory: Path, hidden, ffn, layers, heads, groups, vocab, tied) -> None:
    """Write a Qwen2 of a shape with random bfloat16 weights."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    head = hidden // heads
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (groups * head, hidden),
        "self_attn.v_proj.weight": (groups * head, hidden),
        "self_attn.q_proj.bias": (heads * head,),
        "self_attn.k_proj.bias": (groups * head,),
        "self_attn.v_proj.bias": (groups * head,),
        "self_attn.o_proj.weight": (hidden, heads * head),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        ends["lm_head.weight"] = (vocab, hidden)
    files = [ends] + [
        {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
        for layer in range(layers)
    ]
    total, weight_map = 0, {}
    for number, names in enumerate(files):
        tensors = {
            # norms near 1 and small weights, so that the logits are realistic
            name: (
                (1 + torch.randn(shape) / 10) if "norm" in name else torch.randn(shape) / 50
            ).bfloat16()
            for name, shape in names.items()
        }
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def table(result: dict) -> str:
    """Return the result in Markdown."""
    lines = [
        f"{result['model']}, {result['gigabytes']:.2f} GB, largest tensor group "
        f"{result['largest_tensor_group_gigabytes']:.2f} GB; {result['machine']['cores']} cores of "
        f"{result['machine']['processor']}; median of {result['rounds']} rounds",
        "",
        "| task | seconds | x copy | GB/s | peak GB | of it before the first tensor |",
        "|---|---|---|---|---|---|",
    ]
    for task, row in result["tasks"].items():
        lines.append(
            f"| {task} | {row['seconds']:.2f} | {row['times_the_copy']:.2f} | "
            f"{row['gigabytes_a_second']:.2f} | {row['peak_gigabytes']:.2f} | "
            f"{row['idle_gigabytes']:.2f} |"
        )
    return "\n".join(lines)


def _task(task: str, scratch: str) -> int:
    """Run one task in this process; prints its seconds and memory as JSON."""
    if task.startswith("make "):
        make_model(Path(scratch) / "hf", *SHAPES[task.removeprefix("make ")])
        return 0
    run = TASKS[task](Path(scratch))
    idle = _peak_bytes()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes(), "idle_bytes": idle}))
    return 0


def _copy(scratch: Path):
    def run() -> None:
        shutil.copytree(scratch / "hf", scratch / "out")
        for file in (scratch / "out").iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    return run


def _import(scratch: Path):
    import megatron_prepo.actor.dry_run  # noqa: F401 - importing Megatron is not the conversion
    from checkpoints_convert.convert import import_hf

    return lambda: import_hf(scratch / "hf", scratch / "out")


def _export(scratch: Path):
    import megatron_prepo.actor.dry_run  # noqa: F401
    from checkpoints_convert.convert import export_hf

    return lambda: export_hf(scratch / "megatron", scratch / "out")


def _verify(scratch: Path):
    import transformers  # noqa: F401

    import megatron_prepo.actor.dry_run  # noqa: F401
    from checkpoints_convert.verify import verify

    def run() -> None:
        report = verify(scratch / "hf", megatron=scratch / "megatron", logits=False)
        assert not report.failures, report.failures

    return run


def _load(scratch: Path):
    """Load a Megatron model from Hugging Face files, like a run without `model.megatron`."""
    from megatron_prepo.models.hf_to_megatron import load_hf_weights

    model = _live_model(scratch)
    return lambda: load_hf_weights([model], scratch / "hf")


def _mbridge(scratch: Path):
    """Load the same Megatron model from the same files with mbridge.

    It supports only TransformerEngine's parameter names, so our parameters are renamed for it.
    """
    from mbridge import AutoBridge

    model = _live_model(scratch)
    bridge = AutoBridge.from_pretrained(str(scratch / "hf"))
    bridge.make_vocab_size_divisible_by = 1
    bridge.padded_vocab_size = bridge.vocab_size = bridge.hf_config.vocab_size

    class Shown:
        decoder = model.decoder

        def state_dict(self):
            return {
                name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_").replace(
                    ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
                ): parameter.data
                for name, parameter in model.named_parameters()
            }

    return lambda: bridge.load_weights([Shown()], str(scratch / "hf"))


def _live_model(scratch: Path):
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.model import build_model
    from megatron_prepo.config import ModelConfig, ParallelConfig
    from megatron_prepo.models.hf_config import read_hf_config

    parallel.initialize(ParallelConfig(), seed=0)
    hf = read_hf_config(scratch / "hf")
    (model,) = build_model(hf, ModelConfig(hf="", dtype="bfloat16"), ParallelConfig())
    return model


TASKS = {
    "copy": _copy,
    "import": _import,
    "export": _export,
    "verify": _verify,
    "load": _load,
    "mbridge load": _mbridge,
}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
