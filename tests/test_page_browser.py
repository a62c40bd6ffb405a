"""The page in Chromium: its texts are Python's, its views work, and hostile input does no harm.

Skipped without selenium, chromium or chromedriver; with REQUIRE_BROWSER in the environment that
is an error instead.
"""

import base64
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae import HybridVAE, text
from fastvae.page.pattern import to_javascript
from fastvae.page.weights import rounded

ROOT = Path(__file__).parents[1]
WAIT = 60  # seconds
CHARACTERS = text.CharVocabulary("abcdefghijklmnopqrstuvwxyz äÖ<>&", end=True)
WICKED = "</script><img src=x onerror=\"document.title='owned'\">"
SIZES = {"latent_size": 6, "encoder_channels": (8, 8), "feature_channels": 8, "hidden_size": 16}
READY = "return document.documentElement.dataset.state"
ROWS = "return [...document.querySelectorAll('.path .line')].map((row) => row.textContent)"
AROUND = (
    "return [...document.querySelectorAll('.around button > bdi')].map((row) => row.textContent)"
)
NEWS = "return [...document.querySelectorAll('.{} .news')].map((n) => n.textContent)"
NOTES = "return [...document.querySelectorAll('.note')].map((n) => n.textContent)"
INPUTS = "return [...document.querySelectorAll('input.text')].map((i) => i.value)"


def model_for(vocabulary, length=12, reading="lines", **sizes):
    """A small model whose texts differ from latent to latent."""
    torch.manual_seed(0)
    lines = reading == "lines"
    ids = {"pad_id": vocabulary.pad_id, "end_id": vocabulary.end_id if lines else None}
    model = HybridVAE(vocabulary.size, length, **{**SIZES, **ids, **sizes}).eval()
    vary(model)
    model.reading = text.Reading(reading)
    return model


def vary(model):
    """Weights that make texts differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.5 / parameter[0].numel() ** 0.5)


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (driver and chromium and webdriver):
        reason = "needs selenium (the extra browser-test), chromium and chromedriver"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(WAIT)
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Export a model and open it; afterwards nothing was requested and no script failed."""

    def open_page(model, vocabulary, fragment="", **options):
        path = tmp_path / "page.html"
        fastvae.export_page(model, vocabulary, path, **options)
        return visit(browser, path, fragment)

    browser.get_log("browser")
    browser.get_log("performance")
    yield open_page
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert not [line for line in said if "Error" in line and "CSP-TEST" not in line], said
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert not [url for url in urls if not url.startswith(("file:", "blob:", "data:"))]


def visit(browser, path, fragment=""):
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)
    until(browser, READY)
    return browser


def until(browser, script, *arguments, wanted=bool):
    """Run a script until its value is wanted -> this value."""
    end = time.time() + WAIT
    while True:
        value = browser.execute_script(script, *arguments)
        if wanted(value):
            return value
        assert time.time() < end, (script, value)
        time.sleep(0.02)


def type_text(browser, value, index=0):
    """Set the text of an input as a paste does, and wait for the view."""
    browser.execute_async_script(
        """
        const [index, value, done] = arguments;
        document.addEventListener("drawn", () => done(), { once: true });
        const input = document.querySelectorAll("input.text")[index];
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        index,
        value,
    )


def open_view(browser, name):
    browser.execute_async_script(
        """
        const [name, done] = arguments;
        document.addEventListener("drawn", () => done(), { once: true });
        [...document.querySelectorAll("#views button")].find((b) => b.textContent === name).click();
        """,
        name,
    )


def set_slider(browser, label, value):
    browser.execute_async_script(
        """
        const [label, value, done] = arguments;
        document.addEventListener("drawn", () => done(), { once: true });
        const sliders = [...document.querySelectorAll(".slider")];
        const slider = sliders.find((s) => s.firstChild.textContent === label);
        const input = slider.querySelector("input");
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        label,
        value,
    )


def press(browser, name):
    """Press the button of this name below a view, whatever it says now."""
    buttons = browser.find_elements("css selector", "footer button")
    next(b for b in buttons if name in (b.text, b.get_attribute("name"))).click()


def seen(value):
    """What the page shows of a text."""
    return re.sub("[\x00-\x1f]", lambda c: chr(0x2400 + ord(c[0])), value).replace("\x7f", "\u2421")


def posterior_of(model, vocabulary, value):
    """The page's posterior of a text: mean and standard deviation [Z]."""
    row = torch.tensor([vocabulary.encode_sample(value, model.length)])
    with torch.no_grad():
        mean, logvar = rounded(model).posterior(row)
    return mean[0], (logvar[0] / 2).exp()


def decoded(model, vocabulary, *latents):
    """The texts that the page decodes from latent vectors [Z]."""
    tokens = rounded(model).generate(torch.stack(latents))
    return [seen(t) for t in vocabulary.batch_decode(tokens.tolist())]


def path_of(model, vocabulary, a, b, count):
    """The texts between two, as Python decodes them with the page's weights."""
    exact = rounded(model)
    length = model.length
    ends = exact.encode(torch.tensor([vocabulary.encode_sample(t, length) for t in (a, b)]))
    rows = exact.interpolate(*ends, count + 2)[1:-1]
    return [seen(t) for t in vocabulary.batch_decode(rows.tolist())]


@pytest.mark.parametrize("decoder", ["lstm", "bytenet", "none"])
def test_first_view_is_the_path_that_python_finds(opened, decoder):
    model = model_for(CHARACTERS, decoder=decoder, conv_channels=8)
    given = ["abba", "zeta"]
    browser = opened(model, CHARACTERS, examples=given)
    expected = path_of(model, CHARACTERS, *given, 9)
    assert browser.execute_script(ROWS) == expected and len(set(expected)) > 1
    focus = "const input = document.querySelector('input.text'); return [input, input.selectionEnd]"
    first, end = browser.execute_script(focus)
    assert browser.switch_to.active_element == first and end == len("abba")
    ends = decoded(model, CHARACTERS, *(posterior_of(model, CHARACTERS, t)[0] for t in given))
    notes = [f"comes back as {t}" if t != g else "" for t, g in zip(ends, given, strict=True)]
    until(browser, NOTES, wanted=notes.__eq__)
    type_text(browser, "halo")
    assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "halo", "zeta", 9)
    set_slider(browser, "Texts between", 5)
    assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "halo", "zeta", 5)


def test_the_last_of_many_keystrokes_wins(opened):
    """Typed faster than decoded: what is shown in the end belongs to the last text."""
    model = model_for(CHARACTERS)
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"])
    script = """const input = document.querySelector("input.text");
    for (const text of arguments[0]) {
      input.value = text;
      input.dispatchEvent(new Event("input", { bubbles: true }));
    }"""
    typed = ["hello"[:n] for n in range(6)] * 8 + ["halo"]
    browser.execute_script(script, typed)
    expected = path_of(model, CHARACTERS, "halo", "zeta", 9)
    until(browser, ROWS, wanted=expected.__eq__)
    time.sleep(0.5)
    assert browser.execute_script(ROWS) == expected


def test_lstm_vae(opened):
    torch.manual_seed(1)
    ids = {"pad_id": CHARACTERS.pad_id, "end_id": CHARACTERS.end_id, "mask_pad": True}
    model = fastvae.LSTMVAE(CHARACTERS.size, 12, latent_size=6, hidden_size=24, **ids).eval()
    vary(model)
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"])
    assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "abba", "zeta", 9)


def test_changed_characters_are_marked_and_repeats_are_faint(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    rows = browser.execute_script(ROWS)
    kept = browser.execute_script(
        """return [...document.querySelectorAll('.path .line')].map((row) =>
        [...row.childNodes].filter((n) => n.nodeName !== 'MARK').map((n) => n.textContent).join(''))
        """
    )
    same = browser.execute_script(
        "return [...document.querySelectorAll('.path li')].map((l) => l.matches('.same'))"
    )

    def shared(a, b):
        longest = [0] * (len(b) + 1)
        for x in a:
            row = [0]
            for n, y in enumerate(b):
                row.append(longest[n] + 1 if x == y else max(row[n], longest[n + 1]))
            longest = row
        return longest[-1]

    for before, row, left, faint in zip(["abba", *rows], rows, kept, same, strict=False):
        assert len(left) == shared(before, row) and faint == (before == row)


VOCABULARIES = {
    "character": (CHARACTERS, "lines"),
    "windows": (text.CharVocabulary("abc dhlowr"), "windows"),
    "byte": (text.ByteVocabulary(), "lines"),
    "tweets": (text.ByteVocabulary(), "lines"),
    "token": (
        text.TokenVocabulary(["Cl", "C", "Br", "=", "(", ")", "c1"], r"Cl|Br|c\d|."),
        "lines",
    ),
}
TEXTS = ["", "abc", "hello world", "ClCBr=C(c1)", "äÖ", "a\u0308", "漢字🙂", "\0\n\u202e", "x" * 40]
TEXTS += ["\ufeffab", "@bob see", "ab http://c.d/e f", "a@b httpshttp://c"]
TEXTS += ["@bob\x85see", "x\ufeff@bob", "a\x1c@bob", "\ufeff@bob", "a\u3000http://b\u2028c"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_are_read_as_python_reads_them(opened, name):
    """What is not in the vocabulary is left out, and what does not fit is cut."""
    vocabulary, reading = VOCABULARIES[name]
    model = model_for(vocabulary, reading=reading)
    if name == "tweets":
        model.reading = text.Reading(reading, "tweets")
    example = "ClC" if name == "token" else "ab"
    browser = opened(model, vocabulary, examples=[example] * 3)
    for value in [*TEXTS, example]:
        script = (
            "const {ids, read} = fastvae.vocabulary.encode(arguments[0]); return [[...ids], read]"
        )
        ids, read = browser.execute_script(script, value)
        room = model.length - (reading == "lines")
        read_by_python = text.normalize_tweet(value) if name == "tweets" else value
        try:
            expected = vocabulary.encode(read_by_python)[:room]
        except ValueError:  # the page reads the rest
            known = vocabulary.decode(ids)
            assert seen(known) == seen(read) and set(known) <= set(value + "aOä ")
            continue
        padding = model.length - len(expected)
        end = [vocabulary.end_id] * (reading == "lines")
        assert ids == expected + end + [vocabulary.pad_id] * (padding - len(end))
        assert read == vocabulary.decode(ids)
    assert browser.execute_script(ROWS)


def test_letters_stay_as_they_are_known(opened):
    """A letter and its marks are composed where the vocabulary knows them so, each by itself."""
    vocabulary = text.CharVocabulary("a\u09df\u212b\uac00é", end=True)
    browser = opened(model_for(vocabulary), vocabulary, examples=["a"] * 3)
    for given, read in [
        ("\u09dfa", "\u09dfa"), ("\u09df!", "\u09df"), ("\u212b!", "\u212b"), ("e\u0301", "é"),
        ("\u1100\u1161", "\uac00"), ("a\u0301é", "aé"),
    ]:  # fmt: skip
        script = "return fastvae.vocabulary.encode(arguments[0]).read"
        assert browser.execute_script(script, given) == read, given


PATTERNS = [
    r"Cl|Br|.",
    r"\[[^\]]*\]|%\d\d|[A-Z][a-z]?|.",
    r"\w+|\s+|[^\w\s]+",
    r"[\d\-a-c]+?x|\D",
    r"(?i)ab|.",
    r"(a|b)\1?|(?<=a)c|(?!d).|.",
    r"a{2,3}|^b|b$|\bc|\Bd|[^\n]|\n",
    r"\d*|\D",
    r"(?:Cl|Br)?|.",
    r"([ab])\1|(?:ab)*?|.",
    r"\s+|\S",
    r"(?i)ci|[^k]k|.",
    r"(?m)^ab|b$|.",
]


def test_patterns_find_the_same_tokens(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["ab"] * 3)
    samples = [
        "ClCBrc1",
        "[nH]c%10Na.C\n",
        "häß 12³ x_y\u00a0漢字!?",
        "b-3ax12x",
        "aABaBb",
        "aabacd\nb",
        "a \ufeffb\x1c\x85c",
        "c\u0131CI\u0130i\u212akK",
        "x\u2028ab\nab\u2029b\n",
        "aabbabab",
    ]
    for pattern in PATTERNS:
        source = to_javascript(pattern)
        for sample in samples:
            expected = [m[0] for m in re.finditer(pattern, sample, re.DOTALL) if m[0]]
            script = """const [source, sample] = arguments;
            return [...sample.matchAll(new RegExp(source, "gsu"))].map((m) => m[0])"""
            assert browser.execute_script(script, source, sample) == expected, pattern


def test_neighbors_are_drawn_from_the_posterior_as_far_as_asked(opened):
    """z = μ + d σ ε, with the same standard normal ε at every distance d."""
    model = model_for(CHARACTERS)
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"])
    mean, spread = posterior_of(model, CHARACTERS, "abba")
    browser.execute_script(
        """const { client } = fastvae, decode = client.decode.bind(client);
        client.decode = (latents, options) => {
          window.latents = latents.map((z) => [...z]);
          return decode(latents, options);
        };"""
    )
    open_view(browser, "Around")
    noise = []
    for far in (0.5, 1, 3):
        set_slider(browser, "How far", far)
        z = torch.tensor(browser.execute_script("return window.latents"))
        noise.append((z - mean) / spread / far)
    assert all(torch.allclose(other, noise[0], atol=1e-3) for other in noise)
    assert noise[0].shape == (24, 6) and noise[0].mean().abs() < 0.25
    assert 0.85 < noise[0].std() < 1.15 and len({*noise[0].flatten().tolist()}) == 24 * 6
    style = """const mark = document.querySelector('.own-width');
    return [parseFloat(getComputedStyle(mark, '::before').left), mark.clientWidth]"""
    left, width = browser.execute_script(style)
    assert left == pytest.approx(8 + (width - 16) / 3, abs=1)  # a thumb of 16 px, at 1 of 3
    faint = "return [...document.querySelectorAll('.around button')].map((b) => b.matches('.same'))"
    for far in (0.1, 3):
        set_slider(browser, "How far", far)
        same = [t == "abba" for t in browser.execute_script(AROUND)]
        assert browser.execute_script(faint) == same


def test_around_moves_to_a_neighbor_and_back(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    browser.execute_script(
        """window.said = [];
        const live = document.getElementById("live");
        new MutationObserver(() => said.push(live.textContent)).observe(live, { childList: true });
        """
    )
    open_view(browser, "Around")
    texts = browser.execute_script(AROUND)
    assert len(texts) == 24 and len(set(texts)) > 3
    chosen = next(n for n, t in enumerate(texts) if t != "abba" and t)
    browser.find_elements("css selector", ".around button")[chosen].click()
    shown = "return document.querySelector('.crumbs').textContent"
    until(browser, shown)
    until(browser, AROUND, wanted=lambda now: now != texts)
    assert browser.execute_script(shown) == "abba"
    value = "return document.querySelector('input.text').value"
    assert seen(browser.execute_script(value)) == texts[chosen]
    assert f"In the middle: {texts[chosen]}" in browser.execute_script("return window.said")
    browser.find_element("css selector", ".crumbs button").click()
    until(browser, value, wanted=lambda now: now == "abba")
    assert browser.execute_script(shown) == ""
    walk = """const [steps, done] = arguments;
    const walked = [];
    (async () => {
      for (let n = 0; n < steps; n++) {
        walked.push(document.querySelector("input.text").value);
        const drawn = new Promise((r) => document.addEventListener("drawn", r, { once: true }));
        const items = [...document.querySelectorAll(".around button")];
        items.find((b) => b.firstChild.textContent && !walked.includes(b.firstChild.textContent))
          .click();
        await drawn;
      }
      done(walked);
    })();"""
    walked = browser.execute_async_script(walk, 10)
    crumbs = """return [...document.querySelectorAll('.crumbs button bdi')].map(
        (b) => b.textContent)"""
    assert browser.execute_script(crumbs) == [seen(t) for t in walked[-8:]]
    browser.find_elements("css selector", ".crumbs button")[2].click()
    until(browser, value, wanted=walked[-6].__eq__)
    assert browser.execute_script(crumbs) == [seen(t) for t in walked[-8:-6]]
    type_text(browser, "abba")
    assert browser.execute_script(shown) == ""
    set_slider(browser, "How far", 0)
    returned = set(browser.execute_script(AROUND))
    mean, _ = posterior_of(model_for(CHARACTERS), CHARACTERS, "abba")
    assert returned == set(decoded(model_for(CHARACTERS), CHARACTERS, mean))


def test_directions_by_name_and_from_lists(opened):
    model = model_for(CHARACTERS)
    directions = {f"label {n}": torch.randn(6) for n in range(12)}
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"], directions=directions)
    open_view(browser, "Directions")
    names = """const labels = document.querySelectorAll('.directions .slider span');
    return [...labels].map((label) => label.textContent)"""
    assert len(browser.execute_script(names)) == 8
    assert not browser.execute_script("return document.querySelector('details').open")
    browser.find_element("css selector", ".search").send_keys("EL 11")
    assert until(browser, names, wanted=lambda n: len(n) == 1) == ["label 11"]
    result = "return document.querySelector('.result').textContent"
    before = browser.execute_script(result)
    set_slider(browser, "label 11", 2)
    assert browser.execute_script(result) != before
    assert "label 11" in browser.execute_script(names)
    browser.find_element("css selector", "summary").click()
    for box, lines in zip(
        browser.find_elements("css selector", "textarea"), ("halo\nhello", "zeta"), strict=True
    ):
        box.send_keys(lines)
    browser.find_element("css selector", "details button").click()
    until(browser, names, wanted=lambda found: "halo rather than zeta" in found)


def test_directions_add_up(opened):
    """Each has a root mean square of 0.6; beside each slider is what it does alone."""
    model = model_for(CHARACTERS)
    given = torch.tensor([[47, -24, 3, 12, -30, 8], [-5, 1, 47, 40, -20, 2], [7, 0, 9, 0, 0, -47]])
    named = dict(zip(("first", "second", "third"), given.float(), strict=True))
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"], directions=named)
    open_view(browser, "Directions")
    assert browser.execute_script("return document.querySelector('.search').hidden")

    def moved(by, vector):
        return by * 0.6 * vector / vector.square().mean().sqrt()

    mean, _ = posterior_of(model, CHARACTERS, "abba")
    found = """return [document.querySelector('.result').textContent,
        ...[...document.querySelectorAll('.directions .alone')].map((b) => b.textContent)]"""
    alone = [mean + moved(1, vector) for vector in named.values()]
    assert browser.execute_script(found) == decoded(model, CHARACTERS, mean, *alone)
    set_slider(browser, "first", 2)
    set_slider(browser, "third", -1.5)
    first, third = moved(2, named["first"]), moved(-1.5, named["third"])
    alone = mean + first, alone[1], mean + third
    expected = decoded(model, CHARACTERS, mean + first + third, *alone)
    assert browser.execute_script(found) == expected and expected[0] not in expected[1:]
    browser.find_element("css selector", "summary").click()
    make = browser.find_element("css selector", "details button")
    boxes = browser.find_elements("css selector", "textarea")
    message = "return document.querySelector('details .note').textContent"
    boxes[0].send_keys("halo\n\n hello ")
    make.click()
    assert browser.execute_script(message) == "Write one text or more into each list."
    boxes[1].send_keys("zeta")
    halo, hello, zeta = (posterior_of(model, CHARACTERS, t)[0] for t in ("halo", "hello", "zeta"))
    own = moved(1, (halo + hello) / 2 - zeta)
    alone = mean + own, mean + first, mean + third, alone[1]  # those that were moved come first
    expected = decoded(model, CHARACTERS, mean + first + third + own, *alone)
    script = """document.addEventListener("drawn", () => arguments[0](), { once: true });
        document.querySelector("details button").click();"""
    for _ in range(2):  # the second is the same direction, not one more
        browser.execute_async_script(script)
        assert browser.execute_script(found) == expected
    assert browser.execute_script(message) == ""


ALL_SHOWN = "return [...document.querySelectorAll('.cell')].every((c) => c.shown !== undefined)"
SIZE_AND_DISTANCE = """
const cells = [...document.querySelectorAll('.cell')];
const below = cells.find((c) => c.i === cells[0].i && c.j === cells[0].j + 1);
const top = (cell) => new DOMMatrix(getComputedStyle(cell).transform).f;
return [parseFloat(getComputedStyle(below).fontSize), top(below) - top(cells[0])];"""
FAINT_AND_REPEATS = """
const cells = [...document.querySelectorAll('.cell')];
const texts = new Map(cells.map((c) => [`${c.i}:${c.j}`, c.textContent]));
const left = (c) => texts.get(`${c.i - 1}:${c.j}`);
const known = cells.filter((c) => left(c) !== undefined);
return [known.map((c) => c.matches('.same')), known.map((c) => c.textContent === left(c))];"""


CORNERS = """
return [...document.querySelectorAll('.cell.corner')].map((cell) => {
  const box = cell.getBoundingClientRect();
  return [cell.textContent, box.x + box.width / 2, box.y + box.height / 2];
});"""
SEND = """
const [events] = arguments, map = document.querySelector('.map');
map.setPointerCapture = () => {};
for (const [type, pointerId, clientX, clientY, deltaY] of events) {
  const values = { pointerId, clientX, clientY, deltaY, bubbles: true, cancelable: true };
  map.dispatchEvent(new (type === "wheel" ? WheelEvent : PointerEvent)(type, values));
}"""


def test_map_by_pointer(opened):
    """Drag moves it, the wheel and two fingers scale it about a point, a click goes to a text."""
    model = model_for(CHARACTERS)
    browser = opened(model, CHARACTERS, examples=["abba", "zeta", "halo"])
    open_view(browser, "Map")

    def corners():
        until(browser, ALL_SHOWN)
        return {text: (x, y) for text, x, y in browser.execute_script(CORNERS)}

    def send(*events):
        browser.execute_script(SEND, [[*event, *[0] * (5 - len(event))] for event in events])
        return corners()

    def near(places):
        return {text: pytest.approx(place, abs=1) for text, place in places.items()}

    start = corners()
    assert len(start) == 3
    moved = {text: (x - 60, y + 10) for text, (x, y) in start.items()}
    drag = ("pointerdown", 1, 700, 300), ("pointermove", 1, 640, 310), ("pointerup", 1, 640, 310)
    assert send(*drag) == near(moved)
    assert send(("pointermove", 1, 300, 300)) == near(moved)  # no button is down
    (a, (left, top)), (b, (right, _)) = sorted(moved.items(), key=lambda item: item[1][1])[:2]
    halved = {a: (left, top), b: ((left + right) / 2, top)}  # the third is between two cells then
    assert send(("wheel", 1, left, top, 400)) == near(halved)
    apart = ("pointerdown", 1, left, top), ("pointerdown", 2, left + 50, top)
    wider = ("pointermove", 2, left + 100, top), ("pointerup", 2, 0, 0), ("pointerup", 1, 0, 0)
    assert send(*apart, *wider) == near(moved)
    type_text(browser, "cedar", 2)
    means = [posterior_of(model, CHARACTERS, t)[0] for t in ("abba", "zeta", "cedar")]
    assert sorted(corners()) == sorted(decoded(model, CHARACTERS, *means))
    send(("pointerdown", 1, left, top), ("pointerup", 1, left, top))
    until(browser, "return document.querySelector('.around-view') !== null")
    assert seen(browser.execute_script(INPUTS)[0]) == a
    assert browser.execute_script("return document.querySelector('.crumbs').textContent") == "abba"


def test_map_by_keyboard_wheel_and_drag(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta", "halo"])
    open_view(browser, "Map")
    cells = "return [...document.querySelectorAll('.cell')].map((c) => c.textContent)"
    corners = until(
        browser,
        "return [...document.querySelectorAll('.cell.corner')].map((c) => c.textContent)",
        wanted=lambda found: len(found) == 3 and all(found),
    )
    exact = rounded(model_for(CHARACTERS))
    rows = torch.tensor([CHARACTERS.encode_sample(t, 12) for t in ("abba", "zeta", "halo")])
    expected = CHARACTERS.batch_decode(exact.generate(exact.encode(rows)).tolist())
    assert sorted(corners) == sorted(expected)
    area = browser.find_element("css selector", ".map")
    labels = [f"Corner {n}" for n in (1, 2, 3)]
    inputs = browser.find_elements("css selector", "input.text")
    assert [field.get_attribute("aria-label") for field in inputs] == labels
    inputs[2].send_keys("\ue004")  # tab
    assert browser.switch_to.active_element == area
    for keys in ("-" * 9 + "=" * 6, "+" * 14 + "-" * 10):  # past the least and the largest scale
        area.send_keys(keys)
        until(browser, ALL_SHOWN)
        assert sorted(text for text, *_ in browser.execute_script(CORNERS)) == sorted(expected)
    size, distance = browser.execute_script(SIZE_AND_DISTANCE)
    area.send_keys("+")
    until(browser, cells, wanted=any)
    smaller = browser.execute_script(SIZE_AND_DISTANCE)
    assert smaller == pytest.approx([size / 2**0.5, distance / 2**0.5], rel=1e-2)
    until(browser, ALL_SHOWN)
    for key in ("\ue014", "\ue012", "\ue014"):  # right, left: at last nothing is to be decoded
        area.send_keys(key)
        until(browser, ALL_SHOWN)
    faint, repeats = browser.execute_script(FAINT_AND_REPEATS)
    assert faint == repeats and any(repeats)
    at = "const { i, j } = document.querySelector('.cell.cursor'); return [i, j]"
    i, j = browser.execute_script(at)
    for key in ("\ue014", "\ue014", "\ue012", "\ue013", "\ue015", "\ue015"):
        area.send_keys(key)  # right, right, left, up, down, down
    assert browser.execute_script(at) == [i + 1, j + 1]
    cursor = until(
        browser, "return document.querySelector('.cell.cursor')?.textContent", wanted=bool
    )
    until(browser, "return document.getElementById('live').textContent", wanted=cursor.__eq__)
    area.send_keys("\ue007")
    until(browser, "return document.querySelector('.around-view') !== null")
    value = browser.execute_script("return document.querySelector('input.text').value")
    assert seen(value) == cursor
    assert browser.execute_script("return document.querySelector('.crumbs').textContent") == "abba"
    open_view(browser, "Map")
    browser.execute_script(
        """const map = document.querySelector('.map');
        const at = (type, x) => map.dispatchEvent(new PointerEvent(type, {
          pointerId: 1, clientX: x, clientY: 500, bubbles: true }));
        map.setPointerCapture = () => {};
        at('pointerdown', 700); at('pointermove', 300); at('pointerup', 300);
        map.dispatchEvent(new WheelEvent('wheel', { deltaY: 900, clientX: 600, clientY: 500 }));"""
    )
    until(browser, ALL_SHOWN)


def test_a_link_shows_the_same_again(opened, tmp_path):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    type_text(browser, "ha~lo", 1)
    set_slider(browser, "Temperature", 1)
    set_slider(browser, "Texts between", 7)
    before = browser.execute_script(ROWS)
    press(browser, "Again")
    path = until(browser, ROWS, wanted=lambda now: now != before)
    open_view(browser, "Around")
    set_slider(browser, "How far", 2)
    texts, address = (
        browser.execute_script(AROUND),
        browser.execute_script("return fastvae.address()"),
    )
    visit(browser, tmp_path / "page.html", "#" + address.partition("#")[2])
    until(browser, AROUND, wanted=lambda now: now == texts)
    open_view(browser, "Between")
    assert browser.execute_script(INPUTS) == ["abba", "ha~lo"]
    assert browser.execute_script(ROWS) == path
    # Links that are pasted into the open page.
    follow = "location.hash = arguments[0]"
    browser.execute_script(follow, "v=directions")
    until(browser, "return document.querySelector('.directions-view') !== null")
    browser.execute_script(follow, address.partition("#")[2])
    until(browser, AROUND, wanted=lambda now: now == texts)


HUGE = base64.b64encode(struct.pack("<6f", *[1e30] * 6)).decode().replace("+", "-")


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("#v=map&p=%%%&t=x&s=1e99&n=-4&far=9", "v=map&t=0&s=2147483648&far=3&n=5"),
        ("#t=2&s=-3&n=7.4&far=-1", "v=between&t=1.5&s=0&far=0&n=7"),
        ("#p=AAAA~x&v=<b>", "v=between&t=0&s=1&far=1.4&n=9"),
        (f"#p={HUGE}~x&n=16", "v=between&t=0&s=1&far=1.4&n=15"),
        ("#" + "p=" * 999, "v=between&t=0&s=1&far=1.4&n=9"),
    ],
)
def test_broken_links_are_ignored(opened, fragment, expected):
    """And numbers are brought into what their sliders reach."""
    browser = opened(model_for(CHARACTERS), CHARACTERS, fragment, examples=["abba", "zeta"])
    assert browser.execute_script(READY) == "ready"
    assert browser.execute_script("return fastvae.address()").split("#")[1].startswith(expected)
    assert browser.execute_script(INPUTS)[:2] == ["abba", "zeta"]


def test_what_stands_below_the_views(opened):
    """Again where something is drawn, texts and link for the clipboard, swapped ends."""
    model = model_for(CHARACTERS)
    card = "One.\n\n Two\nlines."
    browser = opened(model, CHARACTERS, examples=["abba", "zeta", "halo"], card=card)
    browser.execute_script(
        """window.refused = false;
        const writeText = async (text) => {
          if (refused) throw new Error();
          window.copied = text;
        };
        Object.defineProperty(navigator, "clipboard", { value: { writeText } });"""
    )
    copied, buttons = "return window.copied", "return document.querySelector('footer').textContent"
    again = """return [...document.querySelectorAll('footer button')].find(
        (b) => b.textContent === 'Again').disabled"""

    def copy(name="Copy texts"):
        browser.execute_script("window.copied = null")
        press(browser, name)
        return until(browser, copied)

    assert browser.execute_script(again) and "Temperatureoff" in browser.execute_script(buttons)
    assert copy().split("\n") == ["abba", *browser.execute_script(ROWS), "zeta"]
    until(browser, buttons, wanted=lambda said: "Copied" in said)
    until(browser, buttons, wanted=lambda said: "Copy texts" in said)
    press(browser, "Swap")
    expected = path_of(model, CHARACTERS, "zeta", "abba", 9)
    until(browser, ROWS, wanted=expected.__eq__)
    assert browser.execute_script(INPUTS) == ["zeta", "abba"]
    assert copy("Copy link") == browser.execute_script("return location.href")
    assert browser.execute_script("return location.hash").startswith("#v=between&")
    browser.execute_script("window.refused = true")
    press(browser, "Copy link")  # at once again
    until(browser, buttons, wanted=lambda said: "Not allowed here" in said)
    until(browser, buttons, wanted=lambda said: said.endswith("Copy textsCopy link"))
    browser.execute_script("window.refused = false")
    open_view(browser, "Around")
    assert not browser.execute_script(again)
    assert copy().split("\n") == browser.execute_script(AROUND)
    open_view(browser, "Directions")  # none has a name
    shown = """const [named, own] = document.querySelectorAll('.named, details');
        return [named.hidden, own.open, document.querySelector('.result').textContent]"""
    hidden, is_open, result = browser.execute_script(shown)
    assert hidden and is_open and copy().split("\n") == ["zeta", result]
    assert browser.execute_script(again)
    set_slider(browser, "Temperature", 0.5)
    assert not browser.execute_script(again) and "0.50" in browser.execute_script(buttons)
    open_view(browser, "Map")
    until(browser, ALL_SHOWN)
    cells = "return [...document.querySelectorAll('.cell')].map((c) => c.textContent)"
    assert sorted(copy().split("\n")) == sorted(filter(None, browser.execute_script(cells)))
    open_view(browser, "About")
    assert browser.execute_script("return document.querySelector('footer').hidden")
    about = """const all = (tag) => [...document.querySelectorAll('.about ' + tag)].map(
        (part) => part.textContent);
        return [all("p"), all("dt"), all("dd").slice(1, 3)]"""
    paragraphs, names, values = browser.execute_script(about)
    assert paragraphs == ["One.", "Two\nlines."]
    assert names == ["Model", "Latent space", "Texts", "Made with"]
    assert values == ["6 dimensions", "up to 11 characters, of 32 different"]
    current = "return [...document.querySelectorAll('[aria-current]')].map((b) => b.textContent)"
    assert browser.execute_script(current) == ["About"]


def test_a_large_model_decodes_a_few_texts_at_a_time(opened, tmp_path):
    """The first alone, and the same texts as at once, drawn at random too."""
    model = model_for(CHARACTERS)
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"])
    set_slider(browser, "Temperature", 1)
    drawn = browser.execute_script(ROWS)
    page = tmp_path / "page.html"
    content = re.sub(r'"work":\d+', '"work":1000000000', page.read_text())
    page.write_text(content)
    visit(browser, page)
    assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "abba", "zeta", 9)
    set_slider(browser, "Temperature", 1)
    assert browser.execute_script(ROWS) == drawn
    texts = ["".join(random.Random(n).choices("abcdeo", k=6)) for n in range(70)]
    script = """const [texts, done] = arguments;
        const rows = texts.map((text) => fastvae.vocabulary.encode(text).ids);
        fastvae.client.encode(rows).then((found) => done(
          found.map(({ mean, spread }) => [[...mean], [...spread]])));"""
    found = torch.tensor(browser.execute_async_script(script, texts))
    expected = torch.stack([torch.stack(posterior_of(model, CHARACTERS, t)) for t in texts])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_tells_what_is_known(opened):
    model = model_for(CHARACTERS)
    known = ["abba", "zeta", "halo", path_of(model, CHARACTERS, "abba", "zeta", 9)[4]]
    browser = opened(model, CHARACTERS, examples=known[:2], texts=known)

    def check(view, rows, count):
        """Each row's distance from the nearest known text, or that it is one."""
        news = NEWS.format(view)
        said = until(browser, news, wanted=lambda found: len(found) == count and all(found))
        for row, sentence in zip(browser.execute_script(rows), said, strict=True):
            least = min(edits(row, text) for text in known)
            number = "1 edit" if least == 1 else f"{least} edits"
            assert sentence.startswith(f"new, {number} from ") if least else sentence == "known"
        return said

    assert "known" in check("path", ROWS, 9)
    open_view(browser, "Around")
    check("around", AROUND, 24)
    open_view(browser, "Between")
    script = "const done = arguments[1]; fastvae.client.nearest(arguments[0]).then(done)"
    found = browser.execute_async_script(script, ["zetta", "hallo!", "abba", ""])
    assert [f["distance"] for f in found] == [1, 2, 0, 4]
    assert [f["text"] for f in found[:3]] == ["zeta", "halo", "abba"]


def edits(a, b):
    """The least number of insertions, deletions and substitutions from one text to another."""
    row = list(range(len(b) + 1))
    for n, x in enumerate(a, 1):
        corner, row[0] = row[0], n
        for m, y in enumerate(b, 1):
            corner, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, corner + (x != y))
    return row[-1]


def test_the_nearest_text_is_the_nearest(opened):
    drawn = random.Random(0)
    known, others = (
        ["".join(drawn.choices("abcdeo ", k=drawn.randint(1, 9))) for _ in range(40)]
        for _ in range(2)
    )
    known = [text for text in known if len(text) > 3]
    others += ["", "x", "xyz"]  # nearer to nothing than to any of them
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=known[:2], texts=known)
    script = "const done = arguments[1]; fastvae.client.nearest(arguments[0]).then(done)"
    for other, found in zip(others, browser.execute_async_script(script, others), strict=True):
        assert found["distance"] == min(edits(other, text) for text in known)
        assert found["text"] in known and edits(other, found["text"]) == found["distance"]


def wicked_model():
    """Greedily it generates markup; at a temperature, marks of direction and NUL too."""
    marks = "\u202e", "\0", "\u2066", "\x7f", "\x85"
    tokens = text.TokenVocabulary([WICKED, *marks, "a"], r"</script><img.*?>|.")
    model = model_for(tokens, length=8)
    with torch.no_grad():
        model.decoder.classifier.weight.zero_()
        bias = model.decoder.classifier.bias
        bias.zero_()[tokens.pad_id] = bias[tokens.end_id] = -100
        bias[0] = 1
    return model, tokens


def test_generated_markup_is_text(opened):
    browser = opened(
        *wicked_model(), examples=["a", WICKED, "\0"], title=WICKED, card=WICKED, prompt=WICKED
    )
    assert browser.execute_script(ROWS) == [WICKED * 8] * 9
    set_slider(browser, "Temperature", 1.5)
    shown = "".join(browser.execute_script(ROWS))
    assert {"\u202e", "\u2400", "\u2066", "\u2421", "\ufffd"} <= set(shown)
    assert not {"\0", "\x7f", "\x85"} & set(shown)
    for view in ("Around", "Directions", "Map", "About", "Between"):
        open_view(browser, view)
        assert browser.execute_script("return document.images.length") == 0
        assert browser.execute_script("return document.scripts.length") == 6
    assert browser.title == WICKED
    isolated = """return [...document.querySelectorAll('bdi')].every((text) =>
        getComputedStyle(text).unicodeBidi === 'isolate')"""
    assert browser.execute_script(isolated)


def test_bytes_that_are_no_text(opened):
    vocabulary = text.ByteVocabulary()
    model = model_for(vocabulary)
    browser = opened(model, vocabulary, examples=["ab", "cd", "ef"])
    set_slider(browser, "Temperature", 1.5)
    assert "\ufffd" in "".join(browser.execute_script(ROWS))


@pytest.mark.parametrize(
    ("value", "unknown"),
    [
        ("\ud800", " U+D800. "),
        ("\udc00\ud800x", " U+DC00 U+D800. "),
        ("a" * 10_000, None),
        ("漢" * 10_000, " 漢. "),
        ("\0\u202e", " U+0000 U+202E. "),
        ("1a2b3c4d5", " 1 2 3 4 5. "),
        ("1a2b3c4d5e6f7g", " 1 2 3 4 5 … "),
        ("", None),
        (" ", None),
    ],
)
def test_whatever_is_pasted(opened, value, unknown):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    script = """const [codes, done] = arguments;
    const tell = () => done(document.querySelector(".note").textContent);
    document.addEventListener("drawn", tell, { once: true });
    const input = document.querySelector("input.text");
    input.value = String.fromCharCode(...codes.slice(0, 50000));
    input.dispatchEvent(new Event("input", { bubbles: true }));"""
    codes = list(value.encode("utf-16-le", "surrogatepass"))
    codes = [low + 256 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
    note = browser.execute_async_script(script, codes)
    if value.startswith("a"):
        assert note == "It reads up to 11 characters."
    elif unknown:
        assert note == "This model has never seen" + unknown
    assert len(browser.execute_script(ROWS)) == 9
    kept = browser.execute_script("return document.querySelector('input.text').value.length")
    assert kept == min(len(codes), 2000)


def test_a_file_that_is_cut_says_so(browser, tmp_path):
    path = tmp_path / "page.html"
    fastvae.export_page(model_for(CHARACTERS), CHARACTERS, path, examples=["abba", "zeta"])
    whole = path.read_bytes()
    ends = [
        whole.index(f'id="{name}"'.encode()) + 200 for name in ("manifest", "engine", "weights")
    ]
    for end in (*ends, len(whole) - 40, whole.index(b'type="module"') + 500):
        path.write_bytes(whole[:end])
        browser.get("about:blank")
        browser.get(path.as_uri())
        said = until(browser, "return document.getElementById('view').textContent")
        if end > whole.index(b'id="worker"'):
            until(browser, READY, wanted=lambda state: state == "failed")
            said = browser.execute_script("return document.getElementById('view').textContent")
        assert "not complete" in said


def test_damaged_weights_are_told(browser, tmp_path):
    path = tmp_path / "page.html"
    fastvae.export_page(model_for(CHARACTERS), CHARACTERS, path, examples=["abba", "zeta"])
    whole = path.read_text()
    start = whole.index('id="weights">') + len('id="weights">') + 300
    path.write_text(whole[:start] + "AAAA" * 20 + whole[start + 80 :])
    browser.get(path.as_uri())
    until(browser, READY, wanted=lambda state: state == "failed")
    said = browser.execute_script("return document.getElementById('view').textContent")
    assert said == "Sorry, this file is damaged: download it again."


@contextmanager
def before_each_page(browser, script):
    """Run a script before those of every page that is opened."""
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        yield
    finally:
        identifier = {"identifier": added["identifier"]}
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", identifier)


def test_without_workers_it_works_in_slices(opened, browser):
    with before_each_page(browser, "delete window.Worker; window.Worker = undefined;"):
        model = model_for(CHARACTERS)
        opened(model, CHARACTERS, examples=["abba", "zeta"])
        assert browser.execute_script("return fastvae.client.worker") is None
        assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "abba", "zeta", 9)


@pytest.mark.parametrize("missing", ["DecompressionStream", "WebAssembly"])
def test_an_old_browser_is_told(opened, browser, missing):
    with before_each_page(browser, f"delete window.{missing};"):
        opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
        assert browser.execute_script(READY) == "failed"
        said = browser.execute_script("return document.getElementById('view').textContent")
        assert said == "Sorry, this browser is too old for it: any from 2023 on will do."


def test_the_policy_forbids_requests_and_other_scripts(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    script = """const done = arguments[0];
    const refused = [];
    document.addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
    const make = (tag, values) => Object.assign(document.createElement(tag), values);
    const add = (tag, values) => document.body.append(make(tag, values));
    add("script", { textContent: "document.title = 'owned'" });
    add("img", { src: "data:image/gif;base64,R0lGODlhAQABAAAAACw=" });
    fetch("data:text/plain,x").then(() => refused.push("fetched"), () => refused.push("fetch"));
    setTimeout(() => done(refused), 500);"""
    refused = browser.execute_async_script(script)
    assert {"script-src-elem", "img-src", "connect-src", "fetch"} <= set(refused)
    assert browser.title != "owned" and "fetched" not in refused
    browser.get_log("browser")  # the refusals


@pytest.mark.parametrize("width", [360, 400, 768, 1280, 1440])
def test_no_view_is_wider_than_the_window(opened, width):
    directions = {f"a long label number {n}": torch.randn(6) for n in range(9)}
    browser = opened(
        model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"], directions=directions
    )
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for view in ("Between", "Around", "Directions", "Map", "About"):
            open_view(browser, view)
            over = "return document.documentElement.scrollWidth - window.innerWidth"
            assert browser.execute_script(over) <= 0, view
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_by_keyboard_alone(opened):
    """Tab reaches everything in order, what has the focus shows it, and changes are announced."""
    from selenium.webdriver.common.keys import Keys

    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    browser.execute_script("document.querySelector('#views button').focus()")
    focused, outlines = [], []
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        focused.append(active.text or active.get_attribute("aria-label") or active.tag_name)
        style = (
            "const s = getComputedStyle(arguments[0]); return s.outlineStyle + s.borderBottomColor"
        )
        outlines.append(browser.execute_script(style, active))
    assert focused[:6] == [
        "Around",
        "Directions",
        "Map",
        "About",
        "First text",
        "Second text",
    ]
    assert all(o.startswith(("solid", "auto")) for o in outlines[:4])
    type_text(browser, "halo")
    live = "return document.getElementById('live').textContent"
    rows = browser.execute_script(ROWS)
    assert until(browser, live, wanted=lambda now: now.endswith(rows[-1])).startswith("Between: ")


def test_motion_is_left_out_where_it_is_not_wanted(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    style = "return getComputedStyle(document.querySelector('.path li')).transitionDuration"
    for value, duration in (("reduce", "0s"), ("no-preference", "0.2s")):
        features = {"features": [{"name": "prefers-reduced-motion", "value": value}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        assert browser.execute_script(style) == duration


def test_bytes_of_the_engine_are_those_of_the_package(opened):
    from page_engine import WasmEngine

    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
    script = """const done = arguments[0];
    const text = document.getElementById("engine").textContent;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    new Response(stream).arrayBuffer().then((b) =>
      done(btoa(String.fromCharCode(...new Uint8Array(b)))));"""
    found = base64.b64decode(browser.execute_async_script(script))
    assert found == WasmEngine.path.read_bytes()


def test_the_benchmark_measures_a_page(browser, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LOADS, module.KEYSTROKES, module.SECONDS = 2, 12, 0.2
    path, output = tmp_path / "page.html", tmp_path / "page.json"
    fastvae.export_page(model_for(CHARACTERS), CHARACTERS, path, examples=["abba", "zeta"])
    monkeypatch.setattr("sys.argv", ["page.py", str(path), "--output", str(output)])
    module.main()
    (found,) = json.loads(output.read_text())["pages"]
    assert found["requests"] == 0 and found["MB"] == path.stat().st_size / 1e6
    named = [value for name, value in found.items() if "ms" in name or "second" in name]
    assert len(named) == 5 and all(value > 0 for value in named)
