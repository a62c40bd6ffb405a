import itertools
import math
from collections import Counter

import pytest
import torch

from fastvae.text import SyntheticCorpus
from fastvae.text.grammar import ALPHABET, FACTORS, WEIGHTS, parse, render
from fastvae.text.synthetic import LONGEST, _line


def derivations(**fixed):
    """All choices, or those where the named slots have the given values."""
    return itertools.product(
        *([fixed[name]] if name in fixed else range(len(w)) for name, w in WEIGHTS.items())
    )


def test_all_lines_differ_and_fit():
    lines = {render(choices) for choices in derivations()}
    assert len(lines) == math.prod(map(len, WEIGHTS.values())) == 1_679_616
    assert max(map(len, lines)) == LONGEST
    assert set().union(*lines) == set(ALPHABET)


def test_lines_parse_back():
    for choices in derivations(object=2, place=5):
        assert parse(render(choices)) == choices


@pytest.mark.parametrize("topic", range(8))
def test_lines_of_a_topic_differ_and_their_probabilities_sum_to_one(topic):
    corpus = SyntheticCorpus()
    lines = [render(choices) for choices in derivations(topic=topic, tense=0, form=1, number=1)]
    assert len(set(lines)) == len(lines) == 9 * 6**4
    total = math.fsum(math.exp(corpus.log_probability(line)) for line in lines)
    assert total == pytest.approx(1 / 8 * 1 / 2 * 1 / 4 * 1 / 2, rel=1e-12)


def test_entropy_by_hand():
    ln2 = math.log(2)
    half = 2 * 0.25 * 2 * ln2 + 0.5 * ln2  # tense, form: 1/2, 1/4, 1/4
    adjective = 0.5 * ln2 + 0.5 * 4 * ln2
    six = 2 * 0.25 * 2 * ln2 + 2 * 0.125 * 3 * ln2 + 0.0625 * 4 * ln2
    six -= 3 / 16 * math.log(3 / 16)
    expected = 3 * ln2 + 2 * half + ln2 + adjective + 4 * six
    assert SyntheticCorpus().entropy == pytest.approx(expected, rel=1e-14)
    assert 12 < expected < 25 and 3 * ln2 + 2 * half + ln2 > 3


def test_samples_have_the_stated_entropy():
    corpus = SyntheticCorpus()
    lines = corpus.lines(20_000, torch.Generator().manual_seed(5))
    nats = -torch.tensor([corpus.log_probability(line) for line in lines], dtype=torch.float64)
    error = nats.std() / math.sqrt(len(lines))
    assert 0 < error < 0.05
    assert abs(nats.mean() - corpus.entropy) < 3 * error


def test_draws_have_exactly_the_stated_probabilities():
    corpus = SyntheticCorpus()
    # Codes below 2^12 run through the draws of the first five slots; the other four stay at their
    # first choice, which has 4/16 each.
    lines = [_line(code) for code in range(2**12)]
    for line, count in Counter(lines).items():
        expected = math.log(count / 2**12 * (4 / 16) ** 4)
        assert corpus.log_probability(line) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "the old pirates hid gold at sea",
        "the old pirates hid gold at sea?",
        "the old pirates hides gold at sea.",
        "did the pirates hid gold at sea?",
        "the pirates hid corn at sea.",
        "the pirates hid gold in barns.",
        "the pirates eat gold at sea.",
        "the big pirates hid gold at sea.",
        "the pirates hid gold at sea. ",
        "the zebras hid gold at sea.",
    ],
)
def test_other_lines_have_no_probability(line):
    corpus = SyntheticCorpus()
    assert corpus.log_probability(line) == -math.inf
    assert corpus.describe(line) is None


def test_describe():
    corpus = SyntheticCorpus()
    assert corpus.describe("does the wise fox trick snails at night?") == {
        "topic": "forest",
        "tense": "present",
        "form": "question",
        "number": "one",
    }
    assert corpus.describe("the robots won't scan moons on mars.") == {
        "topic": "space",
        "tense": "future",
        "form": "denial",
        "number": "many",
    }
    assert corpus.factors == FACTORS


def test_batches_are_fresh_and_the_pass_is_fixed():
    corpus, generator = SyntheticCorpus(), torch.Generator().manual_seed(3)
    first, second = corpus.batch(64, generator), corpus.batch(64, generator)
    assert first.shape == (64, 48) and first.dtype == torch.int64
    assert not torch.equal(first, second)
    assert torch.equal(first, corpus.batch(64, torch.Generator().manual_seed(3)))

    fixed = torch.cat(list(corpus.batches(100)))
    assert len(fixed) == len(corpus) == 1024
    assert torch.equal(fixed, torch.cat(list(SyntheticCorpus(seed=0).batches(64))))
    assert torch.equal(fixed[:70], torch.cat(list(corpus.batches(64, limit=70))))
    assert not torch.equal(fixed, torch.cat(list(SyntheticCorpus(seed=1).batches(64))))
    assert len(SyntheticCorpus(samples=7)) == 7


def test_samples_are_lines_and_pads():
    corpus = SyntheticCorpus(64)
    generator = torch.Generator().manual_seed(9)
    lines = corpus.lines(200, torch.Generator().manual_seed(9))
    for row, line in zip(corpus.batch(200, generator), lines, strict=True):
        assert row.tolist() == corpus.vocabulary.encode_sample(line, 64)
        assert corpus.vocabulary.decode(row) == line


def test_known_lines_on_every_machine():
    lines = SyntheticCorpus().lines(3, torch.Generator().manual_seed(0))
    assert lines == [
        "the wise doctor taught riddles in labs.",
        "did the bold mermaids hide gold by boat?",
        "the bakers won't bake pies on toast.",
    ]


@pytest.mark.parametrize("arguments", [{"length": 46}, {"samples": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be at least"):
        SyntheticCorpus(**arguments)
    least = SyntheticCorpus(47, samples=1)
    assert len(least) == 1 and least[0].shape == (47,)
