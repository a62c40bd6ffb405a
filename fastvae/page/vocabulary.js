// Texts to token ids and back, as fastvae.text.vocabulary does it.

// What Python's \s finds; JavaScript's differs.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const TWEET_WORD = `(?<![^${SPACE}])(?:@|https?://)[^${SPACE}]*`;

export class Vocabulary {
  constructor({ vocabulary, length, pad, end, lines, normalization }) {
    Object.assign(this, vocabulary, { length, pad, end, normalization });
    this.room = length - (lines && end !== null ? 1 : 0);
    this.ends = lines && end !== null;
    this.tokens = this.kind === "character" ? Array.from(this.characters) : this.tokens || [];
    this.ids = new Map(this.tokens.map((token, id) => [token, id]));
    if (this.kind === "token") this.pattern = new RegExp(this.pattern, "gsu");
  }

  /** A text -> its tokens, those that are none left out and listed in `unknown`. */
  split(text, unknown) {
    if (this.kind === "character") {
      return this.composed(text).flatMap((c) => this.character(c, unknown));
    }
    const found = [];
    let at = 0;
    for (const match of text.matchAll(this.pattern)) {
      if (match.index > at) unknown.add(text.slice(at, match.index));
      at = match.index + match[0].length;
      if (this.ids.has(match[0])) found.push(match[0]);
      else unknown.add(match[0]);
    }
    if (at < text.length) unknown.add(text.slice(at));
    return found;
  }

  /** A text -> its characters, a letter and its marks composed where more of them are known so. */
  composed(text) {
    const missing = (list) => list.filter((c) => !this.ids.has(c)).length;
    const clusters = /(?:[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]+|\P{M})?\p{M}*/gsu; // of Hangul, syllables
    return (text.match(clusters) ?? []).flatMap((cluster) => {
      const [typed, whole] = [cluster, cluster.normalize("NFC")].map((form) => Array.from(form));
      return missing(whole) < missing(typed) ? whole : typed;
    });
  }

  /** A character -> itself, or the letter below its marks, or nothing. */
  character(c, unknown) {
    if (this.ids.has(c)) return [c];
    unknown.add(c);
    return Array.from(c.normalize("NFKD")).filter((part) => this.ids.has(part));
  }

  /** A text -> {ids [L], read, cut, unknown}: what of it the model reads. */
  encode(text) {
    let normal = text;
    if (this.normalization === "tweets") {
      const word = new RegExp(TWEET_WORD, "gu");
      normal = text.replace(word, (w) => (w[0] === "@" ? "@userid" : "url"));
    }
    const unknown = new Set();
    let ids;
    if (this.kind === "byte") {
      ids = Array.from(new TextEncoder().encode(normal.slice(0, 4 * this.room)), (b) => b + 3);
    } else {
      ids = this.split(normal, unknown).map((token) => this.ids.get(token));
    }
    const cut = ids.length > this.room;
    ids = ids.slice(0, this.room);
    const row = new Int32Array(this.length).fill(this.pad);
    row.set(ids);
    if (this.ends) row[ids.length] = this.end;
    return { ids: row, read: this.decode(row), cut, unknown: [...unknown] };
  }

  /** Ids -> text up to the end token, without pads. */
  decode(ids) {
    const end = this.end === null ? -1 : ids.indexOf(this.end);
    const content = Array.from(end < 0 ? ids : ids.subarray(0, end)).filter((id) => id !== this.pad);
    if (this.kind !== "byte") return content.map((id) => this.tokens[id] ?? "").join("");
    const bytes = content.flatMap((id) => (id < 3 ? [0xef, 0xbf, 0xbd] : [id - 3]));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }
}

/** A text -> what can be seen of it: control characters as their pictures, lone surrogates as U+FFFD. */
export function visible(text) {
  return Array.from(text, (c) => {
    const code = c.codePointAt(0);
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    if (code === 127) return "\u2421";
    if ((code > 127 && code < 160) || (code >= 0xd800 && code < 0xe000)) return "\ufffd";
    return c;
  }).join("");
}
