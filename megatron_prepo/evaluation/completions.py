"""The completions of a suite in a file, from which an interrupted evaluation resumes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prepo.files.atomic import flush, naming, write_text
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade

Record = dict[str, Any]
"""One completion, as a line of the file holds it."""


def completion(rollout: Rollout, grade: Grade) -> Record:
    """Return a graded completion: text, number of tokens, whether it ended with a stop token."""
    return {
        "reward": grade.reward,
        "graded": grade.outcome,
        "tokens": len(rollout.tokens),
        "finished": rollout.finished,
        "text": rollout.text,
        **({"metrics": grade.metrics} if grade.metrics else {}),
    }


class Completions:
    """A suite's completions in a file, which has all samples of a prompt or none."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], samples: int) -> None:
        self.path, self.prompts, self.samples = path, prompts, samples
        path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, list[Record]] = {}
        for record in _complete_lines(path):
            found.setdefault(record["prompt"], []).append(record)
        known = {prompt.id for prompt in prompts}
        self.by_prompt = {
            prompt: records
            for prompt, records in found.items()
            if prompt in known and len(records) == samples
        }
        if path.exists():
            # drops prompts that an interruption left with some of their samples
            lines = (_line(record) for records in self.by_prompt.values() for record in records)
            write_text(path, "".join(lines))

    def missing(self) -> list[Prompt]:
        """Return the prompts without completions."""
        return [prompt for prompt in self.prompts if prompt.id not in self.by_prompt]

    def append(self, rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """Append all samples of some prompts; they are on disk when this returns."""
        records: list[Record] = [
            {
                "prompt": rollout.prompt.id,
                "sample": i % self.samples,
                **completion(rollout, grade),
            }
            for i, (rollout, grade) in enumerate(zip(rollouts, grades, strict=True))
        ]
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(_line, records))
        flush(self.path)
        for record in records:
            self.by_prompt.setdefault(record["prompt"], []).append(record)

    def records(self) -> list[list[Record]]:
        """Return the samples of each prompt."""
        return [self.by_prompt[prompt.id] for prompt in self.prompts]

    def passed_P(self, pass_reward: float) -> list[int]:
        """Return the number of samples of each prompt that pass."""
        return [sum(r["reward"] >= pass_reward for r in samples) for samples in self.records()]

    def avg_P(self, pass_reward: float) -> list[float]:
        """Return avg@k of each prompt."""
        return [passed / self.samples for passed in self.passed_P(pass_reward)]


def _complete_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a file up to the first that is cut off."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _line(record: Record) -> str:
    # not as UTF-8: a completion may hold half a surrogate pair
    return json.dumps(record, ensure_ascii=True) + "\n"
