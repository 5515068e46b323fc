"""What a server's process on a CPU fixes in other modules, in a process like it."""

import os
import subprocess
import sys

import pytest

from megatron_prepo.rollout.sglang.launch import STAND_INS

LOADED = """
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Code that torchvision's own library runs where it loads, such as next to a torch for CUDA."""


def run(code: str, path) -> subprocess.CompletedProcess:
    """Run by an interpreter with only the stand-ins of ours."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{STAND_INS}{os.pathsep}{path}", "OMP_NUM_THREADS": "1"},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("extension", ["", LOADED], ids=["does not load", "loads"])
def test_torchvisions_operators_are_declared_once(extension, tmp_path):
    """torch aborts the process at a second definition."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension, _meta_registrations")
    (package / "extension.py").write_text(extension)
    (package / "_meta_registrations.py").write_text(
        "import torch\n"
        "torch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: dets)\n"
    )
    answer = run("import torchvision, torch; print(torch.ops.torchvision.nms)", tmp_path)
    assert answer.stdout == "torchvision.nms\n", answer.stderr[-2000:]


def test_a_change_in_sglang_is_named(tmp_path):
    package = tmp_path / "sglang" / "srt" / "batch_invariant_ops.py"
    package.parent.mkdir(parents=True)
    code = "from sglang.srt import batch_invariant_ops as ops\n"
    code += "print(ops.enable_batch_invariant_mode(1, x=2))"
    package.write_text("def enable_batch_invariant_mode(mode=True): raise ValueError")
    answer = run(code, tmp_path)
    assert answer.stdout == "None\n", answer.stderr
    package.write_text("def set_batch_invariant_mode(mode): ...")
    answer = run(code, tmp_path)
    assert answer.returncode == 1
    assert "has no enable_batch_invariant_mode" in answer.stderr and "sglang" in answer.stderr
