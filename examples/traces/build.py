"""Rebuild all files of the traces experiment, from one seed, on one CPU thread.

python examples/traces/build.py                    # the prompts and the base model
python examples/traces/build.py --measure          # print the pass rates of the base model
python examples/traces/build.py --fresh --out DIR  # DIR/train.jsonl: 12 800 new prompts
python examples/traces/build.py --scarce --out DIR  # DIR/train.jsonl: most too hard
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_base import Task, main
from traces import register_programs

TASK = Task(
    folder=Path(__file__).parent,
    seed=0,
    draw_for_corpus=register_programs.draw_for_corpus,
    draw_for_pool=register_programs.draw_for_pool,
    draw_beyond=register_programs.draw_beyond,
    words=register_programs.words(),
    max_new_tokens=96,
    hidden_size=64,
    intermediate_size=192,
    num_steps=4000,
    measured_by=("modulus", "body", "executed"),
    direct_share=0.2,
)

if __name__ == "__main__":
    main(TASK, __doc__)
