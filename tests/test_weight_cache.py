"""What generation keeps of a decoder's weights never outlives these weights."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils import parametrize

from fastvae import _C, LSTMVAE, HybridVAE, ops
from fastvae.models.weight_cache import _checksum

V, L, Z = 11, 8, 3
NAMES = ["lstm", "bytenet", "lstm_vae"]


def make(name, seed=0):
    torch.manual_seed(seed)
    if name == "lstm_vae":
        model = LSTMVAE(V, L, latent_size=Z, hidden_size=18)
    else:
        sizes = {"encoder_channels": (4, 5), "feature_channels": 4, "hidden_size": 18}
        sizes |= {"conv_layers": 2, "conv_channels": 18}
        model = HybridVAE(V, L, latent_size=Z, decoder=name, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    return model


def fresh(model, z, **how):
    """What a model that has kept nothing writes."""
    reference_model = copy.deepcopy(model)
    assert reference_model.decoder.weight_cache._entry is None
    return reference_model.generate(z, **how)


@pytest.fixture
def packings(monkeypatch):
    """The calls that pack weights."""
    calls = []
    for name in ("decode_lstm_pack", "decode_bytenet_pack"):
        pack = getattr(ops, name)

        def counted(*weights, pack=pack, **how):
            calls.append(how)
            return pack(*weights, **how)

        monkeypatch.setattr(ops, name, counted)
    return calls


def step(model, **how):
    optimizer = torch.optim.Adam(model.parameters(), 0.1, **how)
    model(torch.randint(V, (6, L))).loss.backward()
    optimizer.step()


def load(model, **how):
    model.load_state_dict(make(model.kind, seed=1).state_dict(), **how)


@torch.no_grad()
def in_place(model):
    for p in model.decoder.parameters():
        p.mul_(-1)


@torch.no_grad()
def one_weight(model):
    model.decoder.classifier.bias[3] += 100


def swap(model):
    for p in model.decoder.parameters():
        p.data = torch.randn_like(p)


def there_and_back(model):
    """Values change, and the new tensors may stand where the old ones stood."""
    model.bfloat16().float()


def running_statistics(model):
    for name, buffer in model.decoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.randn_like(buffer), alpha=5)


CHANGES = {
    "optimizer": step,
    "foreach": lambda m: step(m, foreach=True),
    "fused": lambda m: step(m, fused=True),
    "load_state_dict": load,
    "assign": lambda m: load(m, assign=True),
    "in place": in_place,
    "one weight": one_weight,
    "swap": swap,
    "bfloat16": lambda m: m.bfloat16(),
    "there and back": there_and_back,
    "double": lambda m: m.double(),
    "reset": lambda m: m.reset_parameters(),
    "running statistics": running_statistics,
}


@pytest.mark.parametrize("name", NAMES)
def test_packed_once(name, packings):
    model, z = make(name), torch.randn(5, Z)
    first = model.generate(z)
    assert torch.equal(model.generate(z), first) and len(packings) == 1
    model.generate(torch.randn(2, Z), temperature=1.0)
    model.train()(torch.randint(V, (4, L))).loss.backward()
    model.sample(3)
    model.interpolate(z[0], z[1])
    assert len(packings) == (2 if name == "bytenet" else 1)  # training moves running statistics


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_changes_are_seen(name, change, packings):
    model, z = make(name), torch.randn(40, Z)
    model.kind = name
    before = model.generate(z)
    CHANGES[change](model)
    after = model.generate(z)
    assert torch.equal(after, fresh(model, z))
    seen = change != "running statistics" or name == "bytenet"
    assert len(packings) == 2 + seen  # that of `fresh` is one
    if seen and change not in ("bfloat16", "there and back", "double"):
        assert not torch.equal(after, before)


class Times(nn.Module):
    """A parametrization by a factor that is no parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return weight * (self.factor[0] if isinstance(self.factor, list) else self.factor)


class Over(Times):
    def forward(self, weight):
        return weight / self.factor


def replace_parametrization(times):
    times.__class__ = Over


ATTRIBUTES = {
    "number": (2.0, lambda times: setattr(times, "factor", -2.0)),
    "tensor": (torch.tensor(2.0), lambda times: times.factor.data.neg_()),
    "list": ([2.0], lambda times: times.factor.__setitem__(0, -2.0)),
    "class": (8.0, replace_parametrization),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
@pytest.mark.parametrize("name", NAMES)
def test_a_parametrization_that_changes_is_seen(name, kind, packings):
    """Where a change cannot be told, as in a list, nothing is kept."""
    model, z = make(name), torch.randn(40, Z)
    factor, change = ATTRIBUTES[kind]
    times = Times(copy.deepcopy(factor))
    parametrize.register_parametrization(model.decoder.classifier, "weight", times)
    before = model.generate(z)
    assert torch.equal(model.generate(z), before) and len(packings) == 1 + (kind == "list")
    change(times)
    after = model.generate(z)
    assert not torch.equal(after, before) and torch.equal(after, fresh(model, z))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_weights_do_not_tell_is_refused(name):
    """Hooks, such as those of pruning, and layers with another forward."""

    class Negated(type(make(name).decoder.classifier)):
        def forward(self, x, tokens=None):
            return -super().forward(x)

    for change in (
        lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_forward_hook(lambda module, x, y: -y),
        lambda layer: setattr(layer, "__class__", Negated),
        lambda layer: setattr(layer, "forward", lambda x, tokens=None: -x),
    ):
        model = make(name).eval()
        change(model.decoder.classifier)
        with pytest.raises(RuntimeError, match=r"would skip .* of classifier \("):
            model.generate(torch.randn(2, Z))
    model = make(name).eval()
    model.decoder.classifier = nn.Sequential(model.decoder.classifier, nn.Dropout())
    with pytest.raises(RuntimeError, match=r"would skip a forward of its own of classifier \(Seq"):
        model.generate(torch.randn(2, Z))
    model = make(name)
    layer = nn.utils.prune.random_unstructured(model.decoder.classifier, "weight", 0.5)
    nn.utils.prune.remove(layer, "weight")
    assert torch.equal(model.generate(torch.zeros(2, Z)), fresh(model, torch.zeros(2, Z)))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_layers_are_no_other_forward(name):
    model, z = make(name).eval(), torch.randn(2, Z)
    before = model.generate(z)
    model.decoder.classifier = torch.compile(model.decoder.classifier, backend="eager")
    assert torch.equal(model.generate(z), before)


def test_layers_with_another_carry_are_refused():
    model = make("bytenet").eval()
    model.decoder.stack.layers[0].carry = not model.decoder.carry
    with pytest.raises(RuntimeError, match="one carry for all layers"):
        model.generate(torch.randn(2, Z))


def test_a_changed_eps_is_seen():
    model, z = make("bytenet"), torch.randn(40, Z)
    before = model.generate(z)
    for module in model.decoder.modules():
        if hasattr(module, "eps"):
            module.eps = 50.0
    after = model.generate(z)
    assert not torch.equal(after, before) and torch.equal(after, fresh(model, z))


@pytest.mark.parametrize("name", NAMES)
def test_forms_are_kept_apart(name):
    model, z = make(name), torch.randn(400, Z)
    want = {}
    for _ in range(2):
        for weights in (None, "int8"):
            for autocast in (False, True):

                def how(weights=weights):  # noise makes many choices close
                    generator = torch.Generator().manual_seed(3)
                    return {"quantization": weights, "temperature": 0.3, "generator": generator}

                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    got = model.generate(z, **how())
                    want.setdefault((weights, autocast), fresh(model, z, **how()))
                assert torch.equal(got, want[weights, autocast])
    assert not torch.equal(want[None, False], want["int8", False])


@pytest.mark.parametrize("name", NAMES)
def test_capability_may_change(name):
    model, z, best = (
        make(name).double(),
        torch.randn(20, Z, dtype=torch.float64),
        _C.cpu_capability(),
    )
    want = model.generate(z), model.generate(z, quantization="int8")
    try:
        for isa in ("baseline", best, "baseline"):
            _C.set_cpu_capability(isa)
            assert torch.equal(model.generate(z), want[0])
            assert torch.equal(model.generate(z, quantization="int8"), want[1])
    finally:
        _C.set_cpu_capability(best)


@pytest.mark.parametrize("name", NAMES)
def test_never_saved_or_copied(name):
    model, z = make(name), torch.randn(5, Z)
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    want = model.generate(z)
    assert list(model.state_dict()) == keys and len(pickle.dumps(model)) == size
    assert model.decoder.weight_cache._entry is not None
    for reference_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert reference_model.decoder.weight_cache._entry is None
        assert torch.equal(reference_model.generate(z), want)


@pytest.mark.parametrize("name", NAMES)
def test_threads(name):
    """Eight threads, each with its own batch, while the kept form goes back and forth."""
    model = make(name).eval()
    work = [(torch.randn(n % 5 + 1, Z), ("int8", None)[n % 3 == 0]) for n in range(48)]
    want = [fresh(model, z, quantization=weights) for z, weights in work]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda job: model.generate(job[0], quantization=job[1]), work))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode(name):
    z = torch.randn(5, Z)
    outside = make(name)
    with torch.inference_mode():
        inside = make(name)  # its tensors count no versions: nothing is kept
        want = inside.generate(z)
        for p in inside.decoder.parameters():
            p.mul_(-1)
        assert not torch.equal(inside.generate(z), want)
        assert torch.equal(outside.generate(z), want)
        assert (
            outside.decoder.weight_cache._entry is not None
            and inside.decoder.weight_cache._entry is None
        )
    assert torch.equal(outside.generate(z), want)


def test_fake_tensors_are_not_kept():
    model, z = make("lstm"), torch.randn(5, Z)
    shapes = ShapeEnv()  # how large packed weights are is known to the kernels alone
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
        assert model.generate(mode.from_tensor(z)).shape == (5, L)
    assert model.decoder.weight_cache._entry is None
    assert torch.equal(model.generate(z), fresh(model, z))


@pytest.mark.parametrize("element", [0, 1, -1])
def test_write_through_data_is_noticed(element):
    """One element of one weight, which no version counter tells."""
    torch.manual_seed(0)
    sizes = {"latent_size": 4, "encoder_channels": (8, 8), "hidden_size": 16}
    model = HybridVAE(20, 16, **sizes).eval()
    z = torch.randn(4, 4)
    model.generate(z)
    bias = model.decoder.classifier.bias
    version = bias._version
    bias.data.view(-1)[element] = 100.0
    assert bias._version == version
    assert (model.generate(z) == element % 20).all()


def test_checksum_tells_places():
    torch.manual_seed(0)
    words = torch.randint(2**31, (300_001,), dtype=torch.int32)
    before = _C.checksum(words.data_ptr(), words.nbytes)
    assert _C.checksum(words.data_ptr(), words.nbytes) == before
    for i, j in ((0, 1), (0, 64), (64, 128), (7, 300_000), (65_535, 65_536), (0, 65_536)):
        words[[i, j]] = words[[j, i]]
        assert _C.checksum(words.data_ptr(), words.nbytes) != before, (i, j)
        words[[i, j]] = words[[j, i]]
    assert _C.checksum(words.data_ptr(), words.nbytes) == before
    blocks = words[:131_072].view(2, 65_536)
    blocks[:] = blocks.flip(0)
    assert _C.checksum(words.data_ptr(), words.nbytes) != before


@pytest.mark.parametrize("size", [1, 4, 255, 256, 257, 262_144, 262_147])
def test_checksum_tells_sizes_and_every_last_byte(size):
    content = torch.zeros(size + 4, dtype=torch.uint8)
    found = [_C.checksum(content.data_ptr(), size + more) for more in range(4)]
    for place in {0, size - 1, size // 2}:
        content[place] = 1
        found.append(_C.checksum(content.data_ptr(), size))
        content[place] = 0
    assert len(set(found)) == len(found)
    content[size] = 1  # behind it
    assert _C.checksum(content.data_ptr(), size) == found[0]


@pytest.mark.parametrize("size", [4, 7, 4001])
def test_checksum_of_other_devices_tells_places(size):
    """The one that needs no kernel, here on the CPU."""
    content = torch.randint(256, (size,), dtype=torch.uint8)
    before = _checksum(content)
    assert _checksum(content.clone()) == before
    for place in (0, size - 1):
        content[place] ^= 1
        assert _checksum(content) != before
        content[place] ^= 1
    if size > 8:
        words = content[:4000].view(-1, 4)
        assert _checksum(words.roll(1, 0).flatten()) != _checksum(words.flatten())


def test_optimizers_are_hooked_only_once_something_is_kept():
    code = (
        "import torch, fastvae\n"
        "from torch.optim.optimizer import _global_optimizer_post_hooks as hooks\n"
        "before = len(hooks)\n"
        "model = fastvae.LSTMVAE(9, 4, latent_size=2, hidden_size=4)\n"
        "made = len(hooks)\n"
        "model.sample(1), model.sample(1)\n"
        "print(before, made, len(hooks))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert run.stdout == "0 0 1\n"
