"""Format of a rollout's routing: the experts that the engine's routers chose for each token.

A sequence of T + 1 tokens has `experts_TLk`: for T tokens and L layers, the numbers of the k chosen
experts, in their order.  The last token is only a target, and is not routed.  Records store the
numbers as bytes, one per number (two from 257 experts on), which can be compared, pickled and
split at any token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prepo.models.hf_config import num_experts


@dataclass(frozen=True)
class RoutingFormat:
    """Sizes that determine the format of a model's routing."""

    layers: int
    """Number of layers; in the supported families, all of them have experts."""
    experts_per_token: int
    experts: int

    @staticmethod
    def of(hf: dict[str, Any]) -> "RoutingFormat":
        """Return the format for a Hugging Face configuration with experts."""
        assert num_experts(hf), "a model without experts has no routing"
        return RoutingFormat(hf["num_hidden_layers"], hf["num_experts_per_tok"], num_experts(hf))

    def pack(self, experts_TLk: np.ndarray) -> bytes:
        r"""Return the bytes.

        Raises ValueError unless each token has k different, existing experts in each layer.

        >>> RoutingFormat(1, 2, experts=8).pack(np.array([[[5, 1]], [[0, 7]]]))
        b'\x05\x01\x00\x07'
        """
        if experts_TLk.shape[1:] != (self.layers, self.experts_per_token):
            raise ValueError(
                f"experts of shape {experts_TLk.shape}, not [tokens, {self.layers} layers, "
                f"{self.experts_per_token} per token]"
            )
        if experts_TLk.size and not 0 <= experts_TLk.min() <= experts_TLk.max() < self.experts:
            raise ValueError(
                f"experts {experts_TLk.min()} to {experts_TLk.max()} of {self.experts}"
            )
        packed_TLk = experts_TLk.astype(self._dtype)
        sorted_TLk = np.sort(packed_TLk, axis=-1)
        if (sorted_TLk[..., 1:] == sorted_TLk[..., :-1]).any():
            raise ValueError("a token is routed to one expert twice")
        return packed_TLk.tobytes()

    def unpack(self, routing: bytes) -> np.ndarray:
        """Return `experts_TLk`, int16."""
        shape = (-1, self.layers, self.experts_per_token)
        experts_TLk: np.ndarray = np.frombuffer(routing, self._dtype).reshape(shape)
        return experts_TLk.astype(np.int16)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.experts <= 256 else "<i2")
