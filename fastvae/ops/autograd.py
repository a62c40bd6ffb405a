"""Autograd of the ops: backward formulas, once differentiable, and an error where more is asked.

`torch.library.register_autograd` makes functions that torch.func refuses and that drop forward-mode
tangents in silence. What is here fills the same entry of the dispatcher and does neither.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# torch.func calls the dispatcher once for each of its levels, so the function is of one level.
from torch._functorch.utils import enable_single_level_autograd_function  # isort: skip

_libraries: list[torch.library.Library] = []  # an entry lives as long as its library


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Make the op `fastvae::name` differentiable, in reverse mode and once.

    backward(ctx, *output gradients) gives a gradient for each input, None where it has none;
    setup_context(ctx, inputs, output) saves what it needs, as in `torch.autograd.Function`.
    Forward mode raises RuntimeError, and so does the derivative of `fastvae::name_backward`.
    """
    _register(name, backward, setup_context)


def register_gradient(name: str) -> None:
    """Make the derivative of the op `fastvae::name_backward` raise RuntimeError."""

    def backward(ctx, *_):
        raise RuntimeError(f"fastvae::{name} is differentiable once: it has no second derivative")

    _register(f"{name}_backward", backward, lambda ctx, inputs, output: None)


def _register(name: str, backward: Callable, setup_context: Callable) -> None:
    op = getattr(torch.ops.fastvae, name).default
    arguments = op._schema.arguments

    def below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def forward(*inputs):
        # torch.autograd.Function turns both off; the levels of torch.func that follow need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below(*inputs)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    function = type(
        f"fastvae_{name}", (_SingleLevelFunction,), {k: staticmethod(v) for k, v in members.items()}
    )

    def call(*inputs):
        # The dispatcher leaves out what is equal to its default.
        inputs += tuple(a.default_value for a in arguments[len(inputs) :])
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors):
            raise RuntimeError(
                f"fastvae::{name} has no forward-mode derivative: use reverse mode "
                "(torch.func.grad, vjp or jacrev) or the same module of fastvae.reference"
            )
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return below(*inputs)
        with enable_single_level_autograd_function():
            return function.apply(*inputs)

    library = torch.library.Library("fastvae", "FRAGMENT")
    library.impl(name, call, "Autograd")
    _libraries.append(library)


def _has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None
