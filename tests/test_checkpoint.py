"""Model folders and training checkpoints: exact, strict, whole after every accident."""

import json
import os
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import fastvae
from fastvae import load
from fastvae.atomic_files import (
    DamagedFileError,
    remove_temporaries,
    write_bytes,
    write_tensors,
)
from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.pretrained import signatures
from fastvae.text.reading import Reading, load_reading
from fastvae.text.vocabulary import ByteVocabulary, CharVocabulary
from fastvae.training import checkpoint

SMALL = {"latent_size": 3, "encoder_channels": (6, 7), "feature_channels": 5, "hidden_size": 6}
VOCABULARY = CharVocabulary("abcdefghi\n")


def hybrid(**arguments):
    return HybridVAE(11, 8, **{**SMALL, **arguments})


MODELS = {
    "lstm": lambda: hybrid(),
    "bytenet": lambda: hybrid(decoder="bytenet", conv_layers=2, conv_channels=4),
    "none": lambda: hybrid(decoder="none"),
    "lstm_vae": lambda: LSTMVAE(11, 8, latent_size=3, hidden_size=6, pad_id=10),
    "float64": lambda: hybrid(dtype=torch.float64),
    "bfloat16": lambda: hybrid().to(torch.bfloat16),
    "float16": lambda: hybrid().half(),
}


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    arguments = config["arguments"] | changes.pop("arguments", {})
    config = config | changes | {"arguments": {k: v for k, v in arguments.items() if v != "gone"}}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    """Other tensors under a good digest: what another program or model would write."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    model = hybrid()
    model.save_pretrained(tmp_path, VOCABULARY)
    return tmp_path


# Model folders


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path, capsys):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "new" / "folder", VOCABULARY)
    rng = torch.get_rng_state()
    loaded, vocabulary = load(tmp_path / "new" / "folder")
    again = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(rng, torch.get_rng_state())
    for other in (loaded, again):
        assert type(other) is type(model) and same_tensors(model, other)
        assert other.config == model.config and not other.training
    assert vocabulary == VOCABULARY
    written = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert written == ["config.json", "model.safetensors", "vocabulary.json"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", MODELS)
def test_int8_round_trip(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path, VOCABULARY, quantization="int8")
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == "int8"
    loaded, vocabulary = load(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_tensors(loaded, again) and vocabulary == VOCABULARY and not loaded.training
    after = loaded.state_dict()
    assert after.keys() == model.state_dict().keys()
    for key, before in model.state_dict().items():
        assert after[key].dtype == before.dtype
        if before.dim() < 2:
            assert torch.equal(after[key], before)
            continue
        # Half of a step of 1/127 of the row's largest, and the rounding of 16 bits.
        before, found = before.double().flatten(1), after[key].double().flatten(1)
        largest = before.abs().amax(1, keepdim=True)
        error = (found - before).abs()
        step = largest / 127
        rounded = {"bfloat16": 2**-8, "float16": 2**-11}.get(name, 0)
        assert (error <= 0.5001 * step + found.abs() * rounded).all()
        assert error.max() > 0.3 * step.max()  # it is rounded
        assert (found / step).round().unique().numel() <= 255


def test_tied_weights_are_saved_under_each_name(tmp_path):
    model = hybrid(feature_channels=6, hidden_size=6)
    model.head.weight = model.decoder.classifier.weight
    model.save_pretrained(tmp_path)
    assert same_tensors(load(tmp_path)[0], model)


def test_int8_is_a_quarter(tmp_path):
    model = hybrid(hidden_size=256)
    for quantization in (None, "int8"):
        model.save_pretrained(tmp_path / str(quantization), quantization=quantization)
    sizes = [(tmp_path / q / "model.safetensors").stat().st_size for q in ("None", "int8")]
    assert sizes[1] < 0.28 * sizes[0]


def test_int8_refuses(tmp_path):
    model = hybrid()
    with pytest.raises(ValueError, match=r'quantization must be None or "int8", got \'int4\''):
        model.save_pretrained(tmp_path / "a", quantization="int4")
    with torch.no_grad():
        model.decoder.classifier.weight[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"decoder\.classifier\.weight is not finite"):
        model.save_pretrained(tmp_path / "a", quantization="int8")
    assert not (tmp_path / "a").exists()
    hybrid().save_pretrained(tmp_path / "b", quantization="int8")
    edit_config(tmp_path / "b", quantization="int4")
    with pytest.raises(ValueError, match="unknown quantization 'int4'"):
        load(tmp_path / "b")


def test_int8_sizes_are_checked_before_memory(tmp_path):
    hybrid().save_pretrained(tmp_path, quantization="int8")
    edit_config(tmp_path, arguments={"hidden_size": 100_000})
    with pytest.raises(ValueError, match=r"does not fit model\.safetensors: it needs more bytes"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["lacks", "shape"])
def test_int8_scales_are_checked(tmp_path, change):
    hybrid().save_pretrained(tmp_path, quantization="int8")
    name = "decoder.classifier.weight.scale"
    if change == "lacks":
        edit_weights(tmp_path, lambda tensors: tensors.pop(name))
    else:
        edit_weights(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(ValueError, match=rf"{name}"):
        load(tmp_path)


def test_how_the_text_was_read_goes_with_the_model(tmp_path):
    model, reading = hybrid(), Reading("lines", "tweets")
    assert model.reading is None
    model.reading = reading
    model.save_pretrained(tmp_path / "first")
    for other in (
        load(tmp_path / "first")[0],
        HybridVAE.from_pretrained(tmp_path / "first"),
    ):
        assert other.reading == reading
        other.save_pretrained(tmp_path / "second")
        assert load_reading(tmp_path / "second") == reading


def test_tuples_come_back_as_tuples(saved):
    assert load(saved)[0].config["encoder_channels"] == (6, 7)


def test_without_vocabulary(tmp_path):
    hybrid().save_pretrained(tmp_path)
    assert load(tmp_path)[1] is None


def test_files_of_another_model_do_not_count_as_this_ones(saved, tmp_path):
    """Those of a model with the same config stay: it may be the same model, trained on."""
    hybrid().save_pretrained(saved)
    assert load(saved)[1] == VOCABULARY
    other = hybrid(hidden_size=7)
    with pytest.raises(ValueError, match=r"vocabulary\.json belongs to another model: remove it,"):
        other.save_pretrained(saved)
    assert load(saved)[0].config == hybrid().config
    other.save_pretrained(saved, VOCABULARY)
    assert load(saved)[0].config == other.config
    other.reading = Reading("lines")
    other.save_pretrained(saved, VOCABULARY)
    with pytest.raises(ValueError, match=r"text\.json belongs to another model"):
        hybrid().save_pretrained(saved, VOCABULARY)
    (saved / "text.json").unlink()
    (saved / "config.json").write_text("damaged")
    hybrid().save_pretrained(saved, VOCABULARY)
    assert load(saved)[1] == VOCABULARY


class OfASubclass(torch.Tensor):
    pass


def test_tensors_of_subclasses_are_not_saved(tmp_path):
    """Such as the parts of a sharded model."""
    model = hybrid()
    weight = model.head.weight.detach().as_subclass(OfASubclass)
    model.head.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"^head\.weight is a OfASubclass: save a model of plain"):
        model.save_pretrained(tmp_path / "model", VOCABULARY)
    assert not (tmp_path / "model").exists()


def test_vocabulary_of_another_size(saved, tmp_path):
    with pytest.raises(ValueError, match=r"259 tokens, the model 11"):
        hybrid().save_pretrained(saved, ByteVocabulary())
    ByteVocabulary().save(saved / "vocabulary.json")
    with pytest.raises(ValueError, match=r"vocabulary\.json has 259 tokens, the model 11"):
        load(saved)


def test_class_is_checked(saved):
    with pytest.raises(ValueError, match="holds a HybridVAE, not a LSTMVAE"):
        LSTMVAE.from_pretrained(saved)
    edit_config(saved, **{"class": "Popen"})
    with pytest.raises(ValueError, match="unknown class 'Popen'"):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"color": 3}}, "unknown argument 'color'"),
        ({"arguments": {"aux_weight": "gone"}}, "lacks the argument 'aux_weight'"),
        ({"arguments": {"decoder": "transformer"}}, "transformer"),
        ({"arguments": {"hidden_size": "large"}}, "does not fit|config.json"),
        ({"arguments": {"hidden_size": 5}}, r"this model has torch.float32 \[20"),
        ({"arguments": {"decoder": "none"}}, "unknown tensor decoder"),
        ({"arguments": {"decoder": "bytenet"}}, "more bytes|lacks the tensor"),
        ({"dtype": "float64"}, "more bytes"),
        ({"dtype": "bfloat16"}, r"is torch.float32 .*, this model has torch.bfloat16"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"class": ["HybridVAE"]}, "class must be a string"),
        ({"version": 2}, "version 2"),
        ({"extra": 1}, "has an unknown key extra"),
    ],
)
def test_config_must_fit(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]"])
def test_config_must_be_json(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 10**9},
        {"hidden_size": 10**6},
        {"hidden_size": 10**30},
        {"decoder": "bytenet", "conv_layers": 10**9, "conv_channels": 4},
        {"encoder_channels": [1] * 100_000},
    ],
)
def test_absurd_sizes_are_refused_before_allocation(saved, arguments):
    edit_config(saved, arguments=arguments)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=r"config\.json"):
        load(saved)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), "lacks the tensor head.bias"),
        (lambda t: t.update(more=torch.zeros(1)), "unknown tensor more"),
        (lambda t: t.update({"head.bias": torch.zeros(12)}), r"head.bias is .* \[12\].* \[11\]"),
        (lambda t: t.update({"head.bias": torch.zeros(11).double()}), "head.bias is torch.float64"),
    ],
)
def test_tensors_must_fit(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_weights_of_other_programs_need_no_digest(saved):
    model, _ = load(saved)
    save_file(model.state_dict(), saved / "model.safetensors")
    assert same_tensors(model, load(saved)[0])


def test_truncated_weights(saved):
    content = (saved / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        (saved / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(DamagedFileError, match=r"model\.safetensors is damaged"):
            load(saved)


def test_a_header_without_end_is_not_read(saved):
    with open(saved / "model.safetensors", "wb") as file:
        file.write((80 << 20).to_bytes(8, "little"))
        file.truncate(90 << 20)
    with pytest.raises(DamagedFileError, match=r"damaged \(a header of 83,886,080 bytes"):
        load(saved)


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a model on the Hub"):
        HybridVAE.from_pretrained("nobody/nothing", local_files_only=True)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        HybridVAE.from_pretrained(saved)


def test_the_hub_cache_is_read(tmp_path):
    # The layout of huggingface_hub's cache, as a download leaves it.
    cache, commit = tmp_path / "models--somebody--model", "0" * 40
    model = hybrid()
    model.save_pretrained(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    loaded = HybridVAE.from_pretrained("somebody/model", cache_dir=tmp_path, local_files_only=True)
    assert same_tensors(model, loaded)


def test_pushing_to_the_hub_uploads_the_folder_and_a_card(monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, *, private, exist_ok):
            assert private and exist_ok
            return SimpleNamespace(repo_id=f"somebody/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            assert commit_message == "Better"
            for path in Path(folder_path).iterdir():
                uploaded[path.name] = path.read_bytes()
            return f"{repo_id}@{revision}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = hybrid()
    model.reading = Reading("lines")
    options = {"private": True, "token": "secret", "branch": "b", "commit_message": "Better"}
    assert model.push_to_hub("m", VOCABULARY, **options) == "somebody/m@b"
    names = ["README.md", "config.json", "model.safetensors", "text.json", "vocabulary.json"]
    assert sorted(uploaded) == names
    assert b'fastvae.HybridVAE.from_pretrained("somebody/m")' in uploaded["README.md"]


def test_no_repository_is_made_for_a_model_that_is_refused(monkeypatch):
    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, *given, **options):
            raise AssertionError("a repository was made")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    mixed = hybrid()
    mixed.head.double()
    for model, vocabulary in ((hybrid(), ByteVocabulary()), (mixed, None)):
        with pytest.raises(ValueError, match=r"they do not belong together|mixes dtypes"):
            model.push_to_hub("m", vocabulary)


def test_one_dtype_is_saved(tmp_path):
    model = hybrid()
    model.head.double()
    with pytest.raises(ValueError, match=r"mixes dtypes \['torch.float32', 'torch.float64'\]"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ["parametrized", "pruned", "compiled", "cut", "extended"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, kind, quantization):
    model = hybrid()
    advice = {
        "parametrized": ": call torch.nn.utils.parametrize.remove_parametrizations first",
        "pruned": ": call torch.nn.utils.prune.remove first",
        "compiled": r": use module\.compile\(\) instead of torch\.compile\(module\)",
        "extended": "",
    }
    if kind == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(model.head, "weight")
    elif kind == "compiled":
        model.head = torch.compile(model.head)
    elif kind == "pruned":
        prune.random_unstructured(model.head, "weight", 0.5)
    elif kind == "cut":
        model.head.weight = torch.nn.Parameter(model.head.weight[:, :-1].clone())
    else:
        model.extra = torch.nn.Linear(2, 2)
    message = f"it could not be loaded{advice[kind]}$" if kind in advice else "to be loaded, got"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model", VOCABULARY, quantization=quantization)
    assert not (tmp_path / "model").exists()
    if kind == "pruned":
        prune.remove(model.head, "weight")
        model.save_pretrained(tmp_path / "model", VOCABULARY)
        saved = fastvae.load(tmp_path / "model")[0].state_dict()
        torch.testing.assert_close(saved, model.state_dict(), rtol=0, atol=0)


def test_changed_settings_that_are_not_saved_give_a_warning(tmp_path):
    model = hybrid()
    model.extra = torch.nn.Dropout()  # has nothing that could be saved
    model.scale, model.masks = torch.tensor(0.5), (torch.ones(2), torch.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, VOCABULARY)
    model.decoder.lstm.eps, model.word_dropout = 0.5, 1.0
    with pytest.warns(UserWarning) as caught:
        model.save_pretrained(tmp_path, VOCABULARY)
    assert sorted(str(warning.message) for warning in caught) == [
        "decoder.lstm.eps is 0.5, which is not saved: a loaded model has 0.0001",
        "word_dropout is 1.0, which is not saved: a loaded model has 0.0; "
        "set model.config['word_dropout'] to save it",
    ]
    model.config["word_dropout"], model.decoder.lstm.eps = 1.0, 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, VOCABULARY)
    assert fastvae.load(tmp_path)[0].word_dropout == 1.0


def test_a_class_with_other_arguments_is_saved(tmp_path):
    """It loads its own way."""

    class Small(fastvae.HybridVAE):
        def __init__(self, width):
            super().__init__(11, 8, latent_size=4, encoder_channels=(8, 8), hidden_size=width)
            self.extra = torch.nn.Linear(2, 2)

    Small(6).save_pretrained(tmp_path)
    assert "extra.weight" in load_file(tmp_path / "model.safetensors")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        hybrid().save_pretrained(tmp_path / "file" / "folder")


# Training checkpoints


def trained(steps=3, **arguments):
    model = hybrid(**arguments)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.randint(11, (4, 8))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same_optimizers(a, b):
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


STATE = {"step": 3, "seed": 0, "best": 1 / 3, "window": {"loss": 0.1 + 0.2}}


@pytest.mark.parametrize("steps", [0, 3])
def test_training_state_round_trip(tmp_path, steps):
    model, optimizer = trained(steps)
    checkpoint.save_checkpoint(tmp_path / "last.safetensors", model, optimizer, STATE)
    other, other_optimizer = trained(1)
    state = checkpoint.load_checkpoint(tmp_path / "last.safetensors", other, other_optimizer)
    assert state == STATE
    assert same_tensors(model, other) and same_optimizers(optimizer, other_optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_best_weights(saved):
    model, optimizer = trained()
    checkpoint.save_checkpoint(saved / "best.safetensors", model, optimizer, STATE)
    assert same_tensors(model, load(saved, best=True)[0])
    assert not same_tensors(model, load(saved)[0])


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.save_checkpoint(path, *trained(1), STATE)
    content = path.read_bytes()
    model, optimizer = trained(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    header = 8 + int.from_bytes(content[:8], "little")
    # Spaces fill the header's end: a flip there changes nothing that anyone reads.
    positions = [*range(0, len(content[:header].rstrip()), 29), *range(header, len(content), 1999)]
    positions.append(content.index(b"digest"))
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedFileError, match="damaged"):
            checkpoint.load_checkpoint(path, model, optimizer)
    for size in range(0, len(content), 3001):
        path.write_bytes(content[:size])
        with pytest.raises(DamagedFileError, match="damaged"):
            checkpoint.load_checkpoint(path, model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpoint_of_another_version(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    checkpoint.save_checkpoint(path, *trained(), STATE)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    model, optimizer = trained(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"last.safetensors was written by another version"):
        checkpoint.load_checkpoint(path, model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpoint_without_a_version(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.save_checkpoint(path, *trained(), STATE)
    with checkpoint.open_tensors(path) as file:
        tensors, metadata = checkpoint.read_tensors(path, file)
    state = {k: v for k, v in json.loads(metadata["fastvae"]).items() if k != "format"}
    checkpoint.write_tensors(path, tensors, {"fastvae": json.dumps(state)})
    with pytest.raises(ValueError, match=r"last\.safetensors: its state .*format"):
        checkpoint.load_checkpoint(path, *trained(1))


def test_checkpoint_of_another_config(tmp_path):
    """Of the same sizes: the folder's files are those that the checkpoint was signed with."""
    path = tmp_path / "last.safetensors"
    hybrid().save_pretrained(tmp_path, VOCABULARY)
    checkpoint.save_checkpoint(path, *trained(), STATE, signed=signatures(tmp_path))
    assert checkpoint.load_checkpoint(path, *trained(1)) == STATE
    edit_config(tmp_path, arguments={"aux_weight": 0.7})
    with pytest.raises(ValueError, match=r"belongs to a run with another config\.json"):
        checkpoint.load_checkpoint(path, *trained(1))


def test_checkpoint_of_another_model(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "last.safetensors", *trained(), STATE)
    for arguments in ({"hidden_size": 5}, {"decoder": "none"}):
        model, optimizer = trained(1, **arguments)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"another model|this model has"):
            checkpoint.load_latest(tmp_path, model, optimizer, print)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_damaged_last_falls_back_to_the_one_before(tmp_path):
    last, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    model, optimizer = trained()
    for step in (1, 2):
        checkpoint.save_checkpoint(last, model, optimizer, {**STATE, "step": step}, previous)
    said = []
    assert checkpoint.load_latest(tmp_path, *trained(1), said.append)["step"] == 2
    assert not said

    last.write_bytes(last.read_bytes()[:-1])
    assert checkpoint.load_latest(tmp_path, *trained(1), said.append)["step"] == 1
    (line,) = said
    assert "last.safetensors is damaged" in line and "step 1" in line and "\n" not in line

    previous.write_bytes(b"")
    with pytest.raises(ValueError, match="no other checkpoint"):
        checkpoint.load_latest(tmp_path, *trained(1), said.append)
    assert checkpoint.load_latest(tmp_path / "empty", *trained(1), said.append) is None


def test_full_disk_keeps_the_old_file(tmp_path):
    last, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    model, optimizer = trained()
    for step in (1, 2):
        checkpoint.save_checkpoint(last, model, optimizer, {**STATE, "step": step}, previous)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond this
    try:
        with pytest.raises(OSError, match=r"cannot write .*last\.safetensors: .*is kept"):
            checkpoint.save_checkpoint(last, model, optimizer, STATE, previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_temporary_files_of_killed_processes_go_and_others_stay(tmp_path):
    path = tmp_path / "file"
    for name in ("file.tmp", "file.7.tmp", "file.x.tmp", "other.7.tmp"):
        (tmp_path / name).write_bytes(b"half")
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole" and (tmp_path / "file.7.tmp").read_bytes() == b"half"
    remove_temporaries([path])
    assert sorted(os.listdir(tmp_path)) == ["file", "file.tmp", "file.x.tmp", "other.7.tmp"]


def test_writers_at_once_leave_a_whole_file(tmp_path):
    contents = [bytes([n]) * (1 << 20) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: write_bytes(tmp_path / "file", content), contents * 8))
    assert (tmp_path / "file").read_bytes() in contents and os.listdir(tmp_path) == ["file"]
