"""Models on the GPU: equal to the reference and to the CPU, trained, sampled, by command."""

import json
import subprocess
import sys

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.testing import assert_accurate

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SMALL = {"vocab_size": 51, "length": 16, "latent_size": 128}
HYBRID = {**SMALL, "encoder_channels": (16, 32), "feature_channels": 20}
MODELS = {
    "lstm": ("HybridVAE", {**HYBRID, "hidden_size": 64}),
    "bytenet": ("HybridVAE", {**HYBRID, "decoder": "bytenet", "conv_channels": 32}),
    "none": ("HybridVAE", {**HYBRID, "decoder": "none"}),
    "lstm_vae": ("LSTMVAE", {**SMALL, "hidden_size": 64}),
}
TWEETS = {"vocab_size": 259, "length": 128}
LARGE = {"tweets hybrid": ("HybridVAE", TWEETS), "tweets LSTM VAE": ("LSTMVAE", TWEETS)}
PROGRAM = "from fastvae.cli import main; main()"


def reference_model(name, sizes, **factory_kwargs):
    """The same weights on every device and in every dtype; what an LSTM rounds does not grow."""
    torch.manual_seed(0)
    model = getattr(reference, name)(**sizes)
    for parameter, value in model.named_parameters():
        if parameter.endswith("norm_weight"):
            value.data.mul_(0.3)
    return model.to(**factory_kwargs)


def ours(name, sizes, **factory_kwargs):
    model = getattr(fastvae, name)(**sizes, **factory_kwargs)
    model.load_state_dict(reference_model(name, sizes).state_dict())
    return model


def tokens_for(sizes, count):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(sizes["vocab_size"], (count, sizes["length"]), generator=generator)


def steps(model, tokens, noise):
    """Training with noise [steps, B, Z] -> the loss of each step, and the parameters after all."""
    where, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)  # linear in gradients
    tokens, losses = tokens.to(where), []
    drop_mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    model.train()
    for row in noise.to(where, dtype):
        loss = model(tokens, 0.5, eps=row, drop_mask=drop_mask.to(where)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.stack(losses).cpu(), weights.cpu()


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_those_of_the_cpu(name):
    """The same noise and dropped tokens: as near to float64 as plain PyTorch on the CPU."""
    case = MODELS[name]
    tokens = tokens_for(case[1], 40)
    noise = torch.randn(10, 40, 128)  # so many that one scale suffices
    assert_accurate(
        lambda noise: steps(ours(*case, device="cuda"), tokens, noise),
        lambda noise: steps(reference_model(*case, dtype=noise.dtype), tokens, noise),
        noise,
    )


@pytest.mark.parametrize("name", [*MODELS, *LARGE])
def test_terms_and_gradients_equal_the_reference_model(name):
    case = (MODELS | LARGE)[name]
    tokens = tokens_for(case[1], 4).cuda()
    drop_mask = torch.zeros_like(tokens, dtype=torch.bool)
    models = {
        dtype: reference_model(*case, device="cuda", dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    }
    mine = ours(*case, device="cuda")

    def terms(model, noise):
        model.zero_grad()
        out = model(tokens, 0.5, eps=noise, drop_mask=drop_mask)
        out.loss.backward()
        largest = {k: p.grad.abs().max() for k, p in model.named_parameters() if p.grad is not None}
        weights = torch.stack([largest[k] for k in sorted(largest)])
        # Not the KL as such: one number, which loses by chance more than its parts or less.
        parts = out.loss, out.reconstruction, out.auxiliary, out.kl_per_dimension
        return (*(t.detach() for t in parts), weights)

    noise = torch.randn(4, models[torch.float32].latent_size, device="cuda")
    assert_accurate(lambda n: terms(mine, n), lambda n: terms(models[n.dtype], n), noise)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, precision):
    """The loss is that of float32 within what the short dtype loses in a few hundred sums."""
    case = MODELS[name]
    model, tokens = ours(*case, device="cuda"), tokens_for(case[1], 6).cuda()
    noise = torch.randn(6, 128, device="cuda")
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    want = model(tokens, eps=noise, drop_mask=nothing).loss
    with torch.autocast("cuda", precision):
        loss = model(tokens, eps=noise, drop_mask=nothing).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert (loss - want).abs() < 20 * torch.finfo(precision).eps * want.abs()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name, temperature):
    """Where the features decide clearly, the same tokens as on the CPU."""
    case = MODELS[name]
    model = ours(*case)
    for p in model.parameters():
        p.data.mul_(5)
    z, texts = torch.randn(9, 128), []
    for device in ("cpu", "cuda"):
        model.to(device)
        drawn = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        texts.append(model.generate(z.to(device), **drawn).cpu())
    assert (texts[0] == texts[1]).all(1).float().mean() > 0.5
    assert model.sample(3).shape == (3, 16) and model.sample(3).is_cuda
    assert model.interpolate(*z[:2].cuda()).is_cuda
    model.bfloat16().sample(3, temperature=temperature)


@pytest.mark.parametrize("wrong", [-1, 51, 1 << 40])
@pytest.mark.parametrize("name", MODELS)
def test_token_out_of_range_is_a_clear_error_and_no_fault(name, wrong):
    case = MODELS[name]
    model, tokens = ours(*case, device="cuda"), tokens_for(case[1], 4).cuda()
    good, z = tokens.clone(), torch.randn(4, 128, device="cuda")
    tokens[2, 5] = wrong
    message = f"tokens hold the id {wrong}; this model's ids are 0 to 50"
    for call in (model, model.posterior, lambda t: model.log_likelihood(t, z)):
        with pytest.raises(ValueError, match=message):
            call(tokens)
    with pytest.raises(ValueError, match=message):
        model.check_tokens(tokens.cpu())
    out = model(tokens, validate=False)  # as in a compiled model, which cannot look at them
    out.loss.backward()
    assert out.loss.isnan()
    assert model(good).loss.isfinite()
    torch.cuda.synchronize()


def run(*arguments, cwd):
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("decoder", ["lstm", "bytenet"])
def test_command_line(tmp_path, decoder):
    (tmp_path / "text").write_text("the cat sat on the mat.\na dog ran to the cat.\n" * 200)
    sizes = ["--length=16", "--latent-size=3", "--encoder-channels=8", "--hidden-size=16"]
    options = [
        *sizes,
        f"--decoder={decoder}",
        "--batch-size=8",
        "--log-every=10",
        "--eval-every=10",
    ]
    train = "train", "--data", "text", "--valid", "text", "--out", "run", "--device", "cuda"
    result = json.loads(run(*train, *options, "--steps=20", "--json", cwd=tmp_path))
    assert result["step"] == 20 and result["valid"]["step"] == 20
    again = run(*train, *options, "--steps=30", "--resume", "--json", cwd=tmp_path)
    assert json.loads(again)["step"] == 30
    short = *train, *options, "--steps=20", "--precision=bf16", "--out=short", "--json"
    assert json.loads(run(*short, cwd=tmp_path))["valid"]["step"] == 20
    for extra in ([], ["--temperature=0.8"]):
        sample = run("sample", "run", "-n", 5, "--json", "--device", "cuda", *extra, cwd=tmp_path)
        assert len(json.loads(sample)) == 5
    evaluated = run(
        "evaluate", "run", "--data", "text", "--limit", 64, "--device", "cuda", cwd=tmp_path
    )
    assert "bits per character" in evaluated
    assert "Triton" in run("info", cwd=tmp_path)
