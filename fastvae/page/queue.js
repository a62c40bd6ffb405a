// Work for the engine, one piece at a time, in slices: {id, kind, group, ...} -> answers by `reply`.

import { Engine } from "./engine.js";
import { nearestTexts } from "./nearest.js";

const SLICE = 8; // milliseconds, after which messages and, on the page, frames have their turn

/** A function that runs its argument as soon as other events have had their turn. */
function soon() {
  const channel = new MessageChannel();
  const waiting = [];
  channel.port1.onmessage = () => waiting.shift()();
  return (run) => {
    waiting.push(run);
    channel.port2.postMessage(0);
  };
}

/** reply: (answer, transferred) => void -> a function that takes messages. */
export function createQueue(reply) {
  const later = soon();
  let engine = null;
  let known = [];
  let work = [];
  let running = false;

  async function load(message) {
    try {
      engine = await Engine.load(message.module, message.weights, message.sizes);
      reply({ id: message.id, ok: true });
    } catch (error) {
      reply({ id: message.id, error: String(error.message || error) });
    }
  }

  function start(piece) {
    if (piece.kind === "nearest") {
      reply({ id: piece.id, found: nearestTexts(known, piece.texts) });
      return false;
    }
    engine.begin(piece.z, piece.temperature, piece.seeds);
    return true;
  }

  function run() {
    running = false;
    const end = performance.now() + SLICE;
    while (work.length) {
      const piece = work[0];
      if (!piece.started) {
        piece.started = true;
        if (!start(piece)) {
          work.shift();
          continue;
        }
      }
      let active = 1;
      do active = engine.step();
      while (active && performance.now() < end);
      if (!active) {
        work.shift();
        reply({ id: piece.id, tokens: engine.decoded() });
      }
      if (performance.now() >= end) break;
    }
    schedule();
  }

  function schedule() {
    if (!work.length || running) return;
    running = true;
    later(run);
  }

  return (message) => {
    if (message.kind === "load") return load(message);
    if (message.kind === "encode") return reply({ id: message.id, ...engine.encode(message.tokens) });
    if (message.kind === "known") {
      known = message.texts;
      return undefined;
    }
    if (message.kind === "drop") {
      for (const piece of work) if (piece.group === message.group) reply({ id: piece.id, dropped: true });
      work = work.filter((piece) => piece.group !== message.group);
      return undefined;
    }
    // What is begun is finished; of the rest, the more urgent comes first.
    let place = work.length;
    while (place > 0 && !work[place - 1].started && work[place - 1].urgency < message.urgency) place--;
    work.splice(place, 0, message);
    schedule();
    return undefined;
  };
}
