"""PREPO's selection: the window of its perplexity schedule (`prepo/ppl_schedule.py`)."""

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.ppl_schedule import PACINGS, progress, select_window, window_start
from megatron_prepo.selection.base import Candidates, Selector


class PerplexityWindow(Selector):
    """A window of K candidates that slides from low to high perplexity."""

    needs_scores = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected = config.num_selected
        self.rho_max = config.rho_max
        self.horizon = config.horizon or total_steps
        self.pacing = PACINGS[config.pacing]
        self.descends = config.direction == "high-to-low"
        self.first = 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K selected candidates, lowest perplexity first."""
        room = len(candidates.prompts) - self.num_selected
        rho = progress(step, self.horizon, self.rho_max)
        self.first = window_start(self.pacing(rho), len(candidates.prompts), self.num_selected)
        if self.descends:
            self.first = room - self.first
        return select_window(candidates.ppl_P, self.first, self.num_selected)

    def metrics(self) -> dict[str, float]:
        """Return the ends of the window, as positions in the ascending order."""
        return {
            "selection/window_first": self.first,
            "selection/window_last": self.first + self.num_selected - 1,
        }
