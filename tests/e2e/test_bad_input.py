"""User errors: a one-line message that names the cause, exit code 2, nothing started."""

import json
import shutil

import pytest

from checkpoints_convert.convert import import_hf
from tests.e2e.laptop import LAPTOP, SHORT, train


def line(prompt_id: str, prompt: str, answer: str = "1") -> str:
    return json.dumps({"id": prompt_id, "prompt": prompt, "answer": answer})


GOOD = [line(f"good-{i}", "tom has 3 apples . how many apples does tom have ?") for i in range(30)]


OFFLOADED = "megatron.optimizer_cpu_offload=true optimizer.use_distributed_optimizer=true"


def assert_refused(capsys, tmp_path, expected: list[str], *overrides: str) -> None:
    code = train(tmp_path / "run", *SHORT, *overrides)
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    for part in expected:
        assert part in error
    assert not (tmp_path / "run").exists(), "something was started"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("selection.num_selectd=8", ["selection.num_selectd", "did you mean", "num_selected"]),
        ("selection.num_selected=25", ["num_selected=25", "num_candidates=24"]),
        ("parallel.tensor=3", ["parallel.tensor=3", "num_attention_heads=4"]),
        ("parallel.expert=2", ["parallel.expert=2", "0 experts"]),
        ("parallel.tensor=8", ["parallel.tensor=8", "num_attention_heads=4"]),
        ("parallel.pipeline=3", ["parallel.pipeline=3", "num_hidden_layers=2"]),
        ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline=2", "parallel.pipeline > 1"]),
        ("megatron.virtual_pipeline_model_parallel_size=2", ["parallel.virtual_pipeline"]),
        ("rollout.max_new_tokens=250", ["rollout.max_new_tokens=250", "256 positions"]),
        ("data.max_prompt_tokens=20", ["data.max_prompt_tokens=20", "train.jsonl, line"]),
        ("selection.num_candidates=801", ["num_candidates=801", "800 prompts"]),
        ("train.total_steps=many", ["train.total_steps", "many"]),
        ("megatron.recompute_granularty=full", ["recompute_granularty", "did you mean"]),
        ("megatron.attention_dropout=1e-5x", ["megatron.attention_dropout='1e-5x'", "number"]),
        ("megatron.sequence_parallel=true", ["parallel.sequence"]),
        ("megatron.context_parallel_size=2", ["set parallel.context instead"]),
        ("megatron.cp_comm_type=p2p", ["is not supported", "parallel.context"]),
        ("parallel.context=4", ["parallel.context=4 x parallel.tensor=2", "heads=4"]),
        ("rollout.router_replay=true", ["rollout.router_replay=false", "the model has no experts"]),
        ("megatron.moe_enable_routing_replay=true", ["set rollout.router_replay instead"]),
        (
            "megatron.optimizer_cpu_offload=true",
            ["megatron.optimizer_cpu_offload=true", "optimizer.use_distributed_optimizer=true"],
        ),
        (
            f"{OFFLOADED} megatron.optimizer_offload_fraction=0",
            ["optimizer_offload_fraction=0", "above 0"],
        ),
        (
            f"{OFFLOADED} megatron.use_precision_aware_optimizer=false",
            ["use_precision_aware_optimizer=false", "remove it"],
        ),
        ("megatron.optimizer_offload_fraction=0.5", ["optimizer_cpu_offload=true"]),
        ("megatron.use_torch_optimizer_for_cpu_offload=true", ["is not supported"]),
        (f"{OFFLOADED} megatron.pin_cpu_params=false", ["pin_cpu_params is not supported"]),
        ("megatron.overlap_param_gather=true", ["optimizer.use_distributed_optimizer=true"]),
        ("data.chat_template=true", ["data.chat_template", "no chat template"]),
        ("loss.clip_low=1.5", ["loss.clip_low=1.5"]),
        ("no_equals_sign", ["no_equals_sign", "section.key=value"]),
    ],
)
def test_wrong_setting(capsys, tmp_path, override, expected):
    assert_refused(capsys, tmp_path, expected, *override.split())


def test_missing_model(capsys, tmp_path):
    assert_refused(
        capsys,
        tmp_path,
        ["no such file or folder: model.hf=", "absent"],
        f"model.hf={tmp_path / 'absent'}",
    )


def test_missing_megatron_checkpoint(capsys, tmp_path):
    missing = tmp_path / "absent"
    assert_refused(capsys, tmp_path, [str(missing)], f"model.megatron={missing}")


def test_a_checkpoint_of_another_model(capsys, tmp_path):
    """Theta shows in no shape: such a run would train, and exit with code 0."""
    import_hf(LAPTOP / "base", tmp_path / "megatron")
    capsys.readouterr()  # its progress
    model = shutil.copytree(LAPTOP / "base", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (model / "config.json").write_text(json.dumps(config))
    expected = ["rope_theta is 10000.0", "1000000.0", str(model)]
    overrides = [f"model.hf={model}", f"model.megatron={tmp_path / 'megatron'}"]
    assert_refused(capsys, tmp_path, expected, *overrides)


def test_a_checkpoint_of_another_tokenizer(capsys, tmp_path):
    import_hf(LAPTOP / "base", tmp_path / "megatron")
    capsys.readouterr()  # its progress
    model = shutil.copytree(LAPTOP / "base", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["tom"], vocab["apples"] = vocab["apples"], vocab["tom"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    overrides = [f"model.hf={model}", f"model.megatron={tmp_path / 'megatron'}"]
    assert_refused(capsys, tmp_path, ["tokenizers of different models", "'tom'"], *overrides)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_hidden_layers": 1, "layer_types": None},
            ["part of the model", "model.layers.1."],
        ),
        ({"intermediate_size": 192}, ["gate_proj.weight has shape (256, 96)", "(192, 96)"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["yarn"]),
    ],
)
def test_weights_that_are_not_those_of_config_json(capsys, tmp_path, changes, expected):
    """The mismatch is found by the files' headers, before a rank reads them."""
    model = shutil.copytree(LAPTOP / "base", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert_refused(capsys, tmp_path, expected, f"model.hf={model}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", ["generation_config.json", "not valid JSON"]),
        ('{"eos_token_id": []}', ["generation_config.json", "eos_token_id=[]"]),
        ('{"eos_token_id": 259}', ["would never end", "259"]),
    ],
)
def test_a_generation_that_cannot_be(capsys, tmp_path, content, expected):
    model = shutil.copytree(LAPTOP / "base", tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    assert_refused(capsys, tmp_path, expected, f"model.hf={model}")


def test_a_link_to_nothing_in_the_model(capsys, tmp_path):
    """The missing file would otherwise be noticed only at the end, when the model is exported."""
    model = shutil.copytree(LAPTOP / "base", tmp_path / "model")
    (model / "README.md").symlink_to(tmp_path / "absent")
    assert_refused(capsys, tmp_path, ["README.md is a link to"], f"model.hf={model}")


def test_missing_weights(capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(LAPTOP / "base", model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_refused(capsys, tmp_path, [str(model), "safetensors"], f"model.hf={model}")


def test_damaged_weights(capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(LAPTOP / "base", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert_refused(capsys, tmp_path, ["model.safetensors", "damaged"], f"model.hf={model}")


@pytest.mark.parametrize(
    ("bad_line", "expected"),
    [
        ('{"prompt": "how many', ["not valid JSON"]),
        (line("empty", "   "), ["prompt", "empty"]),
        (line("good-3", "how many ?"), ["good-3", "line 4"]),
        (line("odd", "how many quarks ?"), ["tokenizer rejects"]),
        (json.dumps({"id": "x", "prompt": "how many ?"}), ["answer", "missing"]),
        ('["a", "list"]', ["object"]),
        (line("long", "tom has 3 apples . " * 60), ["'long'", "max_prompt_tokens=96"]),
    ],
)
def test_wrong_prompt_file(capsys, tmp_path, bad_line, expected):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*GOOD, bad_line]) + "\n")
    where = [str(file), "line 31"]
    assert_refused(capsys, tmp_path, where + expected, f"data.train={file}")


def test_missing_prompt_file(capsys, tmp_path):
    assert_refused(capsys, tmp_path, ["absent.jsonl"], f"data.eval={tmp_path / 'absent.jsonl'}")


def test_a_run_is_not_overwritten(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("precious")
    assert train(run, *SHORT) == 2
    assert "config.yaml in it is not known to be a run's" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "precious"
