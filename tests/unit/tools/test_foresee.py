"""How well Foresight predicts pass rates: a planted signal, and a small run."""

import json

import numpy as np
import pytest
import torch
from rounding import assert_close

from megatron_prepo.records import Prompt
from tests.e2e.laptop import LAPTOP
from tools.data.prompt_perplexity import Scores, scores
from tools.inspect import foresee


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    monkeypatch.setattr(foresee, "SPLITS", 4)


def planted(num=400):
    """Return prompts of which a hidden state alone tells which groups are mixed."""
    generator = np.random.default_rng(0)
    prompts = [Prompt(f"t/{i}", "q", "1", (1, 2, 3), (0, 3)) for i in range(num)]
    hidden_PH = generator.normal(size=(num, 6))
    pass_P = 1 / (1 + np.exp(-3 * hidden_PH[:, 0] + 4))
    passes_P = generator.binomial(8, pass_P).astype(float)
    ppl_P, entropy_P = generator.uniform(2, 9, (2, num))
    return Scores(prompts, ppl_P, entropy_P, hidden_PH), passes_P, np.full(num, 8.0)


def test_a_planted_signal_is_found_by_the_hidden_states_alone():
    scored, passes_P, rollouts_P = planted()
    rows = foresee.predictions(scored, passes_P, rollouts_P)
    assert [row["groups"] for row in rows[:2]] == [64, 128]
    found = {row["foresight_hidden"]: row for row in rows if row["groups"] == 128}
    assert abs(found[0]["correlation"]) < 0.2 < 0.6 < found[32]["correlation"]
    mixed = ((passes_P > 0) & (passes_P < 8)).mean()
    assert found[32]["mixed"] > 1.5 * mixed > 1.2 * found[0]["mixed"]


def test_what_is_asked_is_not_what_was_seen():
    """Prompts 0 to 3 are seen and pass by a feature; those asked, 4 to 7, fail by it."""
    x_PF = np.array([[1.0, -1], [1, -1], [1, 1], [1, 1], [1, 0], [1, -1], [1, 1], [1, 1]])
    passes_P = np.array([0.0, 0, 8, 8, 4, 8, 0, 0])
    correlation, mixed = foresee.prediction(x_PF, passes_P, np.full(8, 8.0), np.arange(8), 4)
    assert correlation < -0.5
    assert mixed == 1.0, "of the four asked, prompt 4 is the likeliest"


def test_it_measures_a_model_of_a_folder(tmp_path, capsys):
    """The hidden states of the base model are those from which its logits are made."""
    completions, out = tmp_path / "completions.jsonl", tmp_path / "foresee.json"
    prompts = (LAPTOP / "eval.jsonl").read_text().splitlines()[:130]
    file = tmp_path / "eval.jsonl"
    file.write_text("\n".join(prompts) + "\n")
    lines = [
        {"prompt": json.loads(line)["id"], "reward": float((i + sample) % 3 == 0)}
        for i, line in enumerate(prompts)
        for sample in range(4)
    ]
    completions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--hf", LAPTOP / "base", "--prompts", file, "--completions", completions]
    assert foresee.main([*map(str, words), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["prompts"] == 130 and result["mixed"] == 1.0
    assert [row["foresight_hidden"] for row in result["rows"]] == [0, 8, 16, 32, 64]
    assert "| foresight_hidden | groups |" in capsys.readouterr().out


def test_too_few_prompts_are_refused(tmp_path, capsys):
    completions, file = tmp_path / "completions.jsonl", tmp_path / "eval.jsonl"
    file.write_text((LAPTOP / "eval.jsonl").read_text().partition("\n")[0] + "\n")
    completions.write_text(json.dumps({"prompt": "eval-0000", "reward": 1.0}) + "\n")
    words = ["--hf", LAPTOP / "base", "--prompts", file, "--completions", completions]
    with pytest.raises(SystemExit) as ended:
        foresee.main([*map(str, words), "--out", str(tmp_path / "out.json")])
    assert ended.value.code == 2 and "give at least 128" in capsys.readouterr().err


def test_hidden_states_are_those_from_which_the_prompts_tokens_are_predicted(tmp_path):
    """After the final norm, and without the last token's, as the actor's are."""
    from transformers import AutoModelForCausalLM

    file = tmp_path / "prompt.jsonl"
    file.write_text((LAPTOP / "eval.jsonl").read_text().partition("\n")[0] + "\n")
    scored = scores(str(LAPTOP / "base"), [file])[str(file)]
    model = AutoModelForCausalLM.from_pretrained(LAPTOP / "base").eval()
    with torch.no_grad():
        states_TH = model.model(torch.tensor([scored.prompts[0].tokens])).last_hidden_state[0]
    assert_close(torch.from_numpy(scored.hidden_PH[0]), states_TH[:-1].double().mean(dim=0))
