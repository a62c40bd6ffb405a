"""highway_conv on the GPU's kernels, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from test_highway_conv import EVERY_ARGUMENT, NAMES, OPS, WRONG_SHAPES, both, make

from fastvae.testing import assert_accurate

kernels = pytest.importorskip("fastvae.kernels.highway_conv")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_op(op, given=lambda t: t):
    """The kernels as `both` of an op, the gradients of whose outputs are given(each)."""
    carry = () if op == "project" else (not op.endswith("no-carry"),)

    def run(*inputs):
        inputs = [t.to(DEVICE) for t in inputs]
        name = f"highway_conv_{op.split('-')[0]}"
        outputs = getattr(kernels, name)(*inputs, *carry)
        saved = (*inputs[:2], *outputs[:2]) if op == "project" else (*inputs, *carry)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [given(torch.linspace(-1, 1, y.numel()).to(y).view_as(y)) for y in outputs]
        grads = getattr(kernels, f"{name}_backward")(*cotangents, *saved)
        assert all(t.is_contiguous() for t in (*outputs, *grads))
        return tuple(t.cpu() for t in (*outputs, *grads))

    return run


# The last one has more rows than one program adds up.
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 15), (2, 17, 23), (10, 20, 90)], ids=str)
@pytest.mark.parametrize("op", ["project", "gate", "gate-no-carry"])
def test_triton(op, shape):
    assert_accurate(triton_op(op), both(OPS[op][1]), *make(op, shape))


@pytest.mark.parametrize("carry", [True, False])
def test_triton_folded(carry):
    def folded(*inputs):
        return kernels.highway_conv(*(t.to(DEVICE) for t in inputs), carry).cpu()

    reference = OPS["folded" if carry else "folded-no-carry"][1]
    assert_accurate(folded, reference, *make("folded", (4, 3, 17)))


@pytest.mark.parametrize("op", OPS)
def test_triton_runs_float64_as_the_reference(op):
    inputs = make(op, dtype=torch.float64)
    if op.startswith("folded"):
        found = kernels.highway_conv(*(t.to(DEVICE) for t in inputs), op == "folded").cpu()
        torch.testing.assert_close(found, OPS[op][1](*inputs), rtol=1e-12, atol=1e-12)
    else:
        expected = both(OPS[op][1])(*inputs)
        torch.testing.assert_close(triton_op(op)(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 1e3])
def test_triton_statistics(offset, monkeypatch):
    """Five programs' rows, the last ones not all there, combined two programs at a time.

    E[a²] − E[a]² would be lost at the offset.
    """
    monkeypatch.setitem(kernels.COMBINE, "PARTS", 2)

    def project(*inputs):
        outputs = kernels.highway_conv_project(*(t.to(DEVICE) for t in inputs))
        return tuple(t.cpu() for t in outputs)

    x, weight, bias = make("project", (9, 60, 1))
    assert_accurate(project, OPS["project"][1], x, weight, bias + offset)


def every_other(t):
    return torch.stack([t, t.neg()], -1)[..., 0]


@pytest.mark.parametrize("op", ["project", "gate"])
def test_triton_takes_any_strides(op):
    """Of inputs, and of the gradients of outputs."""

    def strided(*inputs):
        return triton_op(op, every_other)(*map(every_other, inputs))

    assert_accurate(strided, both(OPS[op][1]), *make(op, (3, 2, 5)))


@pytest.mark.parametrize("op, name", EVERY_ARGUMENT)
def test_triton_rejects(op, name):
    fn = kernels.highway_conv if op == "folded" else getattr(kernels, f"highway_conv_{op}")
    n, carry = NAMES[op].index(name), () if op == "project" else (True,)
    for wrong in (WRONG_SHAPES[name], lambda t: t.double()):
        inputs = make(op)
        inputs[n] = wrong(inputs[n])
        wanted = r"\w+" if name == "x" else name  # x says what T and the dtype are
        with pytest.raises(RuntimeError, match=rf"^{wanted} must have"):
            fn(*inputs, *carry)
