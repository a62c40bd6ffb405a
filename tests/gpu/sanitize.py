"""Every kernel once on small sizes, for compute-sanitizer: Triton's, and persistent ones if built.

Graphs are left out: where PYTORCH_NO_CUDA_MEMORY_CACHING is set each tensor is an allocation of its
own, so that a step over its end is seen, but nothing can be captured.
"""

import torch

from fastvae import nn, ops
from fastvae.kernels import graphs, persistent

graphs.DEVICE = "none"


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for B, H in ((1, 1), (3, 33), (2, 130)):
            layer_norm_lstm(3, B, H, dtype)
            decode_lstm(3, B, 4, H, 2 * H + 1, dtype)
        stack = nn.HighwayConvStack(17, 2, device="cuda", dtype=dtype)
        stack(torch.randn(4, 3, 17, device="cuda", dtype=dtype)).sum().backward()
        stack.eval()(torch.randn(4, 3, 17, device="cuda", dtype=dtype))
        decode_bytenet(4, 3, 5, 17, 11, 2, dtype)
    if all(map(persistent.built, persistent.DTYPES)):
        with persistent.serve():
            persistent_kernels()
    torch.cuda.synchronize()
    print("every kernel ran")


def persistent_kernels() -> None:
    """As on a GPU of six multiprocessors, where small sizes need several blocks and slices."""
    persistent.machine = lambda _: persistent.Machine(6, 160_000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for T, B, size in ((1, 1, 1), (3, 2, 66), (3, 40, 33)):
            if dtype in persistent.DTYPES["layer_norm_lstm"]:
                layer_norm_lstm(T, B, size, dtype)
            if dtype in persistent.DTYPES["decode_lstm"]:
                decode_lstm(T, B, 4, size, 2 * size + 1, dtype)
                decode_bytenet(T, B, 4, size, 2 * size + 1, 2, dtype)


def layer_norm_lstm(T: int, B: int, H: int, dtype: torch.dtype) -> None:
    lstm = nn.LayerNormLSTM(5, H, device="cuda", dtype=dtype)
    y, _ = lstm(torch.randn(T, B, 5, device="cuda", dtype=dtype))
    y.sum().backward()


def decode_lstm(T: int, B: int, D: int, H: int, V: int, dtype: torch.dtype) -> None:
    shapes = (T, B, D), (4 * H, D), (V + 1, 4 * H), (4 * H, H), (4 * H,), (4 * H,)
    shapes += (V, H), (V,), (B, H), (B, H)
    decode(ops.decode_lstm, shapes, (T, B, V), dtype)


def decode_bytenet(T: int, B: int, D: int, C: int, V: int, N: int, dtype: torch.dtype) -> None:
    shapes = (T, B, D), (2 * C, D), (V + 1, 2 * C), (N, 3 * C, C, 2), (N, 3 * C), (V, C), (V,)
    decode(ops.decode_bytenet, shapes, (T, B, V), dtype)


def decode(op, shapes, noise, dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    op(*inputs)
    op(*inputs, torch.randn(noise, device="cuda"), end_id=1, pad_id=0)


if __name__ == "__main__":
    main()
