"""Which prompts are rolled out: one file a method, all with the same verbs.

A selector has

- `needs_perplexity`: whether the candidates are scored for it,
- `choose(ppl_P, step)`: before the rollouts: indices of the K selected candidates, and the first
  position of the perplexity window if there is one; pure, the same on every rank,
- `observe(prompts, rewards_KG)`: after them,
- `state_dict()` and `load_state_dict(state)`.
"""

from megatron_prepo.selection.prepo import PerplexityWindow
from megatron_prepo.selection.random import RandomChoice

METHODS = {"prepo": PerplexityWindow, "random": RandomChoice}
