// View 5: the card.

import { el } from "./dom.js";

/** Rows of [name, value] and paragraphs, as Python wrote them. */
export function aboutView(app) {
  const { card, facts } = app.manifest;
  const table = el("dl");
  for (const [name, value] of facts) table.append(el("dt", {}, name), el("dd", {}, value));
  const paragraphs = card.split(/\n\s*\n/).filter(Boolean).map((part) => el("p", {}, part.trim()));
  const element = el("section", { className: "about" }, ...paragraphs, table);
  return {
    name: "about",
    title: "About",
    element,
    show: () => app.drawn(""),
    again() {},
    texts: () => [],
    focus() {},
  };
}
