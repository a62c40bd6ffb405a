"""The programs in examples/: their measures by hand, and whole on tiny runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import frontier
import molecules
import places
import pytest
import torch

import fastvae
from fastvae.models.hybrid import HybridVAE
from fastvae.page.export import load_directions
from fastvae.text import CharVocabulary

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


def test_common_names():
    """b is in three names, c in two, of which one is listed twice; d in one."""
    rows = [("ab", "X"), ("bc", "X"), ("b", "Y"), ("c", "Y"), ("c", "Y"), ("ad", "Z"), ("a", "Z")]
    assert places.common_names(rows, rare=3) == [("ab", "X"), ("b", "Y"), ("a", "Z")]
    assert places.common_names(rows, rare=2) == [*rows[:4], ("a", "Z")]


def test_country_directions():
    vocabulary = CharVocabulary("abcdef", end=True)
    ids = {"pad_id": vocabulary.pad_id, "end_id": vocabulary.end_id}
    sizes = {"latent_size": 3, "encoder_channels": (4,), "feature_channels": 4, "hidden_size": 4}
    model = HybridVAE(vocabulary.size, 8, **ids, **sizes).eval()
    rows = [("abc", "X"), ("f", "Y"), ("ab", "Y"), ("abcdefab", "X"), ("de", "Y"), ("cc", "Z")]
    found = places.country_directions(model, vocabulary, rows, least=2)
    names = ["abc", "f", "ab", "de", "cc"]  # those that fit
    pad, end = vocabulary.pad_id, vocabulary.end_id
    encoded = [[*vocabulary.encode(name), end] for name in names]
    latents = model.encode(torch.tensor([row + [pad] * (8 - len(row)) for row in encoded]))
    assert list(found) == ["Y"]
    torch.testing.assert_close(found["Y"], latents[1:4].mean(0) - latents.mean(0))


def test_the_packaged_model_of_a_tiny_run(tmp_path):
    cities, countries, table = (tmp_path / n for n in ("cities.txt", "countries.txt", "names.tsv"))
    ends = [name for path in places.PATHS for name in path]
    names = 2 * [name + x for name in ends for x in ("", *"aeiounrstz")]  # no character is rare
    rows = [["0", name, *[""] * 6, "FI" if n < 40 else "JP"] for n, name in enumerate(names)]
    cities.write_text("".join("\t".join(row) + "\n" for row in [*rows, ["0", "Øx", *rows[0][2:]]]))
    countries.write_text("# ISO\nFI\tFIN\t0\tFI\tFinland\nJP\tJPN\t0\tJA\tJapan\n")
    program = [sys.executable, ROOT / "examples" / "places.py"]
    done = subprocess.run([*program, "names", cities, countries, table], capture_output=True)
    assert done.returncode == 0, done.stderr
    written = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    assert ["Hamburg", "Japan"] in written and not any(name == "Øx" for name, _ in written)
    train = [sys.executable, "-m", "fastvae", "train", "--data", table, "--column", "1"]
    options = [*TINY, "--kl-nats=2", "--log-every=1", "--length=16", "--out", tmp_path / "run"]
    subprocess.run([*train, *options], check=True, capture_output=True, cwd=tmp_path)
    pack = [*program, "pack", tmp_path / "run", table, tmp_path / "packed", "--least=5", "-n=20"]
    done = subprocess.run(pack, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, vocabulary = fastvae.load(tmp_path / "packed")
    assert vocabulary.size == model.vocab_size
    assert load_directions(tmp_path / "packed").keys() == {"Finland", "Japan"}
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    assert "--kl-nats 2 --aux-weight 0.2 --steps 2`" in card and "each of 2 countries" in card
    assert "GeoNames" in (tmp_path / "packed" / "card.txt").read_text(encoding="utf-8")
