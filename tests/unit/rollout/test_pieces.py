"""Completions as pieces of text: one per token, and together the decoded text."""

import pytest
from transformers import AutoTokenizer

from megatron_prepo.rollout.pieces import pieces
from tests.e2e.laptop import LAPTOP


class Bytes:
    """A tokenizer whose tokens are bytes, but 300, which is special."""

    def decode(self, tokens, *, skip_special_tokens):
        text, part = "", bytearray()
        for token in [*tokens, None]:
            if token is not None and token < 256:
                part.append(token)
                continue
            text += part.decode(errors="replace") + ("" if token is None else "<end>")
            part = bytearray()
        return text


class Words:
    """A tokenizer of words with spaces before them, except before the first of a text."""

    def decode(self, tokens, *, skip_special_tokens):
        return " ".join(f"w{token}" for token in tokens)


@pytest.mark.parametrize(
    "text", ["plain", "naïve – 数学 😀!", "😀😀", "</script>\n\n\tx", "e\N{COMBINING ACUTE ACCENT}"]
)
def test_characters_of_several_tokens_are_whole(text):
    tokens = [*text.encode(), 300]
    [found] = pieces(Bytes(), [tokens])
    assert len(found) == len(tokens) and "".join(found) == f"{text}<end>"
    ends = [piece for piece in found if piece]
    assert ends == [*text, "<end>"]


@pytest.mark.parametrize("broken", [b"\xe6\x95", b"a\xe6\x95", b"\xff\xffa", b"\x80" * 40 + b"a"])
def test_bytes_that_are_no_text_have_a_piece_each_or_none(broken):
    [found] = pieces(Bytes(), [[*broken]])
    assert len(found) == len(broken) and "\N{REPLACEMENT CHARACTER}" in "".join(found)
    assert "".join(found).count("a") == broken.count(b"a")


def test_a_space_before_a_word_is_kept():
    assert pieces(Words(), [[1, 2, 3], [4], []]) == [["w1", " w2", " w3"], ["w4"], []]


def test_pieces_of_a_real_tokenizer_are_its_text():
    tokenizer = AutoTokenizer.from_pretrained(LAPTOP / "base")
    tokens = [*tokenizer("2 + 2 = 4 #### 4")["input_ids"], tokenizer.eos_token_id]
    [found] = pieces(tokenizer, [tokens])
    assert len(found) == len(tokens)
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=False)
