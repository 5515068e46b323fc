"""Evaluate with real SGLang: nearly greedy, it generates the same text as transformers."""

import json

import pytest

from megatron_prepo.cli import main
from megatron_prepo.rollout.sglang.launch import OwnServer
from tests.e2e.laptop import LAPTOP

SETTINGS = [
    "rollout.max_new_tokens=52",
    "model.dtype=float32",
    "data.max_prompt_tokens=96",
    "eval.samples_per_prompt=2",
    "eval.max_prompts=40",
    "eval.temperature=0.01",
]


def texts(out) -> list[str]:
    lines = (out / "completions" / "base" / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def servers(sglang_python):
    """Return settings of servers: the first evaluation starts one, which the next one uses.

    With stop strings, as the first test has them, a server has a tokenizer, which no other needs.
    """
    stopped: list[OwnServer] = []

    def settings() -> str:
        return f"servers.urls=[{stopped[0].url}]" if stopped else f"servers.python={sglang_python}"

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OwnServer, "stop", lambda server: stopped.append(server))
            yield settings
        assert [server.ended() for server in stopped] == [None], "one is started, and told to stop"
    finally:
        for server in stopped:
            server.stop()


def by_both_engines(servers, directory, *settings: str) -> tuple[list[str], list[str]]:
    """Return the answers of the embedded engine and of SGLang."""
    words = ["--model", f"base={LAPTOP / 'base'}", "--suite", f"held_out={LAPTOP / 'eval.jsonl'}"]
    for engine, more in (("embedded", []), ("sglang", [servers()])):
        out = ["--out", str(directory / engine), f"rollout.engine={engine}"]
        assert main(["evaluate", *out, *words, *SETTINGS, *settings, *more]) == 0
    return texts(directory / "embedded"), texts(directory / "sglang")


def test_both_engines_end_greedy_answers_at_the_same_stops(servers, tmp_path):
    """A stop string and a token; a string of the model's answers, so that most end with it."""
    greedy = ["eval.temperature=0", "eval.samples_per_prompt=1", 'rollout.stop=["= 1", "####"]']
    ours, theirs = by_both_engines(servers, tmp_path, *greedy)
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 38
    assert sum(text.endswith(("= 1", "####")) for text in theirs) >= 20
    assert not any("####" in text[:-4] for text in theirs)


def test_both_engines_give_the_same_answers(servers, tmp_path):
    ours, theirs = by_both_engines(servers, tmp_path)
    assert len(ours) == 80
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 76
