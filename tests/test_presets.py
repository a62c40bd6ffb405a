import os
from dataclasses import asdict, replace

import pytest
import torch

import fastvae
from fastvae.cli.fields import shown
from fastvae.presets import PRESETS, build_model, configure, open_corpus
from fastvae.text import ByteVocabulary, CharVocabulary, LineCorpus, WindowCorpus
from fastvae.training import TrainingConfig

PTB = CharVocabulary("".join(map(chr, range(33, 83))))  # 50 characters, as in the paper


def parameters(name: str, vocabulary) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(PRESETS[name], vocabulary).parameters())


# The design's counts for tweets; by hand for characters: V 51, Z 50 or 100, D 200, L 48.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tweets", 11_099_574),
        ("tweets-lstm-vae", 10_765_459),
        (
            "ptb-lstm",
            # encoder: convolutions, norms, linear; then expansion and deconvolutions with norms
            (3 * 51 * 128 + 128 + 256) + (3 * 128 * 256 + 256 + 512) + (256 * 12 * 100 + 100)
            + (50 * 3072 + 3072) + (3 * 256 * 128 + 128 + 256) + (3 * 128 * 200 + 200 + 400)
            # head; LSTM: input, recurrent, bias and norm; classifier
            + (200 * 51 + 51) + (2000 * 253 + 2000 * 500 + 3 * 2000) + (500 * 51 + 51),
        ),
        (
            "ptb-lstm-vae",
            (2000 * 51 + 2000 * 500 + 6000) + (500 * 200 + 200) + (100 * 1000 + 1000)
            + (2000 * 53 + 2000 * 500 + 6000) + (500 * 51 + 51),
        ),
    ],
)  # fmt: skip
def test_parameter_counts(name, count):
    vocabulary = ByteVocabulary() if name.startswith("tweets") else PTB
    assert parameters(name, vocabulary) == count


@pytest.mark.parametrize(
    ("name", "floor", "start", "end", "decays_from", "batch", "clip"),
    [
        ("ptb-lstm", 0.001, 1000, 8000, 20_000, 64, None),
        ("ptb-bytenet", 0.001, 1000, 8000, 20_000, 64, None),
        ("ptb-conv", 0.0, 10_000, 17_000, None, 64, None),
        ("ptb-lstm-vae", 0.0, 10_000, 17_000, None, 64, 100.0),
        ("tweets", 0.001, 50_000, 60_000, 70_000, 32, None),
        ("tweets-lstm-vae", 0.0, 10_000, 17_000, None, 32, 100.0),
    ],
)
def test_schedules_of_the_paper(name, floor, start, end, decays_from, batch, clip):
    config = TrainingConfig(**PRESETS[name].training)
    weight = config.kl_schedule
    assert (weight(0), weight(start), weight(end), weight(99_999)) == (floor, floor, 1.0, 1.0)
    assert weight((start + end) // 2) == pytest.approx((1 + floor) / 2)
    last = decays_from or 99_999
    assert config.learning_rate_at(last) == 1e-3
    after = config.learning_rate_at(last + 1000)
    assert after == pytest.approx(1e-3 * (0.95 if decays_from else 1.0))
    assert (config.steps, config.batch_size, config.clip_norm) == (100_000, batch, clip)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_a_model_and_a_config(name):
    preset = PRESETS[name]
    preset = replace(preset, length=preset.length or 24)
    vocabulary = ByteVocabulary() if preset.text == "tweets" else PTB
    with torch.device("meta"):
        model = build_model(preset, vocabulary)
    assert (model.vocab_size, model.length) == (vocabulary.size, preset.length)
    assert (model.pad_id, model.end_id) == (vocabulary.pad_id, vocabulary.end_id)
    preset.config()


HYBRID = {
    "vocab_size": 259, "length": 128, "latent_size": 100, "feature_channels": 200,
    "encoder_channels": (128, 256, 512, 512, 512), "decoder": "lstm", "hidden_size": 1000,
    "conv_layers": 3, "conv_channels": 256, "carry": True, "aux_weight": 0.2, "word_dropout": 0.0,
    "pad_id": None, "end_id": None, "mask_pad": False,
}  # fmt: skip
BASELINE = {
    "vocab_size": 259, "length": 128, "latent_size": 100, "hidden_size": 1000, "word_dropout": 0.5,
    "pad_id": None, "end_id": None, "mask_pad": False,
}  # fmt: skip
TRAINING = {
    "steps": 100_000, "batch_size": 64, "learning_rate": 1e-3, "lr_decay": 1.0,
    "lr_decay_every": 1000, "lr_decay_start": 0, "lr_floor": 0.0, "kl_floor": 0.0, "kl_start": 0,
    "kl_end": 0, "kl_cycles": 1, "kl_rise": 1.0, "kl_target": 1.0, "kl_nats": None,
    "free_bits": 0.0, "clip_norm": None, "precision": "fp32", "accumulate": 1, "seed": 0,
    "log_every": 50, "eval_every": 1000, "eval_samples": 2000, "checkpoint_every": 1000,
    "sample_every": 1000, "samples": 5,
}  # fmt: skip


def test_defaults_are_those_of_the_paper():
    """And settings of a run that do not change it by themselves."""
    assert fastvae.HybridVAE(259, 128, device="meta").config == HYBRID
    assert fastvae.LSTMVAE(259, 128, device="meta").config == BASELINE
    assert asdict(TrainingConfig()) == TRAINING


def test_presets_for_any_text():
    """What they change of the defaults; results in the docs were made with these."""
    changed = {"latent_size", "encoder_channels", "feature_channels", "hidden_size"}
    small, lines = PRESETS["small"], PRESETS["lines"]
    assert small.length == 48 and lines.length is None
    assert small.model_arguments.keys() == changed
    assert [small.model_arguments[k] for k in sorted(changed)] == [(64, 128), 100, 200, 32]
    assert (
        lines.model_arguments.keys() == changed | {"mask_pad"} and lines.model_arguments["mask_pad"]
    )
    assert [lines.model_arguments[k] for k in sorted(changed)] == [(128, 256), 100, 320, 64]
    assert asdict(small.config()) == {
        **TRAINING, "steps": 3000, "batch_size": 32, "kl_floor": 0.001, "kl_end": 2000
    }  # fmt: skip
    assert asdict(lines.config()) == {
        **TRAINING, "steps": 10_000, "kl_end": 7000, "kl_target": 0.85, "lr_decay": 0.8,
        "lr_decay_start": 7000, "lr_decay_every": 300, "lr_floor": 1e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "length", "text", "changed"),
    [
        ("ptb-lstm", 48, "windows", {"hidden_size": 500}),
        ("ptb-bytenet", 56, "windows", {"decoder": "bytenet", "conv_layers": 3}),
        ("ptb-conv", 52, "windows", {"latent_size": 100, "decoder": "none", "aux_weight": 0.0}),
        ("ptb-lstm-vae", 48, "windows", {"hidden_size": 500, "word_dropout": 0.5}),
        ("tweets", 128, "tweets", {}),
        ("tweets-lstm-vae", 128, "tweets", {"hidden_size": 1000, "word_dropout": 0.5}),
    ],
)
def test_sizes_of_the_paper(name, length, text, changed):
    preset, vocabulary = PRESETS[name], CharVocabulary("ab", end=True)
    with torch.device("meta"):
        found = preset.model_for(vocabulary).config
    ids = {"vocab_size": 4, "length": length, "pad_id": 2, "end_id": 3}
    characters = {"latent_size": 50, "encoder_channels": (128, 256)} if "ptb" in name else {}
    expected = {**HYBRID, **characters} if "vae" not in name else BASELINE
    assert found == {**expected, **ids, **changed} and preset.text == text


def test_overrides_reach_model_length_and_training():
    preset = configure(
        "ptb-lstm",
        {
            "length": "64",
            "encoder_channels": "32,64",
            "decoder": "bytenet",
            "carry": "False",
            "clip_norm": "5",
            "eval_samples": "none",
            "steps": "300",
        },
    )
    assert preset.length == 64
    changed = {"encoder_channels": (32, 64), "decoder": "bytenet", "carry": False}
    assert preset.model_arguments == {**PRESETS["ptb-lstm"].model_arguments, **changed}
    training = {"clip_norm": 5.0, "eval_samples": None, "steps": 300}
    assert preset.training == {**PRESETS["ptb-lstm"].training, **training}
    assert PRESETS["ptb-lstm"].length == 48


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ptb", {}, r"no preset 'ptb': there are .*ptb-lstm, .*tweets"),
        ("small", {"speed": "9"}, r"small has no field 'speed': did you mean seed"),
        ("ptb-lstm-vae", {"decoder": "lstm"}, r"ptb-lstm-vae has no field 'decoder'"),
        ("small", {"pad_id": "3"}, r"small has no field 'pad_id'"),
        ("small", {"steps": "1.5"}, r"steps = '1.5': expected a whole number"),
        ("small", {"carry": "maybe"}, r"carry = 'maybe': expected true or false"),
        ("small", {"clip_norm": "x"}, r"clip_norm = 'x': expected a number or none"),
        ("small", {"encoder_channels": "a"}, r"encoder_channels = 'a': expected numbers such as"),
    ],
)
def test_wrong_names_and_values_are_named(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure(name, overrides)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("encoder_channels", "(32, 64)", (32, 64)),
        ("encoder_channels", "[8]", (8,)),
        ("encoder_channels", "8,", (8,)),
        ("carry", "TRUE", True),
        ("mask_pad", "false", False),
        ("steps", " 12 ", 12),
        ("learning_rate", "1e-3", 0.001),
        ("clip_norm", "None", None),
        ("eval_samples", "none", None),
        ("eval_samples", "7", 7),
        ("kl_nats", "6", 6.0),
        ("decoder", "none", "none"),
        ("length", "56", 56),
    ],
)
def test_values_as_text(field, text, value):
    preset = configure("ptb-bytenet", {field: text})
    found = {"length": preset.length, **preset.model_arguments, **preset.training}[field]
    assert found == value and type(found) is type(value)
    assert configure("ptb-bytenet", {field: shown(value)}) == preset


def test_windows_and_tweets_become_their_corpora(tmp_path):
    path = tmp_path / "text"
    path.write_text("@bob see https://a.b\nyes\n")
    windows = open_corpus(path, 8, text="windows")
    assert isinstance(windows, WindowCorpus)
    assert windows.vocabulary.decode(next(windows.batches(1))[0]) == "@bob see"
    tweets = open_corpus(path, 32, text="tweets")
    assert isinstance(tweets, LineCorpus)
    lines = [tweets.vocabulary.decode(row) for row in next(tweets.batches(2))]
    assert lines == ["@userid see url", "yes"]


@pytest.mark.parametrize(("characters", "length"), [(13, 20), (356, 32), (76, 88)])
def test_preset_lines_is_small(characters, length):
    """Molecules, place names, sentences: 1 to 2 million parameters."""
    vocabulary = CharVocabulary("".join(map(chr, range(0x100, 0x100 + characters))), end=True)
    with torch.device("meta"):
        model = PRESETS["lines"].model_for(vocabulary, length)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2.2e6


def test_presets_that_leave_the_length_open():
    preset = fastvae.presets.load("lines")
    assert preset.model_for(PTB, 40).length == 40
    with pytest.raises(ValueError, match="takes its length from the text"):
        preset.model_for(PTB)
    config = preset.config(steps=500)
    assert (config.kl_end, config.lr_decay_start, config.lr_decay_every) == (350, 350, 15)
    assert preset.config(steps=2).lr_decay_every == 1
    assert preset.config(steps=500, kl_end=100).kl_end == 100


def test_a_model_takes_four_times_its_weights(monkeypatch):
    """With their gradients and Adam's two moments."""
    preset = fastvae.presets.load("small")
    weights = sum(4 * p.numel() for p in preset.model_for(PTB).parameters())
    memory = {"SC_PHYS_PAGES": 4 * weights, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    preset.model_for(PTB)
    memory["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ValueError, match=r"gradients and Adam's moments need .* GB, this machine"):
        preset.model_for(PTB)


def test_presets_from_python():
    preset = fastvae.presets.load("ptb-lstm")
    assert preset.config(steps=7) == TrainingConfig(**{**preset.training, "steps": 7})
    small = fastvae.presets.load("small")
    vocabulary = fastvae.text.CharVocabulary.from_text("abc")
    model = small.model_for(vocabulary)
    assert model.config["vocab_size"] == vocabulary.size
    assert model.config["hidden_size"] == 200
    with pytest.raises(ValueError, match=r"no preset 'ptb-lstn': did you mean ptb-lstm\?"):
        fastvae.presets.load("ptb-lstn")
    with pytest.raises(ValueError, match="no preset '7': there are lines, "):
        fastvae.presets.load("7")
    with pytest.raises(ValueError, match=r"no field 'step': did you mean steps\?"):
        small.config(step=3)
