"""A model of `transformers` in float64: what its own computation in float32 errs by.

    with computing_in_float64(model):
        exact_SV = model(tokens_1S).logits[0]

The embedding, each layer, the last norm and the head are cast when they are called, and back, which
is exact.  So the memory is that of the model as it is, and of one of its layers in float64: a model
that fits in float32 fits.  Norms and rotary angles stay float32 inside, as `transformers` has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def computing_in_float64(model: Any) -> Iterator[None]:
    """Let a causal language model of `transformers` compute in float64; its weights stay."""
    parts = [model.get_input_embeddings(), *model.model.layers, model.model.norm]
    parts.append(model.get_output_embeddings())
    stored = {part: next(part.parameters()).dtype for part in parts}

    def widen(part: torch.nn.Module, _: object) -> None:
        part.double()

    def narrow(part: torch.nn.Module, *_: object) -> None:
        part.to(stored[part])

    hooks = [part.register_forward_pre_hook(widen) for part in parts]
    hooks += [part.register_forward_hook(narrow) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in parts:  # one that was left by an error
            narrow(part)
