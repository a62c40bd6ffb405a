// View 3: directions that have names, or that two lists of texts give.

import { el, showText, slider } from "./dom.js";
import { fromBase64 } from "./engine.js";
import { field } from "./field.js";
import { plus, size } from "./latent.js";

const SHOWN = 8;
const MOST = 2; // times a direction
const LENGTH = 0.6; // of each direction: root mean square, where the prior's is 1

/** A vector -> the same direction in the length that all have. */
function scaled(vector) {
  return Float32Array.from(vector, (value) => (value * LENGTH) / (size(vector) || 1));
}

export function directionsView(app) {
  const base = field(app, 0, "Text to change", draw);
  const result = el("bdi", { className: "result" });
  const found = el("div", { className: "directions" });
  const search = el("input", { type: "search", className: "search", placeholder: "Search", "aria-label": "Search" });
  const amounts = new Map();
  const directions = app.manifest.directions.map(([name, values]) => ({
    name,
    vector: scaled(new Int8Array(fromBase64(values).buffer)),
  }));
  const own = lists();
  const named = el("div", { className: "named" }, search, found);
  const element = el(
    "section",
    { className: "directions-view" },
    base,
    el("p", { className: "becomes" }, el("span", {}, "becomes"), result),
    named,
    own,
  );
  named.hidden = !directions.length;
  search.hidden = directions.length <= SHOWN;
  search.addEventListener("input", find);
  let text = "";
  let shown = [];

  /** The sliders that are shown: those that were moved, then those that the search finds. */
  function list() {
    const wanted = search.value.trim().toLowerCase();
    const moved = directions.filter(({ name }) => amounts.get(name));
    const rest = directions.filter((d) => !moved.includes(d) && d.name.toLowerCase().includes(wanted));
    shown = [...moved, ...rest].slice(0, SHOWN).map(({ name, vector }) => {
      const limits = { min: -MOST, max: MOST, step: 0.05, value: amounts.get(name) || 0 };
      const row = slider(name, limits, (value) => {
        amounts.set(name, value);
        draw();
      });
      const alone = el("bdi", { className: "alone" });
      row.append(alone);
      return { name, vector, row, alone };
    });
    found.replaceChildren(...shown.map(({ row }) => row));
  }

  function find() {
    list();
    draw();
  }

  /** Two short lists -> the difference of their means, as one more direction. */
  function lists() {
    const area = (label) => el("textarea", { rows: 3, "aria-label": label, placeholder: label });
    const [towards, away] = [area("More like these, one a line"), area("Less like these, one a line")];
    const make = el("button", { type: "button" }, "Make a direction");
    const message = el("p", { className: "note", "aria-live": "polite" });
    const read = (box) => box.value.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, 32);
    make.addEventListener("click", async () => {
      const [more, less] = [read(towards), read(away)];
      if (!more.length || !less.length) {
        message.textContent = "Write one text or more into each list.";
        return;
      }
      message.textContent = "";
      const means = [];
      for (const part of [more, less]) {
        const points = await app.client.encode(part.map((line) => app.vocabulary.encode(line).ids));
        const zero = new Float32Array(app.manifest.latent);
        means.push(points.reduce((sum, point) => plus(sum, point.mean, 1 / points.length), zero));
      }
      const name = `${more[0]} rather than ${less[0]}`.slice(0, 40);
      const vector = scaled(plus(means[0], means[1], -1));
      const before = directions.findIndex((d) => d.name === name);
      if (before >= 0) directions.splice(before, 1);
      directions.unshift({ name, vector });
      amounts.set(name, 1);
      named.hidden = false;
      list();
      draw();
    });
    const open = el("summary", {}, "Make one from your own texts");
    const boxes = el("div", { className: "lists" }, towards, away);
    return el("details", { className: "own", open: !app.manifest.directions.length }, open, boxes, make, message);
  }

  async function draw() {
    let z = app.points[0].mean;
    for (const { name, vector } of directions) z = plus(z, vector, amounts.get(name) || 0);
    const { mean, read } = app.points[0];
    // Beside each slider: what its direction alone makes of the text.
    const rows = shown;
    const alone = rows.map(({ name, vector }) => plus(mean, vector, amounts.get(name) || 1));
    const done = await app.decode([z, ...alone], {
      group: "directions",
      each: (n, found) => {
        if (n === 0) text = found;
        showText(n ? rows[n - 1].alone : result, found, n ? null : read);
      },
    });
    if (done) app.drawn(`${app.points[0].text} becomes ${text}`);
  }

  list();
  own.open = !directions.length;
  return {
    name: "directions",
    title: "Directions",
    element,
    show() {
      base.refresh();
      draw();
    },
    again: draw,
    texts: () => [app.points[0].text, text],
    focus: () => base.input.focus(),
  };
}
