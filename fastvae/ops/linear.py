"""Linear layer of dense inputs and one-hot tokens: decoders' inputs and their classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.autograd import register_autograd, register_gradient
from fastvae.ops.checks import check_like, check_linear, check_shapes
from fastvae.ops.fallback import register_fallback
from fastvae.ops.precision import accumulate_dtype


def linear(x: Tensor | None, weight: Tensor, bias: Tensor, tokens: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K + S], bias [N], tokens [...] -> a [..., N]: linear of both.

        aₙ = W [xₙ, one-hot(sₙ)] + b

    Dense inputs and one-hot ones; either may be absent. The columns of W for the one-hot inputs are
    its last ones; they are looked up, not multiplied.

    Args:
        x: dense inputs, [..., K], or None.
        weight: W, [N, K + S].
        bias: b, [N].
        tokens: ids from 0 to S − 1 of the one-hot inputs, [...] int64, or None.

    Returns:
        a, [..., N], in the dtype of `weight`.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or an id is out of range. On
            devices where checking ids would mean waiting, the row of such an id is NaN instead.
    """
    rows = x if tokens is None else tokens
    if rows is not None and not rows.numel():  # no kernel starts for nothing
        return linear_reference(x, weight, bias, tokens)
    return torch.ops.fastvae.linear(x, weight, bias, tokens)


def linear_reference(
    x: Tensor | None, weight: Tensor, bias: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    if tokens is None:
        return F.linear(x, weight, bias)
    dense = 0 if x is None else x.shape[-1]
    # Upcast: the backward of a lookup adds up its gradients in the table's dtype.
    table = weight[:, dense:].to(accumulate_dtype(weight.dtype)).T + bias
    rows = F.embedding(tokens, table)
    if x is not None:
        rows = rows + F.linear(x, weight[:, :dense])
    return rows.to(weight.dtype)


@torch.library.register_fake("fastvae::linear")
def _fake(x, weight, bias, tokens):
    leading = check_linear(x, weight, bias, tokens)
    return weight.new_empty(*leading, weight.shape[0])


@torch.library.register_fake("fastvae::linear_backward")
def _fake_backward(da, x, weight, tokens):
    leading = check_linear(x, weight, None, tokens)
    check_like({"weight": weight, "da": da})
    check_shapes(da=(da, (*leading, weight.shape[0])))
    dx = weight.new_empty(0 if x is None else x.shape)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def mark_unknown(tokens: Tensor, count: int) -> Tensor:
    """The tokens, with `count` for those outside 0 to count − 1."""
    return tokens.masked_fill((tokens < 0) | (tokens >= count), count)


def _on_any_device(x, weight, bias, tokens):
    if tokens is not None:
        tokens = mark_unknown(tokens, weight.shape[1] - (0 if x is None else x.shape[-1]))
        weight = F.pad(weight, (0, 1), value=float("nan"))
    return linear_reference(x, weight, bias, tokens)


def _backward_reference(da, x, weight, tokens):
    flat, acc_dtype = da.flatten(0, -2), accumulate_dtype(da.dtype)
    dense = 0 if x is None else x.shape[-1]
    dx = da.new_empty(0) if x is None else da @ weight[:, :dense]
    columns = [] if x is None else [flat.T @ x.flatten(0, -2)]
    if tokens is not None:
        S = weight.shape[1] - dense
        # Unlike index_add_ it sums a token's rows in parts, which loses less.
        rows = torch.ops.aten.embedding_dense_backward(
            flat.to(acc_dtype), mark_unknown(tokens, S).flatten(), S + 1, -1, False
        )
        columns.append(rows[:S].T.to(da.dtype))
    return dx, torch.cat(columns, 1), flat.sum(0, dtype=acc_dtype).to(da.dtype)


def _setup(ctx, inputs, output):
    x, weight, _, tokens = inputs
    ctx.save_for_backward(x, weight, tokens)


def _backward(ctx, da):
    x, weight, tokens = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.fastvae.linear_backward(da, x, weight, tokens)
    return None if x is None else dx, dweight, dbias, None


register_fallback("linear", _on_any_device)
register_fallback("linear_backward", _backward_reference)
register_autograd("linear", _backward, _setup)
register_gradient("linear")
