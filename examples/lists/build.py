"""Rebuild all files of the lists experiment, from one seed, on one CPU thread.

python examples/lists/build.py                    # the prompts and the base model
python examples/lists/build.py --measure          # print the pass rates of the base model
python examples/lists/build.py --fresh --out DIR  # DIR/train.jsonl: 12 800 new prompts
python examples/lists/build.py --scarce --out DIR  # DIR/train.jsonl: most too hard
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lists import list_pipelines
from tiny_base import Task, main

TASK = Task(
    folder=Path(__file__).parent,
    seed=0,
    draw_for_corpus=list_pipelines.draw_for_corpus,
    draw_for_pool=list_pipelines.draw_for_pool,
    draw_beyond=list_pipelines.draw_beyond,
    words=list_pipelines.words(),
    max_new_tokens=60,
    hidden_size=64,
    intermediate_size=192,
    num_steps=6500,
    measured_by=("length", "steps"),
    direct_share=0.4,
)

if __name__ == "__main__":
    main(TASK, __doc__)
