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
import time
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
AROUND = "return [...document.querySelectorAll('.around bdi')].map((row) => row.textContent)"


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


def seen(value):
    """What the page shows of a text."""
    return re.sub("[\x00-\x1f]", lambda c: chr(0x2400 + ord(c[0])), value).replace("\x7f", "\u2421")


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
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"])
    expected = path_of(model, CHARACTERS, "abba", "zeta", 9)
    assert browser.execute_script(ROWS) == expected and len(set(expected)) > 1
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
    "token": (
        text.TokenVocabulary(["Cl", "C", "Br", "=", "(", ")", "c1"], r"Cl|Br|c\d|."),
        "lines",
    ),
}
TEXTS = ["", "abc", "hello world", "ClCBr=C(c1)", "äÖ", "a\u0308", "漢字🙂", "\0\n\u202e", "x" * 40]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_are_read_as_python_reads_them(opened, name):
    """What is not in the vocabulary is left out, and what does not fit is cut."""
    vocabulary, reading = VOCABULARIES[name]
    model = model_for(vocabulary, reading=reading)
    example = "ClC" if name == "token" else "ab"
    browser = opened(model, vocabulary, examples=[example] * 3)
    for value in [*TEXTS, example]:
        script = (
            "const {ids, read} = fastvae.vocabulary.encode(arguments[0]); return [[...ids], read]"
        )
        ids, read = browser.execute_script(script, value)
        room = model.length - (reading == "lines")
        try:
            expected = vocabulary.encode(value)[:room]
        except ValueError:  # the page reads the rest
            known = vocabulary.decode(ids)
            assert seen(known) == seen(read) and set(known) <= set(value + "aOä")
            continue
        padding = model.length - len(expected)
        end = [vocabulary.end_id] * (reading == "lines")
        assert ids == expected + end + [vocabulary.pad_id] * (padding - len(end))
        assert read == vocabulary.decode(ids)
    assert browser.execute_script(ROWS)


PATTERNS = [
    r"Cl|Br|.",
    r"\[[^\]]*\]|%\d\d|[A-Z][a-z]?|.",
    r"\w+|\s+|[^\w\s]+",
    r"[\d\-a-c]+?x|\D",
    r"(?i)ab|.",
    r"(?:(a)|b)\1?|(?<=a)c|(?!d).|.",
    r"a{2,3}|^b|b$|\bc|\Bd|[^\n]|\n",
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
    ]
    for pattern in PATTERNS:
        source, flags = to_javascript(pattern)
        for sample in samples:
            expected = [m[0] for m in re.finditer(pattern, sample, re.DOTALL) if m[0]]
            script = """const [source, flags, sample] = arguments;
            const found = sample.matchAll(new RegExp(source, flags));
            return [...found].map((m) => m[0]).filter(Boolean)"""
            assert browser.execute_script(script, source, flags, sample) == expected, pattern


def test_around_moves_to_a_neighbor_and_back(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta"])
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
    browser.find_element("css selector", ".crumbs button").click()
    until(browser, value, wanted=lambda now: now == "abba")
    set_slider(browser, "How far", 0)
    returned = set(browser.execute_script(AROUND))
    exact = rounded(model_for(CHARACTERS))
    z = exact.encode(torch.tensor([CHARACTERS.encode_sample("abba", 12)]))
    assert returned == set(CHARACTERS.batch_decode(exact.generate(z).tolist()))


def test_directions_by_name_and_from_lists(opened):
    model = model_for(CHARACTERS)
    directions = {f"label {n}": torch.randn(6) for n in range(12)}
    browser = opened(model, CHARACTERS, examples=["abba", "zeta"], directions=directions)
    open_view(browser, "Directions")
    names = """const labels = document.querySelectorAll('.directions .slider span');
    return [...labels].map((label) => label.textContent)"""
    assert len(browser.execute_script(names)) == 8
    browser.find_element("css selector", ".search").send_keys("11")
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


def test_map_by_keyboard_wheel_and_drag(opened):
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=["abba", "zeta", "halo"])
    open_view(browser, "Map")
    cells = "return [...document.querySelectorAll('.cell')].map((c) => c.textContent)"
    until(browser, cells, wanted=any)
    corners = until(
        browser,
        "return [...document.querySelectorAll('.cell.corner')].map((c) => c.textContent)",
        wanted=lambda found: len(found) == 3,
    )
    exact = rounded(model_for(CHARACTERS))
    rows = torch.tensor([CHARACTERS.encode_sample(t, 12) for t in ("abba", "zeta", "halo")])
    expected = CHARACTERS.batch_decode(exact.generate(exact.encode(rows)).tolist())
    assert sorted(corners) == sorted(expected)
    area = browser.find_element("css selector", ".map")
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
    for key in ("\ue014", "\ue015"):  # right, down
        area.send_keys(key)
    cursor = until(
        browser, "return document.querySelector('.cell.cursor')?.textContent", wanted=bool
    )
    until(browser, "return document.getElementById('live').textContent", wanted=cursor.__eq__)
    area.send_keys("\ue007")
    until(browser, "return document.querySelector('.around-view') !== null")
    value = browser.execute_script("return document.querySelector('input.text').value")
    assert seen(value) == cursor
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
    type_text(browser, "halo", 1)
    set_slider(browser, "Temperature", 1)
    open_view(browser, "Around")
    texts, address = (
        browser.execute_script(AROUND),
        browser.execute_script("return fastvae.address()"),
    )
    visit(browser, tmp_path / "page.html", "#" + address.partition("#")[2])
    until(browser, AROUND, wanted=lambda now: now == texts)
    open_view(browser, "Between")
    inputs = "return [...document.querySelectorAll('input.text')].map((i) => i.value)"
    assert browser.execute_script(inputs) == ["abba", "halo"]
    before = browser.execute_script(ROWS)
    buttons = browser.find_elements("css selector", "footer button")
    next(button for button in buttons if button.text == "Again").click()
    until(browser, ROWS, wanted=lambda now: now != before)


@pytest.mark.parametrize(
    "fragment", ["#v=map&p=%%%&t=x&s=1e99&n=-4", "#p=AAAA~x&v=<b>", "#" + "p=" * 999]
)
def test_broken_links_are_ignored(opened, fragment):
    browser = opened(model_for(CHARACTERS), CHARACTERS, fragment, examples=["abba", "zeta"])
    assert browser.execute_script(READY) == "ready"


def test_tells_what_is_known(opened):
    known = ["abba", "zeta", "halo"]
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=known[:2], texts=known)
    news = "return [...document.querySelectorAll('.path .news')].map((n) => n.textContent)"
    said = until(browser, news, wanted=lambda found: len(found) == 9 and all(found))
    for row, sentence in zip(browser.execute_script(ROWS), said, strict=True):
        if row in known:
            assert sentence == "known"
        else:
            assert re.fullmatch(r"new, \d+ edits? from \w+", sentence)
    script = "const done = arguments[1]; fastvae.client.nearest(arguments[0]).then(done)"
    found = browser.execute_async_script(script, ["zetta", "hallo!", "abba", ""])
    assert [f["distance"] for f in found] == [1, 2, 0, 0] or found[3]["text"] in ("", "abba")
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
    browser = opened(model_for(CHARACTERS), CHARACTERS, examples=known[:2], texts=known)
    script = "const done = arguments[1]; fastvae.client.nearest(arguments[0]).then(done)"
    for other, found in zip(others, browser.execute_async_script(script, others), strict=True):
        least = min(edits(other, text) for text in known)
        assert found["distance"] == least
        assert least == len(other) or edits(other, found["text"]) == least


def wicked_model():
    """Greedily it generates markup; at a temperature, marks of direction and NUL too."""
    tokens = text.TokenVocabulary([WICKED, "\u202e", "\0", "\u2066", "a"], r"</script><img.*?>|.")
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
    assert {"\u202e", "\u2400", "\u2066"} <= set(shown) and "\0" not in shown
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
    "value", ["\ud800", "\udc00\ud800x", "a" * 10_000, "漢" * 10_000, "\0\u202e", "", " "]
)
def test_whatever_is_pasted(opened, value):
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
        assert "It reads up to 11 characters." in note
    elif value.strip():
        assert note.startswith("This model has never seen")
    assert len(browser.execute_script(ROWS)) == 9


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


def test_without_workers_it_works_in_slices(opened, browser):
    script = {"source": "delete window.Worker; window.Worker = undefined;"}
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        model = model_for(CHARACTERS)
        opened(model, CHARACTERS, examples=["abba", "zeta"])
        assert browser.execute_script("return fastvae.client.worker") is None
        assert browser.execute_script(ROWS) == path_of(model, CHARACTERS, "abba", "zeta", 9)
    finally:
        identifier = {"identifier": added["identifier"]}
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", identifier)


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
