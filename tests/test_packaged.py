"""The model that the package brings: found by its name, small, and good enough to show."""

import base64
import gzip
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_page import block

import fastvae
from fastvae.models.pretrained import PACKAGED, find_folder, packaged_models
from fastvae.page.export import load_directions
from fastvae.text.reading import LINES, Reading

NAMES = [
    *("Hamburg", "San Francisco", "Novosibirsk", "Rio de Janeiro", "Kyoto", "Casablanca"),
    *("Llandudno", "Reykjavík", "Thessaloniki", "Bad Homburg", "Aix-en-Provence", "Grünheide"),
    *("Timbuktu", "Samarkand", "Salt Lake City", "Bergen", "Alice Springs", "Kisangani"),
    *("Montevideo", "Fort Worth", "Ulan Bator", "Santa Fe", "Göttingen", "Stratford"),
    *("Puerto Montt", "Krasnoyarsk", "Winterthur", "Częstochowa", "Nagasaki", "Saint-Denis"),
]


@pytest.fixture(scope="module")
def places():
    return fastvae.load("places")


def as_tokens(model, vocabulary, names):
    rows = []
    for name in names:
        ids = [*vocabulary.encode(name), model.end_id]
        rows.append(ids + [model.pad_id] * (model.length - len(ids)))
    return torch.tensor(rows)


def run(*arguments, cwd):
    command = [sys.executable, "-m", "fastvae", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_names_come_back_from_their_latents(places):
    model, vocabulary = places
    tokens = as_tokens(model, vocabulary, NAMES)
    mean = model.encode(tokens)
    found = vocabulary.batch_decode(model.generate(mean))
    same = [name for name, text in zip(NAMES, found, strict=True) if name == text]
    assert len(same) >= 27, set(NAMES) - set(same)
    shuffled = vocabulary.batch_decode(model.generate(mean.roll(1, 0)))
    assert not any(a == b for a, b in zip(NAMES, shuffled, strict=True))


def test_samples_are_names(places):
    model, vocabulary = places
    generator = torch.Generator().manual_seed(0)
    samples = vocabulary.batch_decode(model.sample(200, temperature=0.5, generator=generator))
    assert len(set(samples)) >= 190
    assert sum(bool(re.fullmatch(r"[^\W\d_].*", text)) for text in samples) >= 180


def test_what_it_brings(places):
    model, vocabulary = places
    assert packaged_models() == ["places"]
    assert model.reading == Reading(LINES) and vocabulary.end_id == model.end_id
    directions = load_directions(PACKAGED / "places")
    assert len(directions) >= 40 and {"Finland", "Japan", "Brazil"} <= directions.keys()
    assert all(v.shape == (model.latent_size,) and v.isfinite().all() for v in directions.values())
    card = (PACKAGED / "places" / "README.md").read_text(encoding="utf-8")
    for word in ("GeoNames", "CC BY 4.0", "fastvae train", "active units", "shuffled"):
        assert word in card
    assert "GeoNames" in (PACKAGED / "places" / "card.txt").read_text(encoding="utf-8")


def test_directions_lead_to_their_countries(places):
    """Names of a country are nearest to its mean among three, from the mean of all names, zero."""
    model, vocabulary = places
    texts = {
        "Finland": "Jyväskylä Hämeenlinna Lappeenranta Kuusamo Seinäjoki Rovaniemi Savonlinna",
        "Japan": "Nagasaki Kagoshima Matsuyama Fukuyama Takasaki Kawasaki Wakayama",
        "Poland": "Częstochowa Wrocław Bydgoszcz Kielce Dąbrowa Tarnów Zakopane",
    }
    directions = load_directions(PACKAGED / "places")
    for country, names in texts.items():
        mean = model.encode(as_tokens(model, vocabulary, names.split())).mean(0)
        distance = {other: (mean - directions[other]).norm().item() for other in texts}
        assert min(distance, key=distance.get) == country


def test_is_small(tmp_path):
    """In a wheel, which compresses."""
    with zipfile.ZipFile(tmp_path / "files.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (PACKAGED / "places").iterdir():
            archive.write(path, path.name)
    assert (tmp_path / "files.zip").stat().st_size <= 1.5e6


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("places") == PACKAGED / "places"
    assert find_folder("./places") == Path("places")
    assert find_folder("no/places") == Path("no/places")
    assert find_folder("..") == Path("..")
    (tmp_path / "places").mkdir()
    assert find_folder("places") == Path("places")
    with pytest.raises(FileNotFoundError, match=r"places holds no config\.json"):
        fastvae.load("places")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere is not a folder, nor a packaged model \("
    ):
        fastvae.load("nowhere")


def test_commands_take_its_name(tmp_path):
    found = run("sample", "places", "-n", 3, "--temperature", 1, "--seed", 4, cwd=tmp_path)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 3, found.stderr
    model, vocabulary = fastvae.load("places")
    generator = torch.Generator().manual_seed(4)
    expected = vocabulary.batch_decode(model.sample(3, temperature=1.0, generator=generator))
    assert found.stdout.splitlines() == expected
    found = run("interpolate", "places", "Hamburg", "San Francisco", cwd=tmp_path)
    lines = found.stdout.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("Hamburg", "San Francisco", 7)


def test_its_page_names_the_source(tmp_path):
    found = run("export", "places", "page.html", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "GeoNames" in page and "Finland" in page
    assert len(page.encode()) <= 2e6


def test_the_page_in_docs_is_current(tmp_path):
    """What a change of the page or of the model left as it was before; compression may differ."""
    options = ["--title=Names of places", "--prompt=Type your home town."]
    options += [f"--example={name}" for name in ("Hamburg", "San Francisco", "Novosibirsk")]
    found = run("export", "places", "page.html", *options, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    pages = tmp_path / "page.html", Path(__file__).parents[1] / "docs" / "places.html"
    contents = [path.read_text(encoding="utf-8") for path in pages]
    weights = [gzip.decompress(base64.b64decode(block(text, "weights"))) for text in contents]
    assert weights[0] == weights[1], "export docs/places.html again"
    rest = [text.replace(block(text, "weights"), "") for text in contents]
    assert rest[0] == rest[1], "export docs/places.html again"
