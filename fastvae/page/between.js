// View 1: between two texts.

import { el, showText, slider } from "./dom.js";
import { field } from "./field.js";
import { lerp } from "./latent.js";

export function betweenView(app) {
  const first = field(app, 0, "First text", draw);
  const last = field(app, 1, "Second text", draw);
  const list = el("ol", { className: "path" });
  const prompt = el("p", { className: "prompt" }, app.manifest.prompt);
  const steps = slider(
    "Texts between",
    { min: 5, max: 15, step: 1, value: app.steps },
    (value) => {
      app.steps = value;
      draw();
    },
    (value) => `${value}`,
  );
  const swap = el("button", { type: "button" }, "Swap");
  swap.addEventListener("click", () => {
    app.points.splice(0, 2, app.points[1], app.points[0]);
    first.refresh();
    last.refresh();
    draw();
  });
  const element = el(
    "section",
    { className: "between" },
    prompt,
    first,
    list,
    last,
  );
  let texts = [];

  function row(index) {
    while (list.children.length <= index) {
      list.append(el("li", {}, el("bdi", { className: "line" }), el("span", { className: "news" })));
    }
    return list.children[index];
  }

  function render() {
    let before = app.points[0].read;
    for (let n = 0; n < app.steps; n++) {
      const item = row(n);
      const text = texts[n];
      if (text === undefined) continue;
      showText(item.firstChild, text, before);
      item.classList.toggle("same", text === before);
      before = text;
    }
    while (list.children.length > app.steps) list.lastChild.remove();
  }

  async function draw() {
    const [a, b] = app.points;
    const count = app.steps;
    const shares = Array.from({ length: count }, (_, n) => (n + 1) / (count + 1));
    const fresh = [];
    app.client.drop("ends");
    const done = await app.decode(
      shares.map((t) => lerp(a.mean, b.mean, t)),
      {
        group: "between",
        each: (n, text) => {
          texts[n] = fresh[n] = text;
          if (n === count - 1 || app.client.first < count) render();
        },
      },
    );
    if (!done) return;
    texts = fresh;
    render();
    app.drawn(`Between: ${texts.join(", ")}`);
    app.tellNews(texts, (n) => list.children[n]?.lastChild);
    tellEnds(a, b);
  }

  /** What the ends themselves come back as, at leisure. */
  async function tellEnds(a, b) {
    if (app.temperature) return;
    const each = (n, text) => [first, last][n].tellReturned(text);
    await app.decode([a.mean, b.mean], { group: "ends", each });
  }

  return {
    name: "between",
    title: "Between",
    element,
    show() {
      first.refresh();
      last.refresh();
      draw();
    },
    controls: [steps, swap],
    again: draw,
    texts: () => [app.points[0].text, ...texts, app.points[1].text],
    focus() {
      first.input.focus();
      first.input.select();
    },
  };
}
