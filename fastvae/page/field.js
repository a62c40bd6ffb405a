// A text that a person types: each keystroke gives its point in the latent space.

import { el, showText } from "./dom.js";
import { visible } from "./vocabulary.js";

const LONGEST = 2000; // characters of a paste that are kept

/** A piece of a text -> how to name it, where nothing of it may be seen. */
function named(piece) {
  const hidden = /^[\p{C}\p{Z}\p{M}]/u.test(piece);
  if (!hidden) return visible(piece.slice(0, 12));
  return `U+${piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** What of a text was not read, as sentences. */
function note(app, { cut, unknown }) {
  const said = [];
  if (unknown.length) {
    const listed = unknown.slice(0, 5).flatMap((piece) => [" ", el("bdi", {}, named(piece))]);
    said.push("This model has never seen", ...listed, unknown.length > 5 ? " … " : ". ");
  }
  if (cut) said.push(`It reads up to ${app.vocabulary.room} ${app.manifest.unit}s.`);
  return said;
}

/** An input for the person's text number `index`; onPoint is called once its point is known. */
export function field(app, index, label, onPoint) {
  const input = el("input", {
    type: "text",
    className: "text",
    value: app.points[index].text,
    spellcheck: false,
    autocomplete: "off",
    autocapitalize: "off",
    "aria-label": label,
    dir: "auto",
  });
  const message = el("p", { className: "note", "aria-live": "polite" });
  const element = el("div", { className: "field" }, input, message);
  let asked = 0;

  async function read() {
    if (input.value.length > LONGEST) input.value = input.value.slice(0, LONGEST);
    const encoded = app.vocabulary.encode(input.value);
    const mine = ++asked;
    element.remark = note(app, encoded);
    message.replaceChildren(...element.remark);
    const [point] = await app.client.encode([encoded.ids]);
    if (mine !== asked) return;
    app.points[index] = { text: input.value, read: encoded.read, ...point };
    onPoint();
  }

  input.addEventListener("input", read);
  element.input = input;
  element.remark = [];
  /** Tell what the model makes of the text, where that is something else. */
  element.tellReturned = (text) => {
    if (element.remark.length) return;
    if (text === app.points[index].read) {
      message.textContent = "";
      return;
    }
    const shown = el("bdi");
    showText(shown, text);
    message.replaceChildren("comes back as ", shown);
  };
  /** Show the point that another view has set. */
  element.refresh = () => {
    if (input.value !== app.points[index].text) input.value = app.points[index].text;
    element.remark = [];
    message.textContent = "";
  };
  return element;
}
