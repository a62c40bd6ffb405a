"""Measures exported pages in headless Chromium, offline from file://, and prints a table.

    python benchmarks/page.py page.html [page.html ...] [--untrained] [--output page.json]

Needs selenium (the extra `browser-test`), chromium and chromedriver. Each figure is a median or a
percentile over several loads or keystrokes of a page that nothing else competes with. `--untrained`
measures models of the paper's two sizes too, whose texts are always of full length.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fastvae
from fastvae.console import console, table
from fastvae.text import ByteVocabulary, CharVocabulary, Vocabulary

LOADS, KEYSTROKES, SECONDS = 7, 60, 4
# Texts a second: random latent vectors, decoded greedily in batches of the page's own size.
RATE = """
const [seconds, done] = arguments;
const { client, manifest } = fastvae;
let seed = 1;
const normal = () => {
  const next = () => ((seed = (seed * 48271) % 2147483647) / 2147483647);
  return Math.sqrt(-2 * Math.log(next())) * Math.cos(2 * Math.PI * next());
};
(async () => {
  let texts = 0;
  const start = performance.now();
  while (performance.now() - start < 1000 * seconds) {
    const vector = () => Float32Array.from({ length: manifest.latent }, normal);
    const z = Array.from({ length: client.batch }, vector);
    await client.decode(z, { group: "", each: () => texts++ });
  }
  done(texts / (performance.now() - start) * 1000);
})();
"""
# Milliseconds between two turns of the page's own events while texts are decoded.
WAITS = """
const [seconds, done] = arguments;
const { client, manifest } = fastvae;
const { port1, port2 } = new MessageChannel();
const waits = [];
const end = performance.now() + 1000 * seconds;
let last = performance.now();
port1.onmessage = () => {
  const now = performance.now();
  waits.push(now - last);
  last = now;
  if (now < end) port2.postMessage(0);
  else done(waits);
};
port2.postMessage(0);
(async () => {
  while (performance.now() < end) {
    const vector = () => Float32Array.from({ length: manifest.latent }, Math.random);
    const z = Array.from({ length: client.batch }, vector);
    await client.decode(z, { group: "", each: () => {} });
  }
})();
"""
WITHOUT_WORKER = {"source": "delete window.Worker; window.Worker = undefined;"}
# Milliseconds from a keystroke to the texts, and to the first one of them.
TYPE = """
const [texts, done] = arguments;
const input = document.querySelector("input.text");
const list = document.querySelector(".path");
(async () => {
  const times = [];
  const first = [];
  for (const text of texts) {
    const once = { once: true };
    const drawn = new Promise((resolve) => document.addEventListener("drawn", resolve, once));
    const start = performance.now();
    const seen = new MutationObserver(() => {
      first.push(performance.now() - start);
      seen.disconnect();
    });
    seen.observe(list, { childList: true, subtree: true, characterData: true });
    input.value = text;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    await drawn;
    times.push(performance.now() - start);
    seen.disconnect();
    await new Promise((resolve) => setTimeout(resolve, 60));
  }
  done([times, first]);
})();
"""


def start_browser():
    """Chromium without a window and without a network. Raises ImportError without selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_script_timeout(120)
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    return browser


def load(browser, page: Path) -> float:
    """Open a page -> milliseconds from the start of navigation to its first view."""
    browser.get("about:blank")
    browser.get(page.resolve().as_uri())
    script = """
    const done = arguments[0];
    const look = () => performance.getEntriesByName("drawn")[0]?.startTime;
    if (look()) done(look());
    else document.addEventListener("drawn", () => done(look()), { once: true });
    """
    return browser.execute_async_script(script)


def requests(browser) -> list[str]:
    """Addresses outside the file that the page has asked for so far."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [url for url in found if not url.startswith(("file:", "blob:", "data:", "about:"))]


def keystrokes(text: str, count: int) -> list[str]:
    """A text typed letter by letter, again and again."""
    typed = [text[: n + 1] for n in range(len(text))] or ["a"]
    return [typed[n % len(typed)] for n in range(count)]


def measure(page: Path) -> dict[str, Any]:
    """A page -> its figures by name."""
    browser = start_browser()
    try:
        loads = [load(browser, page) for _ in range(LOADS)]
        example = browser.execute_script("return fastvae.manifest.examples[1]")
        rate = browser.execute_async_script(RATE, SECONDS)
        count = KEYSTROKES if rate > 50 else KEYSTROKES // 6
        times, first = browser.execute_async_script(TYPE, keystrokes(example, count))
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", WITHOUT_WORKER)
        load(browser, page)
        waits = sorted(browser.execute_async_script(WAITS, SECONDS))
        return {
            "page": page.name,
            "MB": page.stat().st_size / 1e6,
            "texts per second": rate,
            "keystroke to nine texts, p95, ms": sorted(times)[int(0.95 * len(times))],
            "keystroke to the first text, p95, ms": sorted(first)[int(0.95 * len(first))],
            "first view, median, ms": statistics.median(loads),
            "wait of the page without a worker, p95, ms": waits[int(0.95 * len(waits))],
            "requests": len(requests(browser)),
            "browser": browser.capabilities["browserVersion"],
        }
    finally:
        browser.quit()


def untrained(folder: Path) -> list[Path]:
    """Pages of models with the paper's sizes, made in a folder."""
    letters = "".join(map(chr, range(ord("A"), ord("A") + 50)))
    ptb, tweets = CharVocabulary(letters), ByteVocabulary()
    works: dict[str, tuple[Vocabulary, dict[str, Any]]] = {
        "ptb-500": (
            ptb,
            {"length": 48, "latent_size": 50, "encoder_channels": (128, 256), "hidden_size": 500},
        ),
        "tweets-1000": (tweets, {"length": 128, "pad_id": 0, "end_id": 2}),
    }
    pages = []
    for name, (vocabulary, sizes) in works.items():
        model = fastvae.HybridVAE(vocabulary.size, **sizes).eval()
        path = folder / f"{name}.html"
        fastvae.export_page(model, vocabulary, path, examples=("ABC", "DEFGHI", "KLMN"))
        pages.append(path)
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--untrained", action="store_true", help="models of the paper's sizes too")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = arguments.pages + (untrained(Path(folder)) if arguments.untrained else [])
        results = [measure(page) for page in pages]
    if not results:
        parser.error("name a page, or measure --untrained models")
    names = [name for name in results[0] if name != "page"]
    rows = [
        (name, *(f"{r[name]:.3g}" if isinstance(r[name], float) else str(r[name]) for r in results))
        for name in names
    ]
    console().print(table(("", *(r["page"] for r in results)), rows))
    if arguments.output:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
        arguments.output.write_text(json.dumps({"machine": machine, "pages": results}, indent=2))
    if any(r["requests"] for r in results):
        sys.exit("a page sent requests")


def cpu_name() -> str:
    """What the system calls the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
