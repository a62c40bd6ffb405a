"""Make the packaged model of place names: weights of 8 bits, directions of countries, a card.

    python examples/places.py names cities500.txt countryInfo.txt names.tsv
    fastvae train --data names.tsv --column 1 --kl-nats 32 --aux-weight 1 --steps 30000 --out run
    python examples/places.py pack run names.tsv fastvae/pretrained/places

The two files of names are those of https://download.geonames.org/export/dump (CC BY 4.0). `names`
writes a name and its country on each line, without names that have a rare character; `pack` saves
the run and measures what it saved on the names that training held out.
"""

import argparse
import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from frontier import open_run, read, sample_texts
from torch import Tensor

import fastvae
from fastvae.atomic_files import write_tensors
from fastvae.evaluation import measure
from fastvae.models.text_vae import TextVAE
from fastvae.page.export import DIRECTIONS, PAGE_CARD
from fastvae.text import Reading, Vocabulary
from fastvae.text.reading import LINES

NAME, COUNTRY = 1, 8  # columns of GeoNames' file
RARE = 10
PATHS = ("Hamburg", "San Francisco"), ("Novosibirsk", "Rio de Janeiro"), ("Kyoto", "Casablanca")
SOURCE = "names of populated places from GeoNames (https://www.geonames.org), CC BY 4.0"
CARD = """\
---
license: cc-by-4.0
library_name: fastvae
pipeline_tag: text-generation
tags: [vae, text-vae]
---

# places

A variational autoencoder of place names: `fastvae.load("places")`, `fastvae sample places`.

- Data: {names:,} {source}.
  Names with a character that fewer than {rare} names have are left out; so are 5 % of the names, by
  a hash, to measure on.
- License: CC BY 4.0. Attribution to GeoNames goes with the model and with what is made of it.
- Model: preset `lines`, {parameters:,} parameters, saved as int8; names of up to {room} characters.
- Training: `{command}`, {minutes:.0f} minutes.
- Directions: `directions.safetensors` has a vector for each of {directions} countries, the mean
  latent of its names less that of all names.

| on {texts:,} held-out names | |
|---|---:|
| returned exactly from their latents | {exact:.1f} % |
| the same from shuffled latents | {shuffled:.1f} % |
| KL | {kl:.1f} nats |
| bits per character of the bound | {bpc:.2f} |
| active units | {active} of {latent} |
| samples at temperature 1 that are training names, of {samples:,} | {known:.1f} % |

Samples at temperature 1: {warm}.

Samples at temperature 0.5: {cool}.

Between two names:

{paths}
"""


def common_names(rows: Iterable[tuple[str, str]], rare: int = RARE) -> list[tuple[str, str]]:
    """Names and countries -> those whose characters are in at least `rare` names, each once."""
    rows = list(dict.fromkeys(rows))
    counts = Counter(character for name in {name for name, _ in rows} for character in set(name))
    return [(name, country) for name, country in rows if min(counts[c] for c in name) >= rare]


def padded(model: TextVAE, vocabulary: Vocabulary, names: Iterable[str]) -> Tensor:
    """Names that fit the model -> tokens, [B, L]."""
    rows = [[*vocabulary.encode(name), model.end_id] for name in names]
    return torch.tensor([row + [model.pad_id] * (model.length - len(row)) for row in rows])


def country_directions(
    model: TextVAE, vocabulary: Vocabulary, rows: Iterable[tuple[str, str]], least: int
) -> dict[str, Tensor]:
    """Names and countries -> by country the mean latent of its names less that of all names, [Z].

    For countries of at least `least` names that fit the model, those with the most first.
    """
    rows = [(n, country) for n, country in rows if len(vocabulary.encode(n)) < model.length]
    tokens = padded(model, vocabulary, (name for name, _ in rows))
    latents = torch.cat([model.encode(part) for part in tokens.split(1024)])
    members = defaultdict(list)
    for n, (_, country) in enumerate(rows):
        members[country].append(n)
    order = sorted(members, key=lambda country: -len(members[country]))
    return {
        country: latents[members[country]].mean(0) - latents.mean(0)
        for country in order
        if len(members[country]) >= least
    }


def write_names(cities: Path, countries: Path, out: Path) -> None:
    """GeoNames' files -> a name and its country on each line, tab between."""
    with open(countries, encoding="utf-8") as file:
        fields = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
    country = {row[0]: row[4] for row in fields}
    with open(cities, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    kept = common_names((row[NAME], country[row[COUNTRY]]) for row in rows)
    out.write_text("".join(f"{name}\t{where}\n" for name, where in kept), encoding="utf-8")


def pack(run: Path, data: Path, out: Path, valid: Path | None, least: int, samples: int) -> None:
    """Save a run as a packaged model with directions, and a card of what was measured on it."""
    trained, train, held_out = open_run(run, data, valid)
    trained.reading = Reading(LINES)  # of other files, whole lines
    trained.save_pretrained(out, train.vocabulary, quantization="int8")
    model, vocabulary = fastvae.load(out)
    with open(data, encoding="utf-8", newline="") as file:
        rows = [
            (row[0], row[1]) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    directions = country_directions(model, vocabulary, rows, least)
    write_tensors(out / DIRECTIONS, directions, {})
    count = len(held_out)
    found = measure(model, held_out, nll_texts=0, mi_texts=0, reconstruct_texts=count)
    names, drawn = set(read(train)), sample_texts(model, vocabulary, samples, 1.0, 0)
    config = json.loads((run / "training.json").read_text(encoding="utf-8"))["config"]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [row["steps_per_second"] for row in map(json.loads, lines) if row["split"] == "train"]
    paths = []
    for ends in PATHS:
        between = model.interpolate(*model.encode(padded(model, vocabulary, ends)), 7)
        paths.append("    " + ", ".join(vocabulary.batch_decode(between)))
    card = CARD.format(
        names=len(names),
        source=SOURCE,
        rare=RARE,
        parameters=sum(p.numel() for p in model.parameters()),
        room=model.length - 1,
        command=f"fastvae train --data names.tsv --column 1 --kl-nats {config['kl_nats']:g} "
        f"--aux-weight {model.aux_weight:g} --steps {config['steps']}",
        minutes=sum(config["log_every"] / speed for speed in speeds) / 60,
        directions=len(directions),
        texts=found["reconstruction_texts"],
        exact=100 * found["exact_reconstruction"],
        shuffled=100 * found["shuffled_reconstruction"],
        kl=found["kl"],
        bpc=found["bpc"],
        active=found["active_units"],
        latent=model.latent_size,
        samples=samples,
        known=100 * sum(name in names for name in drawn) / samples,
        warm=", ".join(sample_texts(model, vocabulary, 20, 1.0, 1)),
        cool=", ".join(sample_texts(model, vocabulary, 20, 0.5, 1)),
        paths="\n".join(paths),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    about = f"Trained on {len(names):,} {SOURCE}. The model is licensed alike."
    (out / PAGE_CARD).write_text(about + "\n", encoding="utf-8")


def main() -> None:
    """Write the names, or pack a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    names = commands.add_parser("names", help="GeoNames' files -> names and countries")
    names.add_argument("cities", type=Path)
    names.add_argument("countries", type=Path)
    names.add_argument("out", type=Path)
    packing = commands.add_parser("pack", help="a run -> a packaged model")
    packing.add_argument("run", type=Path)
    packing.add_argument("data", type=Path, help="names and countries that it trained on")
    packing.add_argument("out", type=Path)
    packing.add_argument("--valid", type=Path, help="file of held-out names")
    packing.add_argument("--least", type=int, default=500, help="names of a country's direction")
    packing.add_argument("-n", type=int, default=10_000, help="samples from the prior")
    options = parser.parse_args()
    if options.command == "names":
        write_names(options.cities, options.countries, options.out)
    else:
        pack(options.run, options.data, options.out, options.valid, options.least, options.n)


if __name__ == "__main__":
    main()
