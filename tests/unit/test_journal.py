"""What was paid for is found again, bit for bit, and only as the batch that it was."""

import pytest

from megatron_prepo.journal import Journal
from megatron_prepo.records import Prompt, Rollout

PROMPTS = [Prompt(name, "how many ?", "1", (3, 4), (0, 2)) for name in ("a", "b")]


def rollouts(version: int = 5) -> list[Rollout]:
    return [
        Rollout(
            prompt=prompt,
            tokens=(7, 8 + sample),
            engine_logprobs=(-0.1, -1 / 3),
            text="caf\u00e9 \ud800\n",
            finished=sample == 0,
            weight_version=version,
            aborted=sample == 1,
            routing=bytes([250, sample, 10]) if version == 6 else None,
        )
        for prompt in PROMPTS
        for sample in range(2)
    ]


def journal(directory, **options) -> Journal:
    return Journal(directory, True, share=lambda value: value, **options)


def test_a_batch_is_found_once_and_as_it_was(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS) == rollouts()
    assert again.find("rollouts/3", 5, PROMPTS) is None


@pytest.mark.parametrize(
    ("purpose", "version", "prompts"),
    [
        ("rollouts/4", 5, PROMPTS),
        ("probes/3", 5, PROMPTS),
        ("rollouts/3", 6, PROMPTS),
        ("rollouts/3", 5, PROMPTS[::-1]),
        ("rollouts/3", 5, PROMPTS[:1]),
    ],
)
def test_another_batch_is_not_taken(tmp_path, purpose, version, prompts):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    assert journal(tmp_path / "j").find(purpose, version, prompts) is None


def test_a_batch_with_routings_is_found_as_it_was(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts(version=6))
    found = journal(tmp_path / "j").find("rollouts/3", 6, PROMPTS)
    assert found == rollouts(version=6) and found[1].routing == b"\xfa\x01\n"


def test_rounds_of_a_step_are_told_apart(tmp_path):
    first = journal(tmp_path / "j")
    first.add("rollouts/3", rollouts()[:2])
    first.add("rollouts/3", rollouts()[2:])
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS[1:]) == rollouts()[2:]
    assert again.find("rollouts/3", 5, PROMPTS[:1]) == rollouts()[:2]


@pytest.mark.parametrize("lost", [1, 10, 200])
def test_a_torn_last_line_is_no_batch(tmp_path, lost):
    first = journal(tmp_path / "j")
    first.add("rollouts/3", rollouts()[:2])
    first.add("rollouts/3", rollouts()[2:])
    file = tmp_path / "j" / "rollouts_3.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    again = journal(tmp_path / "j")
    assert again.find("rollouts/3", 5, PROMPTS[1:]) is None
    assert again.find("rollouts/3", 5, PROMPTS[:1]) == rollouts()[:2]
    again.add("rollouts/3", rollouts()[2:])
    assert journal(tmp_path / "j").find("rollouts/3", 5, PROMPTS[1:]) == rollouts()[2:]


def test_what_checkpoints_cover_is_forgotten(tmp_path):
    first = journal(tmp_path / "j")
    for step in (8, 9, 10, 11):
        first.add(f"rollouts/{step}", rollouts())
    first.forget(before=10)
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == [
        "rollouts_10.jsonl",
        "rollouts_11.jsonl",
    ]
    first.close()
    assert not (tmp_path / "j").exists()


def test_ranks_that_do_not_write_hear_of_it(tmp_path):
    journal(tmp_path / "j").add("rollouts/3", rollouts())
    lines = []
    Journal(tmp_path / "j", True, share=lambda value: lines.append(value) or value)
    other = Journal(tmp_path / "elsewhere", False, share=lambda value: lines[0])
    assert other.find("rollouts/3", 5, PROMPTS) == rollouts()
    other.add("rollouts/4", rollouts())
    other.forget(before=99)
    assert not (tmp_path / "elsewhere").exists() and list((tmp_path / "j").iterdir())
