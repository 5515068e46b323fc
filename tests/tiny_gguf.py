"""Tiny GGUF files, written as llama.cpp's converter writes them, and the tokenizers for them."""

import json
from pathlib import Path

import numpy as np
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import Qwen2Converter

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    f"What is {a} + {b}? Answer with the number only: {a + b}." for a in range(9) for b in (2, 5)
]
TABLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Name of a module in Hugging Face's format -> in GGUF, without the layer's number."""


def tokenizer(rule: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of some 300 words, in the form of SmolLM2's or Qwen2's.

    `rule`: llama.cpp's name of the rule by which text is cut.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Tokenizer(models.BPE())
    if rule == "qwen2":  # as transformers makes it
        theirs = Qwen2Converter(None).converted({"a": 0, "aa": 1}, [("a", "a")])
        words.normalizer, words.pre_tokenizer = normalizers.NFC(), theirs.pre_tokenizer
    elif rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        words.pre_tokenizer = byte_level
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, START, STOP], initial_alphabet=sorted(alphabet)
    )
    words.train_from_iterator([*TEXTS, "  \n   1  2   "], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=START,
        eos_token=STOP,
        pad_token=STOP,
        unk_token=END,
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def llama(vocab_size: int, *, layers: int = 2) -> PreTrainedModel:
    """Return a model of SmolLM2's form: 9 heads in 3 groups, tied, every parameter random."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=288,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rms_norm_eps=float(np.float32(1e-5)),  # the type of the file
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return tiny_models.randomized(LlamaForCausalLM(config))


def qwen(version: int, vocab_size: int) -> PreTrainedModel:
    """Return a model of Qwen2's form, or of Qwen3's with its heads of 128."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    shape = tiny_models.SHAPE | {
        "vocab_size": vocab_size,
        "num_hidden_layers": 2,
        "rms_norm_eps": float(np.float32(1e-6)),
        "rope_parameters": rope,
        "max_position_embeddings": 512,
        "tie_word_embeddings": version == 3,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if version == 2:
        return tiny_models.randomized(Qwen2ForCausalLM(Qwen2Config(**shape)))
    return tiny_models.randomized(Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=128)))


def write(
    file: Path,
    model: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    rule: str,
    *,
    kind: str = "F32",
    permuted: bool = True,
    fields: dict | None = None,
    extra: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Path:
    """Write a model as llama.cpp's `convert_hf_to_gguf.py` does.

    `kind`: type of matrices; with another than F32 the model gets the values of the file.
    `permuted`: whether Llama's query and key rows are in llama.cpp's order.
    `fields`: further fields, None for one that is missing.  `extra`, `without`: names of tensors.
    """
    import gguf

    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, family)
    for name, value in (_fields(model, words, rule) | (fields or {})).items():
        name = name.replace("ARCH", family)
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_string)(name, value)
    groups = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in sorted(model.named_parameters()):
        name = _name(name)
        values, part = parameter.detach().numpy(), name.split(".")[-2]
        if name in without:
            continue
        if kind != "F32" and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values))
        if family == "llama" and permuted and part in groups:
            values = _permuted(values, groups[part])
        if kind != "F32" and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    for name in extra:
        writer.add_tensor(name, np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _fields(model: PreTrainedModel, words: PreTrainedTokenizerFast, rule: str) -> dict:
    config = model.config
    described = json.loads(words.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(words.get_vocab().items(), key=lambda pair: pair[1])]
    special = {
        token["content"]: 3 if token["special"] else 4 for token in described["added_tokens"]
    }
    unused = [f"[PAD{number}]" for number in range(len(tokens), config.vocab_size)]
    kinds = [special.get(token, 1) for token in tokens] + [5] * len(unused)
    return {
        "general.name": "Tiny",
        "ARCH.block_count": config.num_hidden_layers,
        "ARCH.context_length": config.max_position_embeddings,
        "ARCH.embedding_length": config.hidden_size,
        "ARCH.feed_forward_length": config.intermediate_size,
        "ARCH.attention.head_count": config.num_attention_heads,
        "ARCH.attention.head_count_kv": config.num_key_value_heads,
        "ARCH.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "ARCH.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": words.bos_token_id,
        "tokenizer.ggml.eos_token_id": words.eos_token_id,
        "tokenizer.ggml.padding_token_id": words.pad_token_id,
        "tokenizer.ggml.unknown_token_id": words.unk_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    } | ({"ARCH.attention.key_length": 128} if config.model_type == "qwen3" else {})


def _name(hf: str) -> str:
    """Return GGUF's name of a tensor."""
    module, _, kind = hf.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{TABLE[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{TABLE[part]}.{kind}"


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of query or key in the order of llama.cpp's rotation, pairs side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
