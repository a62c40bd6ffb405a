"""The exported file: what is in it and what is refused, and the command."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastvae as package
from fastvae import HybridVAE, text
from fastvae.atomic_files import write_tensors
from fastvae.page.document import joined
from fastvae.page.export import Page, _find_examples
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


def known_texts(page):
    return json.loads(gzip.decompress(base64.b64decode(block(page, "known"))))


def test_known_texts_may_have_lines(vocabulary, tmp_path):
    path = tmp_path / "page.html"
    package.export_page(small(vocabulary), vocabulary, path, texts=["a\nb", "ba", "a\nb"])
    assert known_texts(path.read_text()) == ["a\nb", "ba"]


def test_holds_the_weights_and_the_engine(page):
    model, content = page
    assert gzip.decompress(base64.b64decode(block(content, "weights"))) == pack(model)
    engine = (FOLDER / "engine.wasm").read_bytes()
    assert gzip.decompress(base64.b64decode(block(content, "engine"))) == engine


def test_says_its_encoding_where_browsers_look(page):
    """In the first 1024 bytes: a server may not tell it."""
    _, content = page
    assert b'<meta charset="utf-8">' in content.encode()[:1024]


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


def test_two_exports_are_the_same_file(vocabulary, tmp_path, monkeypatch):
    """On another day too."""
    model, files = small(vocabulary), []
    for day in range(2):
        monkeypatch.setattr("time.time", lambda day=day: 1e9 + 86_400.0 * day)
        page = package.export_page(model, vocabulary, tmp_path / f"{day}.html", texts=["abc"])
        files.append(page.path.read_bytes())
    assert files[0] == files[1]


def test_a_notebook_finds_the_page_by_any_name(tmp_path):
    path, found = tmp_path / """a "page" & 'more' <i>.html""", []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(Page(path, 1)._repr_html_())
    ((tag, attributes),) = found
    assert tag == "iframe" and attributes["src"] == str(path)


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
    with pytest.raises(ValueError, match="begins with 3 texts, got 4 examples"):
        package.export_page(small(vocabulary), vocabulary, path, examples=list("abcd"))
    for vector in (torch.full((4,), float("inf")), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="direction 'up' must be of finite floating-point"):
            package.export_page(small(vocabulary), vocabulary, path, directions={"up": vector})
    with pytest.raises(ValueError, match="the example 'xyz' holds nothing that the model reads"):
        package.export_page(small(vocabulary), vocabulary, path, examples=["xyz"])
    with pytest.raises(ValueError, match="got Linear"):
        pack(torch.nn.Linear(1, 1))
    half, up = "a\ud800", torch.zeros(4)
    for name, given in [
        ("title", half), ("prompt", half), ("card", half), ("examples", [half]),
        ("directions", {half: up}), ("texts", ["a", half]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: 'a\\ud800' is not Unicode: it has half"):
            package.export_page(small(vocabulary), vocabulary, path, **{name: given})
    assert not path.exists()


REFUSED = [r"(?>a|b)c|.", r"a++|.", r"(a)?(?(1)b|c)|.", r"(?a:\w)|."]
# Python finds nothing, or in either case, where JavaScript finds an empty text.
REFUSED += [r"(?:(a)|b)\1c|.", r"(?:(a)|b)*\1|.", r"(?=(a))\1|.", r"(?i)(a)\1|."]


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_javascript_lacks_are_refused(pattern):
    with pytest.raises(ValueError, match="JavaScript has no"):
        to_javascript(pattern)


SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        ("Cl|Br|.", "(?:Cl|Br|[^])"),
        ("[^a-c]", "[^a-c]"),
        ("[^a]é", r"[^a]\u{e9}"),
        (r"\d-", r"[\p{Nd}]\u{2d}"),
        (r"\D", r"[\P{Nd}]"),
        (r"\S", f"(?:[^{SPACE}])"),
        (r"[\Wab]", r"(?:[ab]|[^\p{L}\p{N}_])"),
        (r"[^\Wa]", r"(?:(?![a]|[^\p{L}\p{N}_])[^])"),
        ("a{2,3}?", "(?:a){2,3}?"),
        ("a+b*c?", "(?:a){1,}(?:b){0,}(?:c){0,1}"),
        (r"(a)(?:bc)\1", r"(a)bc(?:\1)"),
        (r"((a)b)+\2", r"(?:((a)b)){1,}(?:\2)"),
        ("(?<=a)b(?!c)", "(?<=a)b(?!c)"),
        ("(?<!a)b(?=c)", "(?<!a)b(?=c)"),
        ("^a$", r"(?<![^])a(?=\n?(?![^]))"),
        ("(?m)^a$", r"(?<![^\n])a(?![^\n])"),
        ("(?i)k", r"[Kk\u{212a}]"),
        ("(?i)[b-i]", r"[B-Ib-i\u{130}-\u{131}]"),
        (r"\Aa\Z", "(?<![^])a(?![^])"),
        (r"(a)\1|b*", r"(?=([^]*))(?:(?:(a)(?:\2)|(?:b){0,}))(?!\1(?![^]))"),
    ],
)
def test_patterns_as_javascript(pattern, source):
    assert to_javascript(pattern) == source


def test_python_space_is_what_the_page_takes_for_it():
    """As ranges: of the pattern's \\s, and of words in tweets."""
    codes = [n for n in range(0x110000) if re.match(r"\s", chr(n))]
    assert codes == [n for n in range(0x110000) if re.match(f"[{SPACE}]", chr(n))]
    script = (FOLDER / "vocabulary.js").read_text()
    assert f'const SPACE = "{SPACE}";'.replace("\\", "\\\\") in script


def manifest_of(model, vocabulary, folder, **options):
    written = package.export_page(model, vocabulary, folder / "page.html", **options)
    return json.loads(block(written.path.read_text(), "manifest"))


def test_the_page_is_told_what_the_model_is(vocabulary, tmp_path):
    """Lines have room for their end, windows are full."""
    found = manifest_of(small(vocabulary), vocabulary, tmp_path, texts=["abc", "d", "abc"])
    parameters = sum(p.numel() for p in small(vocabulary).parameters())
    told = {"kind": "character", "characters": "abcdefgh"}
    assert found["vocabulary"] == told and found["unit"] == "character"
    assert (found["length"], found["latent"], found["pad"], found["end"]) == (8, 4, 8, 9)
    assert found["lines"] is True and found["normalization"] == "none" and found["known"] is True
    assert found["facts"] == [
        ["Model", f"HybridVAE, {parameters / 1e6:.2g} million parameters"],
        ["Latent space", "4 dimensions"],
        ["Texts", "up to 7 characters, of 8 different"],
        ["Known texts", "2"],
        ["Made with", f"fastvae {package.__version__}"],
    ]
    # The decoder at 8 positions; deconvolutions of 3 taps from 4 to 4 channels at 2, then at 4.
    decoder = sum(p.numel() for p in small(vocabulary).decoder.parameters())
    assert found["work"] == 8 * decoder + 2 * 3 * 16 + 4 * 3 * 16

    characters = text.CharVocabulary("abcdefgh")
    model = small(characters, reading="windows")
    found = manifest_of(model, characters, tmp_path, card="Mine.", prompt="Go.")
    assert found["lines"] is False and found["end"] is None and found["known"] is False
    assert (found["card"], found["prompt"]) == ("Mine.", "Go.")
    assert found["facts"][2] == ["Texts", "up to 8 characters, of 8 different"]
    assert not any(name == "Known texts" for name, _ in found["facts"])
    for reading, lines in ((None, False), (text.Reading("Mine"), False)):
        model.reading = reading
        assert manifest_of(model, characters, tmp_path)["lines"] is lines
    model = small(vocabulary)
    model.reading = None
    found = manifest_of(model, vocabulary, tmp_path)
    assert found["lines"] is True and "a space of 4 dimensions" in found["card"]
    model.reading = text.Reading("lines", "tweets")
    assert manifest_of(model, vocabulary, tmp_path)["normalization"] == "tweets"


def test_directions_keep_their_own(vocabulary, tmp_path):
    given = {"x": torch.tensor([1.0, -0.5, 0.0, 0.25]), "y": torch.tensor([0.0, 0.0, 0.0, -3.0])}
    found = manifest_of(small(vocabulary), vocabulary, tmp_path, directions=given)["directions"]
    values = [[name, list(np.frombuffer(base64.b64decode(v), np.int8))] for name, v in found]
    assert values == [["x", [47, -24, 0, 12]], ["y", [0, 0, 0, -47]]]


class Copier:
    """Gives back every text but its b's and, in texts of seven, its first token."""

    length, end_id = 16, 9

    def encode(self, tokens):
        self.tokens = tokens
        return tokens.double()

    def generate(self, z):
        tokens = z.long().masked_fill(z == 1, 2)
        tokens[(z < 8).sum(1) == 7, 0] = 5
        return tokens

    def sample(self, count, generator):
        assert generator.initial_seed() == 0
        ids = torch.full((count, 16), 8)
        ids[1:, 0], ids[:, 1] = 3, 9
        return ids


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        # Those that come back, of about ten characters first; then those of fewer errors.
        ([], ["aba", "aaa", "c" * 12, "c" * 9, "xyz"], ["c" * 9, "c" * 12, "aaa"]),
        ([], ["bbb", "aaaaaaa", "abb", "aba"], ["aaaaaaa", "aba", "abb"]),
        (["aaa"], ["aaa", "cc", "cc", "d"], ["aaa", "cc", "d"]),
        ([], ["e" * 20], ["e" * 20, "a", "a"]),  # its first 15
        ([], ["xyz"], ["a", "a", "a"]),
        ([], [], ["d", "a", "a"]),  # sampled; a blank one is none
        (["a", "b", "c"], ["d"], ["a", "b", "c"]),
    ],
)
def test_examples_that_come_back_go_first(vocabulary, given, known, expected):
    assert _find_examples(Copier(), vocabulary, given, known, 15) == expected


def test_examples_are_looked_for_among_a_few(vocabulary):
    known = [a + b + c for a in "abcdefgh" for b in "abcdefgh" for c in "abcde"]
    for count, step in ((320, 2), (128, 1), (255, 1), (256, 2)):
        model = Copier()
        _find_examples(model, vocabulary, [], known[:count], 15)
        texts = vocabulary.batch_decode(model.tokens.tolist())
        assert texts == known[:count:step][:128]


def test_up_to_three_examples(vocabulary, tmp_path):
    given = ["abc", "de", "f"]
    assert manifest_of(small(vocabulary), vocabulary, tmp_path, examples=given)["examples"] == given
    found = manifest_of(small(vocabulary), vocabulary, tmp_path, examples=given[:2])["examples"]
    assert found[:2] == given[:2] and len(found) == 3


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
    assert known_texts(content) == ["abc", "fade"]


@pytest.mark.parametrize("normalization", ["none", "tweets", "mine.lower"])
def test_what_the_page_cannot_call_is_told(fastvae, vocabulary, tmp_path, normalization):
    model = small(vocabulary)
    model.reading = text.Reading("lines", normalization)
    model.save_pretrained(tmp_path / "run", vocabulary)
    status, _, err = fastvae("export", tmp_path / "run", tmp_path / "page.html")
    told = "the page reads texts as they are typed: it cannot call mine.lower, which normalized the"
    assert status == 0
    assert err == (f"{told} training lines\n" if normalization == "mine.lower" else "")


def test_options_of_the_command(fastvae, vocabulary, tmp_path):
    """Its own title, the best weights, and texts in a field."""
    run, path = tmp_path / "run", tmp_path / "page.html"
    small(vocabulary).save_pretrained(run, vocabulary)
    best = small(vocabulary)
    tensors = {f"model.{name}": t for name, t in best.state_dict().items()}
    write_tensors(run / "best.safetensors", tensors, {})
    (tmp_path / "known.jsonl").write_text('{"t": "abc"}\n{"t": "hgf"}\n')
    texts = "--texts", tmp_path / "known.jsonl", "--field", "t"
    assert fastvae("export", run, path, "--title", "Mine & <yours>", "--best", *texts)[0] == 0
    content = path.read_text()
    assert "<title>Mine &amp; &lt;yours></title>" in content
    assert gzip.decompress(base64.b64decode(block(content, "weights"))) == pack(best)
    assert known_texts(content) == ["abc", "hgf"]
    manifest = json.loads(block(content, "manifest"))
    assert manifest["prompt"] == "Type over either text."
    assert fastvae("export", run, path)[0] == 0
    assert gzip.decompress(base64.b64decode(block(path.read_text(), "weights"))) != pack(best)


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
    texts, folder = tmp_path / "texts.html", tmp_path / "folder.html"
    texts.write_text("abc\n")
    folder.mkdir()
    for arguments, said in (
        ((run, tmp_path / "page.html", "--column", "2"), "are for the file that --texts names"),
        ((run, tmp_path / "page.html", "--texts", tmp_path / "other.txt"), "no text that fits"),
        ((run, tmp_path / "other.txt" / "page.html"), "cannot make the folder"),
        ((run, run / "model.safetensors"), "the page's name must end in .html"),
        ((run, run), "the page's name must end in .html"),
        ((run, texts, "--texts", texts), f"PAGE {texts} is a file that is read: name another one"),
        ((run, texts, "--card", texts), f"PAGE {texts} is a file that is read: name another one"),
        ((run, folder), f"cannot write {folder}: Is a directory"),
        ((tmp_path / "none", tmp_path / "page.html"), "is not a folder"),
    ):
        status, _, err = fastvae("export", *arguments)
        assert status == 2 and said in err and len(err.splitlines()) == 1
    assert texts.read_text() == "abc\n"
