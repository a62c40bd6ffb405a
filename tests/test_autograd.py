"""Derivatives through torch.func, and the ones that are refused."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae.ops.highway_conv import highway_conv, highway_conv_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_reference
from fastvae.ops.linear import linear, linear_reference

SIZES = {
    "latent_size": 4,
    "encoder_channels": (8, 8),
    "feature_channels": 8,
    "hidden_size": 16,
}


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def last_state(op):
    """The loss of c_n alone: nothing reaches h."""
    return lambda *inputs: op(*inputs)[1]


CASES = {
    "linear": (linear, linear_reference, [(5, 3), (4, 3), (4,)]),
    "layer_norm_lstm": (
        lambda *inputs: layer_norm_lstm(*inputs)[0],
        lambda *inputs: layer_norm_lstm_reference(*inputs)[0],
        [(3, 2, 20), (20, 5), (20,), (20,), (2, 5), (2, 5)],
    ),
    "layer_norm_lstm lengths": (
        lambda *inputs: layer_norm_lstm(*inputs, lengths=torch.tensor([1, 3]))[0],
        lambda *inputs: layer_norm_lstm_reference(*inputs, lengths=torch.tensor([1, 3]))[0],
        [(3, 2, 20), (20, 5), (20,), (20,), (2, 5), (2, 5)],
    ),
    "c_n": (
        last_state(layer_norm_lstm),
        last_state(layer_norm_lstm_reference),
        [(3, 2, 20), (20, 5), (20,), (20,), (2, 5), (2, 5)],
    ),
    "highway_conv": (highway_conv, highway_conv_reference, [(3, 2, 5), (15, 5, 2), (15,)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("argument", [0, 1])
def test_reverse_mode(name, argument):
    op, reference, shapes = CASES[name]
    inputs = tensors(*shapes)

    def of_one(function):
        return lambda x: function(*inputs[:argument], x, *inputs[argument + 1 :])

    x = inputs[argument]
    ours, theirs = of_one(op), of_one(reference)
    torch.testing.assert_close(
        grad(lambda x: ours(x).square().sum())(x), grad(lambda x: theirs(x).square().sum())(x)
    )
    y, pull = vjp(ours, x)
    torch.testing.assert_close(pull(torch.ones_like(y)), vjp(theirs, x)[1](torch.ones_like(y)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobian():
    x, weight, bias = tensors((2, 3), (4, 3), (4,))
    found = jacrev(lambda x: linear(x, weight, bias))(x)
    expected = torch.einsum("ab,ij->aibj", torch.eye(2), weight.to(torch.float32)).to(x.dtype)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model(masked):
    sizes = SIZES | ({"pad_id": 0, "mask_pad": True} if masked else {})
    models = [fastvae.HybridVAE(20, 16, **sizes), fastvae.reference.HybridVAE(20, 16, **sizes)]
    models[1].load_state_dict(models[0].state_dict())
    x, z = torch.randint(20, (1, 16)), torch.randn(4)
    x[:, 9:] = 0

    def slope(model):
        model.eval().double()
        return grad(lambda z: model.log_likelihood(x, z[None]).sum())(z.double())

    torch.testing.assert_close(*map(slope, models))


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_refused(name):
    op, _, shapes = CASES[name]
    inputs = tensors(*shapes)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative: use reverse mode"):
        jvp(lambda x: op(x, *inputs[1:]), (inputs[0],), (torch.ones_like(inputs[0]),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[1], torch.ones_like(inputs[1]))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            op(inputs[0], dual, *inputs[2:])


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_over_reverse_is_refused(name):
    op, _, shapes = CASES[name]
    inputs = tensors(*shapes)
    slope = grad(lambda x: op(x, *inputs[1:]).sin().sum())
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jvp(slope, (inputs[0],), (torch.ones_like(inputs[0]),))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jacfwd(slope)(inputs[0])


@pytest.mark.parametrize("name", CASES)
def test_activation_checkpointing(name):
    op, reference, shapes = CASES[name]
    grads = []
    for function in (op, reference):
        inputs = [x.requires_grad_() for x in tensors(*shapes)]
        checkpoint(function, *inputs, use_reentrant=False).sin().sum().backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", CASES)
def test_second_derivative_is_refused(name):
    op, _, shapes = CASES[name]
    inputs = tensors(*shapes)

    def penalty(x):
        return grad(lambda x: op(x, *inputs[1:]).square().sum())(x).square().sum()

    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad(penalty)(inputs[0])
