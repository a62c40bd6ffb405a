"""Graphs on the GPU: changed inputs and weights, streams, threads, captures, short memory."""

import threading
from functools import partial

import pytest
import torch

from fastvae import nn, ops, reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.testing import assert_accurate, gradients

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fastvae.kernels import graphs

T, B, H = 12, 5, 96


def make(T=T, B=B, H=H, dtype=torch.float32):
    shapes = (T, B, 4 * H), (4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H)
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    tensors[1] /= H**0.5
    return [t.to(dtype) for t in tensors]


def decoding(T=40, B=5, D=8, H=96, V=33):
    shapes = (T, B, D), (4 * H, D), (V + 1, 4 * H), (4 * H, H), (4 * H,), (4 * H,)
    shapes += (V, H), (V,), (B, H), (B, H)
    return [torch.randn(shape, device="cuda") for shape in shapes]


def test_changed_inputs_and_weights(kept):
    """One graph each for forward with and without saving, and for backward."""
    for _ in range(3):
        inputs = make()
        assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
        fn = gradients(ops.layer_norm_lstm), gradients(layer_norm_lstm_reference)
        assert_accurate(*fn, *inputs)
    assert len(kept) == 3


def test_outputs_are_fresh_memory(kept):
    inputs = make()
    first = ops.layer_norm_lstm(*inputs)
    before = [t.clone() for t in first]
    inputs[0].neg_()
    second = ops.layer_norm_lstm(*inputs)
    assert all(map(torch.equal, first, before)) and not torch.equal(first[0], second[0])


def test_two_layers_with_both_forwards_before_either_backward(kept):
    """Stacked, of one shape, trained for three steps in place: equal to the reference models."""

    def train(modules, dtype, x):
        torch.manual_seed(1)
        layers = [modules.LayerNormLSTM(H, H, device="cuda", dtype=dtype) for _ in range(2)]
        weights = [p for layer in layers for p in layer.parameters()]
        with torch.no_grad():
            for p in weights:
                p.copy_(torch.linspace(-0.1, 0.1, p.numel()).sin().view_as(p) * 3)
        for _ in range(3):
            y = layers[1](layers[0](x.to(dtype))[0])[0]
            grads = torch.autograd.grad(y.square().mean() * 100, weights)
            with torch.no_grad():
                for p, g in zip(weights, grads, strict=True):
                    p -= 0.1 * g
        return y.detach(), *(p.detach() for p in weights)

    x = torch.randn(T, B, H, device="cuda")
    assert_accurate(lambda x: train(nn, x.dtype, x), lambda x: train(reference, x.dtype, x), x)
    assert len(kept) == 2


def test_two_streams_at_once(kept):
    """Each has graphs of its own, and the results of working alone."""
    cases = [[make(T=60, B=32), decoding()] for _ in range(2)]

    def work(lstm, decode):
        h, c_n, *saved = torch.ops.fastvae.layer_norm_lstm(*lstm, 1e-4, True)
        ones = torch.ones_like(h), torch.ones_like(c_n)
        grads = torch.ops.fastvae.layer_norm_lstm_backward(*ones, *lstm[1:], h, *saved)
        return h, c_n, *grads, ops.decode_lstm(*decode)

    want = [work(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, case, result in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(work(*case))
    torch.cuda.synchronize()
    for alone, result in zip(want, results, strict=True):
        for got in result:
            for a, b in zip(alone, got, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(kept) == 9


@pytest.mark.parametrize("own_stream", [False, True], ids=["one stream", "a stream each"])
def test_python_threads(kept, own_stream):
    cases = [make(B=n) for n in (3, 4, 3, 4)]
    want = [ops.layer_norm_lstm(*case)[0] for case in cases]
    torch.cuda.synchronize()
    wrong = []

    def work(case, expected):
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                if not torch.equal(ops.layer_norm_lstm(*case)[0], expected):
                    wrong.append(case)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_a_capture_of_the_callers(kept):
    """Launched directly: the caller's graph reads the caller's tensors."""
    inputs, decode = make(), decoding()
    ops.layer_norm_lstm(*inputs)
    ops.decode_lstm(*decode, end_id=3, pad_id=0)
    torch.cuda.synchronize()
    before, graph = dict(kept), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, _ = ops.layer_norm_lstm(*inputs)
        tokens = ops.decode_lstm(*decode, end_id=3, pad_id=0)
    assert dict(kept) == before
    for _ in range(2):
        for t in (*inputs, *decode):
            t.copy_(torch.randn_like(t))
        graph.replay()
        assert torch.equal(tokens, ops.decode_lstm(*decode, end_id=3, pad_id=0))
        torch.testing.assert_close(h, ops.layer_norm_lstm(*inputs)[0])


def test_inference_mode_and_autocast(kept):
    inputs = make()
    with torch.inference_mode():
        ops.layer_norm_lstm(*inputs)
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    with torch.autocast("cuda", torch.bfloat16):
        fn = gradients(ops.layer_norm_lstm), gradients(layer_norm_lstm_reference)
        grads = fn[0](*inputs)
    assert {g.dtype for g in grads} == {torch.float32}
    module = nn.LayerNormLSTM(7, H, device="cuda")
    x = torch.randn(T, B, 7, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_settings_make_graphs_of_their_own(kept):
    """Replays never round more than the settings at the time of the call allow."""
    inputs = make(B=64, H=512)
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    torch.set_float32_matmul_precision("high")
    try:
        rough = ops.layer_norm_lstm(*inputs)[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(kept) == 2
    torch.use_deterministic_algorithms(False)
    plain = ops.layer_norm_lstm(*inputs)[0]
    torch.use_deterministic_algorithms(True)
    assert len(kept) == 3
    assert torch.equal(plain, ops.layer_norm_lstm(*inputs)[0])
    assert (rough - plain).abs().max() < 0.1


def test_the_cache_is_bounded(kept):
    for n in range(1, graphs.KEPT + 5):
        ops.layer_norm_lstm(*make(T=2, B=n, H=16))
    assert len(kept) == graphs.KEPT
    sizes = {key[4][0][0][1] for key in kept}
    assert sizes == set(range(5, graphs.KEPT + 5))


@pytest.fixture
def limited():
    """limited(bytes): how much may be allocated from here on; None: all there is."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(size):
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0) if size else 1.0)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_short_memory_launches_directly(kept, limited, monkeypatch):
    """Memory for the loop, but not for a graph's copies of all it reads and writes."""
    inputs = make(T=128, B=128, H=512)
    run = partial(torch.ops.fastvae.layer_norm_lstm, *inputs, 1e-4, True)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICE", "none")
        want = run()
        del want
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        want = run()
        peak = torch.cuda.max_memory_reserved()
    values = [t.cpu() for t in want]
    del want
    torch.cuda.empty_cache()
    limited(1.2 * peak)
    for _ in range(2):
        got = run()
        for a, b in zip(got, values, strict=True):
            torch.testing.assert_close(a.cpu(), b)
        del got
    assert not kept
    limited(None)
    run()
    assert len(kept) == 1


def test_out_of_memory_leaves_the_process_usable(kept, limited):
    small = make()
    want = ops.layer_norm_lstm(*small)[0]
    large = make(T=128, B=128, H=512)
    torch.cuda.empty_cache()
    limited(torch.cuda.memory_reserved() + (1 << 20))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            torch.ops.fastvae.layer_norm_lstm(*large, 1e-4, True)
    limited(None)
    assert torch.equal(ops.layer_norm_lstm(*small)[0], want)
    assert torch.ops.fastvae.layer_norm_lstm(*large, 1e-4, True)[0].isfinite().all()


def test_another_device(kept):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    inputs = [t.to("cuda:1") for t in make()]
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
