"""Differentiable sums over processes, so that a batch divided among them counts as one."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Shared:
    """Holds a process group: a copy of its owner shares the group, a pickled one has none."""

    def __init__(self, group=None):
        self.group = group

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self

    def __reduce__(self) -> tuple:
        return _Shared, ()


class AcrossProcesses:
    """Mixin of modules with batch statistics: those of `process_group`, or its own for None."""

    _shared = _Shared()

    @property
    def process_group(self):
        """The processes; copies of the module share it, pickled ones have None."""
        return self._shared.group

    @process_group.setter
    def process_group(self, group) -> None:
        self._shared = _Shared(group)


class _AllReduce(torch.autograd.Function):
    """x -> Σ x over the processes of a group; the gradient is summed the same way."""

    # torch.distributed.nn.all_reduce is deprecated; some supported torch versions have no gradient
    # for its successor.
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
    """x -> Σ x over the processes of a group, differentiable.

    Every process of the group must call it, and run its backward too.

    Args:
        x: the summand of this process, of the same shape in all processes.
        group: a `torch.distributed` process group.

    Returns:
        the sum, in the shape and dtype of `x`.
    """
    return _AllReduce.apply(x, group)


def combine_statistics(
    count: int, mean: Tensor, m2: Tensor, group
) -> tuple[int | Tensor, Tensor, Tensor]:
    """count, mean, m2 [C] of each process -> those of all processes of a group.

    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances". Differentiable in `mean` and `m2`.

    Args:
        count: values per channel in this process.
        mean: their mean, [C].
        m2: Σ (a − mean)², [C].
        group: a process group; None is this process alone.

    Returns:
        count, mean [C] and m2 [C] of all values; the count is a tensor if there is a group.
    """
    if group is None:
        return count, mean, m2
    sums = all_reduce(torch.cat([count * mean, mean.new_tensor([count])]), group)
    total = sums[-1].detach()
    global_mean = sums[:-1] / total
    m2 = all_reduce(m2 + count * (mean - global_mean).square(), group)
    return total, global_mean, m2
