"""A GGUF file is the model that it was made of: tensors, logits, tokens; or it is refused."""

import json
import shutil
import sys

import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from checkpoints_convert import __main__
from megatron_prepo.errors import UserError
from megatron_prepo.models import gguf_to_hf, gguf_tokenizer
from megatron_prepo.models.hf_files import HFTensors

pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF with the package accelerate")

CASES = {
    # name: (rule of the tokenizer, model of so many rows, type of its matrices)
    "llama": ("smollm", lambda rows: tiny_gguf.llama(rows), "F32"),
    "llama q8_0": ("smollm", lambda rows: tiny_gguf.llama(rows), "Q8_0"),
    "qwen2": ("qwen2", lambda rows: tiny_gguf.qwen(2, rows + 5), "F32"),
    "qwen3": ("qwen2", lambda rows: tiny_gguf.qwen(3, rows), "F16"),
}
HARD = (
    "What is 12 + 345?",
    "  1  22   333\n\n 4",
    "it's IT'S caf\u00e9 cafe\u0301 \u2581 \U0001f600",
    "<|im_start|>user\nadd<|im_end|>\n",
)


def make(name, directory, **changes):
    """Write a case's GGUF file; return it, the model and the tokenizer that it was made of."""
    rule, of_rows, kind = CASES[name]
    words = tiny_gguf.tokenizer(rule)
    model, directory = of_rows(len(words)), directory / name.replace(" ", "-")
    directory.mkdir()
    file = tiny_gguf.write(directory / "m.gguf", model, words, rule, kind=kind, **changes)
    return file, model, words


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, and the Hugging Face folder that is made of it."""
    root = tmp_path_factory.mktemp("gguf")
    file, model, words = make(request.param, root)
    with gguf_to_hf.hf_folder(file.parent, root / "out") as folder:
        kept = shutil.copytree(folder, root / "kept")
    assert sorted(path.name for path in root.iterdir()) == sorted([file.parent.name, "kept"])
    return file, model, words, kept


def test_every_tensor_and_logit_is_the_models(case):
    file, model, _, folder = case
    expected = dict(model.named_parameters())
    with HFTensors(folder, tied=model.config.tie_word_embeddings) as tensors:
        assert tensors.names() == expected.keys()
        assert [n for n in expected if not torch.equal(tensors[n], expected[n])] == []
    tokens = torch.randint(model.config.vocab_size, (1, 100), generator=torch.Generator())
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = [one(tokens).logits for one in (model, ours, theirs)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_the_tokenizer_is_the_models(case):
    _, model, words, folder = case
    found = AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        tokens = found(text).input_ids
        assert tokens == words(text).input_ids
        assert found.decode(tokens) == words.decode(tokens)
    roles = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    assert [getattr(found, r) for r in roles] == [getattr(words, r) for r in roles]
    assert len(found) == len(words) <= model.config.vocab_size
    assert found.clean_up_tokenization_spaces is False
    assert found(["a b c", "a"], padding=True).attention_mask[1][-1] == 0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_rows_in_another_order_are_another_model(tmp_path):
    """The test above detects a permutation that is not undone."""
    file, model, _ = make("llama", tmp_path, permuted=False)
    with gguf_to_hf.hf_folder(file, tmp_path / "out") as folder:
        wrong = load_file(folder / "model.safetensors")
    names = [n for n, p in model.named_parameters() if not torch.equal(p, wrong[n])]
    kinds = {name.split(".")[-2] for name in names}
    assert kinds == {"q_proj", "k_proj"} and len(names) == 2 * model.config.num_hidden_layers


def test_text_with_a_number_of_its_own_stays_one_token(tmp_path):
    words = tiny_gguf.tokenizer("qwen2")
    words.add_tokens(["<think>"])
    model = tiny_gguf.qwen(2, len(words))
    file = tiny_gguf.write(tmp_path / "m.gguf", model, words, "qwen2")
    with gguf_to_hf.hf_folder(file, tmp_path / "out") as folder:
        found = AutoTokenizer.from_pretrained(folder)
    tokens = found("a<think>b").input_ids
    assert (
        tokens == words("a<think>b").input_ids and words.convert_tokens_to_ids("<think>") in tokens
    )
    assert found.decode(tokens, skip_special_tokens=True) == "a<think>b"


def test_the_begin_token_is_added_where_the_file_asks_for_it(tmp_path):
    file, _, words = make("llama", tmp_path, fields={"tokenizer.ggml.add_bos_token": True})
    with gguf_to_hf.hf_folder(file, tmp_path / "out") as folder:
        found = AutoTokenizer.from_pretrained(folder)
    assert found("a 1").input_ids == [words.bos_token_id, *words("a 1").input_ids]
    assert found("a 1", add_special_tokens=False).input_ids == words("a 1").input_ids


def test_llama_3_cuts_text_as_transformers_converts_it():
    theirs = TikTokenConverter.__init__.__defaults__
    assert gguf_tokenizer.WORDS % 3 in theirs
    parts = gguf_tokenizer.cut("llama-bpe").pre_tokenize_str("12345 it's")
    assert [part for part, _ in parts] == ["123", "45", "\u0120it", "'s"]


# The command line


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["checkpoints_convert", *map(str, arguments)])
        capsys.readouterr()
        return __main__.main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["llama q8_0", "qwen2"])
def test_import_verify_and_export(cli, name, tmp_path):
    file, model, words = make(name, tmp_path)
    out, back = tmp_path / "megatron", tmp_path / "back"
    tensor = 3 if name.startswith("llama") else 2
    code, printed, _ = cli("import", "--hf", file, "--out", out, "--tp", tensor, "--pp", 2)
    assert code == 0 and f"model.hf={out / 'hf'} model.megatron={out}" in printed
    assert f"{len(list(model.named_parameters()))} tensors (" in printed
    assert "dequantized to float32" in printed and ("Q8_0" in printed) == ("q8_0" in name)
    layouts = f"1x1,{tensor}x2"
    code, printed, err = cli("verify", "--hf", file, "--megatron", out, "--layouts", layouts)
    assert code == 0 and printed.endswith("verified\n"), err
    assert cli("export", "--megatron", out, "--out", back)[0] == 0
    found = AutoModelForCausalLM.from_pretrained(back)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter)
    assert AutoTokenizer.from_pretrained(back).chat_template == words.chat_template
    assert not list(tmp_path.rglob("*.partial"))


def test_another_files_checkpoint_is_not_verified(cli, tmp_path):
    file, model, words = make("llama", tmp_path)
    assert cli("import", "--hf", file.parent, "--out", tmp_path / "megatron")[0] == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    other = tiny_gguf.write(tmp_path / "other.gguf", model, words, "smollm")
    where = ("--megatron", tmp_path / "megatron", "--layouts", "1x1", "--no-logits")
    code, _, err = cli("verify", "--hf", other, *where)
    assert code == 1 and "model.layers.1.mlp.down_proj.weight" in err


# What is refused


REFUSED = {
    "architecture": ({"general.architecture": "gemma"}, {}, "architecture 'gemma'"),
    "rope scaling": ({"ARCH.rope.scaling.type": "yarn"}, {}, "ignores llama.rope.scaling.type"),
    "rope factors": ({}, {"extra": ("rope_freqs.weight",)}, "rope scaling of Llama 3.1"),
    "no groups": (
        {"ARCH.attention.head_count_kv": None},
        {},
        "lacks llama.attention.head_count_kv",
    ),
    "head size": ({"ARCH.attention.key_length": 64}, {}, "key_length is 64"),
    "a tensor less": ({}, {"without": ("blk.1.ffn_up.weight",)}, "lacks blk.1.ffn_up.weight"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, {}, "no complete tokenizer"),
    "no end": ({"tokenizer.ggml.eos_token_id": None}, {}, "names no end token"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, {}, "'llama' and rule 'smollm'"),
    "unknown rule": ({"tokenizer.ggml.pre": "tekken"}, {}, "rule 'tekken'"),
    "token outside": ({"tokenizer.ggml.bos_token_id": 9999}, {}, "damaged"),
    "types of two tokens": ({"tokenizer.ggml.token_type": [1, 1]}, {}, "damaged"),
    "an unknown merge": ({"tokenizer.ggml.merges": ["qqq zzz"]}, {}, "damaged"),
    "layers without end": ({"ARCH.block_count": 4_000_000_000}, {}, "lacks blk.10"),
    "one of two": ({"split.count": 2}, {}, "one of 2 files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_read_completely_is_refused(name, tmp_path):
    fields, words, said = REFUSED[name]
    file, _, _ = make("llama", tmp_path, fields=fields, **words)
    with (
        pytest.raises(UserError, match=said) as refused,
        gguf_to_hf.hf_folder(file, tmp_path / "out"),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_other_files_are_refused(cli, tmp_path):
    file, _, _ = make("llama", tmp_path)
    out = tmp_path / "out"

    def refused(source, said):
        code, _, err = cli("import", "--hf", source, "--out", out)
        assert code == 2 and said in err and err.count("\n") == 1 and not out.exists(), err

    text, short = tmp_path / "text.gguf", tmp_path / "short.gguf"
    text.write_text("GGML or not")
    refused(text, "is not a GGUF file")
    short.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(short, "damaged or truncated")
    refused(tmp_path, "has several GGUF files")
    (tmp_path / "split").mkdir()
    for number in (1, 2):
        shutil.copyfile(file, tmp_path / "split" / f"m-0000{number}-of-00002.gguf")
    refused(tmp_path / "split", "several files is not supported")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert (
        "is not an empty directory" in cli("import", "--hf", file, "--out", tmp_path / "taken")[2]
    )


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    file, _, _ = make("llama", tmp_path)
    monkeypatch.setattr(gguf_to_hf, "find_spec", lambda name: None if name == "gguf" else object())
    said = r"missing: gguf; pip install -c constraints.txt -e '\.\[real\]'"
    with pytest.raises(UserError, match=said), gguf_to_hf.hf_folder(file, tmp_path / "out"):
        pass


def test_weights_of_hugging_face_next_to_a_gguf_file_come_first(tmp_path):
    file, model, _ = make("llama", tmp_path)
    model.save_pretrained(file.parent)
    with gguf_to_hf.hf_folder(file.parent, tmp_path / "out") as folder:
        assert folder == file.parent
