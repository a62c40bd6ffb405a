// The page: what all views share, and which of them is shown.

import { aboutView } from "./about.js";
import { aroundView } from "./around.js";
import { betweenView } from "./between.js";
import { Client } from "./client.js";
import { directionsView } from "./directions.js";
import { debounced, el, slider } from "./dom.js";
import { inflate } from "./engine.js";
import { fromAddress, toAddress } from "./latent.js";
import { mapView } from "./map.js";
import { visible, Vocabulary } from "./vocabulary.js";

const LONG = 40; // tokens, from which on texts are shown smaller

const data = (id) => document.getElementById(id)?.textContent ?? "";

class App {
  constructor(manifest) {
    this.manifest = manifest;
    this.vocabulary = new Vocabulary(manifest);
    this.client = new Client(manifest);
    Object.assign(this, { steps: 9, far: 1.4, temperature: 0, seed: 1, crumbs: [], known: false });
    this.live = document.getElementById("live");
    this.announceSoon = debounced((text) => (this.live.textContent = visible(text)), 700);
    this.newsSoon = debounced((...rest) => this.findNews(...rest), 250);
  }

  /** Latent vectors -> each(index, text). */
  decode(latents, { group, each }) {
    const { temperature, seed } = this;
    const options = { group, temperature, seed, each: (n, ids) => each(n, this.vocabulary.decode(ids)) };
    return this.client.decode(latents, options);
  }

  announce(text) {
    this.live.textContent = visible(text);
  }

  /** A text -> its point, as if a person had typed it. */
  async pointOf(text) {
    const { ids, read } = this.vocabulary.encode(text);
    const [point] = await this.client.encode([ids]);
    return { text, read, ...point };
  }

  /** A view is complete. */
  drawn(summary) {
    if (summary) this.announceSoon(summary);
    performance.mark("drawn");
    document.documentElement.dataset.state = "ready";
    document.dispatchEvent(new Event("drawn"));
  }

  /** Show for each text whether it is known, where known texts are in the file. */
  tellNews(texts, place) {
    for (let n = 0; n < texts.length; n++) place(n)?.replaceChildren();
    if (this.known) this.newsSoon(texts, place);
  }

  async findNews(texts, place) {
    const mine = (this.news = {});
    for (let n = 0; n < texts.length; n++) {
      const [{ text, distance }] = await this.client.nearest([texts[n]]);
      if (this.news !== mine) return;
      const edits = distance === 1 ? "1 edit" : `${distance} edits`;
      const near = el("bdi", {}, visible(text));
      place(n)?.replaceChildren(...(distance ? [`new, ${edits} from `, near] : ["known"]));
    }
  }

  /** The point of each example, or of the address. */
  async readPoints() {
    const examples = this.manifest.examples.map((text) => ({ text, ...this.vocabulary.encode(text) }));
    const found = await this.client.encode(examples.map(({ ids }) => ids));
    this.points = found.map((point, n) => ({ text: examples[n].text, read: examples[n].read, ...point }));
    const address = new URLSearchParams(location.hash.slice(1));
    address.getAll("p").slice(0, 3).forEach((value, n) => {
      const [code, ...text] = value.split("~");
      const mean = fromAddress(code, this.manifest.latent);
      if (!mean) return;
      const shown = text.join("~").slice(0, 200);
      const read = this.vocabulary.encode(shown).read;
      this.points[n] = { ...this.points[n], text: shown, read, mean };
    });
    const number = (name, low, high, other) => {
      const value = address.has(name) ? Number(address.get(name)) : other;
      return Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : other;
    };
    this.temperature = number("t", 0, 1.5, this.temperature);
    this.seed = Math.round(number("s", 0, 2 ** 31, this.seed));
    this.far = number("far", 0, 3, this.far);
    this.steps = Math.round(number("n", 5, 15, this.steps));
    this.wanted = address.get("v");
  }

  /** The address of what is shown. */
  address() {
    const { temperature, seed, far, steps, view } = this;
    const address = new URLSearchParams({ v: view.name, t: temperature, s: seed, far, n: steps });
    for (const { text, mean } of this.points) address.append("p", `${toAddress(mean)}~${text}`);
    return `${location.href.split("#")[0]}#${address}`;
  }

  /** Show a view by its name. */
  open(name) {
    this.view = this.views.find((view) => view.name === name) || this.views[0];
    document.getElementById("view").replaceChildren(this.view.element);
    for (const [n, link] of [...document.getElementById("views").children].entries()) {
      if (this.views[n] === this.view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    this.footer();
    this.view.show();
  }

  footer() {
    const footer = document.querySelector("footer");
    footer.hidden = this.view.name === "about";
    footer.replaceChildren(...(this.view.controls || []), ...this.controls);
    this.allowAgain();
  }

  /** Drawing again changes something only where something is drawn. */
  allowAgain() {
    this.again.disabled = !this.temperature && !this.view.draws;
  }

  build() {
    document.body.classList.toggle("long", this.vocabulary.room > LONG);
    this.views = [betweenView, aroundView, directionsView, mapView, aboutView].map((make) => make(this));
    const links = this.views.map((view) => {
      const link = el("button", { type: "button" }, view.title);
      link.addEventListener("click", () => this.open(view.name));
      return link;
    });
    document.getElementById("views").replaceChildren(...links);
    const temperature = slider(
      "Temperature",
      { min: 0, max: 1.5, step: 0.05, value: this.temperature },
      (value) => {
        this.temperature = value;
        this.allowAgain();
        this.view.again();
      },
      (value) => (value ? value.toFixed(2) : "off"),
    );
    const button = (text, run) => {
      const made = el("button", { type: "button", name: text }, text);
      made.addEventListener("click", () => run(made));
      return made;
    };
    this.again = button("Again", () => {
      this.seed++;
      this.view.again();
    });
    const copy = button("Copy texts", (made) => this.copy(made, this.view.texts().join("\n")));
    const share = button("Copy link", (made) => {
      const address = this.address();
      history.replaceState(null, "", address);
      this.copy(made, address);
    });
    this.controls = [temperature, this.again, copy, share];
  }

  async copy(button, text) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => (button.textContent = button.name), 1200);
  }

  async readKnown() {
    if (!this.manifest.known) return;
    const texts = JSON.parse(new TextDecoder().decode(await inflate(data("known"))));
    this.client.send({ kind: "known", texts });
    this.known = true;
    this.view.again();
  }
}

async function start() {
  if (!document.getElementById("end")) throw new Error("this file is not complete: download it again");
  if (!("DecompressionStream" in window) || !("WebAssembly" in window)) {
    throw new Error("this browser is too old for it: any from 2023 on will do");
  }
  const app = new App(JSON.parse(data("manifest")));
  await app.client.load(data("engine"), data("weights"), data("worker"));
  await app.readPoints();
  app.build();
  window.fastvae = app; // for the console
  app.open(app.wanted || "between");
  if (app.view.name === "between" && !matchMedia("(pointer: coarse)").matches) app.view.focus();
  window.addEventListener("hashchange", async () => {
    await app.readPoints();
    app.open(app.wanted || app.view.name);
  });
  await app.readKnown();
}

start().catch((error) => {
  document.documentElement.dataset.state = "failed";
  document.getElementById("view").replaceChildren(el("p", { className: "failure" }, `Sorry, ${error.message}.`));
});
