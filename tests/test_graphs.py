"""kernels/graphs.py on CPU, with CUDA's streams and graphs replaced by ones that record on tensors.

The fake graph records every PyTorch call, and every Triton launch in the interpreter, and replays
them on the same memory, as CUDA does.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.testing import assert_accurate

graphs = pytest.importorskip("fastvae.kernels.graphs")


class Recorder(TorchDispatchMode):
    """What runs under it, as closures that write to the same memory again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)

        def again():
            new = func(*args, **kwargs)
            for o, n in zip(tree_leaves(outputs), tree_leaves(new), strict=True):
                if isinstance(o, torch.Tensor) and o.data_ptr() != n.data_ptr():
                    o.copy_(n)

        self.calls.append(again)
        return outputs


TAKEN = 512  # bytes, of what a recorded call allocates


class FakeCuda:
    """The parts of torch.cuda that graphs.py uses, for CPU tensors."""

    def __init__(self):
        self.stream_id, self.capturing, self.memory = 1, False, 1 << 40
        self.captures = self.replays = 0
        self.log, self.fail, self.recorder = [], [], threading.local()

    def current_stream(self, device):
        return self._stream(self.stream_id, device)

    def Stream(self, device):
        return self._stream("side", device)

    def _stream(self, name, device):
        wait = lambda other: self.log.append((name, "waits for", other.cuda_stream))  # noqa: E731
        return SimpleNamespace(cuda_stream=name, device=device, wait_stream=wait)

    def stream(self, stream):
        return nullcontext()

    def is_current_stream_capturing(self):
        return self.capturing

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=self.memory)

    def memory_reserved(self, device):
        """Every call so far has taken as much."""
        return TAKEN * len(self.recorder.now.calls)

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])

        def replay():
            self.replays += 1
            for call in graph.calls:
                call()

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and stream.cuda_stream == "side"
        self.log.append(("capture", "on", stream.cuda_stream))
        self.captures += 1
        if self.fail:
            raise self.fail.pop()
        with Recorder() as self.recorder.now:
            yield
        graph.calls = self.recorder.now.calls
        self.recorder.now = None

    def record_launches(self, monkeypatch):
        """Also of Triton's kernels in the interpreter, whose own PyTorch calls do not count."""
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        run = interpreter.InterpretedFunction.run

        def recorded(*args, **kwargs):
            recorder = getattr(self.recorder, "now", None)
            if recorder is None:
                return run(*args, **kwargs)
            known = len(recorder.calls)
            run(*args, **kwargs)
            recorder.calls[known:] = [lambda: run(*args, **kwargs)]

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", recorded)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    clear = lambda: fake.log.append("workspaces")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    graphs._graphs.clear()
    yield fake
    graphs._graphs.clear()


def powers(x, weight, count):
    """A loop with buffers, views, writes in place, and an input returned as it is."""
    out, total = x.new_empty(count, *x.shape), torch.zeros_like(x)
    for n in range(count):
        torch.mm(x if n == 0 else out[n - 1], weight, out=out[n])
        total += out[n]
    return out, total, x


def assert_right(x, weight, count=3):
    given = x.clone(), weight.clone()
    got = graphs.replayed(powers, (x, weight), count)
    for a, b in zip(got, powers(x, weight, count), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x, given[0]) and torch.equal(weight, given[1])
    return got


def make(rows=2, size=3, dtype=torch.float32):
    """Whole numbers, whose products are exact in any order."""
    x, weight = torch.randint(-3, 4, (rows, size)), torch.randint(-3, 4, (size, size))
    return x.to(dtype), weight.to(dtype)


def test_replays_read_what_is_given_and_return_fresh_memory(fake):
    kept = [assert_right(*make()) for _ in range(4)]
    assert fake.captures == 1 and fake.replays == 4
    values = [[t.clone() for t in outputs] for outputs in kept]
    assert_right(*make())
    for outputs, before in zip(kept, values, strict=True):
        assert all(map(torch.equal, outputs, before))
    (graph,) = graphs._graphs.values()
    own = {t.data_ptr() for t in (*graph.inputs, *graph.outputs)}
    assert not own & {t.data_ptr() for outputs in kept for t in outputs}


def test_strided_expanded_and_inference_inputs(fake):
    x, weight = make(4, 4)
    assert_right(x.T, weight.T)
    assert_right(x[:1].expand(4, 4), weight)
    with torch.inference_mode():
        assert_right(*make(4, 4))
    assert_right(x.requires_grad_().detach(), weight)
    with torch.inference_mode():  # a graph built here must serve outside
        assert_right(*make(5, 5))
    assert_right(*make(5, 5))
    assert fake.captures == 2


def test_the_capture_is_ordered_with_the_callers_stream(fake):
    assert_right(*make())
    assert fake.log == [
        ("side", "waits for", 1),
        (1, "waits for", "side"),
        "workspaces",
        ("capture", "on", "side"),
        "workspaces",
    ]


def test_keys(fake, monkeypatch):
    """Another graph for everything that changes what is launched; the same one otherwise."""

    def other(*inputs):
        return powers(*inputs)

    changes = [
        lambda: assert_right(*make(rows=5)),
        lambda: assert_right(*make(dtype=torch.float64)),
        lambda: assert_right(*make(), count=2),
        lambda: graphs.replayed(other, make(), 3),
        lambda: setattr(fake, "stream_id", 2),
        lambda: torch.use_deterministic_algorithms(False),
        lambda: monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
        lambda: torch.set_float32_matmul_precision("high"),
    ]
    precision = torch.get_float32_matmul_precision()
    settings = SimpleNamespace(
        fp32_precision="ieee",
        allow_fp16_reduced_precision_reduction=True,
        allow_bf16_reduced_precision_reduction=True,
        allow_fp16_accumulation=False,
    )
    changes.append(lambda: monkeypatch.setattr(torch.backends.cuda, "matmul", settings))
    changes += [
        lambda name=name: setattr(settings, name, not getattr(settings, name))
        for name in vars(settings)
    ]
    try:
        for n, change in enumerate(changes, 1):
            change()
            assert_right(*make())
            assert fake.captures == n + 1
            assert_right(*make())
            assert fake.captures == n + 1
        device = torch.zeros(()).device  # whose streams may be called as those of another
        assert all(device in key for key in graphs._graphs)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_unused_longest_goes_first(fake, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    for rows in (1, 2, 1, 3, 1):  # 3 takes the place of 2
        assert_right(*make(rows))
    assert fake.captures == 3
    assert_right(*make(2))
    assert fake.captures == 4 and len(graphs._graphs) == 2


def test_memory_is_bounded(fake):
    x, weight = make(rows=100)
    assert_right(x, weight)
    (graph,) = graphs._graphs.values()
    given = x.nbytes + weight.nbytes
    assert graph.bytes > given and (graph.bytes - given) % TAKEN == 0  # temporaries count
    fake.memory = graphs.SHARE * 2 * graph.bytes
    for rows in (99, 98, 97):
        assert_right(*make(rows))
    assert len(graphs._graphs) == 2
    fake.memory = graphs.SHARE * 2 * (x.nbytes + weight.nbytes)
    before = fake.captures
    assert_right(*make(rows=100))
    assert fake.captures == before  # too large to be kept: launched directly


def test_direct_launches(fake):
    x, weight = make()
    fake.capturing = True
    assert graphs.capturing(x.device)
    assert_right(x, weight)
    assert_right(x.T.contiguous().T, weight)
    assert fake.captures == 0
    fake.capturing = False
    assert not graphs.capturing(x.device)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("none left"), torch.AcceleratorError("CUDA error: out of memory")],
    ids=lambda e: type(e).__name__,
)
def test_short_memory_launches_directly_and_frees_the_graphs(fake, error):
    assert_right(*make(rows=4))
    fake.fail = [error]
    assert_right(*make())
    assert not graphs._graphs and fake.log[-1] == "workspaces"
    assert_right(*make())
    assert len(graphs._graphs) == 1  # and the next call tries again


def test_short_memory_at_the_replay(fake, monkeypatch):
    assert_right(*make())
    (graph,) = graphs._graphs.values()
    alive = []

    def fails():
        raise torch.OutOfMemoryError("none left")

    graph.graph.replay = fails
    del graph
    monkeypatch.setattr(graphs._graphs, "clear", lambda: alive.append(True), raising=False)
    assert_right(*make())
    assert alive


@pytest.mark.parametrize("error", [RuntimeError("wrong"), torch.AcceleratorError("launch failed")])
def test_other_errors_are_raised_and_leave_nothing(fake, error):
    fake.fail = [error]
    with pytest.raises(type(error), match=str(error)):
        graphs.replayed(powers, make(), 3)
    assert not graphs._graphs and fake.log[-1] == "workspaces"
    assert_right(*make())


def test_errors_of_the_function_are_raised(fake):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        graphs.replayed(lambda x, w: (x @ w,), (torch.ones(2, 3), torch.ones(2, 3)))
    assert not graphs._graphs


def test_python_threads(fake):
    def work(rows):
        return [assert_right(*make(rows)) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [1, 2, 1, 2, 3, 1, 2, 3]))
    assert fake.captures == 3


def test_held_carries_state(fake):
    """State that fn writes in place goes on from run to run, and stays the caller's elsewhere."""

    def step(state, x):
        state += x
        return (state * 2,)

    for capturing in (False, True):
        fake.capturing = capturing
        state, x = torch.zeros(3), torch.ones(3)
        for _ in range(2):
            with graphs.held(step, (state.clone(), x)) as (own, run):
                got = []
                for n in range(3):
                    own[1].fill_(n + 1)
                    got.append(run()[0].clone())
            assert [t[0].item() for t in got] == [2, 6, 12]
        assert state.sum() == 0
        x.fill_(1)
    assert fake.captures == 1


def test_two_layers_with_both_forwards_before_either_backward(fake, monkeypatch):
    """Two of one shape share graphs and nothing else; weights change from step to step."""
    kernels = pytest.importorskip("fastvae.kernels.layer_norm_lstm")
    fake.record_launches(monkeypatch)
    T, B, H = 2, 1, 2

    def layer():
        parameters = torch.randn(4 * H, H), torch.rand(4 * H), torch.randn(4 * H)
        return [torch.randn(T, B, 4 * H), *parameters, torch.randn(B, H), torch.randn(B, H)]

    def both(*inputs):
        layers = inputs[:6], inputs[6:]
        outputs = [kernels.layer_norm_lstm(*layer, 1e-4, True) for layer in layers]
        gradients = []
        for layer, (h, c_n, *saved) in zip(layers, outputs, strict=True):
            ones = torch.ones_like(h), torch.ones_like(c_n)
            gradients += kernels.layer_norm_lstm_backward(*ones, *layer[1:], h, *saved)
        return *outputs[0][:2], *outputs[1][:2], *gradients

    def reference(*inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = [
            *layer_norm_lstm_reference(*inputs[:6]),
            *layer_norm_lstm_reference(*inputs[6:]),
        ]
        gradients = torch.autograd.grad(sum(t.sum() for t in outputs), inputs)
        return *(t.detach() for t in outputs), *gradients

    assert_accurate(both, reference, *layer(), *layer())
    assert fake.captures == 2 and fake.replays == 8 * 4
