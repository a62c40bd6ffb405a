// Small helpers for elements, and which characters of a text are new.

import { visible } from "./vocabulary.js";

/** el("p", {className: "note"}, "text", child) -> an element; text is never read as markup. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "for" || name === "list") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Characters of b -> whether each is not in the longest sequence that it shares with a. */
export function changed(a, b) {
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] =
        a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const marks = new Array(b.length).fill(true);
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      marks[j] = false;
      i++;
      j++;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return marks;
}

/** Show a text, with what is new since the text before marked; null before marks nothing. */
export function showText(element, text, before = null) {
  const seen = visible(text);
  const state = JSON.stringify([seen, before]);
  if (element.shown === state) return;
  element.shown = state;
  const characters = Array.from(seen);
  const marks = before === null ? [] : changed(Array.from(visible(before)), characters);
  const parts = [];
  for (let start = 0, end; start < characters.length; start = end) {
    for (end = start + 1; end < characters.length && !marks[end] === !marks[start]; ) end++;
    const part = characters.slice(start, end).join("");
    parts.push(marks[start] ? el("mark", {}, part) : part);
  }
  element.replaceChildren(...parts);
  element.classList.toggle("empty", !characters.length);
}

/** A slider with its name, and where `show` is given its value in words. */
export function slider(name, properties, onInput, show = null) {
  const value = el("output");
  const input = el("input", { type: "range", ...properties });
  const label = el("label", { className: "slider" }, el("span", {}, name), input);
  if (show) label.append(value);
  const told = () => {
    const share = (input.value - input.min) / (input.max - input.min);
    label.style.setProperty("--share", share);
    if (show) value.textContent = show(Number(input.value));
  };
  input.addEventListener("input", () => {
    told();
    onInput(Number(input.value));
  });
  told();
  label.set = (number) => {
    input.value = number;
    told();
  };
  return label;
}

/** A function that runs `run` once calls have stopped for so many milliseconds. */
export function debounced(run, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...values), wait);
  };
}
