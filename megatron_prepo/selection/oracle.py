"""Upper bound, not a method: roll out every candidate to measure which are neither easy nor hard.

Selects the K candidates whose pass rate, measured on G probe rollouts per candidate, is nearest to
`selection.target_pass_rate`.  The probes are counted in the ledger; a comparison that shows the
value of knowing the pass rates excludes them, and states so.
"""

from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection.base import Candidates, Selector


class Oracle(Selector):
    """Selection by measured pass rates."""

    needs_scores = True
    needs_pass_rates = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.target = config.num_selected, config.target_pass_rate

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, nearest first; ties keep their order."""
        assert candidates.pass_rate_P is not None, "needs_pass_rates"
        distance_P = (candidates.pass_rate_P - self.target).abs()
        nearest: list[int] = distance_P.argsort(stable=True)[: self.num_selected].tolist()
        return nearest
