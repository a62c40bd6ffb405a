"""Batches without the pads after each sequence's end, so that layers compute the other steps only.

The rows are in the order of `torch.nn.utils.rnn.pack_padded_sequence`: sequences with the longest
first, and the rows of one step after those of the step before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.layer_norm_lstm import real_steps


def token_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """tokens [B, L] -> number of positions up to the last token that is no pad, [B] int64.

    Args:
        tokens: ids, [B, L] int64.
        pad_id: the id of pads. Pads between other tokens count.
    """
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return torch.where(tokens == pad_id, 0, position).amax(1)


class Packing(NamedTuple):
    """Where the N rows that are left of a batch [L, B, ...] are.

    Args:
        shape: L, B.
        order: sequences, longest first, [B] int64.
        lengths: steps of each, in that order, [B] int64.
        rows: the rows, of L · B, [N] int64.
    """

    shape: tuple[int, int]
    order: Tensor
    lengths: Tensor
    rows: Tensor

    @classmethod
    def of(cls, tokens: Tensor, pad_id: int) -> "Packing":
        """tokens [B, L] -> their packing, whose N depends on them: they must be on a CPU.

        Args:
            tokens: ids, [B, L] int64.
            pad_id: the id of pads.
        """
        B, L = tokens.shape
        lengths, order = token_lengths(tokens, pad_id).sort(descending=True, stable=True)
        real = real_steps(lengths)
        rows = torch.arange(len(real), device=real.device).unsqueeze(1) * B + order
        return cls((L, B), order, lengths, rows[real])

    def pack(self, t: Tensor) -> Tensor:
        """t [L, B, ...] -> [N, ...].

        Args:
            t: one row per position and sequence; a floating-point one has 3 dimensions.
        """
        if not t.is_floating_point():
            return t.flatten()[self.rows]
        # A lookup, because the backward of an index is many times slower.
        return F.embedding(self.rows, t.flatten(0, 1))

    def sort(self, t: Tensor) -> Tensor:
        """t [B, ...] -> the same, longest sequences first."""
        return t.index_select(0, self.order)

    def restore(self, t: Tensor) -> Tensor:
        """t [B, ...], longest sequences first -> the same in the order of the batch."""
        return t.index_select(0, self.order.argsort())

    def sum(self, t: Tensor) -> Tensor:
        """t [N] -> the sum of each sequence [B], in the order of the batch."""
        steps = t.new_zeros(self.shape[0] * self.shape[1]).index_copy(0, self.rows, t)
        return steps.view(self.shape).sum(0)
