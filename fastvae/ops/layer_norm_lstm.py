"""LayerNorm-LSTM over a whole sequence: one joint norm over the four gates, none on the cell."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.autograd import register_autograd, register_gradient
from fastvae.ops.checks import (
    check_eps,
    check_layer_norm_lstm,
    check_lengths,
    check_like,
    check_shapes,
    check_wide,
)
from fastvae.ops.fallback import register_fallback
from fastvae.ops.precision import accumulate_dtype


def layer_norm_lstm(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [T, B, 4H], h0, c0 [B, H] -> h [T, B, H], c_n [B, H]: a LayerNorm-LSTM over a sequence.

        aₜ = xₜ + W hₜ₋₁
        i, f, g, o = chunk(LayerNorm(aₜ) · gain + bias)    over the 4H axis, biased variance
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g),   hₜ = σ(o) tanh(cₜ)

    Semeniuta et al. 2017, arXiv:1702.02390; the norm after Ba et al. 2016, arXiv:1607.06450.

    With lengths, a sequence's state stays as it is from its end on, its later outputs are zero and
    its later rows of x are not looked at; a CPU does not compute these steps at all. x without such
    rows, [N, 4H], is packed as `torch.nn.utils.rnn.pack_padded_sequence` packs it: sequences with
    the longest first, and the rows of one step after those of the step before.

    Args:
        x: input-side pre-activations W_x xₜ + b, [T, B, 4H]; with lengths also packed, [N, 4H].
        weight_hh: recurrent weight W, [4H, H].
        norm_weight: gain of the norm, [4H].
        norm_bias: bias of the norm, [4H].
        h0: initial hidden state, [B, H].
        c0: initial cell state, [B, H].
        eps: added to the variance.
        lengths: steps of each sequence, from 0 to T, [B] int64, or None if all have T. For packed x
            they must not increase, and N is their sum.

    Returns:
        h of every step, [T, B, H] or packed as x is, [N, H], and the last c of each sequence, in
        the dtype of `x`, which all tensors but lengths share.

    Raises:
        ValueError: lengths have a wrong shape, dtype, device or, where they can be read without
            waiting for them, value. Elsewhere values under 0 count as 0 and those over T as T.
        RuntimeError: another tensor has a wrong shape, dtype or device, or eps is negative or not
            finite; the message names it.
    """
    check_eps(eps)
    inputs = (x, weight_hh, norm_weight, norm_bias, h0, c0)
    if lengths is not None:
        check_lengths(lengths, x, h0)
    packed = lengths is not None and x.dim() == 2
    if not x.numel() and x.dim() and (x.shape[0] or packed):  # no kernel starts for nothing
        return layer_norm_lstm_reference(*inputs, eps, lengths)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    h, c_n, *_ = torch.ops.fastvae.layer_norm_lstm(*inputs, eps, save, lengths)
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
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function in plain PyTorch: what every kernel is tested against."""
    tensors = weight_hh, norm_weight, norm_bias, h0, c0, eps, lengths
    if lengths is not None and x.dim() == 2:
        real = real_steps(lengths)
        h, c_n = layer_norm_lstm_reference(unpacked(x, real), *tensors)
        return h[real], c_n
    h, c, outputs = h0, c0, []
    for t, x_t in enumerate(x):
        if lengths is None:
            h, c = layer_norm_lstm_cell(x_t + h @ weight_hh.T, c, norm_weight, norm_bias, eps)
            outputs.append(h)
            continue
        real = (t < lengths).unsqueeze(1)
        a = torch.where(real, x_t, 0) + h @ weight_hh.T
        state = layer_norm_lstm_cell(a, c, norm_weight, norm_bias, eps)
        h, c = (torch.where(real, *pair) for pair in zip(state, (h, c), strict=True))
        outputs.append(torch.where(real, h, 0))
    return torch.stack(outputs), c


def real_steps(lengths: Tensor) -> Tensor:
    """lengths [B] -> [T, B] bool: which steps a sequence has; T is the longest's, at least 1."""
    steps = max([1, *lengths.tolist()])
    return torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths


def unpacked(x: Tensor, real: Tensor) -> Tensor:
    """Packed x [N, ...], real [T, B] -> [T, B, ...] with zeros for other steps."""
    return x.new_zeros(*real.shape, *x.shape[1:]).index_put((real,), x)


@torch.library.register_fake("fastvae::layer_norm_lstm")
def _fake(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save, lengths=None):
    _, B, H = check_layer_norm_lstm(x, weight_hh, norm_weight, norm_bias, h0, c0, lengths)
    saved, rows = accumulate_dtype(x.dtype), x.shape[:-1]
    return (
        x.new_empty(*rows, H),
        x.new_empty(B, H),
        x.new_empty((*rows, H) if save else (0,), dtype=saved),
        x.new_empty((*rows, 4 * H) if save else (0,)),
        x.new_empty(rows if save else (0,), dtype=saved),
    )


@torch.library.register_fake("fastvae::layer_norm_lstm_backward")
def _fake_backward(
    dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd, lengths=None
):
    packed = lengths is not None and h.dim() == 2
    check_shapes(h=(h, 2 if packed else 3))
    *rows, H = h.shape
    B = h0.shape[0] if packed else rows[1]
    check_like({"h": h, "dh": dh, "dc_n": dc_n, "normalized": normalized})
    check_wide({"c": c, "rstd": rstd}, h)
    check_shapes(dh=(dh, (*rows, H)), dc_n=(dc_n, (B, H)), c=(c, (*rows, H)), rstd=(rstd, (*rows,)))
    check_layer_norm_lstm(normalized, weight_hh, norm_weight, norm_bias, h0, c0, lengths)
    like = (normalized, weight_hh, norm_weight, norm_bias, h0, c0)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def layer_norm_lstm_loop(
    x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save, lengths=None
) -> tuple[Tensor, ...]:
    """The op in plain PyTorch, with what backward needs: for devices without a kernel."""
    tensors = weight_hh, norm_weight, norm_bias, h0, c0, eps, save, lengths
    if lengths is not None and x.dim() == 2:
        real = real_steps(lengths)
        h, c_n, *kept = layer_norm_lstm_loop(unpacked(x, real), *tensors)
        return h[real], c_n, *(t[real] if save else t for t in kept)
    saved = accumulate_dtype(x.dtype)
    h, c, steps = h0, c0.to(saved), []
    for t, x_t in enumerate(x):
        before, a = c, x_t + h @ weight_hh.T
        normalized, _, rstd = torch.native_layer_norm(a, a.shape[-1:], None, None, eps)
        h, c = lstm_gates(normalized * norm_weight + norm_bias, c)
        step = h.to(x.dtype), c, normalized, rstd.squeeze(-1).to(saved)
        if lengths is not None:
            real = t < lengths
            c = torch.where(real.unsqueeze(1), c, before)
            step = tuple(torch.where(real.view(-1, *[1] * (s.dim() - 1)), s, 0) for s in step)
        h = step[0]
        steps.append(step)
    outputs = [
        torch.stack(step) for step in zip(*(steps if save else [s[:1] for s in steps]), strict=True)
    ]
    empty = (
        () if save else (x.new_empty(0, dtype=saved), x.new_empty(0), x.new_empty(0, dtype=saved))
    )
    return (outputs[0], c.to(x.dtype), *outputs[1:], *empty)


def layer_norm_lstm_backward_loop(
    dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd, lengths=None
) -> tuple[Tensor, ...]:
    """Its backward in plain PyTorch: for devices without a kernel."""
    if lengths is not None and h.dim() == 2:
        real = real_steps(lengths)
        dh, *kept = (unpacked(t, real) for t in (dh, h, c, normalized, rstd))
        tensors = weight_hh, norm_weight, norm_bias, h0, c0, *kept, lengths
        dx, *rest = layer_norm_lstm_backward_loop(dh, dc_n, *tensors)
        return dx[real], *rest
    T = len(h)
    dz, dx = torch.empty_like(normalized), torch.empty_like(normalized)
    dh_t, dc = torch.zeros_like(h0), dc_n.to(c.dtype)
    for t in reversed(range(T)):
        i, f, g, o = (normalized[t] * norm_weight + norm_bias).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_before, tanh_c = c[t - 1] if t else c0, c[t].tanh()
        dh_t, dc_after = dh_t + dh[t], dc
        dc = dc + dh_t * o * (1 - tanh_c * tanh_c)
        if lengths is not None:
            real = (t < lengths).unsqueeze(1)
            dh_t, dc = torch.where(real, dh_t, 0), torch.where(real, dc, 0)
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
        dc = dc * f if lengths is None else torch.where(real, dc * f, dc_after)
        dh_t = dx[t] @ weight_hh
    h_before = torch.cat([h0.unsqueeze(0), h[:-1]])
    dweight_hh = dx.flatten(0, 1).T @ h_before.flatten(0, 1)
    return dx, dweight_hh, (dz * normalized).sum((0, 1)), dz.sum((0, 1)), dh_t, dc.to(c0.dtype)


register_fallback("layer_norm_lstm", layer_norm_lstm_loop)
register_fallback("layer_norm_lstm_backward", layer_norm_lstm_backward_loop)


def _setup_context(ctx, inputs, output):
    _, weight_hh, norm_weight, norm_bias, h0, c0, _, ctx.saved, lengths = inputs
    h, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
    ctx.save_for_backward(weight_hh, norm_weight, norm_bias, h0, c0, h, *saved, lengths)


def _backward(ctx, dh, dc_n, *_):
    if not ctx.saved:
        raise RuntimeError("layer_norm_lstm was called with save=False, so it has no backward")
    saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives them once
    _, _, _, h0, _, h, *_ = saved
    dh = torch.zeros_like(h) if dh is None else dh
    dc_n = torch.zeros_like(h0) if dc_n is None else dc_n
    grads = torch.ops.fastvae.layer_norm_lstm_backward(dh, dc_n, *saved)
    return (*grads, None, None, None)


register_autograd("layer_norm_lstm", _backward, _setup_context)
register_gradient("layer_norm_lstm")
