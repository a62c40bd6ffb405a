"""What is installed here: versions, build, machine, and which kernel serves which op."""

import platform
from importlib.util import find_spec
from typing import Any

import torch

import fastvae
from fastvae import _C

NO_TRITON = "nothing: Triton is not installed"
# What computes each op on a GPU: README's table, and here where kernels are registered.
ON_GPU = {
    "layer_norm_lstm": "Triton: H up to 2,048; float64 and packed rows in PyTorch",
    "highway_conv_project": "Triton: float64 in PyTorch",
    "highway_conv_gate": "Triton: float64 in PyTorch",
    "highway_conv": "Triton: float64 in PyTorch",
    "linear": "PyTorch",
    "unfold": "PyTorch",
    "fold": "PyTorch",
    "gumbel_noise": "Triton",
    "decode_lstm": "Triton: H and V up to 2,048; float64 and int8 in PyTorch",
    "decode_bytenet": "CUDA C++: C of 256 to 512, in bfloat16 up to 256 sequences, in float32 up "
    "to 128; else Triton: float64 and int8 in PyTorch",
    "decode_lstm_pack": "PyTorch, for Triton",
    "decode_bytenet_pack": "PyTorch",
}
BACKWARD = "layer_norm_lstm", "highway_conv_project", "highway_conv_gate", "linear"
ON_GPU |= {f"{op}_backward": ON_GPU[op] for op in BACKWARD}
# README and docs/performance.md say the same.
PROVED = (
    "run on an NVIDIA H100, but float32 changes made since have not; for AMD's cards compiled only"
)
PLAIN = "fastvae.reference has the same models in plain PyTorch, for any device"
PERSISTENT_PROVED = "run on an NVIDIA H100 before their launch changed"


def facts() -> dict[str, Any]:
    """Names and values for people and programs; `ops` maps each op to what serves it per device."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    backends = ("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)
    backend = next((f"{name} {version}" for name, version in backends if version), "CPU only")
    return {
        "fastvae": fastvae.__version__,
        "compiler": _C.compiler(),
        "torch": f"{torch.__version__}, {backend}",
        "Python": platform.python_version(),
        "CPU": f"{_cpu_name()}, {_C.cpu_capability()}",
        "threads": torch.get_num_threads(),
        "GPU": ", ".join(gpus) or "none",
        "Triton kernels": PROVED,
        "persistent CUDA kernels": _persistent(),
        "without kernels": PLAIN,
        "ops": {op: {"cpu": _server(op, "CPU"), "cuda": _server(op, "CUDA")} for op in _ops()},
    }


def _ops() -> list[str]:
    """Those that users call."""
    return [op for op in _registered() if not op.endswith("_persistent")]


def _registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastvae::") for name in names if name.startswith("fastvae::"))


def _server(op: str, key: str) -> str:
    """What the dispatcher calls for this op on a device of this kind, were there one."""
    if key == "CUDA":
        needs_triton = "Triton" in ON_GPU[op] and find_spec("triton") is None
        return NO_TRITON if needs_triton else ON_GPU[op]
    return "C++ kernel" if _has(op, key) else "PyTorch"


def _persistent() -> str:
    """Whether csrc/cuda was built, and for which ops its kernels come before Triton's."""
    known = set(_registered())
    names = {op: f"{op}_persistent" for op in _ops()}
    built = {op for op, name in names.items() if name in known and _has(name, "CUDA")}
    if not built:
        return "not built; `pip install -v` says why"
    serving = ", ".join(sorted(built & _served()))
    return f"built; serving {serving or 'nothing'}; {PERSISTENT_PROVED}"


def _served() -> set[str]:
    from fastvae.kernels import persistent

    return {*persistent.SERVING}


def _has(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvae::{op}", key)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
