"""decode_bytenet on the GPU's kernels, in Triton's interpreter where there is no GPU."""

from contextlib import contextmanager

import pytest
import torch
from test_decode_bytenet import NAMES, gumbel, make

from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.decode_lstm import pack_reference


@pytest.fixture
def kernels(monkeypatch):
    """Those of the op, with chunks of two steps."""
    kernels = pytest.importorskip("fastvae.kernels.decode_bytenet")
    monkeypatch.setattr("fastvae.kernels.decode.STEPS", 2)
    return kernels


@pytest.fixture(params=["whole", "chunks"])
def triton_decode(request, kernels, monkeypatch):
    """The two ways to decode: all steps in one kernel, or by the chunk."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if request.param == "chunks":
        monkeypatch.setattr(kernels, "launch", lambda *_: None)

    def run(inputs, noise=None, carry=True, end_id=None, pad_id=None, packed=None, int8=False):
        tensors = [t if t is None else t.to(device) for t in (*inputs, noise)]
        return kernels.decode_bytenet(*tensors, carry, end_id, pad_id, packed, int8).cpu()

    return run


# More sequences than a program takes; channels that are padded, several passes over the tokens.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (5, 17, 3, 7, 4, 2),
        (3, 2, 0, 17, 65, 1),
        (3, 2, 4, 5, 6, 0),
        (9, 4, 0, 31, 65, 1),
    ],
)
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
def test_triton(triton_decode, shape, noisy):
    inputs, noise = make(shape), gumbel(shape) if noisy else None
    for carry in (True, False) if noisy else (True,):
        tokens = triton_decode(inputs, noise, carry)
        assert torch.equal(tokens, decode_bytenet_reference(*inputs, noise, carry))


def test_triton_takes_any_strides(triton_decode):
    shape = (5, 17, 3, 7, 4, 2)
    inputs, noise = make(shape), gumbel(shape)
    strided = [torch.stack([t, t.neg()], -1)[..., 0] for t in (*inputs, noise)]
    assert not any(t.is_contiguous() for t in strided)
    tokens = triton_decode(strided[:-1], strided[-1])
    assert torch.equal(tokens, decode_bytenet_reference(*inputs, noise, True))


def test_triton_end_id(triton_decode):
    shape = (7, 6, 4, 5, 4, 2)
    inputs, noise = make(shape), gumbel(shape)
    inputs[5] /= 4
    ends = {"end_id": 2, "pad_id": 1}
    tokens = triton_decode(inputs, noise, **ends)
    assert torch.equal(tokens, decode_bytenet_reference(*inputs, noise, True, 2, 1))
    inputs[6][2] = 1e6  # all end at once: features after it are never read
    inputs[0][1:] = float("nan")
    assert triton_decode(inputs, **ends).tolist() == [[2] + [1] * 6] * 6


def test_triton_chooses_as_torch(triton_decode):
    """Ties go to the first, 0 equals −0, NaN is largest, and −inf may be all there is."""
    inf, nan = float("inf"), float("nan")
    rows = [[0, -0.0, 0], [-0.0, 0, 0], [1, 3, 3], [-3, -1, -2], [-1e-40, -1e-30, -1e-35]]
    rows += [[inf, nan, nan], [-nan, inf, 0], [-inf, -inf, -inf], [-inf, -1, inf], [nan, 9, nan]]
    noise = torch.tensor(rows).unsqueeze(1)
    inputs = make((len(rows), 1, 2, 3, 3, 1))
    inputs[5].zero_()
    inputs[6].zero_()
    assert torch.equal(triton_decode(inputs, noise)[0], noise.argmax(-1)[:, 0])


@pytest.mark.parametrize("name", [*NAMES, "noise"])
def test_triton_rejects(triton_decode, name):
    n = [*NAMES, "noise"].index(name)
    # What sets a size for others is not blamed for its length itself.
    sizes = {"features": "noise", "conv_weight": "conv_bias"}
    sizes["classifier_weight"] = "token_embeddings"
    for wrong, blamed in (
        (lambda t: t[..., None], name),
        (lambda t: torch.cat([t, t]), sizes.get(name, name)),
        (lambda t: t.double(), "feature_weight" if name == "features" else name),
    ):
        inputs = [*make(), gumbel((6, 3, 4, 5, 7, 2))]
        inputs[n] = wrong(inputs[n])
        with pytest.raises(RuntimeError, match=rf"\b{blamed} must have"):
            triton_decode(inputs[:-1], inputs[-1])
    for ids, message in (
        ((7, 0), "end_id must be from 0 to 6, got 7"),
        ((-1, 0), "end_id must be from 0 to 6, got -1"),
        ((2, None), "pad_id must be 0 or more where end_id is given, got None"),
        ((2, -1), "pad_id must be 0 or more where end_id is given, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            triton_decode(make(), None, True, *ids)


def test_triton_packed(triton_decode):
    """Packed weights change nothing; integers are for the reference."""
    inputs = make()
    packed = pack_reference(inputs[1], inputs[3], inputs[5])
    assert torch.equal(triton_decode(inputs, packed=packed), triton_decode(inputs))
    tokens = triton_decode(inputs, int8=True)
    assert torch.equal(tokens, decode_bytenet_reference(*inputs, int8=True))


def test_triton_leaves_float64_to_pytorch(triton_decode):
    shape = (5, 3, 3, 7, 4, 2)
    inputs, noise = make(shape, torch.float64), gumbel(shape, torch.float64)
    want = decode_bytenet_reference(*inputs, noise, True, 2, 1)
    assert torch.equal(triton_decode(inputs, noise, True, 2, 1), want)


def test_triton_launch(kernels):
    """Which shapes one program can serve, and what it takes at once."""
    for dtype, largest in ((torch.float32, 64), (torch.bfloat16, 256), (torch.float16, 256)):
        for C in (1, 16, 17, 48, 64, 256):
            launch = kernels.launch(64, C, dtype, False)
            assert (launch is not None) == (largest >= C)
            if launch:
                assert launch["COLS"] >= kernels.padded(C) >= C and launch["ROWS"] >= 16
            assert kernels.launch(64, C, dtype, True) is None
        assert kernels.launch(2048, 16, dtype, False) and not kernels.launch(2049, 16, dtype, False)


def test_triton_grid(kernels, monkeypatch):
    """The launch alone: a program for each rows of the batch, tensors in the layout it reads."""
    launches = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, args, options))

    monkeypatch.setattr(kernels, "sequence_kernel", Stub())
    inputs = make((6, 33, 4, 20, 7, 2), torch.bfloat16)
    kernels.decode_bytenet(*inputs, None, True, 2, 1)
    ((grid, args, options),) = launches
    projected, rows, weight, bias, classifier, _, noise, state, tokens, *sizes = args
    assert grid == (3,) and sizes == [6, 33, 32, 7, 2, 2, 1] and noise is None
    assert not options["NOISE"] and options["CARRY"] and options["COLS"] == 32
    assert all(t.is_contiguous() for t in args if isinstance(t, torch.Tensor))
    assert projected.shape == (6, 33, 64) and rows.shape == (8, 64)
    assert state.shape == (2, 3, 33, 32) and not state.any() and (tokens == 1).all()
    assert torch.equal(weight[1, 2, :20, 0, :20], inputs[3][1, 40:60, :, 0])
    assert torch.equal(bias[:, 1, :20], inputs[4][:, 20:40])
    padding = (weight[:, :, 20:], weight[..., 20:], bias[..., 20:], classifier[:, 20:])
    assert not any(t.any() for t in padding)


@pytest.mark.parametrize("triton_decode", ["chunks"], indirect=True)
def test_triton_chunks_stop_early(triton_decode, monkeypatch):
    """Work stops after the chunk in which the last sequence ends."""
    from fastvae.kernels import decode

    chunks, held = [], decode.held

    @contextmanager
    def counted(*args):
        with held(*args) as (own, run):
            yield own, lambda: chunks.append(len(own[0])) or run()

    monkeypatch.setattr(decode, "held", counted)
    monkeypatch.setattr(decode, "STEPS", 4)
    inputs = make((10, 2, 3, 4, 5, 1))
    triton_decode(inputs)
    assert chunks == [4, 4, 4]
    inputs[6][3] = 1e6
    triton_decode(inputs, end_id=3, pad_id=0)
    assert chunks == [4, 4, 4, 4]


def test_triton_multiplies_as_torch_is_told(kernels, monkeypatch):
    """float32 in full, unless torch's own switch allows TF32; the interpreter knows no TF32."""
    precisions, launch = [], kernels.sequence_kernel

    class Recording:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                precisions.append(options["PRECISION"])
                launch[grid](*arguments, **options)

            return run

    monkeypatch.setattr(kernels, "sequence_kernel", Recording())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [t.to(device) for t in make()]
    want = kernels.decode_bytenet(*inputs, None, True, None, None)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(kernels.decode_bytenet(*inputs, None, True, None, None), want)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert precisions == ["ieee", "tf32"]
