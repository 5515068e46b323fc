"""The benchmark of checkpoints at the shape of a given model: it writes a complete state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from tools.bench import checkpoint, plan, utilisation

REPOSITORY = Path(__file__).resolve().parents[4]


def test_a_models_shape_is_saved_in_the_background(tmp_path):
    config = tiny_models.qwen2().config
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "result.json"
    command = [sys.executable, "tools/bench/checkpoint.py", "--out", str(out), "--rounds", "1"]
    command += ["--background", "--model", str(tmp_path / "model")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    result = json.loads(out.read_text())
    # with float32 models the weights are stored twice: the model's, and the optimizer's
    assert 16 * result["parameters"] < result["bytes"] < 16 * result["parameters"] + 1e6
    assert result["seconds"].keys() == {"background", "written", "finish"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result.json"]


@pytest.mark.parametrize("tool", [checkpoint, plan, utilisation])
def test_a_model_that_is_not_there_is_said_in_a_line(tool, tmp_path, monkeypatch, capsys):
    words = ["tool", "--out", str(tmp_path / "result.json"), "--model", str(tmp_path / "absent")]
    monkeypatch.setattr(sys, "argv", words)
    assert tool.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no such file or folder: ") and not list(tmp_path.iterdir())
