"""Sums over processes that gradients pass through: a batch divided among them counts as one."""

import torch
import torch.distributed as dist
from torch import Tensor


class AcrossProcesses:
    """A module whose statistics are those of all processes of `process_group`; None: its own."""

    process_group = None


class _AllReduce(torch.autograd.Function):
    # torch.distributed.nn's is deprecated; its successor has no gradient in some torch we serve.
    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(dy, ctx.group), None


def all_reduce(x: Tensor, group) -> Tensor:
    """Σ x over the processes of `group`; every process must call it, and its backward too."""
    return _AllReduce.apply(x, group)


def combine_statistics(
    count: int, mean: Tensor, m2: Tensor, group
) -> tuple[int | Tensor, Tensor, Tensor]:
    """count, mean, Σ (a − mean)² [C] over the processes of `group`; None is this process alone.

    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """
    if group is None:
        return count, mean, m2
    sums = all_reduce(torch.cat([count * mean, mean.new_tensor([count])]), group)
    total = sums[-1].detach()
    global_mean = sums[:-1] / total
    m2 = all_reduce(m2 + count * (mean - global_mean).square(), group)
    return total, global_mean, m2
