"""Evaluate with real SGLang: nearly greedy, it generates the same text as transformers."""

import json

from megatron_prepo.cli import main
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


def test_both_engines_give_the_same_answers(sglang_python, tmp_path):
    words = ["--model", f"base={LAPTOP / 'base'}", "--suite", f"held_out={LAPTOP / 'eval.jsonl'}"]
    for engine in ("embedded", "sglang"):
        out = ["--out", str(tmp_path / engine)]
        more = [f"rollout.engine={engine}", f"servers.python={sglang_python}"]
        assert main(["evaluate", *out, *words, *SETTINGS, *more]) == 0
    pairs = list(zip(texts(tmp_path / "embedded"), texts(tmp_path / "sglang"), strict=True))
    assert len(pairs) == 80
    assert sum(one == other for one, other in pairs) >= 76


def test_both_engines_end_greedy_answers_at_the_same_stops(sglang_python, tmp_path):
    """A stop string and a token; a string of the model's answers, so that most end with it."""
    words = ["--model", f"base={LAPTOP / 'base'}", "--suite", f"held_out={LAPTOP / 'eval.jsonl'}"]
    greedy = ["eval.temperature=0", "eval.samples_per_prompt=1", 'rollout.stop=["= 1", "####"]']
    for engine in ("embedded", "sglang"):
        out = ["--out", str(tmp_path / engine)]
        more = [f"rollout.engine={engine}", f"servers.python={sglang_python}"]
        assert main(["evaluate", *out, *words, *SETTINGS, *greedy, *more]) == 0
    ours, theirs = texts(tmp_path / "embedded"), texts(tmp_path / "sglang")
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 38
    assert sum(text.endswith(("= 1", "####")) for text in theirs) >= 20
    assert not any("####" in text[:-4] for text in theirs)
