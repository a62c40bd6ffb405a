"""Loops of kernel launches replayed as CUDA graphs: one launch for a whole sequence.

A graph reads its own copies of the inputs, into which the caller's are copied before each replay,
and its outputs are copied out, so that what the caller holds is always fresh memory.
"""

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, cuda

KEPT = 16  # graphs; the one unused for longest goes first
SHARE = 4  # together they hold at most this part of the device's memory
DEVICE = "cuda"
_graphs: "OrderedDict[tuple, _Graph]" = OrderedDict()
_lock = threading.RLock()  # of _graphs, and of captures: a process can have one at a time
atexit.register(_graphs.clear)  # while CUDA still lives


class _Graph:
    """`fn` captured on inputs of its own, on behalf of the stream that will replay it."""

    def __init__(self, fn: Callable, tensors: tuple[Tensor, ...], options: tuple, stream) -> None:
        self.lock, self.stream = threading.RLock(), stream
        self.graph, side = cuda.CUDAGraph(), cuda.Stream(stream.device)
        with torch.no_grad(), cuda.stream(stream):
            self.inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
            # Kernels compile and libraries choose their algorithms before the capture.
            side.wait_stream(stream)
            with cuda.stream(side):
                fn(*self.inputs, *options)
            stream.wait_stream(side)
            # The products' workspace must be the graph's own: others would write to it meanwhile.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    before = cuda.memory_reserved(stream.device)
                    self.outputs = fn(*self.inputs, *options)
                    taken = cuda.memory_reserved(stream.device) - before  # temporaries too
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        self.bytes = sum(t.nbytes for t in self.inputs) + taken

    def load(self, tensors: tuple[Tensor, ...]) -> None:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)

    def __call__(self) -> tuple[Tensor, ...]:
        """The graph's own outputs, which its next replay overwrites."""
        self.graph.replay()
        return self.outputs


def replayed(fn: Callable, tensors: tuple[Tensor, ...], *options) -> tuple[Tensor, ...]:
    """fn(*tensors, *options), a loop of launches, from a graph of these sizes; outputs are fresh.

    Each stream has graphs of its own, so that streams never share buffers. Under a capture of the
    caller's, off CUDA, and where memory is short, fn is launched directly.
    """
    try:
        return _replay(fn, tensors, options)
    except RuntimeError as error:
        if not _short_of_memory(error):
            raise
    # The error, and with it what its frames held, is gone.
    with _lock:
        _graphs.clear()
    return fn(*(t.contiguous() for t in tensors), *options)


def _replay(fn: Callable, tensors: tuple[Tensor, ...], options: tuple) -> tuple[Tensor, ...]:
    with held(fn, tensors, *options) as (_, run):
        outputs = run()
        return tuple(t.clone() for t in outputs) if isinstance(run, _Graph) else outputs


@contextmanager
def held(
    fn: Callable, tensors: tuple[Tensor, ...], *options
) -> Iterator[tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]]:
    """Own copies of the tensors, and what runs fn(*copies, *options) as often as it is called.

    fn may write to the copies, which carry state from one run to the next. Launched directly they
    may be the caller's tensors: state must be the caller's to write.
    """
    graph = _graph(fn, tensors, options)
    if graph is None:
        own = [t.contiguous() for t in tensors]
        yield own, lambda: fn(*own, *options)
        return
    with graph.lock:
        graph.load(tensors)
        yield graph.inputs, graph


def capturing(device: torch.device) -> bool:
    """Whether the caller is capturing a graph, so that nothing may wait for the device."""
    return device.type == DEVICE and cuda.is_current_stream_capturing()


def _graph(fn: Callable, tensors: tuple[Tensor, ...], options: tuple) -> _Graph | None:
    """The graph for these sizes, on the current stream; None where fn must be launched directly."""
    device = tensors[0].device
    if device.type != DEVICE or capturing(device):
        return None
    limit = cuda.get_device_properties(device).total_memory // SHARE
    if sum(t.nbytes for t in tensors) > limit // 3:  # it holds outputs besides
        return None
    stream = cuda.current_stream(device)
    sizes = tuple((t.shape, t.dtype) for t in tensors)
    key = fn, device, stream.cuda_stream, options, sizes, _settings()
    with _lock:
        graph = _graphs.pop(key, None) or _build(fn, tensors, options, stream)
        if graph is None:
            return None
        _graphs[key] = graph
        while len(_graphs) > KEPT or sum(g.bytes for g in _graphs.values()) > limit:
            _graphs.popitem(last=False)
        return _graphs.get(key)


def _build(fn: Callable, tensors: tuple[Tensor, ...], options: tuple, stream) -> _Graph | None:
    """A new graph; None where memory is short.

    It is built in a thread of its own, which knows of no inference mode, no autocast, and none of
    the memory pools into which torch.compile sends what its threads allocate.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_Graph, fn, tensors, options, stream).result()
    except RuntimeError as error:
        if not _short_of_memory(error):
            raise
    _graphs.clear()
    return None


def _short_of_memory(error: RuntimeError) -> bool:
    """Of the allocator's making, or of the driver's, which allocates for graphs by itself."""
    driver = isinstance(error, torch.AcceleratorError) and "out of memory" in str(error)
    return driver or isinstance(error, torch.OutOfMemoryError)


def _settings() -> tuple:
    """What the user may change that changes what fn launches."""
    matmul = torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
    )
