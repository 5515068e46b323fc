"""A run's inputs are identified by their content."""

import json
import os

import pytest

from megatron_prepo.files import digest as digests
from megatron_prepo.inputs import digests as inputs

MIB = 1 << 20


@pytest.fixture
def large(tmp_path):
    """Sparse file that is larger than what is read in full."""
    path = tmp_path / "weights.safetensors"
    with open(path, "wb") as file:
        file.truncate(digests.FULL_BYTES + 3 * MIB)
    return path


def change(path, offset: int, size: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"x" * size)


def test_a_small_file_counts_byte_for_byte(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB + 5))
    before = digests.digest(path)
    change(path, 2 * MIB + 12345)
    assert before.startswith("sha256:") and digests.digest(path) != before


@pytest.mark.parametrize("where", ["first", "last", "middle", "longer"])
def test_of_a_large_file_ends_size_and_any_long_change_count(large, where):
    before, size = digests.digest(large), large.stat().st_size
    assert before.startswith("sampled:")
    match where:
        case "first":
            change(large, 0)
        case "last":
            change(large, size - 1)
        case "middle":
            change(large, 20 * MIB, size // digests.NUM_BLOCKS)
        case "longer":
            os.truncate(large, size + 1)
    assert digests.digest(large) != before


def test_of_a_large_file_a_change_within_a_gap_is_not_seen(large):
    """The docstring documents this limit; if the test fails, change the docstring."""
    before = digests.digest(large)
    change(large, large.stat().st_size // (digests.NUM_BLOCKS + 1) + digests.BLOCK_BYTES + 1)
    assert digests.digest(large) == before


def test_of_a_model_the_files_count_that_can_move_a_number(tmp_path):
    names = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]
    names += ["additional_chat_templates/rag.jinja", "shards/a.safetensors"]
    weight_map = {"weight_map": {"w": "shards/a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    for name in [*names, "README.md", "export/model.safetensors", ".cache/config.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = inputs.file_digests("model.hf", tmp_path)
    assert found.keys() == {*names, "model.safetensors.index.json"}
