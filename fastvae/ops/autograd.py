"""Backward formulas of the ops: once differentiable, and an error where more is asked."""

from collections.abc import Callable

import torch


def register_autograd(op: str, backward: Callable, setup_context: Callable) -> None:
    """`torch.library.register_autograd` for an op whose backward has no derivative of its own.

    Asking for one (`create_graph=True`) raises RuntimeError instead of dropping terms in silence.
    """

    def once(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{op} is differentiable once: call backward without create_graph")
        return backward(ctx, *grads)

    torch.library.register_autograd(op, once, setup_context=setup_context)
