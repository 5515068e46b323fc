"""`megatron-prepo evaluate` on the laptop's models: as in training, resumed, and refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from fake_sglang import FakeSGLang
from rounding import approx

from megatron_prepo.cli import main
from tests.e2e.laptop import LAPTOP, SHORT, made_by_ranks, summary

SUITE = f"held_out={LAPTOP / 'eval.jsonl'}"
SETTINGS = [
    "rollout.max_new_tokens=52",
    "model.dtype=float32",
    "data.max_prompt_tokens=96",
    "eval.samples_per_prompt=4",
    "eval.max_prompts=12",
]


def evaluate(out: Path, *words: str) -> int:
    return main(["evaluate", "--out", str(out), *words])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run, of which the checkpoint and the export are evaluated."""
    directory = tmp_path_factory.mktemp("run") / "run"
    return made_by_ranks(directory, *SHORT, "eval.samples_per_prompt=4", "parallel.tensor=1")


def test_a_run_its_export_and_its_checkpoint_are_the_same_model(run, tmp_path, capsys):
    """avg@k equals what the run itself measured with the same seeds."""
    words = ["--model", f"run={run}", "--model", f"hf={run / 'hf'}"]
    words += ["--model", f"base={LAPTOP / 'base'}"]
    assert evaluate(tmp_path, *words) == 0
    models = results(tmp_path)["models"]
    trained = summary(run)
    assert models["run"]["mean"]["mean"] == trained["pass_rate_after"]
    assert models["base"]["mean"]["mean"] == trained["pass_rate_before"]
    assert models["hf"]["suites"] == models["run"]["suites"]
    assert (models["run"]["rollouts"], models["hf"]["rollouts"]) == (trained["rollouts"], None)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "avg@4 in per cent (95 % interval)"
    assert table[2] == "| model | held out | mean | rollouts |"
    assert table[4].startswith(f"| run | {100 * trained['pass_rate_after']:.2f} (")
    assert table[4].endswith(f"| {trained['rollouts']} |")


def test_a_megatron_checkpoint_is_exported_first(run, tmp_path):
    out, base = tmp_path / "out", LAPTOP / "base"
    words = ["--suite", SUITE, "--config", str(run / "config.yaml"), f"model.hf={base}"]
    checkpoint = str(run / "checkpoints")
    assert evaluate(out, "--model", f"a={checkpoint}", "--model", f"b={run / 'hf'}", *words) == 0
    models = results(out)["models"]
    assert models["a"]["suites"] == models["b"]["suites"]
    assert (out / "exported" / "a" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert evaluate(out, "--model", f"base={LAPTOP / 'base'}", "--suite", SUITE, *SETTINGS) == 0
    return out


def test_an_evaluation_that_was_cut_off_goes_on_where_it_was(whole, tmp_path):
    """The evaluation is cut off in the middle of a prompt's samples, in the middle of a line."""
    path = Path("completions") / "base" / "held_out.jsonl"
    lines = (whole / path).read_text().splitlines(keepends=True)
    assert len(lines) == 12 * 4
    (tmp_path / path).parent.mkdir(parents=True)
    lines[0] = lines[0].replace('"text": "', '"text": "kept ')
    (tmp_path / path).write_text("".join(lines[:22]) + lines[22][:30])
    (tmp_path / "evaluation.json").write_bytes((whole / "evaluation.json").read_bytes())
    model = ["--model", f"base={LAPTOP / 'base'}", "--suite", SUITE]
    assert evaluate(tmp_path, *model, *SETTINGS, "rollout.batch_size=8") == 0
    again = (tmp_path / path).read_text().splitlines(keepends=True)
    assert again == lines
    assert results(tmp_path)["models"] == results(whole)["models"]


def test_numbers_follow_from_the_completions(whole):
    suite = results(whole)["models"]["base"]["suites"]["held_out"]
    lines = (whole / "completions" / "base" / "held_out.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    groups = [rewards[i : i + 4] for i in range(0, 48, 4)]
    assert suite["avg"]["mean"] == approx(sum(rewards) / 48)
    assert suite["pass_at"]["1"] == suite["avg"]
    assert suite["pass_at"]["4"]["mean"] == approx(sum(map(max, groups)) / 12)
    assert list(suite["pass_at"]) == ["1", "2", "4"]
    assert 0 < suite["avg"]["mean"] < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["train.seed=2"], "another setting train.seed: 1 recorded, 2 given; choose another --out"),
        (["rollout.max_new_tokens=8"], "another setting rollout.max_new_tokens"),
        (["--suite", f"held_out={LAPTOP / 'train.jsonl'}"], "another suite held_out"),
        (["--model", f"base={LAPTOP.parent / 'traces' / 'base'}"], "another model base"),
    ],
)
def test_what_is_there_is_not_mixed_with_something_else(whole, capsys, change, words):
    before = results(whole)
    model = [] if "--model" in change else ["--model", f"base={LAPTOP / 'base'}"]
    suite = [] if "--suite" in change else ["--suite", SUITE]
    assert evaluate(whole, *model, *suite, *SETTINGS, *change) == 2
    assert words in capsys.readouterr().err
    assert results(whole) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "m=absent", "--suite", SUITE], "no such file or folder: absent"),
        (
            ["--model", str(LAPTOP / "base"), "--suite", "x=absent.jsonl"],
            "no such file or folder: absent.jsonl",
        ),
        (["--model", f"m={LAPTOP / 'base'}", *SETTINGS], "give --suite NAME=FILE"),
        (
            ["--model", f"m={LAPTOP / 'base'}", "--suite", SUITE],
            "rollout.max_new_tokens is required",
        ),
        (
            ["--model", str(LAPTOP / "base"), "--suite", SUITE, "rollout.max_new_tokens=9999"],
            "does not fit the model's",
        ),
        (["--model", f"a/b={LAPTOP / 'base'}", "--suite", SUITE, *SETTINGS], "cannot name a model"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, capsys, words, sentence):
    assert evaluate(tmp_path, *words) == 2
    assert sentence in capsys.readouterr().err


def test_a_hugging_face_directory_needs_no_megatron(tmp_path):
    program = (
        "import sys\n"
        "from megatron_prepo.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, any(name.partition('.')[0] == 'megatron' for name in sys.modules))\n"
    )
    words = ["evaluate", "--out", str(tmp_path), "--model", str(LAPTOP / "base"), "--suite", SUITE]
    command = [sys.executable, "-c", program, *words, *SETTINGS, "eval.max_prompts=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr


def test_sglang_servers_get_the_files_tensors_and_their_answers_are_kept(tmp_path):
    """Every tensor of the files arrives at a fake server, and each prompt is requested four
    times."""
    hf, out = tmp_path / "hf", tmp_path / "out"
    model = tiny_models.qwen3(tied=True)
    tiny_models.save(model, hf)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LAPTOP / "base" / name, hf)
    (hf / "generation_config.json").write_text('{"eos_token_id": 2}')
    words = ["--model", f"tiny={hf}", "--suite", SUITE, *SETTINGS, "rollout.engine=sglang"]
    with FakeSGLang(fp32_lm_head=True) as fake:
        assert evaluate(out, *words, f"servers.urls=[{fake.url}]") == 0
        assert set(fake.weights) == {name for name, _ in model.named_parameters()}
        assert all(fake.weights[name].equal(p) for name, p in model.named_parameters())
        assert sorted(fake.answered.values()) == [1] * 12 * 4
    assert results(out)["models"]["tiny"]["suites"]["held_out"]["prompts"] == 12
