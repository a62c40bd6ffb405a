"""A training step as one launch: recorded once as a CUDA graph, then replayed with new inputs.

A step of a small model consists of hundreds of short kernels that take longer to launch than to
run.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, cuda

WARM_UP = 3  # steps before the recording, in which kernels compile and libraries choose algorithms


class RecordedStep:
    """A training step that is recorded once as a CUDA graph and then replayed: tensors -> tensor.

    The fourth call records the graph, later calls replay it. A call runs `fn` once: zero_grad(),
    forward, backward and the step of a capturable optimizer. All other tensors that `fn` reads or
    writes, such as parameters, must keep their addresses. Python numbers keep the values of the
    recording: a learning rate that changes must be a tensor.

    Args:
        fn: the step, tensors -> tensor. If it synchronizes with the device it cannot be recorded;
            then `say` gets one line and `fn` runs kernel by kernel.
        device: a CUDA device.
        say: receives a line of text.

    Raises:
        ValueError: the device is not CUDA, or inputs have other shapes than in the first call.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        device: torch.device | str = "cuda",
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.fn, self.device, self.say = fn, torch.device(device), say
        if self.device.type != "cuda":
            raise ValueError(f"a step is recorded on a CUDA device, not on {self.device}")
        self.stream = cuda.Stream(self.device)
        self.calls, self.shapes = 0, []
        self.graph: cuda.CUDAGraph | None = None
        self.failed = False

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Run the step on new inputs -> its output.

        Args:
            tensors: inputs of `fn`, on any device, or None; shapes as in the first call.

        Raises:
            ValueError: inputs have other shapes than in the first call.
        """
        shapes = [None if t is None else t.shape for t in tensors]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise ValueError(f"inputs had the shapes {self.shapes} at first, now {shapes}")
        self.calls += 1
        if self.calls > WARM_UP and self.graph is None and not self.failed:
            self._record(tensors)
        if self.graph is None:
            return self._run(tensors)
        for own, given in zip(self.inputs, tensors, strict=True):
            if own is not None:
                own.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _run(self, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Run the step without a graph, on the stream of the recording."""
        current = cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with cuda.stream(self.stream):
            result = self.fn(*(t if t is None else t.to(self.device) for t in tensors))
        current.wait_stream(self.stream)
        return result

    def _record(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Record the step as a graph; if that fails, say why."""
        self.inputs = [t if t is None else t.to(self.device, copy=True) for t in tensors]
        graph = cuda.CUDAGraph()
        # The graph needs its own cuBLAS workspace: the stream's may be freed.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.fn(*self.inputs)
        except RuntimeError as error:
            self.failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"steps are launched kernel by kernel, not as one CUDA graph: {reason}")
        else:
            self.graph = graph
        finally:
            torch._C._cuda_clearCublasWorkspaces()
