"""A product whose epilogue computes the statistics of its rows, so that logits are never stored.

A candidate for the head's forward (docs/head_benchmark.md): it is measured by `head.py`, and no run
uses it.  In place of a product and `lm_head_triton.row_statistics`, which writes and reads 4 bytes
per token and word, a program computes a tile of logits after another for the same tokens and
condenses each, with an online maximum, while it is in registers.

The columns of a rank are split into parts, each condensed by another program to the four numbers
per token that `lm_head_torch.row_statistics` returns; `lm_head` combines parts, slabs and ranks
alike.  Inputs are loaded by TMA descriptors, which fill what is outside a tensor with zeros; a row
is a multiple of 16 bytes.

Letters: R tokens, H hidden, V columns of this rank, P parts of the columns.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_prepo.actor import lm_head

GROUP = 32
"""Tiles of tokens that are computed at a time: their hidden states, 29 MB for Qwen2.5-7B, stay in
the L2 cache while all words pass, so that the weight is read from memory once per 4,096 tokens."""
MOST_PARTS = 64
"""Largest number of parts: each has 16 bytes per token in memory."""


class Tile(NamedTuple):
    """Size of a tile of logits, and of the program that computes it."""

    tokens: int
    words: int
    width: int
    """Numbers of the hidden state that are multiplied at a time."""
    warps: int
    stages: int
    """Number of loads in flight."""
    programs: int
    """Programs that fit one multiprocessor, by registers and shared memory."""
    one_loop: bool = True
    """Whether the loops over tiles and over the width are one for the compiler, so that a tile's
    first inputs are loaded during the epilogue of the tile before."""

    def __str__(self) -> str:
        return f"{self.tokens} x {self.words}"


TILES = {
    9: (Tile(128, 256, 64, 8, 4, 1), Tile(128, 128, 64, 4, 3, 2)),
    10: (Tile(128, 256, 64, 8, 4, 1, one_loop=False), Tile(128, 128, 64, 4, 3, 2)),
}
"""By a GPU's major capability: the largest tile, which reads its inputs least often, and one of
which two fit a multiprocessor, where one multiplies while the other is in its epilogue.  On
Blackwell the large one in one loop does not fit the registers."""


@torch.no_grad()
def logprobs_and_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    tile: Tile,
    multiprocessors: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `lm_head.vocab_parallel_logprobs_and_entropy` does, without a gradient."""
    head = lm_head._Head.of(weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens=1)
    stats_P4R = product_statistics(
        hidden_TH.index_select(0, head.rows_R),
        weight_VH[: head.columns],
        head.target_R,
        head.temperature,
        tile=tile,
        parts=fewest_waves(tile, len(head.rows_R), head.columns, multiprocessors),
    )
    stats_4R = lm_head._combine(stats_P4R)
    _, entropy_R, logprobs_R = lm_head._merge(lm_head._gather(stats_4R, group))
    values = (logprobs_R, entropy_R)
    zeros_T = logprobs_R.new_zeros(targets_T.shape)
    logprobs_T, entropy_T = (zeros_T.index_copy(0, head.rows_R, value_R) for value_R in values)
    return logprobs_T, entropy_T


def product_statistics(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    tile: Tile,
    parts: int,
) -> torch.Tensor:
    """Return statistics [P, 4, R] of hidden @ weight.T / temperature, by parts of the columns.

    They are those of `row_statistics` for the columns of a part; P is at most `parts`.  A target
    that is in no part, being another rank's, gives -inf.
    """
    (num_rows, width), num_columns = hidden_RH.shape, len(weight_VH)
    tiles = math.ceil(math.ceil(num_columns / tile.words) / parts)
    parts = max(1, math.ceil(num_columns / max(1, tiles * tile.words)))
    stats_P4R = hidden_RH.new_zeros(parts, 4, num_rows, dtype=torch.float32)
    if num_rows == 0 or num_columns == 0:
        stats_P4R[:, [0, 3]] = -torch.inf
        return stats_P4R
    tiles_R = math.ceil(num_rows / tile.tokens)
    group = min(GROUP, tiles_R)
    _product_statistics[(group, parts, math.ceil(tiles_R / group))](
        TensorDescriptor.from_tensor(hidden_RH, [tile.tokens, tile.width]),
        TensorDescriptor.from_tensor(weight_VH, [tile.words, tile.width]),
        target_R,
        stats_P4R.new_ones(num_rows) * (1 / temperature),
        stats_P4R,
        num_rows,
        num_columns,
        width,
        tiles,
        TOKENS=tile.tokens,
        WORDS=tile.words,
        WIDTH=tile.width,
        ONE_LOOP=tile.one_loop,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return stats_P4R


def fewest_waves(tile: Tile, num_rows: int, num_columns: int, multiprocessors: int) -> int:
    """Return the number of parts by which multiprocessors are idle least.

    Qwen2.5-7B's 64 x 594 tiles: 33 parts of 18 tiles are 64 x 33 programs, 16 for each of 132.

    >>> fewest_waves(TILES[9][0], 8192, 152064, 132)
    33
    """
    tiles_R, tiles_V = math.ceil(num_rows / tile.tokens), math.ceil(num_columns / tile.words)
    at_a_time = tile.programs * multiprocessors

    def tiles_in_sequence(parts: int) -> int:
        return math.ceil(tiles_R * parts / at_a_time) * math.ceil(tiles_V / parts)

    return min(range(1, MOST_PARTS + 1), key=tiles_in_sequence)


@triton.jit
def _product_statistics(
    hidden,
    weight,
    target,
    scale,
    stats,
    num_rows,
    num_columns,
    width,
    tiles,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):
    first_row = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * TOKENS
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, TOKENS)
    inside = rows < num_rows
    row_scale = tl.load(scale + rows, mask=inside, other=1.0)
    # 32 bits: to compare all columns with 64 takes a fifth of the epilogue's instructions
    wanted = tl.load(target + rows, mask=inside, other=-1).to(tl.int32)
    maximum = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    at_target = tl.full((TOKENS,), float("-inf"), tl.float32)
    first_tile = tl.program_id(1) * tiles
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(num_columns, WORDS))
    for tile in tl.range(first_tile, last_tile, flatten=ONE_LOOP):
        x = tl.zeros((TOKENS, WORDS), tl.float32)
        for first in range(0, width, WIDTH):
            h = hidden.load([first_row, first])
            w = weight.load([tile * WORDS, first])
            x = tl.dot(h, w.T, x, input_precision="ieee")
        columns = tile * WORDS + tl.arange(0, WORDS)
        x = tl.where(columns[None, :] < num_columns, x * row_scale[:, None], float("-inf"))
        hit = tl.where(columns[None, :] == wanted[:, None], x, float("-inf"))
        at_target = tl.maximum(at_target, tl.max(hit, axis=1))
        # as in `lm_head_triton`: no maximum to subtract where there is only -inf, and no 0 * -inf
        larger = tl.maximum(maximum, tl.max(x, axis=1))
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        down = tl.where(maximum == float("-inf"), 0.0, maximum - origin)
        x -= origin[:, None]
        exp = tl.exp(x)
        rescale = tl.exp(down)
        x_exp = tl.where(exp == 0.0, 0.0, x * exp)
        weighted = rescale * (weighted + down * total) + tl.sum(x_exp, axis=1)
        total = rescale * total + tl.sum(exp, axis=1)
        maximum = larger
    out = stats + tl.program_id(1).to(tl.int64) * 4 * num_rows + rows
    tl.store(out, maximum, mask=inside)
    tl.store(out + num_rows, total, mask=inside)
    tl.store(out + 2 * num_rows, weighted, mask=inside)
    tl.store(out + 3 * num_rows, at_target, mask=inside)
