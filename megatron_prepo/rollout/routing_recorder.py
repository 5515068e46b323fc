"""Recording of the experts that a `transformers` model chooses while it generates.

B completions, of which R are in the running batch; S tokens, L layers, k experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ChosenExperts:
    """Recorder of the experts chosen for a batch of completions in its last forward pass."""

    def __init__(self, model: Any) -> None:
        self.routers = [layer.mlp.gate for layer in model.model.layers]
        self._last: list[torch.Tensor] = []
        """Experts [R * S, k] per layer in the last forward pass."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the model's forward passes within this context."""
        hooks = [router.register_forward_hook(self._hear) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self, num_rows: int) -> torch.Tensor:
        """Return `experts_RSLk` of the last forward pass, for this number of rows."""
        last, self._last = self._last, []
        return torch.stack(last, dim=1).unflatten(0, (num_rows, -1))

    def _hear(self, router: torch.nn.Module, inputs: object, outputs: tuple[Any, ...]) -> None:
        _, _, experts_Tk = outputs
        self._last.append(experts_Tk)
