// The known text nearest to another one, by edits of single characters.

/** Number of edits between two arrays of code points, or `limit` if it is that or more. */
export function editDistance(a, b, limit) {
  if (Math.abs(a.length - b.length) >= limit) return limit;
  let row = Array.from({ length: b.length + 1 }, (_, n) => n);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    let least = i;
    for (let j = 1; j <= b.length; j++) {
      const change = row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      next[j] = Math.min(change, row[j] + 1, next[j - 1] + 1);
      if (next[j] < least) least = next[j];
    }
    if (least >= limit) return limit;
    row = next;
  }
  return Math.min(row[b.length], limit);
}

const bags = new WeakMap();

/** Counts of 16 classes of characters, whose differences bound the distance from below. */
function bag(points) {
  const counts = new Uint8Array(16);
  for (const c of points) counts[c & 15]++;
  return counts;
}

function prepared(known) {
  if (!bags.has(known)) {
    const points = known.map((text) => Array.from(text, (c) => c.codePointAt(0)));
    bags.set(known, { points, counts: points.map(bag), places: new Map(known.map((t, n) => [t, n])) });
  }
  return bags.get(known);
}

/** Known texts, other texts -> for each of these its nearest known text and their distance. */
export function nearestTexts(known, texts) {
  const { points, counts, places } = prepared(known);
  return texts.map((text) => {
    if (places.has(text)) return { text, distance: 0 };
    const own = Array.from(text, (c) => c.codePointAt(0));
    const mine = bag(own);
    let distance = Infinity;
    let best = 0;
    for (let n = 0; n < points.length && distance > 1; n++) {
      let more = 0;
      let less = 0;
      const theirs = counts[n];
      for (let k = 0; k < 16; k++) {
        const d = theirs[k] - mine[k];
        if (d > 0) more += d;
        else less -= d;
      }
      if (Math.max(more, less) >= distance) continue;
      const found = editDistance(own, points[n], distance);
      if (found < distance) [distance, best] = [found, n];
    }
    return { text: known[best], distance };
  });
}
