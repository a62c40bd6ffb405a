// View 2: around a text.

import { el, showText, slider } from "./dom.js";
import { field } from "./field.js";
import { normals } from "./latent.js";
import { visible } from "./vocabulary.js";

const NEIGHBOURS = 24;
const FARTHEST = 3; // times the posterior's standard deviations
const CRUMBS = 8;

export function aroundView(app) {
  const centre = field(app, 0, "Text in the middle", () => {
    app.crumbs = [];
    draw();
  });
  const crumbs = el("nav", { className: "crumbs", "aria-label": "Where you have been" });
  const list = el("ul", { className: "around" });
  const far = slider("How far", { min: 0, max: FARTHEST, step: 0.01, value: app.far }, (value) => {
    app.far = value;
    draw();
  });
  far.classList.add("wide");
  const mark = el("span", { className: "own-width" });
  mark.style.setProperty("--at", 1 / FARTHEST);
  const scale = el("div", { className: "scale" }, far, mark);
  const element = el(
    "section",
    { className: "around-view" },
    el("p", { className: "prompt" }, app.manifest.prompt),
    centre,
    scale,
    crumbs,
    list,
  );
  let texts = [];

  const items = Array.from({ length: NEIGHBOURS }, (_, n) => {
    const button = el("button", { type: "button" }, el("bdi"), el("span", { className: "news" }));
    button.addEventListener("click", () => go(n));
    list.append(el("li", {}, button));
    return button;
  });

  function moveTo(point) {
    app.points[0] = point;
    centre.refresh();
    draw();
  }

  async function go(n) {
    if (texts[n] === undefined) return;
    const point = await app.pointOf(texts[n]);
    app.crumbs = [...app.crumbs, app.points[0]].slice(-CRUMBS);
    app.seed++;
    moveTo(point);
    app.announce(`In the middle: ${point.text}`);
  }

  function showCrumbs() {
    crumbs.replaceChildren(
      ...app.crumbs.map((point, n) => {
        const button = el("button", { type: "button" }, el("bdi", {}, visible(point.text) || "…"));
        button.addEventListener("click", () => {
          app.crumbs = app.crumbs.slice(0, n);
          moveTo(point);
        });
        return button;
      }),
    );
  }

  async function draw() {
    const { mean, spread, read } = app.points[0];
    showCrumbs();
    const around = normals(app.seed, NEIGHBOURS, mean.length);
    const here = around.map((noise) => mean.map((m, k) => m + app.far * spread[k] * noise[k]));
    const fresh = [];
    const done = await app.decode(here, {
      group: "around",
      each: (n, text) => {
        fresh[n] = text;
        texts[n] = text;
        showText(items[n].firstChild, text, read);
        items[n].classList.toggle("same", text === read);
      },
    });
    if (!done) return;
    texts = fresh;
    app.drawn(`Around ${app.points[0].text}: ${texts.join(", ")}`);
    app.tellNews(texts, (n) => items[n].lastChild);
  }

  return {
    name: "around",
    title: "Around",
    element,
    show() {
      centre.refresh();
      draw();
    },
    again: draw,
    draws: true,
    texts: () => texts,
    focus: () => centre.input.focus(),
  };
}
