"""Checks of what an op is given: those of the C++ kernels, for the fakes and the GPU kernels.

Each op has one function here. All raise RuntimeError naming the tensor that is wrong, with what it
has and what it must have.
"""

import math

import torch
from torch import Tensor

from fastvae.ops.precision import accumulate_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DTYPES_OF_GPUS = (*DTYPES, torch.float16)


def check_shapes(
    *, empty: bool = False, **wanted: tuple[Tensor, int | tuple[int, ...]]
) -> list[torch.Size]:
    """Tensors by name, each with its shape or its number of dimensions -> their shapes.

    Raises RuntimeError naming the tensor whose shape is another, or unless `empty` has no element.
    """
    for name, (tensor, shape) in wanted.items():
        check_given(name, tensor)
        if isinstance(shape, int):
            if tensor.dim() != shape:
                raise RuntimeError(f"{name} must have {shape} dimensions, got {list(tensor.shape)}")
        elif tensor.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if not (tensor.numel() or empty):
            raise RuntimeError(f"{name} must have no empty dimension, got {list(tensor.shape)}")
    return [tensor.shape for tensor, _ in wanted.values()]


def check_eps(eps: float) -> None:
    """Raises RuntimeError unless eps can be added to a variance."""
    if not 0 <= eps < math.inf:
        raise RuntimeError(f"eps must be 0 or more, and finite, got {eps}")


def check_given(name: str, tensor: Tensor | None) -> None:
    """Raises RuntimeError for None, which the dispatcher takes for any tensor."""
    if tensor is None:
        raise RuntimeError(f"{name} must be a tensor, got None")


def check_like(tensors: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless all have the dtype and device of the first, and a known dtype."""
    for name, tensor in tensors.items():
        check_given(name, tensor)
    first, like = next(iter(tensors.items()))
    known = DTYPES if like.device.type == "cpu" else DTYPES_OF_GPUS
    if like.dtype not in known:
        names = ", ".join(map(_name, known))
        raise RuntimeError(
            f"{first} must have one of the dtypes {names} on {like.device.type}, "
            f"got {_name(like.dtype)}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != like.dtype:
            raise RuntimeError(
                f"{name} must have the dtype of {first}, {_name(like.dtype)}, "
                f"got {_name(tensor.dtype)}"
            )
        check_device(name, tensor, first, like)


def check_device(name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    """Raises RuntimeError unless `tensor` is where `like` is."""
    if tensor.device != like.device:
        raise RuntimeError(
            f"{name} must be on the device of {first}, {like.device}, got {tensor.device}"
        )


def check_wide(tensors: dict[str, Tensor], like: Tensor) -> None:
    """Raises RuntimeError unless all have the dtype of the sums of `like`, and its device."""
    wide = accumulate_dtype(like.dtype)
    for name, tensor in tensors.items():
        check_given(name, tensor)
        if tensor.dtype != wide:
            raise RuntimeError(
                f"{name} must have dtype {_name(wide)}, that of the sums of the other tensors, "
                f"got {_name(tensor.dtype)}"
            )
        check_device(name, tensor, "the other tensors", like)


def check_linear(
    x: Tensor | None, weight: Tensor, bias: Tensor | None, tokens: Tensor | None
) -> tuple[int, ...]:
    """-> the leading dimensions of its output; ids are not looked at."""
    if x is None and tokens is None:
        raise RuntimeError("x or tokens must be given")
    check_shapes(weight=(weight, 2))
    tensors = {"weight": weight, "bias": bias, "x": x}
    check_like({name: t for name, t in tensors.items() if t is not None})
    if x is not None and not x.dim():
        raise RuntimeError("x must have shape [..., K], got []")
    K = 0 if x is None else x.shape[-1]
    S = weight.shape[1] - K
    if (S != 0) if tokens is None else (S <= 0):
        needed = "S = 0 without tokens" if tokens is None else "S is that of the tokens"
        raise RuntimeError(
            f"weight must have shape [N, K + S], where K = {K} and {needed}, "
            f"got {list(weight.shape)}"
        )
    if tokens is not None:
        if tokens.dtype != torch.int64:
            raise RuntimeError(f"tokens must have dtype int64, got {_name(tokens.dtype)}")
        check_device("tokens", tokens, "weight", weight)
        if x is not None and tokens.shape != x.shape[:-1]:
            raise RuntimeError(
                "tokens must have the shape of x without its last dimension, "
                f"{list(x.shape[:-1])}, got {list(tokens.shape)}"
            )
    if bias is not None:
        check_shapes(bias=(bias, (weight.shape[0],)))
    return tuple(x.shape[:-1] if tokens is None else tokens.shape)


def check_unfold(x: Tensor, *, empty: bool = False) -> tuple[int, int, int]:
    """-> 2T, B, C."""
    check_like({"x": x})
    ((steps, B, C),) = check_shapes(empty=empty, x=(x, 3))
    if steps % 2:
        raise RuntimeError(f"x must have an even number of steps, got {list(x.shape)}")
    return steps, B, C


def check_fold(
    windows: Tensor, bias: Tensor | None, *, empty: bool = False
) -> tuple[int, int, int]:
    """-> T, B, C."""
    check_like({"windows": windows} | ({} if bias is None else {"bias": bias}))
    ((T, B, C, taps),) = check_shapes(empty=empty, windows=(windows, 4))
    if taps != 3:
        raise RuntimeError(f"windows must have shape [T, B, C, 3], got {list(windows.shape)}")
    if bias is not None:
        check_shapes(empty=empty, bias=(bias, (C,)))
    return T, B, C


def check_layer_norm_lstm(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
) -> tuple[int, int, int]:
    """-> T, B, H; with lengths and packed x [N, 4H]: N, B, H. Lengths' values are not looked at."""
    parameters = {"weight_hh": weight_hh, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_like({"x": x, **parameters, "h0": h0, "c0": c0})
    packed = lengths is not None and x.dim() == 2
    (steps, *_), (B, H) = check_shapes(x=(x, 2 if packed else 3), h0=(h0, 2))
    B = B if packed else x.shape[1]
    check_shapes(
        x=(x, (steps, 4 * H) if packed else (steps, B, 4 * H)),
        weight_hh=(weight_hh, (4 * H, H)),
        norm_weight=(norm_weight, (4 * H,)),
        norm_bias=(norm_bias, (4 * H,)),
        h0=(h0, (B, H)),
        c0=(c0, (B, H)),
    )
    if lengths is not None:
        _check_lengths(lengths, x, B, RuntimeError)
    return steps, B, H


def check_lengths(lengths: Tensor, x: Tensor, h0: Tensor) -> None:
    """Raises ValueError unless lengths are [B] for x [T, B, ·] or packed [N, ·], h0 [B, ·].

    Values are checked where Python can read them without waiting: on a CPU and not while
    torch.compile, torch.export or a transform of torch.func runs.
    """
    packed = x.dim() == 2
    _check_lengths(lengths, x, h0.shape[0] if packed or x.dim() < 2 else x.shape[1], ValueError)
    if not readable(lengths):
        return
    values, most = lengths.tolist(), x.shape[0]
    for value in values:
        if not 0 <= value <= most:
            raise ValueError(f"lengths must be from 0 to {most}, got {value}")
    if packed and values != sorted(values, reverse=True):
        raise ValueError("lengths must not increase where x is packed, [N, ·]")
    if packed and sum(values) != most:
        raise ValueError(f"lengths must add up to the {most} rows of x, got {sum(values)}")


def _check_lengths(lengths: Tensor, x: Tensor, batch: int, error: type[Exception]) -> None:
    """Raises `error` for a wrong type, shape, dtype or device of lengths."""
    if not isinstance(lengths, Tensor):
        raise error(f"lengths must be a tensor [B], got {type(lengths).__name__}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise error(f"lengths must have shape [B] = [{batch}], got {list(lengths.shape)}")
    if lengths.dtype != torch.int64:
        raise error(f"lengths must have dtype int64, got {_name(lengths.dtype)}")
    if lengths.device != x.device:
        raise error(f"lengths must be on the device of x, {x.device}, got {lengths.device}")


def readable(tensor: Tensor) -> bool:
    """Whether Python can read values now without waiting, and may choose sizes by them."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def check_highway_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[int, int, int]:
    """-> T, B, C."""
    tensors = {"x": x, "weight": weight, "bias": bias}
    check_like({name: t for name, t in tensors.items() if t is not None})
    ((T, B, C),) = check_shapes(x=(x, 3))
    check_shapes(weight=(weight, (3 * C, C, 2)))
    if bias is not None:
        check_shapes(bias=(bias, (3 * C,)))
    return T, B, C


def check_highway_conv_project_backward(
    da: Tensor, dmean: Tensor, dm2: Tensor, x: Tensor, weight: Tensor, a: Tensor, mean: Tensor
) -> tuple[int, int, int]:
    """-> T, B, C."""
    T, B, C = check_highway_conv(x, weight)
    check_like({"x": x, "da": da, "a": a})
    check_wide({"mean": mean, "dmean": dmean, "dm2": dm2}, x)
    check_shapes(da=(da, (T, B, 3 * C)), a=(a, (T, B, 3 * C)))
    check_shapes(mean=(mean, (3 * C,)), dmean=(dmean, (3 * C,)), dm2=(dm2, (3 * C,)))
    return T, B, C


def check_highway_conv_gate(
    a: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, dy: Tensor | None = None
) -> tuple[int, int, int]:
    """-> T, B, C."""
    check_like({"x": x, "a": a} | ({} if dy is None else {"dy": dy}))
    check_wide({"mean": mean, "scale": scale, "shift": shift}, x)
    ((T, B, C),) = check_shapes(x=(x, 3))
    check_shapes(a=(a, (T, B, 3 * C)))
    check_shapes(mean=(mean, (3 * C,)), scale=(scale, (3 * C,)), shift=(shift, (3 * C,)))
    if dy is not None:
        check_shapes(dy=(dy, (T, B, C)))
    return T, B, C


def check_decode(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    *,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None,
    end_id: int | None,
    pad_id: int | None,
    hidden: int,
    gates: int,
    **layers: Tensor,
) -> tuple[int, int, int]:
    """What every decoder is given -> T, B, V. Raises RuntimeError naming what is wrong.

    The classifier reads [hidden], the inputs are [gates · hidden]. Of `layers`, its weights by
    name, dtypes and devices are checked here, shapes are not.
    """
    weights = {"feature_weight": feature_weight, "token_embeddings": token_embeddings, **layers}
    weights |= {"classifier_weight": classifier_weight, "classifier_bias": classifier_bias}
    check_like({"features": features, **weights})
    ((T, B, D),) = check_shapes(empty=True, features=(features, 3))
    if not T * B:
        raise RuntimeError("features must have at least one step and one sequence")
    ((V, _),) = check_shapes(classifier_weight=(classifier_weight, 2))
    width = gates * hidden
    check_shapes(classifier_weight=(classifier_weight, (V, hidden)))
    check_shapes(
        token_embeddings=(token_embeddings, (V + 1, width)), classifier_bias=(classifier_bias, (V,))
    )
    check_shapes(empty=True, feature_weight=(feature_weight, (width, D)))
    if noise is not None:
        check_wide({"noise": noise}, features)
        check_shapes(noise=(noise, (T, B, V)))
    if end_id is not None:
        if not 0 <= end_id < V:
            raise RuntimeError(f"end_id must be from 0 to {V - 1}, got {end_id}")
        if pad_id is None or pad_id < 0:
            raise RuntimeError(f"pad_id must be 0 or more where end_id is given, got {pad_id}")
    return T, B, V


def check_packed(packed: Tensor | None, features: Tensor) -> None:
    """Raises RuntimeError unless packed weights, if given, are bytes on the device of features."""
    if packed is None:
        return
    if packed.dtype != torch.uint8:
        raise RuntimeError("packed must be what the op's pack function returns")
    check_device("packed", packed, "features", features)


def check_decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None,
    end_id: int | None,
    pad_id: int | None,
) -> tuple[int, int, int]:
    """-> T, B, V."""
    ((_, H),) = check_shapes(h0=(h0, 2))
    parameters = {"weight_hh": weight_hh, "norm_weight": norm_weight, "norm_bias": norm_bias}
    T, B, V = check_decode(
        features,
        feature_weight,
        token_embeddings,
        classifier_weight=classifier_weight,
        classifier_bias=classifier_bias,
        noise=noise,
        end_id=end_id,
        pad_id=pad_id,
        hidden=H,
        gates=4,
        **parameters,
        h0=h0,
        c0=c0,
    )
    check_shapes(
        weight_hh=(weight_hh, (4 * H, H)),
        norm_weight=(norm_weight, (4 * H,)),
        norm_bias=(norm_bias, (4 * H,)),
        h0=(h0, (B, H)),
        c0=(c0, (B, H)),
    )
    return T, B, V


def check_decode_bytenet(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None,
    end_id: int | None,
    pad_id: int | None,
) -> tuple[int, int, int]:
    """-> T, B, V."""
    ((N, _, C, _),) = check_shapes(empty=True, conv_weight=(conv_weight, 4))
    sizes = check_decode(
        features,
        feature_weight,
        token_embeddings,
        classifier_weight=classifier_weight,
        classifier_bias=classifier_bias,
        noise=noise,
        end_id=end_id,
        pad_id=pad_id,
        hidden=C,
        gates=2,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
    )
    check_shapes(
        empty=True, conv_weight=(conv_weight, (N, 3 * C, C, 2)), conv_bias=(conv_bias, (N, 3 * C))
    )
    return sizes


def check_decode_lstm_pack(
    feature_weight: Tensor,
    weight_hh: Tensor,
    classifier_weight: Tensor,
    token_embeddings: Tensor | None = None,
) -> None:
    ((_, H), (V, _)) = check_shapes(
        weight_hh=(weight_hh, 2), classifier_weight=(classifier_weight, 2)
    )
    ((_, D),) = check_shapes(empty=True, feature_weight=(feature_weight, 2))
    check_shapes(weight_hh=(weight_hh, (4 * H, H)), classifier_weight=(classifier_weight, (V, H)))
    check_shapes(empty=True, feature_weight=(feature_weight, (4 * H, D)))
    tensors = {"weight_hh": weight_hh, "feature_weight": feature_weight}
    if token_embeddings is not None:
        check_shapes(token_embeddings=(token_embeddings, (V + 1, 4 * H)))
        tensors["token_embeddings"] = token_embeddings
    check_like({**tensors, "classifier_weight": classifier_weight})


def check_decode_bytenet_pack(
    feature_weight: Tensor, conv_weight: Tensor, classifier_weight: Tensor
) -> None:
    ((N, _, C, _),) = check_shapes(empty=True, conv_weight=(conv_weight, 4))
    ((V, _),) = check_shapes(classifier_weight=(classifier_weight, 2))
    ((_, D),) = check_shapes(empty=True, feature_weight=(feature_weight, 2))
    check_shapes(empty=True, conv_weight=(conv_weight, (N, 3 * C, C, 2)))
    check_shapes(classifier_weight=(classifier_weight, (V, C)))
    check_shapes(empty=True, feature_weight=(feature_weight, (2 * C, D)))
    tensors = {"conv_weight": conv_weight, "feature_weight": feature_weight}
    check_like({**tensors, "classifier_weight": classifier_weight})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_gumbel_noise(seed: Tensor, steps: int, batch: int, vocab_size: int) -> None:
    check_shapes(seed=(seed, (1,)))
    if seed.dtype != torch.int64:
        raise RuntimeError(f"seed must have dtype int64, got {_name(seed.dtype)}")
    sizes = [steps, batch, vocab_size]
    if min(sizes) < 0:
        raise RuntimeError(f"steps, batch and vocab_size must be 0 or more, got {sizes}")
