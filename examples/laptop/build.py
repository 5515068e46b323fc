"""Rebuild all files of the laptop experiment, from one seed, on one CPU thread.

    python examples/laptop/build.py                    # the prompts and the base model
    python examples/laptop/build.py --measure          # print the pass rates of the base model
    python examples/laptop/build.py --fresh --out DIR  # DIR/train.jsonl: 12 800 new prompts
    python examples/laptop/build.py --scarce --out DIR  # DIR/train.jsonl: most too hard

Building takes about 105 CPU-seconds, measuring about 20, fresh prompts a few. Written to ``--out``:

    train.jsonl   prompts for reinforcement learning
    eval.jsonl    held-out prompts, disjoint from train.jsonl
    base/         a Hugging Face directory: Qwen3 with 228 192 parameters after supervised training

No prompt of the two files is in the base model's training text. The same seed gives the same files
on one machine; another machine may round the weights differently.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from laptop import story_sums
from tiny_base import Task, main

TASK = Task(
    folder=Path(__file__).parent,
    seed=3,
    draw_for_corpus=story_sums.draw_for_corpus,
    draw_for_pool=story_sums.draw_for_pool,
    draw_beyond=story_sums.draw_beyond,
    words=story_sums.words(),
    max_new_tokens=52,  # the longest worked answer of the pool has about 40 tokens
    hidden_size=96,
    intermediate_size=256,
    num_steps=2600,
    measured_by=("steps", "magnitude"),
)

if __name__ == "__main__":
    main(TASK, __doc__)
