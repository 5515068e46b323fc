"""A model of a published shape, too slow for every run: `pytest -m slow`."""

import pytest

from checkpoints_convert.convert import export_hf, import_hf
from checkpoints_convert.verify import verify
from tools.bench.convert import SHAPES, make_model


@pytest.mark.slow
def test_half_a_billion_parameters_there_and_back(tmp_path):
    make_model(tmp_path / "hf", *SHAPES["qwen2.5-0.5b"])
    assert import_hf(tmp_path / "hf", tmp_path / "megatron", tensor=2) == []
    report = verify(tmp_path / "hf", megatron=tmp_path / "megatron")
    assert not report.failures
    assert len(report.logits) == 2  # one of 2,048 positions
    export_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=300 << 20)
    again = verify(tmp_path / "back", layouts=[(1, 1, 1)], logits=False)
    assert again.tensors == report.tensors  # every SHA-256
