"""LayerNorm-LSTM over a whole sequence: one joint norm over the four gates, none on the cell."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.autograd import register_autograd, register_gradient
from fastvae.ops.checks import check_layer_norm_lstm, check_like, check_shapes, check_wide
from fastvae.ops.precision import accumulate_dtype


def layer_norm_lstm(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """x [T, B, 4H], h0, c0 [B, H] -> h [T, B, H], c_n [B, H]: a LayerNorm-LSTM over a sequence.

        aₜ = xₜ + W hₜ₋₁
        i, f, g, o = chunk(LayerNorm(aₜ) · gain + bias)    over the 4H axis, biased variance
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g),   hₜ = σ(o) tanh(cₜ)

    Semeniuta et al. 2017, arXiv:1702.02390; the norm after Ba et al. 2016, arXiv:1607.06450.

    Args:
        x: input-side pre-activations W_x xₜ + b, [T, B, 4H].
        weight_hh: recurrent weight W, [4H, H].
        norm_weight: gain of the norm, [4H].
        norm_bias: bias of the norm, [4H].
        h0: initial hidden state, [B, H].
        c0: initial cell state, [B, H].
        eps: added to the variance.

    Returns:
        h of every step and the last c, in the dtype of `x`, which all tensors share.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    inputs = (x, weight_hh, norm_weight, norm_bias, h0, c0)
    if not x.numel() and x.dim() and x.shape[0]:  # no kernel starts for nothing
        return layer_norm_lstm_reference(*inputs, eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    h, c_n, *_ = torch.ops.fastvae.layer_norm_lstm(*inputs, eps, save)
    return h, c_n


def layer_norm_lstm_cell(
    a: Tensor, c: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """One step in plain PyTorch: pre-activations a [B, 4H], cell c [B, H] -> h, c [B, H]."""
    return lstm_gates(F.layer_norm(a, a.shape[-1:], norm_weight, norm_bias, eps), c)


def lstm_gates(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized pre-activations z [B, 4H], cell c [B, H] -> h, c [B, H]."""
    i, f, g, o = z.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def layer_norm_lstm_reference(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """The same function in plain PyTorch: what every kernel is tested against."""
    h, c, outputs = h0, c0, []
    for x_t in x:
        h, c = layer_norm_lstm_cell(x_t + h @ weight_hh.T, c, norm_weight, norm_bias, eps)
        outputs.append(h)
    return torch.stack(outputs), c


@torch.library.register_fake("fastvae::layer_norm_lstm")
def _fake(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save):
    T, B, H = check_layer_norm_lstm(x, weight_hh, norm_weight, norm_bias, h0, c0)
    saved = accumulate_dtype(x.dtype)
    return (
        x.new_empty(T, B, H),
        x.new_empty(B, H),
        x.new_empty((T, B, H) if save else (0,), dtype=saved),
        x.new_empty((T, B, 4 * H) if save else (0,)),
        x.new_empty((T, B) if save else (0,), dtype=saved),
    )


@torch.library.register_fake("fastvae::layer_norm_lstm_backward")
def _fake_backward(dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd):
    ((T, B, H),) = check_shapes(h=(h, 3))
    check_like({"h": h, "dh": dh, "dc_n": dc_n, "normalized": normalized})
    check_wide({"c": c, "rstd": rstd}, h)
    check_shapes(dh=(dh, (T, B, H)), dc_n=(dc_n, (B, H)), c=(c, (T, B, H)), rstd=(rstd, (T, B)))
    check_layer_norm_lstm(normalized, weight_hh, norm_weight, norm_bias, h0, c0)
    like = (normalized, weight_hh, norm_weight, norm_bias, h0, c0)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def layer_norm_lstm_loop(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save):
    """The op in plain PyTorch, with what backward needs: for devices without a kernel."""
    saved = accumulate_dtype(x.dtype)
    h, c, steps = h0, c0.to(saved), []
    for x_t in x:
        a = x_t + h @ weight_hh.T
        normalized, _, rstd = torch.native_layer_norm(a, a.shape[-1:], None, None, eps)
        h, c = lstm_gates(normalized * norm_weight + norm_bias, c)
        h = h.to(x.dtype)
        steps.append((h, c, normalized, rstd.squeeze(-1).to(saved)))
    outputs = [
        torch.stack(step) for step in zip(*(steps if save else [s[:1] for s in steps]), strict=True)
    ]
    empty = (
        () if save else (x.new_empty(0, dtype=saved), x.new_empty(0), x.new_empty(0, dtype=saved))
    )
    return (outputs[0], c.to(x.dtype), *outputs[1:], *empty)


def layer_norm_lstm_backward_loop(
    dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd
):
    """Its backward in plain PyTorch: for devices without a kernel."""
    T = len(h)
    dz, dx = torch.empty_like(normalized), torch.empty_like(normalized)
    dh_t, dc = torch.zeros_like(h0), dc_n.to(c.dtype)
    for t in reversed(range(T)):
        i, f, g, o = (normalized[t] * norm_weight + norm_bias).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_before, tanh_c = c[t - 1] if t else c0, c[t].tanh()
        dh_t = dh_t + dh[t]
        dc = dc + dh_t * o * (1 - tanh_c * tanh_c)
        gates = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dc * i * (1 - g * g),
            dh_t * tanh_c * o * (1 - o),
        )
        dz[t] = torch.cat(gates, -1)
        dn = dz[t] * norm_weight
        along = (dn * normalized[t]).mean(-1, keepdim=True)
        dx[t] = rstd[t].unsqueeze(-1) * (dn - dn.mean(-1, keepdim=True) - normalized[t] * along)
        dc = dc * f
        dh_t = dx[t] @ weight_hh
    h_before = torch.cat([h0.unsqueeze(0), h[:-1]])
    dweight_hh = dx.flatten(0, 1).T @ h_before.flatten(0, 1)
    return dx, dweight_hh, (dz * normalized).sum((0, 1)), dz.sum((0, 1)), dh_t, dc.to(c0.dtype)


# PyTorch's dispatcher is the only registry.
torch.library.impl("fastvae::layer_norm_lstm", "CompositeExplicitAutograd", layer_norm_lstm_loop)
torch.library.impl(
    "fastvae::layer_norm_lstm_backward", "CompositeExplicitAutograd", layer_norm_lstm_backward_loop
)


def _setup_context(ctx, inputs, output):
    _, weight_hh, norm_weight, norm_bias, h0, c0, _, ctx.saved = inputs
    h, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
    ctx.save_for_backward(weight_hh, norm_weight, norm_bias, h0, c0, h, *saved)


def _backward(ctx, dh, dc_n, *_):
    if not ctx.saved:
        raise RuntimeError("layer_norm_lstm was called with save=False, so it has no backward")
    saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives them once
    _, _, _, h0, _, h, *_ = saved
    dh = torch.zeros_like(h) if dh is None else dh
    dc_n = torch.zeros_like(h0) if dc_n is None else dc_n
    grads = torch.ops.fastvae.layer_norm_lstm_backward(dh, dc_n, *saved)
    return (*grads, None, None)


register_autograd("layer_norm_lstm", _backward, _setup_context)
register_gradient("layer_norm_lstm")
