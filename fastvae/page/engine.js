// The engine: WebAssembly over the weights. Runs in the worker, or on the page where there is none.

/** base64 -> bytes. */
export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text.trim());
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let n = 0; n < bytes.length; n++) bytes[n] = binary.charCodeAt(n);
  return bytes;
}

/** base64 of a gzip file -> its bytes. */
export async function inflate(text) {
  try {
    const stream = new Blob([fromBase64(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error("this file is damaged: download it again");
  }
}

export class Engine {
  /** module, weights: base64 of gzip files; sizes: {length, latent, capacity}. */
  static async load(module, weights, sizes) {
    const [code, file] = await Promise.all([inflate(module), inflate(weights)]);
    const { instance } = await WebAssembly.instantiate(code, {});
    return new Engine(instance.exports, file, sizes);
  }

  constructor(wasm, file, { length, latent, capacity }) {
    Object.assign(this, { wasm, length, latent, capacity });
    const at = wasm.engine_alloc(file.length);
    if (!at) throw new Error("there is not enough memory");
    new Uint8Array(wasm.memory.buffer, at, file.length).set(file);
    const status = wasm.engine_load(at, file.length, capacity);
    if (status) throw new Error(status === 3 ? "there is not enough memory" : "this file is damaged: download it again");
    const words = (count) => wasm.engine_alloc(4 * count);
    this.tokens = words(capacity * length);
    this.z = words(capacity * latent);
    this.mean = words(capacity * latent);
    this.logvar = words(capacity * latent);
    this.seeds = words(2 * capacity);
  }

  floats(at, count) {
    return new Float32Array(this.wasm.memory.buffer, at, count);
  }

  /** tokens [N, L] -> mean, logvar [N, Z]. */
  encode(tokens) {
    const count = tokens.length / this.length;
    new Int32Array(this.wasm.memory.buffer, this.tokens, tokens.length).set(tokens);
    this.wasm.engine_encode(this.tokens, count, this.mean, this.logvar);
    const size = count * this.latent;
    return { mean: this.floats(this.mean, size).slice(), logvar: this.floats(this.logvar, size).slice() };
  }

  /** Start decoding of z [N, Z], N at most `capacity`. */
  begin(z, temperature, seeds) {
    this.count = z.length / this.latent;
    this.floats(this.z, z.length).set(z);
    if (seeds) new Uint32Array(this.wasm.memory.buffer, this.seeds, seeds.length).set(seeds);
    this.wasm.engine_begin(this.z, this.count, temperature, seeds ? this.seeds : 0, 0);
  }

  /** Decode one more token of each text -> how many have not ended. */
  step() {
    return this.wasm.engine_step(1);
  }

  /** The decoded tokens [N, L]. */
  decoded() {
    const at = this.wasm.engine_tokens();
    return new Int32Array(this.wasm.memory.buffer, at, this.count * this.length).slice();
  }
}
