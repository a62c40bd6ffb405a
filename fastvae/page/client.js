// The page's side of the engine: promises instead of messages, in a worker where there can be one.

import { createQueue } from "./queue.js";

const LARGEST_BATCH = 32;
const WORK_OF_A_BATCH = 7e8; // multiplications: about a tenth of a second

/** Source -> a worker that runs it, or null where the browser has none for a page like this. */
async function startWorker(source) {
  try {
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    await new Promise((resolve, reject) => Object.assign(worker, { onmessage: resolve, onerror: reject }));
    return worker;
  } catch {
    return null;
  }
}

export class Client {
  constructor(manifest) {
    this.manifest = manifest;
    const fitting = Math.round(WORK_OF_A_BATCH / manifest.work);
    // A large model's first text comes alone, so that it comes soon; more at once take less time each.
    this.first = Math.max(1, Math.min(LARGEST_BATCH, fitting));
    this.batch = Math.max(4, this.first);
    this.waiting = new Map();
    this.next = 0;
    this.newest = {};
  }

  /** Base64 of module and weights, source of the worker -> once the engine is there. */
  async load(module, weights, source) {
    const sizes = { length: this.manifest.length, latent: this.manifest.latent, capacity: LARGEST_BATCH };
    const message = { kind: "load", module, weights, sizes };
    this.worker = await startWorker(source);
    if (this.worker) {
      this.worker.onmessage = (event) => this.answer(event.data);
      this.send = (piece) => this.worker.postMessage(piece);
    } else {
      this.send = createQueue((answer) => this.answer(answer));
    }
    await this.ask(message);
  }

  answer(answer) {
    const { resolve, reject } = this.waiting.get(answer.id);
    this.waiting.delete(answer.id);
    if (answer.error) reject(new Error(answer.error));
    else resolve(answer);
  }

  ask(message) {
    const id = this.next++;
    const promise = new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
    this.send({ urgency: 1, ...message, id });
    return promise;
  }

  /** Rows of ids -> {mean, spread} each: Float32Array [Z] and the posterior's standard deviations. */
  async encode(rows) {
    const { length, latent } = this.manifest;
    const points = [];
    for (let start = 0; start < rows.length; start += LARGEST_BATCH) {
      const part = rows.slice(start, start + LARGEST_BATCH);
      const tokens = new Int32Array(part.length * length);
      part.forEach((row, n) => tokens.set(row, n * length));
      const { mean, logvar } = await this.ask({ kind: "encode", tokens });
      part.forEach((_, n) => {
        const here = [n * latent, (n + 1) * latent];
        points.push({ mean: mean.slice(...here), spread: logvar.slice(...here).map((v) => Math.exp(v / 2)) });
      });
    }
    return points;
  }

  /** Leave undone what a call with this group asked for. */
  drop(group) {
    if (group) this.send({ kind: "drop", group });
  }

  /**
   * Latent vectors -> calls each(index, ids) as texts are decoded; true when all are, false if a later
   * call with the same group took their place.
   */
  async decode(latents, { group, each, temperature = 0, seed = 0, urgency = 1 }) {
    const { length, latent } = this.manifest;
    const call = (this.newest[group] = {});
    this.drop(group);
    const parts = [];
    for (let start = 0, end; start < latents.length; start = end) {
      end = start + (start ? this.batch : this.first);
      const part = latents.slice(start, end);
      const z = new Float32Array(part.length * latent);
      part.forEach((vector, n) => z.set(vector, n * latent));
      const seeds = new Uint32Array(2 * part.length);
      part.forEach((_, n) => seeds.set([start + n, seed], 2 * n));
      const at = start;
      const asked = this.ask({ kind: "decode", z, temperature, seeds, group, urgency });
      parts.push(
        asked.then(({ tokens }) => {
          if (!tokens || this.newest[group] !== call) return false;
          part.forEach((_, n) => each(at + n, tokens.subarray(n * length, (n + 1) * length)));
          return true;
        }),
      );
    }
    return (await Promise.all(parts)).every(Boolean);
  }

  /** Texts -> {text, distance} each: the nearest known one. */
  async nearest(texts) {
    return (await this.ask({ kind: "nearest", texts, urgency: 0 })).found;
  }
}
