"""Judge a model of SMILES: its samples, and how well latents return molecules.

    pip install '.[examples]'
    fastvae train --data qm9.csv --column smiles --out molecules
    python examples/molecules.py molecules --data qm9.csv

Prints shares in percent: samples from the prior that are valid (V), valid and unique (V.U.), valid,
unique and not in the training file (V.U.N.); molecules of the test file that come back from their
own latents, greedily and from 10 latents with 10 samples each, and greedily from the latents of
other molecules.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from frontier import open_run, read, sample_texts

from fastvae.metrics import reconstruction_accuracy

Canonical = Callable[[str], str | None]


def canonical_smiles(text: str) -> str | None:
    """SMILES -> its canonical form, or None if it is no molecule."""
    from rdkit import Chem, rdBase

    rdBase.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(text) if text else None
    return None if molecule is None else Chem.MolToSmiles(molecule)


def sample_shares(
    samples: list[str], known: set[str], canonical: Canonical = canonical_smiles
) -> dict[str, float]:
    """Samples and known canonical forms -> shares V, V.U. and V.U.N. of the samples."""
    valid = [form for form in map(canonical, samples) if form is not None]
    unique = set(valid)
    counts = {"V": len(valid), "V.U.": len(unique), "V.U.N.": len(unique - known)}
    return {name: count / len(samples) for name, count in counts.items()}


def stochastic_reconstruction(
    model: torch.nn.Module, batches: Iterable[torch.Tensor], seed: int, draws: int = 10
) -> float:
    """Share of sampled texts equal to the text that their latent was drawn for.

    For each text draws latents from its posterior, and from each as many texts.
    """
    generator = torch.Generator().manual_seed(seed)
    equal = count = 0
    for tokens in batches:
        with torch.no_grad():
            mean, logvar = model.posterior(tokens)
        for _ in range(draws):
            noise = torch.randn(mean.shape, generator=generator)
            z = mean + (0.5 * logvar).exp() * noise
            for _ in range(draws):
                found = model.generate(z, temperature=1.0, generator=generator)
                equal += (found == tokens).all(1).sum().item()
                count += len(tokens)
    return equal / count


def main() -> None:
    """Measure a run and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="file that the run trained on")
    parser.add_argument("--valid", type=Path, help="file of held-out molecules")
    parser.add_argument("-n", type=int, default=10_000, help="samples from the prior")
    parser.add_argument("--texts", type=int, default=1000, help="molecules to reconstruct")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, train, other = open_run(options.run, options.data, options.valid)
    sampling = options.n, options.temperature, options.seed
    known = {form for form in map(canonical_smiles, read(train)) if form}
    found = sample_shares(sample_texts(model, train.vocabulary, *sampling), known)
    accuracy = reconstruction_accuracy(model, other.batches(64, options.texts))
    found["reconstruction, greedy"] = accuracy["exact_reconstruction"]
    batches = other.batches(64, options.texts // 10 or 1)
    found["reconstruction, 10 x 10"] = stochastic_reconstruction(model, batches, options.seed)
    found["shuffled control"] = accuracy["shuffled_reconstruction"]
    for name, share in found.items():
        print(f"{name:<26}{100 * share:6.1f} %")


if __name__ == "__main__":
    main()
