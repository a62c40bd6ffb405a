// View 4: a plane through three texts, every cell a decoded text.

import { el, showText } from "./dom.js";
import { field } from "./field.js";
import { lerp, plus } from "./latent.js";

const SIDE = window.innerWidth < 600 ? 4 : 6; // cells between two of the three texts
const MOST_CACHED = 20000;
const ZOOM = [-3, 5]; // powers of two

export function mapView(app) {
  const fields = [0, 1, 2].map((n) => field(app, n, `Corner ${n + 1}`, restart));
  const plane = el("div", { className: "plane" });
  const area = el("div", {
    className: "map",
    tabIndex: 0,
    role: "application",
    "aria-label": "Map of texts: arrow keys move, plus and minus zoom, Enter goes around a text",
  });
  area.append(plane);
  const element = el("section", { className: "map-view" }, el("div", { className: "corners" }, ...fields), area);
  const wide = document.body.classList.contains("long") ? 2 : 1;
  const cached = new Map();
  const cells = new Map();
  let centre = { x: SIDE / 2, y: SIDE / 2 };
  let zoom = 0;
  let pointer = null;
  let cursor = null;
  let filling = false;
  let version = 0;
  let toTell = null;

  const base = () => ({ x: wide * (area.clientWidth < 600 ? 104 : 132), y: 44 });
  const level = () => Math.round(zoom);
  const step = () => 2 ** -level();
  const unit = () => ({ x: base().x * 2 ** zoom, y: base().y * 2 ** zoom }); // pixels
  const keyOf = (i, j) => `${level()}:${i}:${j}`;

  function latent(x, y) {
    const [a, b, c] = app.points.map((point) => point.mean);
    const over = lerp(a, b, (x - y / 2) / SIDE);
    return plus(plus(over, c, y / SIDE), a, -y / SIDE);
  }

  /** Columns and rows of the cells in sight, and one more on each side. */
  function inSight() {
    const { x, y } = unit();
    const across = area.clientWidth / 2 / x;
    const down = area.clientHeight / 2 / y;
    const found = [];
    for (let i = Math.floor((centre.x - across) / step()); i <= Math.ceil((centre.x + across) / step()); i++) {
      for (let j = Math.floor((centre.y - down) / step()); j <= Math.ceil((centre.y + down) / step()); j++) {
        found.push([i, j]);
      }
    }
    return found;
  }

  function corner(i, j) {
    const [x, y] = [i * step(), j * step()];
    return (y === 0 && (x === 0 || x === SIDE)) || (y === SIDE && x === SIDE / 2);
  }

  function place() {
    const { x, y } = unit();
    const wanted = new Set();
    const scale = 2 ** (zoom - level());
    plane.style.setProperty("--scale", scale);
    for (const [i, j] of inSight()) {
      const key = keyOf(i, j);
      wanted.add(key);
      let cell = cells.get(key);
      if (!cell) {
        cell = el("bdi", { className: "cell" });
        Object.assign(cell, { i, j });
        cell.classList.toggle("corner", corner(i, j));
        cells.set(key, cell);
        plane.append(cell);
      }
      const [left, top] = [(i * step() - centre.x) * x, (j * step() - centre.y) * y];
      cell.style.transform = `translate(-50%, -50%) translate(${left}px, ${top}px)`;
      cell.style.maxWidth = `${x * step() - 10}px`;
      cell.classList.toggle("cursor", cursor !== null && cursor.i === i && cursor.j === j);
      const text = cached.get(key);
      if (text !== undefined) {
        showText(cell, text);
        cell.classList.toggle("same", text === cached.get(keyOf(i - 1, j)));
      }
    }
    for (const [key, cell] of cells) {
      if (!wanted.has(key)) {
        cell.remove();
        cells.delete(key);
      }
    }
    fill();
  }

  /** Decode what is missing, nearest to the pointer first, a batch at a time. */
  async function fill() {
    if (filling) return;
    filling = true;
    for (;;) {
      const from = pointer || centre;
      const { x, y } = unit();
      const far = ([i, j]) => Math.hypot((i * step() - from.x) * x, (j * step() - from.y) * y);
      const missing = inSight().filter(([i, j]) => !cached.has(keyOf(i, j)));
      if (!missing.length) break;
      const part = missing.sort((a, b) => far(a) - far(b)).slice(0, Math.min(24, app.client.batch));
      const keys = part.map(([i, j]) => keyOf(i, j));
      const mine = version;
      const latents = part.map(([i, j]) => latent(i * step(), j * step()));
      const each = (n, text) => mine === version && cached.set(keys[n], text);
      const done = await app.decode(latents, { group: "map", each });
      if (!done && mine === version) break;
      if (cached.size > MOST_CACHED) cached.clear();
      requestAnimationFrame(show);
    }
    filling = false;
    app.drawn("");
  }

  function show() {
    tell();
    for (const [key, cell] of cells) {
      const text = cached.get(key);
      if (text === undefined) continue;
      showText(cell, text);
      cell.classList.toggle("same", text === cached.get(keyOf(cell.i - 1, cell.j)));
    }
  }

  /** Announce the text under the cursor, once it is there. */
  function tell() {
    if (toTell === null || !cached.has(toTell)) return;
    app.announce(cached.get(toTell));
    toTell = null;
  }

  function restart() {
    version++;
    cached.clear();
    cells.forEach((cell) => cell.remove());
    cells.clear();
    place();
  }

  function toPlane(event) {
    const box = area.getBoundingClientRect();
    const { x, y } = unit();
    return {
      x: centre.x + (event.clientX - box.left - box.width / 2) / x,
      y: centre.y + (event.clientY - box.top - box.height / 2) / y,
    };
  }

  function zoomBy(change, at) {
    const before = 2 ** zoom;
    zoom = Math.min(ZOOM[1], Math.max(ZOOM[0], zoom + change));
    const share = 1 - before / 2 ** zoom;
    centre = { x: centre.x + (at.x - centre.x) * share, y: centre.y + (at.y - centre.y) * share };
    cursor = null;
    place();
  }

  async function goAround(i, j) {
    const text = cached.get(keyOf(i, j));
    if (text === undefined) return;
    const point = await app.pointOf(text);
    app.crumbs = [...app.crumbs, app.points[0]];
    app.points[0] = point;
    app.open("around");
  }

  const touches = new Map();
  let moved = 0;
  area.addEventListener("pointerdown", (event) => {
    area.setPointerCapture(event.pointerId);
    touches.set(event.pointerId, event);
    moved = 0;
  });
  area.addEventListener("pointermove", (event) => {
    pointer = toPlane(event);
    const before = touches.get(event.pointerId);
    if (!before) return;
    const { x, y } = unit();
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    if (touches.size === 2) {
      const [other] = [...touches.values()].filter((touch) => touch.pointerId !== event.pointerId);
      const apart = (touch) => Math.hypot(touch.clientX - other.clientX, touch.clientY - other.clientY);
      zoomBy(Math.log2(apart(event) / Math.max(1, apart(before))), toPlane(other));
    } else {
      centre = { x: centre.x - dx / x, y: centre.y - dy / y };
      place();
    }
    touches.set(event.pointerId, event);
    moved += Math.abs(dx) + Math.abs(dy);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    area.addEventListener(name, (event) => {
      touches.delete(event.pointerId);
      if (name === "pointerup" && moved < 6) {
        const { x, y } = toPlane(event);
        goAround(Math.round(x / step()), Math.round(y / step()));
      }
    });
  }
  area.addEventListener("pointerleave", () => (pointer = null));
  area.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoomBy(-event.deltaY / (event.ctrlKey ? 100 : 400), toPlane(event));
    },
    { passive: false },
  );
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  area.addEventListener("keydown", (event) => {
    if (arrows[event.key]) {
      const at = cursor || { i: Math.round(centre.x / step()), j: Math.round(centre.y / step()) };
      cursor = { i: at.i + arrows[event.key][0], j: at.j + arrows[event.key][1] };
      centre = { x: cursor.i * step(), y: cursor.j * step() };
      toTell = keyOf(cursor.i, cursor.j);
      place();
      tell();
    } else if (event.key === "+" || event.key === "=") zoomBy(0.5, centre);
    else if (event.key === "-") zoomBy(-0.5, centre);
    else if (event.key === "Enter" && cursor) goAround(cursor.i, cursor.j);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => area.isConnected && area.clientWidth && place()).observe(area);

  return {
    name: "map",
    title: "Map",
    element,
    show() {
      fields.forEach((each) => each.refresh());
      restart();
    },
    again: restart,
    texts: () => [...cells.values()].map((cell) => cell.textContent).filter(Boolean),
    focus: () => area.focus(),
  };
}
