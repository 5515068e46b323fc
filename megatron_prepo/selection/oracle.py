"""An upper bound, not a method: rolls out every candidate to see which are neither easy nor hard.

Takes the K candidates whose pass rate, measured on G probe rollouts each, is nearest to
`selection.target_pass_rate`.  The probes are paid for and in the ledger; a comparison that shows
what knowing the pass rates would be worth leaves them out, and says so.
"""

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates, Selector


class Oracle(Selector):
    """Knows the pass rates."""

    needs_scores = True
    needs_pass_rates = True

    def __init__(self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float):
        self.num_selected, self.target = config.num_selected, config.target_pass_rate

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Positions of the K candidates, nearest first; ties keep their order."""
        distance_P = (candidates.pass_rate_P - self.target).abs()
        return distance_P.argsort(stable=True)[: self.num_selected].tolist()
