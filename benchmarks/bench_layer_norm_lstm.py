"""LayerNorm-LSTM as a module with its input projection, forward and backward.


`compile` compiles the step: the loop unrolled takes minutes. `nn.LSTM` has no norm: another
function, shown as what the machine's vendor makes of the same products.
"""

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell
from fastvae.testing import assert_accurate, gradients

INPUTS = 200
SHAPES = [(48, 64, 500), (60, 128, 1000), (128, 32, 1000)]


class CompiledStep(fastvae.reference.LayerNormLSTM):
    """The reference with its step compiled."""

    step = staticmethod(torch.compile(layer_norm_lstm_cell))

    def forward(self, x: Tensor):
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        outputs = []
        for x_t in nn.functional.linear(x, self.weight_ih, self.bias):
            a = x_t + h @ self.weight_hh.T
            h, c = self.step(a, c, self.norm_weight, self.norm_bias, self.eps)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


RIVALS = {
    "fastvae": fastvae.nn.LayerNormLSTM,
    "eager": fastvae.reference.LayerNormLSTM,
    "compile": CompiledStep,
    "nn.LSTM": nn.LSTM,
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_lstm(time, rival, shape):
    T, B, H = shape
    module = RIVALS[rival](INPUTS, H)
    x = torch.randn(T, B, INPUTS)
    if rival == "fastvae":
        twin = fastvae.reference.LayerNormLSTM(INPUTS, H)
        twin.load_state_dict(module.state_dict())
        wide = fastvae.reference.LayerNormLSTM(INPUTS, H, dtype=torch.float64)
        wide.load_state_dict(module.state_dict())

        def plain(x: Tensor) -> Tensor:
            return (wide if x.dtype == torch.float64 else twin)(x)[0]

        assert_accurate(gradients(lambda x: module(x)[0]), gradients(plain), x[:4])

    def step() -> None:
        module(x)[0].sum().backward()
        module.zero_grad()

    products = 8 * T * B * H * (H + INPUTS)
    time(f"LayerNorm-LSTM forward and backward T={T} B={B} H={H}", step, 3 * products, rounds=3)
