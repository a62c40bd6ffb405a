"""Loops of kernel launches replayed as CUDA graphs: one launch for a whole sequence."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 16  # graphs, each with its own inputs and outputs; the one unused for longest goes first
_graphs: "OrderedDict[tuple, _Graph]" = OrderedDict()
_lock = threading.RLock()


class _Graph:
    """`fn` captured on inputs of its own, into which the caller's are copied before each replay."""

    def __init__(self, fn: Callable, tensors: tuple[Tensor, ...], options: tuple) -> None:
        self.inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        # Kernels compile and libraries choose their algorithms before the capture.
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(stream):
            fn(*self.inputs, *options)
        torch.cuda.current_stream(tensors[0].device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.outputs = fn(*self.inputs, *options)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)


def capturing(device: torch.device) -> bool:
    """Whether the caller is capturing a graph, so that nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replayed(fn: Callable, tensors: tuple[Tensor, ...], *options) -> tuple[Tensor, ...]:
    """fn(*tensors, *options), a loop of launches, from a graph of these sizes; outputs are fresh.

    Each stream has graphs of its own, so that streams never share buffers. Under a capture of the
    caller's, off CUDA, and where memory is short, fn is launched directly.
    """
    device = tensors[0].device
    if device.type != "cuda" or capturing(device):
        return fn(*(t.contiguous() for t in tensors), *options)
    stream = torch.cuda.current_stream(device).cuda_stream
    key = fn, device, stream, options, tuple((t.shape, t.dtype) for t in tensors)
    with _lock, torch.cuda.device(device):
        try:
            graph = _graphs.pop(key, None) or _Graph(fn, tensors, options)
        except torch.OutOfMemoryError:
            _graphs.clear()
            return fn(*(t.contiguous() for t in tensors), *options)
        _graphs[key] = graph
        while len(_graphs) > KEPT:
            _graphs.popitem(last=False)
        return graph(tensors)
