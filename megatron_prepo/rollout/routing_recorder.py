"""What the routers of a `transformers` model choose while it generates.

B completions, of which R are in the running batch; S tokens, L layers, k experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ChosenExperts:
    """Those of a batch of completions, forward pass by forward pass."""

    def __init__(self, model):
        self.routers = [layer.mlp.gate for layer in model.model.layers]
        self._last: list[torch.Tensor] = []
        """[R * S, k] of each layer, of the last forward pass."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, the model's forward passes are heard of."""
        hooks = [router.register_forward_hook(self._hear) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self, num_rows: int) -> torch.Tensor:
        """`experts_RSLk` of the last forward pass, of so many rows."""
        last, self._last = self._last, []
        return torch.stack(last, dim=1).unflatten(0, (num_rows, -1))

    def _hear(self, router, inputs, outputs) -> None:
        _, _, experts_Tk = outputs
        self._last.append(experts_Tk)
