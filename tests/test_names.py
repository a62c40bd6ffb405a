"""One word for one thing: identifiers that were renamed do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GONE = {
    "symbol_rows": "token_embeddings",
    "symbol_table": "input_embeddings",
    "historyless": "mask_history",
    "Kept": "WeightCache",
    "twin": "reference_model",
    "twins": "reference_modules",
    "normalise": "normalize",
    "normalised": "normalized",
    "normalise_tweet": "normalize_tweet",
    "_Trainer": "TrainingStep and Recorder",
    "Wide": "opmath_type",
    "widen": "upcast",
    "voters": "classifier_blocks",
    "MOST_MEMBERS": "MAX_GROUP_SIZE",
    "Offer": "Choice",
    "Exhibit": "Experiment",
    "symbols": "tokens",
    "RunFolder": "RunDirectory",
}


@pytest.mark.parametrize("folder", ["fastvae", "csrc", "kernels", "benchmarks", "tests"])
def test_renamed_identifiers_are_gone(folder):
    names = re.compile(rf"\b({'|'.join(GONE)})\b")
    files = [
        p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
    ]
    assert files
    for path in files:
        if path != Path(__file__):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                found = names.search(line)
                assert not found, f"{path}:{number}: {found[0]} is now {GONE[found[0]]}"
