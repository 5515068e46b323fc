"""`python -m checkpoints_convert` as a user sees it: what works, what is refused, what remains."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from checkpoints_convert import __main__, convert
from megatron_prepo.files import ownership
from megatron_prepo.models import hf_config, hf_files
from megatron_prepo.models.hf_files import HFTensors, HFWriter
from megatron_prepo.models.torch_dist import TorchDistReader, TorchDistWriter

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = {
    "qwen2": lambda: tiny_models.qwen2(tied=True),
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "llama3": lambda: tiny_models.llama3(),
    "mistral": lambda: tiny_models.mistral(window=8),
    "moe": lambda: tiny_models.qwen3_moe(),
    "moe not normalized": lambda: tiny_models.qwen3_moe(normalized=False),
}
NORM, O_PROJ = "model.norm.weight", "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face directories; not to be changed."""
    root = tmp_path_factory.mktemp("hf")
    return {name: Path(tiny_models.save(make(), root / name)) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    """Checkpoints that `import` makes of them; not to be changed."""
    root = tmp_path_factory.mktemp("megatron")
    for name, hf in models.items():
        convert.import_hf(hf, root / name)
    return {name: root / name for name in models}


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["checkpoints_convert", *map(str, arguments)])
        capsys.readouterr()
        code = __main__.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def command(*arguments):
    """Run a command in a separate process; the same result."""
    return subprocess.run(
        [sys.executable, "-m", "checkpoints_convert", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(result, *said):
    """Assert exit code 2 and one line for the user, after a progress bar at most."""
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert [line.startswith("error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("error: ") and "Traceback" not in err
    for part in said:
        assert part in lines[-1]


def copy_of(hf, directory, *, config=None, tensors=None):
    """Copy a model, with changes to config.json and `tensors(dict)` applied to its weights."""
    shutil.copytree(hf, directory)
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        weights = load_file(directory / "model.safetensors")
        tensors(weights)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


def assert_same_tensors(one, other):
    with HFTensors(one) as a, HFTensors(other) as b:
        assert a.names() == b.names()
        assert [name for name in a.names() if bits(a[name]) != bits(b[name])] == []


def files_below(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))


# What works


def test_import_verify_and_export_in_processes_of_their_own(models, tmp_path):
    """The README's three commands run; the export equals the source, weights and other files."""
    hf, megatron, out = models["qwen2"], tmp_path / "megatron", tmp_path / "out"

    imported = command("import", "--hf", hf, "--out", megatron, "--tp", 2, "--pp", 2)
    assert imported.returncode == 0 and f"wrote {megatron}" in imported.stdout, imported.stderr
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"

    manifest = tmp_path / "manifest.json"
    verified = command("verify", "--hf", hf, "--megatron", megatron, "--manifest", manifest)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.splitlines()[-1] == "verified"
    report = json.loads(manifest.read_text())
    assert report["passed"] and report["failures"] == []
    assert report["layouts"] == ["tp1 pp1 ep1", "tp2 pp1 ep1", "tp1 pp2 ep1", "tp2 pp2 ep1"]
    source = load_file(hf / "model.safetensors")
    assert {name: row["sha256"] for name, row in report["tensors"].items()} == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in source.items()
    }
    assert len(report["logits"]) == 2

    exported = command("export", "--megatron", megatron, "--out", out)
    assert exported.returncode == 0 and f"wrote {out}" in exported.stdout, exported.stderr
    assert_same_tensors(hf, out)
    assert files_below(out) == files_below(hf)
    assert (out / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert files_below(tmp_path)[0] == "manifest.json"  # and no *.partial anywhere
    assert not list(tmp_path.rglob("*.partial"))


def test_an_error_in_a_process_of_its_own_is_one_line(tmp_path):
    refused = command("import", "--hf", tmp_path / "absent", "--out", tmp_path / "out")
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line == f"error: no such file or folder: {tmp_path / 'absent'}"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral", "moe"])
def test_verify_passes_every_family_with_logits(cli, models, checkpoints, name):
    layouts = "1x1,2x1,2x2,2x1x2,1x1x4" if name == "moe" else "1x1,2x1,1x2,4x1"
    code, out, err = cli(
        "verify", "--hf", models[name], "--megatron", checkpoints[name], "--layouts", layouts
    )
    assert code == 0, err
    assert f"{2048 if name == 'llama3' else 256} random tokens" in out


@pytest.mark.parametrize("stages", [2, 4, 5])
def test_layers_that_stages_do_not_divide_are_cut_unevenly(cli, tmp_path, stages):
    hf, megatron, out = (tmp_path / name for name in ("hf", "megatron", "out"))
    tiny_models.save(tiny_models.randomized(tiny_models.llama3(layers=5)), hf)
    assert cli("import", "--hf", hf, "--out", megatron, "--pp", stages)[0] == 0
    words = ["--layouts", f"1x{stages}", "--no-logits", "--manifest", tmp_path / "manifest.json"]
    code, _, err = cli("verify", "--hf", hf, "--megatron", megatron, *words)
    assert code == 0, err
    report = json.loads((tmp_path / "manifest.json").read_text())
    assert report["layouts"] == [f"tp1 pp{stages} ep1"], "not skipped"
    assert cli("export", "--megatron", megatron, "--out", out)[0] == 0
    assert_same_tensors(hf, out)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_with_an_exported_model(cli, models, tmp_path, name):
    """The export went through a checkpoint that is split by layers and ranks."""
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    assert cli("import", "--hf", models[name], "--out", megatron, "--tp", 2, "--pp", 2)[0] == 0
    assert cli("export", "--megatron", megatron, "--out", out)[0] == 0
    tokens = torch.arange(40)[None] * 6
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
            for directory in (models[name], out)
        )
    assert torch.equal(found, expected) and expected.std() > 0.1
    assert_same_tensors(models[name], out)
    assert (out / "config.json").read_bytes() == (models[name] / "config.json").read_bytes()


def test_inspect_lists_every_tensor_of_either_format(cli, models, checkpoints):
    code, out, _ = cli("inspect", models["qwen3"])
    weights = load_file(models["qwen3"] / "model.safetensors")
    heading, *rows = out.splitlines()
    assert code == 0 and "4 heads in 2 groups of size 12, vocabulary 259" in heading
    assert [row.split()[0] for row in rows] == sorted(weights)
    assert "(48, 32)" in next(row for row in rows if "layers.0.self_attn.q_proj" in row)

    code, out, _ = cli("inspect", checkpoints["qwen3"])
    heading, *rows = out.splitlines()
    assert code == 0 and "Megatron torch_dist release" in heading
    qkv = next(row for row in rows if "linear_qkv.weight" in row)
    assert "(4 chunks)" in qkv and "float32" in qkv and "(4, 96, 32)" in qkv


@pytest.mark.parametrize("name", ["qwen3", "moe"])
def test_the_size_on_disk_is_that_of_the_weights_however_they_are_cut(cli, models, tmp_path, name):
    """A chunk is stored without the tensor it was cut from: in addition to the weights there is
    only its header."""
    size = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
    beside = {}
    for tp in (1, 2):
        out = tmp_path / str(tp)
        assert cli("import", "--hf", models[name], "--out", out, "--tp", tp)[0] == 0
        stored = sum(file.stat().st_size for file in (out / "release").glob("*.distcp"))
        entries = TorchDistReader(out / "release").tensors.values()
        beside[tp] = (stored - size) / sum(len(entry.chunks) for entry in entries)
    assert beside[2] < 1.1 * beside[1]


# Types


def test_import_to_bfloat16_rounds_as_torch_does(cli, models, tmp_path):
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    cli("import", "--hf", models["qwen2"], "--out", megatron, "--dtype", "bfloat16")
    reader = TorchDistReader(megatron / "release")
    assert {reader.dtype(key) for key in reader.tensors} == {torch.bfloat16}
    assert cli("export", "--megatron", megatron, "--out", out)[0] == 0
    found = load_file(out / "model.safetensors")
    for name, tensor in load_file(models["qwen2"] / "model.safetensors").items():
        assert bits(found[name]) == bits(tensor.to(torch.bfloat16)), name


def test_export_to_another_type_and_back(cli, models, checkpoints, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    megatron = checkpoints["qwen2"]
    assert cli("export", "--megatron", megatron, "--out", small, "--dtype", "bfloat16")[0] == 0
    cli("import", "--hf", small, "--out", tmp_path / "m")
    cli("export", "--megatron", tmp_path / "m", "--out", large, "--dtype", "float32")
    found = [load_file(directory / "model.safetensors") for directory in (small, large)]
    for name, tensor in load_file(models["qwen2"] / "model.safetensors").items():
        assert bits(found[0][name]) == bits(tensor.to(torch.bfloat16)), name
        assert bits(found[1][name]) == bits(tensor.to(torch.bfloat16).float()), name


def test_config_json_of_an_export_names_the_type_of_its_tensors(cli, checkpoints, tmp_path):
    """transformers and the engines load the type that config.json names."""
    out = tmp_path / "out"
    cli("export", "--megatron", checkpoints["qwen2"], "--out", out, "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16


def test_an_export_without_a_type_is_described_by_its_tensors(cli, models, checkpoints, tmp_path):
    """The described type does not depend on the directory that lends its configuration, such as a
    bfloat16, quantised base."""
    base = copy_of(
        models["qwen2"],
        tmp_path / "base",
        config={"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}},
    )
    out = tmp_path / "out"
    assert cli("export", "--megatron", checkpoints["qwen2"], "--hf", base, "--out", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert "quantization_config" not in config
    theirs = AutoModelForCausalLM.from_pretrained(out)
    source = load_file(models["qwen2"] / "model.safetensors")
    assert all(bits(theirs.state_dict()[name]) == bits(tensor) for name, tensor in source.items())
    assert_refused(cli("import", "--hf", base, "--out", tmp_path / "m"), "quantised")


def test_an_import_describes_its_tensors(cli, models, tmp_path):
    """The model is in float32, but its config.json names bfloat16."""
    hf = copy_of(models["qwen2"], tmp_path / "hf", config={"dtype": "bfloat16"})
    assert cli("import", "--hf", hf, "--out", tmp_path / "m")[0] == 0
    assert json.loads((tmp_path / "m" / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_types_that_differ_between_kinds_of_tensors_are_kept(cli, models, tmp_path):
    """Norms in float32, the rest in bfloat16: bit for bit."""

    def mixed(weights):
        for name, tensor in weights.items():
            weights[name] = tensor if "norm" in name else tensor.to(torch.bfloat16)

    hf = copy_of(models["qwen3"], tmp_path / "hf", tensors=mixed)
    assert cli("import", "--hf", hf, "--out", tmp_path / "m", "--tp", 2)[0] == 0
    assert cli("export", "--megatron", tmp_path / "m", "--out", tmp_path / "out")[0] == 0
    assert_same_tensors(hf, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
)
def test_a_type_that_megatron_cannot_keep_is_refused_or_kept(cli, models, tmp_path, name):
    """Megatron checkpoints hold q, k and v in one tensor, and all layers of a parameter too."""

    def one_other(weights):
        for other in weights:
            if other != name:
                weights[other] = weights[other].to(torch.bfloat16)

    hf = copy_of(models["qwen3"], tmp_path / "hf", tensors=one_other)
    result = cli("import", "--hf", hf, "--out", tmp_path / "m")
    if result[0] == 0:
        assert cli("export", "--megatron", tmp_path / "m", "--out", tmp_path / "out")[0] == 0
        assert_same_tensors(hf, tmp_path / "out")
    else:
        assert_refused(result, "layers.1")


# What verify finds


def verify(cli, hf, megatron, *more):
    return cli(
        "verify", "--hf", hf, "--megatron", megatron, "--layouts", "1x1", "--no-logits", *more
    )


@pytest.mark.parametrize("name", [NORM, O_PROJ])
@pytest.mark.parametrize("side", ["hf", "megatron"])
def test_verify_names_a_tensor_of_which_one_bit_is_another(
    cli, models, checkpoints, tmp_path, name, side
):
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    shutil.copytree(models["qwen3"], hf)
    shutil.copytree(checkpoints["qwen3"], megatron)
    content = load_file(hf / "model.safetensors")[name].numpy().tobytes()
    files = hf.glob("*.safetensors") if side == "hf" else megatron.rglob("*.distcp")
    flipped = 0
    for file in files:
        data = bytearray(file.read_bytes())
        if (place := data.find(content)) >= 0:
            data[place + len(content) // 2] ^= 1
            file.write_bytes(data)
            flipped += 1
    assert flipped == 1

    code, out, err = verify(cli, hf, megatron, "--manifest", tmp_path / "manifest.json")

    assert code == 1 and out.splitlines()[-1] == "failed"
    failed = [line for line in err.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and name in failed[0]
    report = json.loads((tmp_path / "manifest.json").read_text())
    assert not report["passed"] and name in report["failures"][0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama3", {"rope_parameters": tiny_models.LLAMA3_ROPE | {"factor": 32.0}}),
        ("llama3", {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        ("moe", {"num_experts_per_tok": 4}),
    ],
    ids=["theta", "epsilon", "tied", "untied", "rope factor", "no rope scaling", "experts a token"],
)
def test_verify_notices_another_setting_than_the_checkpoint_was_made_with(
    cli, models, checkpoints, tmp_path, name, config
):
    """None of them shows in the shape of a tensor."""
    hf = copy_of(models[name], tmp_path / "hf", config=config)
    code, _, err = verify(cli, hf, checkpoints[name])
    assert code in (1, 2), "not noticed"
    assert "Traceback" not in err and ("FAILED" in err or "error: " in err)


def test_verify_notices_a_rope_scaling_that_the_actor_would_lose(
    cli, models, checkpoints, monkeypatch
):
    """The loss shows only in the logits at 2,048 positions."""
    from megatron_prepo.actor import model

    def without(hf):
        return {k: v for k, v in hf_config.gpt_settings(hf).items() if "scaling" not in k}

    monkeypatch.setattr(model, "gpt_settings", without)
    code, _, err = cli("verify", "--hf", models["llama3"], "--layouts", "1x1")
    assert code == 1 and "FAILED logits: 2048 random tokens" in err


@pytest.mark.parametrize("name", ["qwen2", "moe"])
def test_verify_logs_what_is_allowed_and_notices_more(
    cli, models, checkpoints, monkeypatch, tmp_path, name
):
    """A norm that is off by a ten-thousandth, which is some 20 times what float32 errs by."""
    from megatron_prepo.actor import checkpoint

    words = ["verify", "--hf", models[name], "--megatron", checkpoints[name], "--layouts", "1x1"]
    code, out, err = cli(*words, "--manifest", tmp_path / "manifest.json")
    assert code == 0, err
    assert out.count("of transformers in float32") == 2
    for row in json.loads((tmp_path / "manifest.json").read_text())["logits"]:
        for which in ("max", "mean"):
            ours, theirs = (row[f"{which}_abs_{kind}"] for kind in ("difference", "rounding"))
            assert 0 < ours <= 8 * theirs < 1e-4 * row["spread"], row
    right = checkpoint.load_weights

    def off(chunks, *others):
        right(chunks, *others)
        chunks[0].decoder.final_layernorm.weight.data *= 1.0001

    monkeypatch.setattr(checkpoint, "load_weights", off)
    code, _, err = cli(*words)
    assert code == 1
    assert "FAILED logits: 32 random tokens" in err and "FAILED logits: 256 random tokens" in err


def test_verify_says_which_layouts_it_skipped(cli, models):
    code, out, _ = cli("verify", "--hf", models["qwen3"], "--layouts", "1x1,3x1", "--no-logits")
    assert code == 0 and "tp3 pp1 ep1: skipped" in out


def test_verify_refuses_layouts_of_which_none_fits(cli, models):
    result = cli("verify", "--hf", models["qwen3"], "--layouts", "3x1", "--no-logits")
    assert_refused(result, "layouts")


def test_verify_of_another_model_than_the_checkpoints(cli, models, checkpoints):
    assert_refused(verify(cli, models["qwen3"], checkpoints["qwen2"]), "does not fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_import_warns_of_a_tensor_that_is_not_finite_and_keeps_it(cli, models, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(weights):
        weights[name][3, 4] = value

    hf = copy_of(models["qwen2"], tmp_path / "hf", tensors=spoil)
    code, _, err = cli("import", "--hf", hf, "--out", tmp_path / "m")
    assert code == 0
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and name in warned[0]
    assert verify(cli, hf, tmp_path / "m")[0] == 0


def test_import_of_a_sound_model_warns_of_nothing(cli, models, tmp_path):
    _, _, err = cli("import", "--hf", models["moe"], "--out", tmp_path / "m")
    assert "warning" not in err


# What is refused


def set_shape(name, *shape):
    def change(weights):
        weights[name] = torch.zeros(shape)

    return change


def uneven_gate(weights):
    """Make gate and up uneven; together they have the right shape."""
    prefix = "model.layers.0.mlp."
    weights[prefix + "gate_proj.weight"] = torch.zeros(40, 32)
    weights[prefix + "up_proj.weight"] = torch.zeros(56, 32)


def heads_moved_from_q_to_k(weights):
    """Move heads from q to k; together they have the right shape."""
    prefix = "model.layers.0.self_attn."
    weights[prefix + "q_proj.weight"] = torch.zeros(24, 32)
    weights[prefix + "k_proj.weight"] = torch.zeros(48, 32)


BAD_MODELS = {
    # name: (changes to config.json, change to the tensors, the error message)
    "unsupported type": ({"model_type": "gpt2"}, None, ["gpt2", "config.json"]),
    "no type": ({"model_type": None}, None, ["config.json"]),
    "unsupported rope": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        None,
        ["yarn"],
    ),
    "rope scaling without a factor": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        None,
        ["factor"],
    ),
    "unsupported activation": ({"hidden_act": "gelu"}, None, ["hidden_act"]),
    "more layers": (
        {"num_hidden_layers": 5, "layer_types": None},
        None,
        ["lacks", "model.layers.4.", " and 1 more"],
    ),
    "fewer layers": (
        {"num_hidden_layers": 3, "layer_types": None},
        None,
        ["not part of the model", "model.layers.3.", " and 1 more"],
    ),
    "layers without a type": ({"num_hidden_layers": 5}, None, ["num_hidden_layers", "layer_types"]),
    "no experts in a mixture of them": (
        {"model_type": "qwen3_moe"},
        None,
        ["lacks num_experts_per_tok, moe_intermediate_size, num_experts"],
    ),
    "another vocabulary": ({"vocab_size": 300}, None, ["model.embed_tokens.weight", "300"]),
    "missing tensor": ({}, lambda weights: weights.pop(O_PROJ), ["lacks", O_PROJ]),
    "extra tensor": ({}, set_shape("model.extra.weight", 2), ["model.extra.weight"]),
    "bias that the family has not": (
        {},
        set_shape("model.layers.0.self_attn.q_proj.bias", 48),
        ["q_proj.bias"],
    ),
    "norm of another shape": ({}, set_shape(NORM, 31), [NORM, "(31,)"]),
    "matrix of another shape": ({}, set_shape(O_PROJ, 32, 47), [O_PROJ]),
    "transposed matrix": ({}, set_shape(O_PROJ, 48, 32), [O_PROJ]),
    "rows that are no heads": (
        {},
        set_shape("model.layers.0.self_attn.k_proj.weight", 23, 32),
        ["k_proj"],
    ),
    "twice the keys": ({}, set_shape("model.layers.0.self_attn.k_proj.weight", 48, 32), ["k_proj"]),
    "gate and up of other sizes": ({}, uneven_gate, ["gate_proj"]),
    "a head moved from q to k": ({}, heads_moved_from_q_to_k, ["q_proj"]),
    "a row too many in the embedding": ({}, set_shape("lm_head.weight", 260, 32), ["lm_head"]),
}


@pytest.mark.parametrize("problem", BAD_MODELS)
@pytest.mark.parametrize("sizes", [(), ("--tp", 2)], ids=["tp1", "tp2"])
def test_import_refuses_a_model_that_is_not_right(cli, models, tmp_path, problem, sizes):
    config, tensors, said = BAD_MODELS[problem]
    copy_of(models["qwen3"], tmp_path / "hf", config=config, tensors=tensors)
    result = cli("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out", *sizes)
    assert_refused(result, *said)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "null", '{"model_type": "qwen3"}'])
def test_import_refuses_a_config_json_that_is_not_right(cli, models, tmp_path, text):
    copy_of(models["qwen3"], tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(text)
    assert_refused(cli("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out"), "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_import_refuses_a_directory_without_config_or_weights(cli, models, tmp_path):
    copy_of(models["qwen3"], tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert_refused(cli("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out"), "safetensors")
    (tmp_path / "hf" / "config.json").unlink()
    assert_refused(cli("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out"), "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "sizes", [("--tp", 3), ("--tp", 0), ("--tp", -1), ("--pp", 9), ("--ep", 2)], ids=str
)
def test_import_refuses_a_layout_that_does_not_fit(cli, models, tmp_path, sizes):
    assert_refused(cli("import", "--hf", models["qwen3"], "--out", tmp_path / "out", *sizes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["import", "export"])
def test_an_output_that_holds_something_is_left_alone(cli, models, checkpoints, tmp_path, what):
    source = {
        "import": ("--hf", models["qwen3"]),
        "export": ("--megatron", checkpoints["qwen3"]),
    }[what]
    directory, file = tmp_path / "directory", tmp_path / "file"
    directory.mkdir()
    (directory / "precious").write_text("precious")
    file.write_text("precious")
    for out in (directory, file):
        assert_refused(cli(what, *source, "--out", out), str(out))
    assert files_below(tmp_path) == ["directory", "directory/precious", "file"]
    assert_refused(cli(what, *source, "--out", file / "below"), str(file))


@pytest.mark.parametrize("what", ["import", "export"])
@pytest.mark.parametrize("out", [".", "../empty", "new/", "new/deeper"])
def test_an_output_is_named_as_in_a_shell(
    cli, models, checkpoints, tmp_path, monkeypatch, what, out
):
    """Paths: relative, the current directory (empty), with a slash at the end, below a new one."""
    source = {
        "import": ("--hf", models["qwen3"]),
        "export": ("--megatron", checkpoints["qwen3"]),
    }[what]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = cli(what, *source, "--out", out)
    assert code == 0, err
    expected = {"import": "release", "export": "config.json"}[what]
    where = {".": "empty", "../empty": "empty"}.get(out, f"empty/{out}")
    assert (tmp_path / where / expected).exists()


def without(directory, *names):
    for name in names:
        (directory / name).unlink()


BAD_CHECKPOINTS = {
    # change to a copy, the error message
    "nothing there": (shutil.rmtree, ["megatron"]),
    "no tracker": (
        lambda d: without(d, "latest_checkpointed_iteration.txt"),
        ["latest_checkpointed_iteration.txt"],
    ),
    "tracker without its checkpoint": (lambda d: shutil.rmtree(d / "release"), ["release"]),
    "tracker that says nothing": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("soon"),
        ["latest_checkpointed_iteration.txt"],
    ),
    "no table": (lambda d: without(d, "release/.metadata"), [".metadata"]),
    "no configuration": (lambda d: shutil.rmtree(d / "hf"), ["config.json", "--hf"]),
    "data cut off": (
        lambda d: [f.write_bytes(f.read_bytes()[:-9]) for f in d.rglob("*.distcp")],
        ["truncated"],
    ),
    "data overwritten": (
        lambda d: [f.write_bytes(bytes(f.stat().st_size)) for f in d.rglob("*.distcp")],
        ["release"],
    ),
    "configuration of another model": (
        lambda d: (d / "hf" / "config.json").write_text(
            (d / "hf" / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
        ),
        ["hidden_size is 32", "64"],
    ),
}


@pytest.mark.parametrize("problem", BAD_CHECKPOINTS)
def test_export_refuses_a_checkpoint_that_is_not_right(cli, checkpoints, tmp_path, problem):
    spoil, said = BAD_CHECKPOINTS[problem]
    megatron = shutil.copytree(checkpoints["qwen3"], tmp_path / "megatron")
    spoil(megatron)
    before = files_below(tmp_path)
    assert_refused(cli("export", "--megatron", megatron, "--out", tmp_path / "out"), *said)
    assert files_below(tmp_path) == before


OTHER_MODELS = {
    # a configuration that is not the checkpoint's: none of it shows in the shape of a tensor
    "theta": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ["rope_theta is 10000.0", "1000000.0"],
    ),
    "epsilon": ("qwen3", {"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-06", "1e-05"]),
    "fewer rows of the vocabulary": ("qwen3", {"vocab_size": 200}, ["vocab_size is 259", "200"]),
    "more rows of the vocabulary": ("qwen3", {"vocab_size": 260}, ["vocab_size is 259", "260"]),
    "tied": ("qwen3", {"tie_word_embeddings": True}, ["tie_word_embeddings is True", "False"]),
    "no rope scaling": (
        "llama3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ["rope_type llama3 is True", "False"],
    ),
    "no sliding window": ("mistral", {"sliding_window": None}, ["sliding_window", "(7, 0)", "()"]),
    "another sliding window": ("mistral", {"sliding_window": 9}, ["(7, 0)", "(8, 0)"]),
    "experts a token": ("moe", {"num_experts_per_tok": 4}, ["num_experts_per_tok is 2", "4"]),
    "probabilities normalized": (
        "moe not normalized",
        {"norm_topk_prob": True},
        ["not norm_topk_prob is True", "False"],
    ),
    "probabilities not normalized": (
        "moe",
        {"norm_topk_prob": False},
        ["not norm_topk_prob is False", "True"],
    ),
    "heads": (
        "qwen3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24},
        ["head_dim is 12", "24"],
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
@pytest.mark.parametrize("record", ["args", "files"])
def test_a_checkpoint_is_exported_as_the_model_that_it_records(
    cli, models, checkpoints, tmp_path, name, record
):
    """The record in common.pt decides; without it, the configuration stored with the checkpoint."""
    model, changes, said = OTHER_MODELS[name]
    megatron = checkpoints[model]
    if record == "files":
        megatron = shutil.copytree(megatron, tmp_path / "megatron")
        common = torch.load(megatron / "release" / "common.pt", weights_only=False)
        torch.save({k: v for k, v in common.items() if k != "args"}, megatron / "release/common.pt")
    other = copy_of(models[model], tmp_path / "other", config=changes)
    result = cli("export", "--megatron", megatron, "--hf", other, "--out", tmp_path / "out")
    assert_refused(result, "was not created from the model of", *said)
    assert not (tmp_path / "out").exists()
    same = cli("export", "--megatron", megatron, "--hf", models[model], "--out", tmp_path / "out")
    assert same[0] == 0


def test_a_record_of_an_earlier_version_is_that_of_normalized_probabilities(
    cli, models, checkpoints, tmp_path
):
    """It has no field for that: no other model could be imported."""
    megatron = shutil.copytree(checkpoints["moe"], tmp_path / "megatron")
    common = torch.load(megatron / "release" / "common.pt", weights_only=False)
    del common["args"].moe_router_pre_softmax
    torch.save(common, megatron / "release" / "common.pt")
    same, other = models["moe"], models["moe not normalized"]
    assert cli("export", "--megatron", megatron, "--hf", same, "--out", tmp_path / "a")[0] == 0
    result = cli("export", "--megatron", megatron, "--hf", other, "--out", tmp_path / "b")
    assert_refused(result, "not norm_topk_prob is False", "True")


def tokenizer_of(directory, tokens):
    vocab = {token: number for number, token in enumerate(tokens)}
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": []})
    (directory / "tokenizer.json").write_text(text)


def test_a_tokenizer_whose_numbers_mean_other_tokens_is_refused(cli, models, tmp_path):
    """Additional tokens are no conflict: many models have rows to spare."""
    hf, megatron = copy_of(models["qwen3"], tmp_path / "hf"), tmp_path / "megatron"
    tokenizer_of(hf, "abc")
    assert cli("import", "--hf", hf, "--out", megatron)[0] == 0
    tokenizer_of(hf, "acb")
    result = cli("export", "--megatron", megatron, "--hf", hf, "--out", tmp_path / "out")
    assert_refused(result, "tokenizers of different models", "token 1 is 'b' and 'c'")
    tokenizer_of(hf, "abcd")
    assert cli("export", "--megatron", megatron, "--hf", hf, "--out", tmp_path / "out")[0] == 0


def test_a_width_of_experts_that_does_not_divide_is_refused(cli, tmp_path):
    """The width of the dense layers would divide, but the model has none."""
    config = tiny_models.qwen3_moe().config
    config.moe_intermediate_size = 18
    tiny_models.save(tiny_models.randomized(Qwen3MoeForCausalLM(config)), tmp_path / "hf")
    arguments = ("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out")
    assert_refused(cli(*arguments, "--tp", 4), "tensor", "width of an expert, 18")
    assert cli(*arguments, "--tp", 4, "--ep", 2)[0] == 0


def test_verify_refuses_a_model_of_other_shapes(cli, models, tmp_path):
    """verify refuses it as import does; here without a checkpoint."""
    for problem in ("matrix of another shape", "rows that are no heads", "missing tensor"):
        config, tensors, said = BAD_MODELS[problem]
        hf = copy_of(models["qwen3"], tmp_path / problem, config=config, tensors=tensors)
        assert_refused(cli("verify", "--hf", hf, "--no-logits"), said[-1])


def test_wrong_arguments_of_verify_and_inspect(cli, models, tmp_path):
    hf = models["qwen3"]
    assert_refused(cli("verify", "--hf", hf, "--layouts", "two"), "--layouts", "two")
    assert_refused(cli("verify", "--hf", hf, "--prompts", tmp_path / "absent"), "absent")
    assert_refused(verify(cli, hf, tmp_path / "absent"), "absent")
    assert_refused(cli("inspect", tmp_path / "absent"), "absent")


# What a failure in the middle leaves


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def failing_after(function, calls, failure):
    """Return a method that works this many times, then fails."""
    done = []

    def method(*arguments, **named):
        done.append(1)
        return (failure if len(done) > calls else function)(*arguments, **named)

    return method


IMPORT_FAILURES = [(TorchDistWriter, "write", 5), (TorchDistWriter, "finish", 0)]
IMPORT_FAILURES += [(convert, "carry_over", 0), (ownership, "rename_tree", 0)]
EXPORT_FAILURES = [(HFWriter, "write", 5), (TorchDistReader, "read", 3)]
EXPORT_FAILURES += [(hf_files, "carry_over", 0), (ownership, "rename_tree", 0)]


@pytest.mark.parametrize(("place", "name", "calls"), IMPORT_FAILURES + EXPORT_FAILURES)
def test_a_full_disk_leaves_nothing(
    cli, models, checkpoints, tmp_path, monkeypatch, place, name, calls
):
    """No directory remains, neither complete in appearance nor partial; the next try succeeds."""
    arguments = ("import", "--hf", models["qwen3"])
    if (place, name, calls) in EXPORT_FAILURES:
        arguments = ("export", "--megatron", checkpoints["qwen3"])
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing_after(getattr(place, name), calls, full_disk))
        result = cli(*arguments, "--out", tmp_path / "out")
    assert_refused(result, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(("place", "name", "calls"), [IMPORT_FAILURES[0], EXPORT_FAILURES[0]])
def test_an_interruption_leaves_nothing(
    cli, models, checkpoints, tmp_path, monkeypatch, place, name, calls
):
    arguments = ("import", "--hf", models["qwen3"])
    if (place, name, calls) in EXPORT_FAILURES:
        arguments = ("export", "--megatron", checkpoints["qwen3"])
    monkeypatch.setattr(place, name, failing_after(getattr(place, name), calls, interrupted))
    code, *_ = cli(*arguments, "--out", tmp_path / "out")
    assert code == 130
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_conversion_do_not_get_into_the_next(cli, models, tmp_path):
    """A killed process could not clean up."""
    left = tmp_path / "out.partial" / "release"
    ownership.create(left.parent, ownership.UNFINISHED)
    left.mkdir()
    (left / "__7_0.distcp").write_text("left")
    assert cli("import", "--hf", models["qwen3"], "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "release" / "__7_0.distcp").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_safetensors_library_reads_an_export_of_several_files(checkpoints, tmp_path, models):
    convert.export_hf(checkpoints["moe"], tmp_path / "out", shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    expected = load_file(models["moe"] / "model.safetensors")
    assert len(files) > 3 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
