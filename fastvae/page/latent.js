// Latent vectors: lines, random directions, and their form in an address.

/** (1 - t) a + t b. */
export function lerp(a, b, t) {
  return a.map((value, n) => value + t * (b[n] - value));
}

/** a + scale · b. */
export function plus(a, b, scale = 1) {
  return a.map((value, n) => value + scale * b[n]);
}

/** Root mean square of a vector. */
export function size(vector) {
  return Math.sqrt(vector.reduce((sum, v) => sum + v * v, 0) / vector.length);
}

/** Seed -> a function that gives uniform numbers in (0, 1): mulberry32. */
export function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x = (x + Math.imul(x ^ (x >>> 7), x | 61)) ^ x;
    return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

/** Seed, count -> standard normal vectors [count][size]. */
export function normals(seed, count, length) {
  const next = uniform(seed);
  const normal = () => Math.sqrt(-2 * Math.log(next())) * Math.cos(2 * Math.PI * next());
  return Array.from({ length: count }, () => Float32Array.from({ length }, normal));
}

/** A vector -> base64 for an address. */
export function toAddress(vector) {
  const bytes = new Uint8Array(Float32Array.from(vector).buffer);
  const text = btoa(String.fromCharCode(...bytes));
  return text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** Base64 of an address -> the vector, or null if it is none of this length. */
export function fromAddress(text, length) {
  try {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (c) => c.charCodeAt(0));
    const vector = new Float32Array(bytes.buffer);
    return vector.length === length && vector.every((v) => Math.abs(v) < 1e4) ? vector : null;
  } catch {
    return null;
  }
}
