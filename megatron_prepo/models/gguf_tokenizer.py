"""The tokenizer in a GGUF file, as one of `transformers`.

It is built from the file's own tables.  The reader of `transformers` 5.12 names the begin token as
the end token, drops the padding token and all added tokens that are text, and cuts text by GPT-2's
rule whatever a model's own rule is: fewer and other tokens than the model was trained on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError

TABLES = ("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges")
"""Required entries below `tokenizer.`."""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Types of tokens: no text, text that is one token, and a row of the embedding without a token."""
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Role in `transformers` -> in GGUF."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Parts of a text that are encoded separately, with numbers of up to N digits."""
DIGITS = {"qwen2": 1, "llama-bpe": 3}
"""N of WORDS, for the rules that use it."""
RULES = ("gpt-2", "smollm", *DIGITS)
"""Supported rules by which text is cut into parts, llama.cpp's names."""


def tokenizer(file: Path, fields: Mapping[str, Any]) -> Any:
    """Return the tokenizer that the fields of a GGUF file describe.

    Raises UserError for an incomplete one, and for another kind than BPE of bytes by RULES.
    """
    from transformers import PreTrainedTokenizerFast

    tables = {n.removeprefix("tokenizer."): v for n, v in fields.items()}
    if absent := [name for name in TABLES if name not in tables]:
        raise UserError(f"{file} has no complete tokenizer: tokenizer.{absent[0]} is missing")
    if tables["ggml.model"] != "gpt2" or tables["ggml.pre"] not in RULES:
        raise UserError(
            f"{file}: a tokenizer of kind {tables['ggml.model']!r} and rule "
            f"{tables['ggml.pre']!r} is not supported; 'gpt2' with {', '.join(RULES)} is; use the "
            "model's Hugging Face folder"
        )
    tokens = tables["ggml.tokens"]
    numbers = {role: tables.get(f"ggml.{name}_token_id") for role, name in ROLES.items()}
    named = {role: tokens[number] for role, number in numbers.items() if number is not None}
    if "eos_token" not in named:
        raise UserError(f"{file}: its tokenizer names no end token (ggml.eos_token_id)")
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(tables, named.get("bos_token")),
        chat_template=tables.get("chat_template"),
        # meant for other kinds; true would make `transformers` warn in every process that decodes
        clean_up_tokenization_spaces=False,
        **named,
    )


def _backend(tables: Mapping[str, Any], bos_token: str | None) -> Any:
    """Return the tokenizer of `tokenizers`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    tokens, kinds = tables["ggml.tokens"], tables["ggml.token_type"]
    numbers = {
        t: n for n, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED
    }
    merges = [tuple(merge.split(" ")) for merge in tables["ggml.merges"]]
    # Llama 3 looks a part up as a whole word before it merges
    model = models.BPE(numbers, merges, ignore_merges=tables["ggml.pre"] == "llama-bpe")
    backend = Tokenizer(model)
    if tables["ggml.pre"] == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = cut(tables["ggml.pre"]), decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if bos_token is not None and tables.get("ggml.add_bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos_token, "$A"],
            pair=[bos_token, "$A", bos_token, "$B"],
            special_tokens=[(bos_token, numbers[bos_token])],
        )
    return backend


def cut(rule: str) -> Any:
    """Return what cuts a text into parts by one of RULES."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if rule == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    parts = Split(Regex(WORDS % DIGITS[rule]), "isolated")
    return Sequence([parts, ByteLevel(add_prefix_space=False, use_regex=False)])
