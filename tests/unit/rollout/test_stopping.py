"""Where a completion ends: the model's stop tokens, named ones, and stop strings; both engines."""

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from rounding import approx
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_prepo.config import RolloutConfig
from megatron_prepo.errors import UserError
from megatron_prepo.inputs.preflight import check_stop_tokens
from megatron_prepo.records import Prompt
from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.sglang.completion import CompletionJob, Sampling
from megatron_prepo.rollout.stopping import Stops, named_tokens, stop_tokens, unused_end_token
from megatron_prepo.rollout.transformers_engine import EmbeddedEngine

TOKENIZER = SimpleNamespace(eos_token_id=7)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [4, 5]}, {"eos_token_id": 3}, {4, 5}),
        ({"eos_token_id": 4}, {}, {4}),
        ({"temperature": 0.6}, {"eos_token_id": [3, 6]}, {3, 6}),
        (None, {"eos_token_id": [3, 6]}, {3, 6}),
        (None, {"eos_token_id": 3}, {3}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {7}),
        (None, {}, {7}),
    ],
)
def test_stop_tokens_are_the_generations_else_the_models_else_the_tokenizers(
    tmp_path, generation, config, expected
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, TOKENIZER) == expected


@pytest.mark.parametrize("ids", [[], [[]], ["2"], "2", -1, [2, -1], 1.5, True, {}, {"a": 1}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_would_never_stop_a_completion_is_refused(tmp_path, file, ids):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match=f"{file}: eos_token_id=.* names no token"):
        stop_tokens(tmp_path, TOKENIZER)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_a_generation_config_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"generation_config.json is not") as caught:
        stop_tokens(tmp_path, TOKENIZER)
    assert len(str(caught.value).splitlines()) == 1


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_tokenizer(*more):
    """Return a tokenizer with a token per byte, numbered by it, then `</s>`, then `more`."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, "</s>", *more])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def stops(*texts, tokens=(256,)):
    return Stops(frozenset(tokens), texts, byte_tokenizer("ab\n\nQ", "\n\n"))


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("ab\n\ncd", 4),
        ("ab\ncd\n", None),
        ("\n\n\n", 2),
        ("an END here", 6),  # the string that is complete first
        ("aé\n\n", 5),
        ("日本語のあとに\n\n", 7 * 3 + 2),
        ("ENDE。", 3),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(text, length):
    """A token per byte, so that characters are cut."""
    assert stops("\n\n", "END").length(list(text.encode())) == length


@pytest.mark.parametrize("text", ["。", "はい。", "é。", "abc。"])
def test_a_stop_string_of_several_bytes_is_complete_with_its_last(text):
    assert stops("。").length(list(f"{text}more".encode())) == len(text.encode())


def test_a_token_may_go_on_after_a_stop_string():
    """Tokens are not cut: the policy chose all of it."""
    assert stops("b\n").length([97, 257, 98, 98]) == 2


def test_no_window_is_too_short():
    """Whatever stands before, the last tokens tell what all of them do."""
    generator = torch.Generator().manual_seed(0)
    of = stops("\n\n", "aé。")
    for _ in range(50):
        pieces = ["\n", "a", "é", "。", "日", "xy", "aé"]
        chosen = torch.randint(0, len(pieces), (30,), generator=generator).tolist()
        tokens = list("".join(pieces[i] for i in chosen).encode())
        decoded = (of.tokenizer.decode(tokens[:n]) for n in range(1, len(tokens) + 1))
        ends = (n for n, t in enumerate(decoded, 1) if any(stop in t for stop in of.texts))
        assert of.length(tokens) == next(ends, None)


def test_without_stop_strings_only_tokens_count():
    assert Stops(frozenset([2, 5])).length([1, 3, 5, 2]) == 3


def test_tokens_are_named_by_text_or_number():
    tokenizer = byte_tokenizer("<|turn|>")
    assert named_tokens(["<|turn|>", "10", "</s>"], tokenizer) == {257, 10, 256}
    for name in ("<turn>", "258", "\n"):
        with pytest.raises(UserError, match=r"rollout\.stop_tokens: the tokenizer has no token"):
            named_tokens([name], tokenizer)


def test_an_end_token_that_ends_nothing_is_named_with_the_remedy():
    tokenizer = byte_tokenizer("<|turn|>")
    assert unused_end_token(frozenset([256]), tokenizer) is None
    warning, remedy = unused_end_token(frozenset([257]), tokenizer)
    assert "'</s>' (256)" in warning and "rollout.stop_tokens=[256]" in remedy


def test_sglang_would_obey_the_tokenizers_end_token_with_stop_strings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 257}))
    arguments = str(tmp_path), {"vocab_size": 300}, byte_tokenizer("<|turn|>")

    def check(**settings):
        return check_stop_tokens(*arguments, RolloutConfig(max_new_tokens=4, **settings))

    assert check(stop=("x",)) == check(engine="sglang") == {257}
    with pytest.raises(UserError, match=r"add it: rollout\.stop_tokens=\[256\]"):
        check(stop=("x",), engine="sglang")
    assert check(stop=("x",), engine="sglang", stop_tokens=("256",)) == {256, 257}


@pytest.mark.parametrize("stop", [("",), ("x",) * 33])
def test_stop_strings_that_sglang_would_refuse_are_an_error(stop):
    with pytest.raises(ValueError, match=r"rollout\.stop="):
        RolloutConfig(max_new_tokens=4, stop=stop)


# The engines

PROMPTS = [Prompt(f"p{i}", "", "", (70 + i, 80, 90), (0, 0)) for i in range(4)]


def rollouts(directory, of, batch_size=64):
    """Generate with the embedded engine."""
    model = tiny_models.qwen2()
    engine = EmbeddedEngine(
        tiny_models.save(model, directory),
        of.tokenizer,
        stops=of,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_size=batch_size,
    )
    engine.load_weights([list(load_file(directory / "model.safetensors").items())], 1)
    request = Request(
        prompts=PROMPTS, samples_per_prompt=4, temperature=1.0, max_new_tokens=24, seed="s"
    )
    return engine.generate(request)


def test_the_embedded_engine_cuts_a_completion_where_it_ends_and_changes_nothing_before(tmp_path):
    """A character per token; stop strings of one and two characters that its completions have."""
    letters = SimpleNamespace(decode=lambda tokens, **_: "".join(chr(0x100 + t) for t in tokens))
    plain = rollouts(tmp_path, Stops(frozenset([256]), (), letters))
    texts = tuple(letters.decode(r.tokens[3 : 3 + n]) for n in (1, 2) for r in plain[n:12:3])
    of = Stops(frozenset([256]), texts, letters)
    cut = []
    for before, after in zip(plain, rollouts(tmp_path, of), strict=True):
        length = of.length(before.tokens) or len(before.tokens)
        assert after.tokens == before.tokens[:length]
        assert list(after.engine_logprobs) == approx(
            list(before.engine_logprobs[:length]), 1000, dtype=torch.float32, scale=1.0
        )
        assert after.finished == (of.length(before.tokens) is not None)
        cut.append(length < len(before.tokens))
    assert 3 < sum(cut) < len(cut), "some are to end earlier, and some not"


def answer(tokens, finish):
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish},
            "weight_version": "run.3",
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "prompt_tokens": 3,
        },
    }


def test_sglang_is_asked_for_the_same_stops():
    job = CompletionJob(0, PROMPTS[0], "seed")
    of = stops("\n\n", tokens=(256, 10))
    params = Sampling(1.0, 8, of, "run.3", 300).request(job, "r")["sampling_params"]
    assert (params["stop"], params["no_stop_trim"]) == (("\n\n",), True)
    assert params["stop_token_ids"] == [10, 256]
    plain = Sampling(1.0, 8, stops(), "run.3", 300).request(job, "r")["sampling_params"]
    assert not {"stop", "no_stop_trim"} & plain.keys()


@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        ("ab\n\n", "stop", ("ab\n\n", "stop")),
        ("ab\n\ncdef", "length", ("ab\n\n", "stop")),  # SGLang missed it
        ("ab\n\ncde", "stop", ("ab\n\n", "stop")),
        ("abcdefgh", "length", ("abcdefgh", "length")),
    ],
)
def test_sglangs_completion_ends_where_the_embedded_engines_would(text, finish, kept):
    job, sampling = CompletionJob(0, PROMPTS[0], ""), Sampling(1.0, 8, stops("\n\n"), "run.3", 300)
    read = sampling.read(answer(list(text.encode()), finish), job, cut=False, server="it")
    assert (bytes(read.tokens).decode(), read.finish) == kept
    assert len(read.logprobs) == len(read.tokens)
