"""Stand-in for SGLang's kernel package on a CPU: names to import, and one hash function.

It must not define `convert_weight_packed`: SGLang then assumes a CPU with AMX.
"""

from collections.abc import Callable
from typing import NoReturn

import torch

_MASK = 0xFFFFFFFF


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

    return missing


def murmur_hash32(
    seed_N: torch.Tensor, positions_N: torch.Tensor, columns_M: torch.Tensor
) -> torch.Tensor:
    """Return MurmurHash3 (x86, 32 bit) of 16 bytes as uint32 [N, M].

    The bytes are seed low, seed high, position and column.  Integers of 64 bits hold the 32-bit
    words, and are cut to 32 bits after each operation.
    """
    seed_N1 = seed_N.view(torch.int64)[:, None]
    hash_NM = torch.zeros(len(seed_N), len(columns_M), dtype=torch.int64)
    words = (
        seed_N1 & _MASK,
        (seed_N1 >> 32) & _MASK,
        positions_N.long()[:, None] & _MASK,
        columns_M.long()[None, :] & _MASK,
    )
    for word in words:
        word = (word * 0xCC9E2D51) & _MASK
        word = (_rotated(word, 15) * 0x1B873593) & _MASK
        hash_NM = (_rotated(hash_NM ^ word, 13) * 5 + 0xE6546B64) & _MASK
    hash_NM = hash_NM ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hash_NM = ((hash_NM ^ (hash_NM >> shift)) * factor) & _MASK
    return (hash_NM ^ (hash_NM >> 16)).to(torch.uint32)


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _MASK


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
