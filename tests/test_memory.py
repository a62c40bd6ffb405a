"""A training step of our modules needs no more memory than the plain reference models'."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch, fastvae
from fastvae import reference
torch.set_num_threads(2)
classes = (fastvae if sys.argv[1] == "ours" else reference)
model = getattr(classes, sys.argv[2])(51, 48, hidden_size=256, **eval(sys.argv[3]))
tokens = torch.randint(51, (128, 48))
for _ in range(2):
    model(tokens, 0.5).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SMALL = {"encoder_channels": (32, 32), "feature_channels": 32}


def peak(whose, name, arguments, folder):
    command = [sys.executable, "-c", PROGRAM, whose, name, repr(arguments)]
    # Outside the source tree, whose bare package has no native module.
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("HybridVAE", SMALL),
        ("HybridVAE", {**SMALL, "decoder": "bytenet", "conv_layers": 4}),
        ("LSTMVAE", {}),
    ],
    ids=["lstm", "bytenet", "baseline"],
)
def test_training_peak(name, arguments, tmp_path):
    plain = peak("plain", name, arguments, tmp_path)
    assert peak("ours", name, arguments, tmp_path) <= plain
