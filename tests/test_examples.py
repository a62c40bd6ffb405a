"""The programs in examples/: their measures by hand, and whole on tiny runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import frontier
import molecules
import pytest
import torch

from fastvae.models.hybrid import HybridVAE

ROOT = Path(__file__).parents[1]
TINY = [
    *("--steps=2", "--batch-size=4", "--latent-size=3", "--encoder-channels=4,4"),
    *("--hidden-size=8", "--feature-channels=4", "--sample-every=0"),
]


def test_shares_of_samples():
    """Canonical here: letters in order; not valid: what has an x."""
    forms = {"ab": "ab", "ba": "ab", "cd": "cd", "x": None, "": None}
    found = molecules.sample_shares(["ab", "ba", "x", "cd", ""], {"cd"}, forms.get)
    assert found == {"V": 3 / 5, "V.U.": 2 / 5, "V.U.N.": 1 / 5}


def test_stochastic_reconstruction_counts_each_draw():
    """A model that always writes one text, on that text and another."""
    model = HybridVAE(6, 8, latent_size=2, encoder_channels=(4,), feature_channels=4, hidden_size=4)
    model.eval()
    with torch.no_grad():
        model.decoder.classifier.weight.zero_()
        model.decoder.classifier.bias.copy_(torch.tensor([0.0, 0, 0, 100, 0, 0]))
    tokens = torch.tensor([[3] * 8, [2] * 8])
    assert molecules.stochastic_reconstruction(model, [tokens, tokens[:1]], 0, draws=3) == 2 / 3


def test_witten_bell_by_hand():
    """Order 2 on "ab": the grams a, b, end and (start a), (a b), (b end), once each."""
    ngram = frontier.NGram(["ab"], order=2)
    # One of 3 characters; uniform over 3 and a new one: (1 + 3 / 4) / (3 + 3).
    first = (1 + 3 / 4) / 6
    each = (1 + first) / 2
    assert ngram.nats("ab") == pytest.approx(-3 * math.log(each))
    # b at the start: seen 0 times of 1 after start.
    assert ngram.nats("b") == pytest.approx(-math.log(first / 2) - math.log(each))
    # z occurs nowhere, and nothing follows it: the end is judged by its share alone.
    new = (3 / 4) / 6
    assert ngram.nats("z") == pytest.approx(-math.log(new / 2) - math.log(first))
    assert ngram.mean_nats(["ab", "b"]) == pytest.approx((ngram.nats("ab") + ngram.nats("b")) / 2)


def test_a_model_of_more_text_prefers_it():
    names = ["Berlin", "Bern", "Bergen", "Lyon", "London", "Lund"] * 5
    ngram = frontier.NGram(names)
    assert ngram.nats("Berlin") < ngram.nats("Bernon") < ngram.nats("nilreB")


def test_the_frontier_of_tiny_runs(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{a}{b}{c}\n" for a in "BDKL" for b in "aeiou" for c in "nrstz"))
    command = [sys.executable, "-m", "fastvae", "train", "--data", names, *TINY, "--out"]
    for run in ("one", "two"):
        subprocess.run([*command, tmp_path / run], check=True, capture_output=True, cwd=tmp_path)
    program = [sys.executable, ROOT / "examples" / "frontier.py", "--data", names, "-n", "20"]
    arguments = f"dial={tmp_path}/one,{tmp_path}/two", "--out", tmp_path / "frontier.png"
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["run"]).name for row in rows] == ["one", "two"]
    assert all(0 <= row["exact_reconstruction"] <= 1 and row["held_out_nats"] > 0 for row in rows)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    program[-4:] = ["--data", names]
    command = [*command[:-1], "--valid", names, "--out", tmp_path / "three"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    arguments = f"dial={tmp_path}/three", "--out", tmp_path / "no.png"
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "held out nothing: name a file with --valid" in done.stderr
