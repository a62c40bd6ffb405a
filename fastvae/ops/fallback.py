"""What devices without a kernel run: plain PyTorch. PyTorch's dispatcher is the only registry."""

from collections.abc import Callable

import torch

from fastvae.ops.checks import check_given


def register_fallback(name: str, function: Callable) -> None:
    """Make `function` what the op `fastvae::name` is where no kernel serves a device.

    It serves calls without any tensor too, of which the dispatcher knows no device: these raise
    RuntimeError.
    """
    arguments = getattr(torch.ops.fastvae, name).default._schema.arguments
    required = [n for n, a in enumerate(arguments) if str(a.type) == "Tensor"]

    def call(*inputs):
        for n in required:
            check_given(arguments[n].name, inputs[n])
        return function(*inputs)

    torch.library.impl(f"fastvae::{name}", "CompositeExplicitAutograd", call)
