"""Shared code of the tiny tasks of this folder: problems, sampling of problems, and tokenizer."""

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ANSWER_MARK = "####"


@dataclass(frozen=True)
class Problem:
    """One problem with its working; tasks add further fields that determine difficulty."""

    prompt: str
    working: str
    """Steps that lead to the answer, without the answer mark."""
    answer: int

    @property
    def worked_answer(self) -> str:
        return f"{self.working} {self.direct_answer}"

    @property
    def direct_answer(self) -> str:
        return f"{ANSWER_MARK} {self.answer}"


Draw = Callable[[random.Random], Problem]


def draw_unique(
    draw: Draw, rng: random.Random, count: int, held_back: Collection[str] = ()
) -> list[Problem]:
    """Draw ``count`` problems with different prompts, none of them in ``held_back``."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw(rng)
        if problem.prompt not in held_back:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def draw_training_text(
    draw: Draw, rng: random.Random, direct_share: float, held_back: Collection[str] = ()
) -> tuple[str, str]:
    """Draw a prompt that is not in ``held_back``, with its answer: direct by ``direct_share``."""
    problem = draw(rng)
    while problem.prompt in held_back:
        problem = draw(rng)
    answers_directly = rng.random() < direct_share
    return problem.prompt, problem.direct_answer if answers_directly else problem.worked_answer


def zipf(count: int, exponent: float) -> tuple[float, ...]:
    """Return weights 1, 2**-a, 3**-a, ... of ``count`` items."""
    return tuple(rank**-exponent for rank in range(1, count + 1))


def is_correct(response: str, answer: str) -> bool:
    """Return whether a response, decoded with its special tokens, ends in the correct answer.

    There must be an ``<eos>``, exactly one answer mark before it, and after the mark nothing but
    the digits of the answer: ``is_correct("9 + 4 = 1 3 #### 1 3 <eos>", "13")`` is true.
    """
    text, eos, _ = response.partition(EOS)
    _, *after_mark = text.split(ANSWER_MARK)
    return bool(eos) and len(after_mark) == 1 and "".join(after_mark[0].split()) == answer


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer with single digits: ``"has 13 pens"`` -> ``<bos> has 1 3 pens``.

    ``<bos>`` is added at the start, ``<eos>`` is not added. There is no unknown token: a word that
    is neither in ``words`` nor a digit raises, because a silent replacement could turn a wrong
    answer into a correct one.
    """
    vocabulary = [PAD, BOS, EOS, *sorted({*words, *"0123456789", ANSWER_MARK})]
    ids = {word: token_id for token_id, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
