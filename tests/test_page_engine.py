"""The page's engine against Python: random models of every kind, as WebAssembly and natively."""

import ctypes
import importlib.util
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from page_engine import SOURCE, NativeEngine, WasmEngine

from fastvae import LSTMVAE, HybridVAE, load, ops
from fastvae.nn import BatchNorm
from fastvae.page.weights import pack, rounded

EXAMPLES = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", autouse=True)
def native(tmp_path_factory):
    NativeEngine.build(tmp_path_factory.mktemp("engine"))


def shaken(model, seed):
    """Weights that make texts differ, and running norms that are no identity."""
    torch.manual_seed(seed)
    model.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 * torch.rand(()) + 1).add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


@st.composite
def models(draw):
    blocks = draw(st.integers(1, 3))
    sizes = {"vocab_size": draw(st.integers(3, 40)), "latent_size": draw(st.integers(1, 20))}
    ends = draw(st.sampled_from([(None, None), (0, None), (1, 2), (0, 1)]))
    sizes |= dict(zip(("pad_id", "end_id"), ends, strict=True))
    sizes["mask_pad"] = ends[0] is not None and draw(st.booleans())
    sizes["word_dropout"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    if draw(st.booleans()):
        channels = draw(st.lists(st.integers(1, 19), min_size=blocks, max_size=blocks))
        length = draw(st.integers(1, 5)) << blocks
        sizes["decoder"] = draw(st.sampled_from(["lstm", "bytenet", "none"]))
        sizes |= {"feature_channels": draw(st.integers(1, 19)), "carry": draw(st.booleans())}
        sizes |= {"hidden_size": draw(st.integers(1, 40)), "conv_layers": draw(st.integers(1, 3))}
        sizes |= {"conv_channels": draw(st.integers(1, 20)), "encoder_channels": channels}
        model = HybridVAE(length=length, **sizes)
    else:
        sizes["hidden_size"] = draw(st.integers(1, 40))
        model = LSTMVAE(length=draw(st.integers(1, 20)), **sizes)
    return shaken(model, draw(st.integers(0, 999)))


def texts(model, count):
    """Random tokens [N, L], with an end and pads where the model has them."""
    tokens = torch.randint(model.vocab_size, (count, model.length))
    if model.end_id is not None:
        for row, end in zip(tokens, torch.randint(model.length, (count,)), strict=True):
            row[end], row[end + 1 :] = model.end_id, model.pad_id
    return tokens


def unsure(logits, by=1e-3):
    """logits [..., V] -> whether the first two are so close that rounding may swap them."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second < by


@EXAMPLES
@hypothesis.given(models(), st.integers(1, 9))
def test_is_the_model_with_rounded_weights(model, count):
    file, model = pack(model), rounded(model)
    engine = WasmEngine(file, capacity=5)
    assert engine.status == 0
    tokens, z = texts(model, count), 2 * torch.randn(count, model.latent_size)
    mean, logvar = engine.encode(tokens)
    with torch.no_grad():
        expected = model.posterior(tokens)
        logits = model.logits(tokens, z)
    assert np.allclose(mean, expected[0], rtol=1e-4, atol=1e-4)
    assert np.allclose(logvar, expected[1], rtol=1e-4, atol=1e-4)
    given_history = torch.from_numpy(engine.decode(z, forced=tokens)).T
    assert ((given_history == logits.argmax(-1)) | unsure(logits)).all()
    found, generated = torch.from_numpy(engine.decode(z)).long(), model.generate(z)
    for own, theirs, text in zip(found, generated, z.split(1), strict=True):
        differ = (own != theirs).nonzero()
        if len(differ):  # only where two tokens were nearly equally likely
            with torch.no_grad():
                logits = model.logits(theirs.unsqueeze(0), text)
            assert unsure(logits[int(differ[0])]).all()


@EXAMPLES
@hypothesis.given(models(), st.integers(1, 7), st.sampled_from([0.0, 0.7]))
def test_wasm_and_native_code_agree_bit_for_bit(model, count, temperature):
    file = pack(model)
    engines = WasmEngine(file), NativeEngine(file)
    tokens, z = texts(model, count), 2 * torch.randn(count, model.latent_size)
    seeds = np.arange(count) + 2**40
    (mean, logvar), (native_mean, native_logvar) = (engine.encode(tokens) for engine in engines)
    assert mean.tobytes() == native_mean.tobytes() and logvar.tobytes() == native_logvar.tobytes()
    found = [engine.decode(z, temperature, seeds) for engine in engines]
    assert np.array_equal(*found)


@EXAMPLES
@hypothesis.given(models(), st.integers(2, 11))
def test_no_text_depends_on_the_others(model, count):
    """Whatever the batch, and however many steps a call decodes."""
    engine, z = WasmEngine(pack(model), capacity=11), torch.randn(count, model.latent_size)
    seeds = np.arange(count) - 3
    together = engine.decode(z, 1.0, seeds, steps=2)
    alone = [engine.decode(z[n : n + 1], 1.0, seeds[n : n + 1]) for n in range(count)]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("name", [Path(__file__).parent / "data" / "run", "places"])
def test_a_trained_model_decodes_the_same(name):
    """Of 1,000 latent vectors: tokens after the same text, whole texts, and posterior means."""
    trained, _ = load(name)
    engine, model = WasmEngine(pack(trained), 64), rounded(trained)
    z = torch.randn(1000, model.latent_size)
    tokens = model.generate(z, temperature=1.0)
    with torch.no_grad():
        expected = model.logits(tokens, z).argmax(-1).T.numpy()
    agree = engine.decode(z, forced=tokens) == expected
    assert agree.mean() >= 0.9999
    same = (engine.decode(z) == model.generate(z).numpy()).all(1)
    assert same.mean() >= 0.995
    mean, _ = engine.encode(tokens)
    assert np.abs(mean - model.encode(tokens).numpy()).max() < 1e-4


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_samples_are_those_of_the_op_that_draws_noise(temperature):
    sizes = {"vocab_size": 31, "length": 16, "latent_size": 4, "encoder_channels": (8, 8)}
    model = shaken(HybridVAE(feature_channels=8, hidden_size=16, **sizes), 1)
    engine, model = WasmEngine(pack(model), 64), rounded(model)
    seeds = torch.randint(2**63 - 1, (300,))
    z = torch.randn(300, 4)
    found, same = engine.decode(z, temperature, seeds), 0
    features, _ = model._expand(z)
    for n, seed in enumerate(seeds.split(1)):
        noise = ops.gumbel_noise(seed, 16, 1, 31, temperature)
        row = features[:, n : n + 1].contiguous()
        tokens = model.decoder.generate(row, None, noise, False, None, None)
        same += np.array_equal(tokens[0], found[n])
    assert same >= 299  # a near tie may fall either way


def test_a_file_that_is_cut_or_another_is_refused():
    file = pack(LSTMVAE(9, 4, latent_size=2, hidden_size=3))
    assert WasmEngine(file).status == NativeEngine(file).status == 0
    for wrong in (file[:-1], file + b"\0", b"other" + file[5:], file[: len(file) // 2]):
        assert WasmEngine(wrong).status != 0
    lying = bytearray(file)
    lying[28:32] = (4000).to_bytes(4, "little")  # hidden size
    assert WasmEngine(bytes(lying)).status != 0


FIELDS = {"magic": 0, "version": 4, "layers": 36, "blocks": 64}  # where they are in the header


@pytest.mark.parametrize(
    "field, value", [("magic", 0), ("version", 2), ("layers", 1025), ("blocks", 17), ("blocks", -1)]
)
def test_a_header_of_another_kind_is_told(field, value):
    """Not that a size is wrong: the file is none that this engine reads."""
    file, place = pack(LSTMVAE(9, 4, latent_size=2, hidden_size=3)), FIELDS[field]
    lying = file[:place] + value.to_bytes(4, "little", signed=True) + file[place + 4 :]
    assert WasmEngine(lying).status == NativeEngine(lying).status == 1
    assert WasmEngine(file, capacity=0).status == NativeEngine(file, capacity=0).status == 1


def test_ties_go_to_the_first():
    model = LSTMVAE(9, 4, latent_size=2, hidden_size=3)
    with torch.no_grad():
        model.decoder.classifier.weight.zero_()
        model.decoder.classifier.bias.zero_()[[2, 5]] = 1.0
    z = torch.randn(3, 2)
    for engine in (WasmEngine(pack(model)), NativeEngine(pack(model))):
        assert (engine.decode(z) == 2).all()


FUNCTIONS = """
#include "simd.h"
void exponentials(const float *x, float *y, int n) {
  for (int k = 0; k < n; k += 4) store(y + k, exponential(load(x + k)));
}
void sigmoids(const float *x, float *y, int n) {
  for (int k = 0; k < n; k += 4) store(y + k, sigmoid(load(x + k)));
}
void tangents(const float *x, float *y, int n) {
  for (int k = 0; k < n; k += 4) store(y + k, tangent(load(x + k)));
}
void logarithms(const double *x, double *y, int n) {
  for (int k = 0; k < n; ++k) y[k] = logarithm(x[k]);
}
"""


def test_functions_are_within_a_few_ulps(tmp_path):
    """exp and σ of their own value, tanh of 1, log of double precision."""
    (tmp_path / "functions.c").write_text(FUNCTIONS)
    NativeEngine.compile(tmp_path / "functions.c", tmp_path / "functions.so", f"-I{SOURCE}")
    library = ctypes.CDLL(str(tmp_path / "functions.so"))

    def computed(name, x):
        x, y = np.concatenate([x[:0], x]), np.empty_like(x)
        getattr(library, name)(
            x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), len(x)
        )
        return y.astype(np.float64)

    eps = np.finfo(np.float32).eps
    x = np.linspace(-80, 80, 1 << 16, dtype=np.float32)
    exact = x.astype(np.float64)
    relative = computed("exponentials", x) / np.exp(exact) - 1
    assert np.abs(relative).max() < 2 * eps
    assert np.abs(computed("sigmoids", x) * (1 + np.exp(-exact)) - 1).max() < 4 * eps
    assert np.abs(computed("tangents", x) - np.tanh(exact)).max() < 2 * eps
    far = np.array([-1e30, -200, 200, 1e30], np.float32)
    assert np.abs(computed("sigmoids", far) - [0, 0, 1, 1]).max() < eps
    numbers = np.exp(np.linspace(-23, 23, 1 << 16))
    assert np.abs(computed("logarithms", numbers) - np.log(numbers)).max() < 1e-14


def test_weights_that_are_no_numbers_are_refused():
    model = LSTMVAE(9, 4, latent_size=2, hidden_size=3)
    model.decoder.classifier.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"decoder\.classifier\.weight is not finite"):
        pack(model)


def test_the_committed_module_is_built_from_its_source(tmp_path):
    """Byte for byte."""
    if not os.environ.get("REQUIRE_BROWSER"):
        pytest.importorskip("ziglang")
    spec = importlib.util.spec_from_file_location("build", SOURCE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(tmp_path / "engine.wasm")
    assert (tmp_path / "engine.wasm").read_bytes() == WasmEngine.path.read_bytes()
