"""What a user's own typed code calls: `mypy --strict` checks it against the annotations."""

from typing import Any, assert_type

import torch
from torch import Tensor

import fastvae
from fastvae.text import CharVocabulary, SyntheticCorpus, Vocabulary, WindowCorpus


def models() -> None:
    vocabulary = CharVocabulary.from_text("some text")
    model = fastvae.HybridVAE(vocabulary.size, 8, latent_size=4, encoder_channels=(4, 4))
    baseline = fastvae.LSTMVAE(10, 8, hidden_size=4)
    assert_type(model.posterior(torch.zeros(2, 8, dtype=torch.int64)), tuple[Tensor, Tensor])
    assert_type(model.encode(torch.zeros(2, 8, dtype=torch.int64)), Tensor)
    assert_type(model.generate(torch.zeros(2, 4)), Tensor)
    assert_type(baseline.sample(3, temperature=0.5, quantization="int8"), Tensor)
    assert_type(model.interpolate(torch.zeros(4), torch.zeros(4), steps=3), Tensor)
    model.save_pretrained("folder", vocabulary)
    loaded, words = fastvae.load("folder")
    assert_type(words, Vocabulary | None)
    assert_type(loaded.log_likelihood(torch.zeros(1, 8), torch.zeros(1, 4)), Tensor)
    assert_type(fastvae.HybridVAE.from_pretrained("folder"), fastvae.HybridVAE)


def training() -> None:
    corpus = SyntheticCorpus()
    preset = fastvae.presets.load("small")
    model = preset.model_for(corpus.vocabulary)
    windows = WindowCorpus("train.txt", 48, vocabulary=corpus.vocabulary)
    result = fastvae.train(model, windows, preset.config(steps=1), "run", validation=corpus)
    assert_type(result, dict[str, Any])
    assert_type(fastvae.KLSchedule(end=10)(3), float)


def ops() -> None:
    x, weight, gain, h0 = torch.zeros(3, 2, 8), torch.zeros(8, 2), torch.ones(8), torch.zeros(2, 2)
    h, c_n = fastvae.ops.layer_norm_lstm(x, weight, gain, gain, h0, h0)
    assert_type(h, Tensor)
    assert_type(c_n, Tensor)
    lstm = fastvae.nn.LayerNormLSTM(4, 2)
    lstm.to("cpu")
