"""Decodes with the persistent kernels for a while, beside a stream that copies gigabytes.

    python tests/gpu/soak.py [--seconds 60]

Long sequences whose ends are drawn at random; every repetition must give the same tokens.
"""

import argparse
import time

import torch

from fastvae.kernels import persistent

STEPS, BYTES = 1000, 1 << 30


def cases() -> dict[str, list[torch.Tensor]]:
    """The inputs of each decoder in bfloat16, B 20, with its plan."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    T, B, D, H, V, C, N = STEPS, 20, 8, 500, 51, 256, 3
    lstm = [
        normal(T, B, D),
        normal(4 * H, D),
        normal(V + 1, 4 * H),
        normal(4 * H, H, scale=H**-0.5),
    ]
    lstm += [torch.ones_like(normal(4 * H)), normal(4 * H), normal(V, H), normal(V)]
    lstm += [normal(B, H), normal(B, H)]
    net = [normal(T, B, D), normal(2 * C, D), normal(V + 1, 2 * C)]
    net += [normal(N, 3 * C, C, 2, scale=C**-0.5), normal(N, 3 * C), normal(V, C), normal(V)]
    return {"decode_lstm": lstm, "decode_bytenet": net}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was done")
        return
    torch.manual_seed(0)
    side = torch.cuda.Stream()
    source, target = (torch.empty(BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    inputs, runs, start = cases(), 0, time.monotonic()
    noise = -torch.empty(STEPS, 20, 51, device="cuda").exponential_().log()
    with persistent.serve(), torch.no_grad():
        while time.monotonic() - start < seconds:
            end = int(torch.randint(51, ()))
            results: dict[str, list[torch.Tensor]] = {op: [] for op in inputs}
            with torch.cuda.stream(side):
                for _ in range(8):
                    target.copy_(source)
            for op, tensors in inputs.items():
                for _ in range(3):
                    tokens = getattr(torch.ops.fastvae, op)
                    rest = (1e-4, end, 0) if op == "decode_lstm" else (True, end, 0)
                    results[op].append(tokens(*tensors, noise, *rest))
            for op, tokens in results.items():
                assert all(torch.equal(tokens[0], again) for again in tokens), (
                    f"{op} is not the same"
                )
            runs += 3 * len(inputs)
    print(f"{runs} decodings of {STEPS} steps, all repeated exactly")


if __name__ == "__main__":
    main()
