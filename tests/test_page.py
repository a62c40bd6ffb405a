"""The exported file: what is in it and what is refused, and the command."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastvae as package
from fastvae import HybridVAE, text
from fastvae.page.document import joined
from fastvae.page.pattern import to_javascript
from fastvae.page.weights import pack

FOLDER = Path(package.__file__).parent / "page"
SIZES = {"latent_size": 4, "encoder_channels": (4, 4), "feature_channels": 4, "hidden_size": 8}


def small(vocabulary, length=8, reading="lines", **sizes):
    ids = {"pad_id": vocabulary.pad_id, "end_id": vocabulary.end_id}
    model = HybridVAE(vocabulary.size, length, **{**SIZES, **ids, **sizes}).eval()
    model.reading = text.Reading(reading)
    return model


@pytest.fixture
def vocabulary():
    return text.CharVocabulary("abcdefgh", end=True)


@pytest.fixture
def page(vocabulary, tmp_path):
    model = small(vocabulary)
    written = package.export_page(model, vocabulary, tmp_path / "page.html", examples=["abc"])
    return model, written.path.read_text()


def block(page, name):
    return re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', page, re.S)[1]


def test_holds_the_weights_and_the_engine(page):
    model, content = page
    assert gzip.decompress(base64.b64decode(block(content, "weights"))) == pack(model)
    engine = (FOLDER / "engine.wasm").read_bytes()
    assert gzip.decompress(base64.b64decode(block(content, "engine"))) == engine


def test_policy_allows_this_script_and_style_alone(page):
    _, content = page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', content)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for rule, tag in (("script-src", 'script type="module"'), ("style-src", "style")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag.split()[0]}>", content, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[rule].split()[0] == f"'sha256-{digest}'"
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", content)


def test_two_exports_are_the_same_file(vocabulary, tmp_path):
    model = small(vocabulary)
    first, second = (
        package.export_page(model, vocabulary, tmp_path / f"{n}.html").path.read_bytes()
        for n in range(2)
    )
    assert first == second


def test_markup_in_texts_stays_text(tmp_path):
    wicked = "</script><script>alert(1)</script><!--"
    tokens = text.TokenVocabulary([wicked, "a"], r"</script>.*?<!--|.")
    path = tmp_path / "page.html"
    package.export_page(
        small(tokens), tokens, path, title=wicked, prompt=wicked, card=wicked, examples=[wicked]
    )
    content = path.read_text()
    assert wicked not in content
    manifest = json.loads(block(content, "manifest"))
    assert manifest["vocabulary"]["tokens"][0] == manifest["prompt"] == manifest["card"] == wicked


def test_examples_are_those_that_come_back(vocabulary, tmp_path):
    known = ["abc", "hgfedcb", "aaaa", "bcd"]
    written = package.export_page(
        small(vocabulary), vocabulary, tmp_path / "page.html", examples=["fade"], texts=known
    )
    manifest = json.loads(block(written.path.read_text(), "manifest"))
    assert manifest["examples"][0] == "fade" and set(manifest["examples"][1:]) < set(known)
    assert written.size == written.path.stat().st_size
    assert f'src="{written.path}"' in written._repr_html_()


def test_what_does_not_belong_together_is_refused(vocabulary, tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="the vocabulary has 4 tokens, the model 10"):
        package.export_page(small(vocabulary), text.CharVocabulary("ab", end=True), path)
    with pytest.raises(ValueError, match=r"'x' must have shape \[4\], got \[3\]"):
        package.export_page(small(vocabulary), vocabulary, path, directions={"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="the example 'xyz' holds nothing that the model reads"):
        package.export_page(small(vocabulary), vocabulary, path, examples=["xyz"])
    with pytest.raises(ValueError, match="got Linear"):
        pack(torch.nn.Linear(1, 1))
    assert not path.exists()


@pytest.mark.parametrize("pattern", [r"(?>a|b)c|.", r"a++|.", r"(a)?(?(1)b|c)|.", r"(?a:\w)|."])
def test_patterns_that_javascript_lacks_are_refused(pattern):
    with pytest.raises(ValueError, match="JavaScript has no"):
        to_javascript(pattern)


def test_sources_are_short_and_the_script_is_one():
    for path in FOLDER.glob("*"):
        if path.suffix in (".js", ".css", ".py", ".html"):
            assert len(path.read_text().splitlines()) < 300, path
    for name in ("main", "worker"):
        script = joined(name)
        assert "import " not in script and not re.search(r"^export ", script, re.M)
        assert script.count("function createQueue(") == 1


def test_command(fastvae, vocabulary, tmp_path):
    run, path = tmp_path / "some run", tmp_path / "page.html"
    small(vocabulary).save_pretrained(run, vocabulary)
    directions = {"a little": torch.full((4,), 0.1), "more h": torch.ones(4)}
    save_file(directions, run / "directions.safetensors")
    (run / "card.txt").write_text("About the model.", encoding="utf-8")
    (tmp_path / "known.tsv").write_text("1\tabc\n2\tfade\n3\tabc\n4\txyz\n5\tabcdefgh\n")
    (tmp_path / "card.txt").write_text("One.\n\nTwo.")
    options = "--prompt", "Type.", "--example", "bad", "--example", "cafe"
    more = "--texts", tmp_path / "known.tsv", "--column", "2", "--card", tmp_path / "card.txt"
    status, out, err = fastvae("export", run, path, *options, *more)
    assert (status, err) == (0, "")
    size = path.stat().st_size / 1e6
    assert out == f"{path}: {size:.2f} MB, with 2 known texts\n"
    content = path.read_text()
    assert "<title>some run</title>" in content
    manifest = json.loads(block(content, "manifest"))
    assert manifest["examples"] == ["bad", "cafe", "abc"] or manifest["examples"][2] == "fade"
    assert manifest["prompt"] == "Type." and manifest["card"] == "One.\n\nTwo."
    assert [name for name, _ in manifest["directions"]] == ["more h", "a little"]  # longest first
    known = gzip.decompress(base64.b64decode(block(content, "known"))).decode().split("\n")
    assert known == ["abc", "fade"]


@pytest.mark.parametrize("found", [True, False])
def test_open_shows_the_page(fastvae, vocabulary, tmp_path, monkeypatch, found):
    run, path, asked = tmp_path / "run", tmp_path / "a page.html", []
    small(vocabulary).save_pretrained(run, vocabulary)
    (run / "card.txt").write_text("Beside the model.", encoding="utf-8")
    monkeypatch.setattr("webbrowser.open", lambda url: asked.append(url) or found)
    status, _, err = fastvae("export", run, path, "--open")
    assert status == 0 and asked == [path.as_uri()]
    assert json.loads(block(path.read_text(), "manifest"))["card"] == "Beside the model."
    assert ("found no browser" in err) is not found


def test_command_tells_what_is_wrong(fastvae, vocabulary, tmp_path):
    run = tmp_path / "run"
    small(vocabulary).save_pretrained(run, vocabulary)
    (tmp_path / "other.txt").write_text("xyz\n")
    for arguments, said in (
        ((run, tmp_path / "page.html", "--column", "2"), "are for the file that --texts names"),
        ((run, tmp_path / "page.html", "--texts", tmp_path / "other.txt"), "no text that fits"),
        ((run, tmp_path / "other.txt" / "page.html"), "cannot make the folder"),
        ((run, run), f"cannot write {run}: Is a directory"),
        ((tmp_path / "none", tmp_path / "page.html"), "is not a folder"),
    ):
        status, _, err = fastvae("export", *arguments)
        assert status == 2 and said in err and len(err.splitlines()) == 1
