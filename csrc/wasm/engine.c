// Inference of a text VAE in one WebAssembly module: tokens -> posterior, latent vectors -> tokens.
//
// What each layer computes is defined in fastvae/ops and fastvae/models; fastvae/page/weights.py writes the file that
// engine_load reads. Texts of a batch share each pass over the weights, and no text depends on the others: sums are
// taken in the same order in every batch.

#include "layers.h"

#ifdef __wasm__
extern unsigned char __heap_base;
static uintptr_t heap_end;

void *reserve(int64_t size) {
  if (!heap_end) heap_end = (uintptr_t)&__heap_base;
  uint64_t start = ((uint64_t)heap_end + 63) / 64 * 64, end = start + size, have = __builtin_wasm_memory_size(0);
  if (size < 0 || end > 0xFFFF0000ull) return 0;
  uint64_t pages = (end + 65535) / 65536;
  if (pages > have && __builtin_wasm_memory_grow(0, pages - have) == ~0ul) return 0;
  heap_end = end;
  return (void *)(uintptr_t)start;  // memory of WebAssembly starts as zeros, and none is ever freed
}
#define EXPORT(name) __attribute__((export_name(#name)))
#else
#include <stdlib.h>
#define EXPORT(name)
void *reserve(int64_t size) {
  void *start = size < 0 ? 0 : aligned_alloc(64, (size + 63) / 64 * 64 + 64);
  if (start) __builtin_memset(start, 0, size);
  return start;
}
#endif

enum { MAGIC = 0x45415646, VERSION = 1 };  // "FVAE"
enum { HYBRID, LSTM_VAE };
enum { NO_DECODER, LSTM, BYTENET };
enum { OK, BAD_HEADER, BAD_SIZE, NO_MEMORY };

typedef struct {
  int32_t magic, version, kind, decoder, vocabulary, length, latent, hidden, features, layers, carry, pad, end, mask_pad;
  float eps, encoder_eps;
  int32_t blocks, channels[MOST_BLOCKS];
  int32_t float_count, byte_count;
} Header;

EXPORT(engine_alloc) void *engine_alloc(int size) { return reserve(size); }

static struct {
  Header h;
  int capacity;
  ConvEncoder conv_encoder;
  float *encoder_table;  // of the LSTM VAE, as the next four
  Matrix encoder_recurrence, posterior, initial;
  Norm encoder_norm;
  float *encoder_state;
  Deconvolution deconvolution;
  float *token_table;  // what the decoder adds for each previous token, and last for the start of a text
  Matrix input, layers[1024], classifier;
  Norm norm;
  float *posterior_row, *z, *state, *cells, *sums, *logits, *inputs;
} model;

static struct {
  const float *features;
  int rows_per_text, count, active, position;
  float temperature;
  const int32_t *forced;
  int32_t *tokens, *text, *previous;  // text: which one a row of the state belongs to
  uint32_t *seeds;
} run;

static int state_size(void) {  // floats that a text keeps: [features, h], or each layer's last two inputs
  int H = padded(model.h.hidden);
  return model.h.decoder == LSTM ? padded(model.h.features) + H : 2 * H * model.h.layers;
}

static void take_decoder(Source *from) {
  Header *h = &model.h;
  int sizes[2] = {h->features, h->hidden}, pair[2] = {h->hidden, h->hidden};
  if (h->decoder == LSTM) {
    model.token_table = take_table(from, h->vocabulary + 1, 4, h->hidden, 1);
    model.input = take_matrix(from, 4, h->hidden, h->features ? 2 : 1, h->features ? sizes : sizes + 1, 0);
    model.norm = take_norm(from, h->hidden, h->eps);
  } else if (h->decoder == BYTENET) {
    model.token_table = take_table(from, h->vocabulary + 1, 2, h->hidden, 1);
    model.input = take_matrix(from, 2, h->hidden, 1, sizes, 0);
    for (int n = 0; n < h->layers && !from->failed; ++n) model.layers[n] = take_matrix(from, 3, h->hidden, 2, pair, 1);
  }
  int read = h->decoder == NO_DECODER ? h->features : h->hidden;
  model.classifier = take_matrix(from, 1, h->vocabulary, 1, &read, 1);
}

static void take_lstm_encoder(Source *from) {
  Header *h = &model.h;
  model.encoder_table = take_table(from, h->vocabulary, 4, h->hidden, 1);
  model.encoder_recurrence = take_matrix(from, 4, h->hidden, 1, &h->hidden, 0);
  model.encoder_norm = take_norm(from, h->hidden, h->encoder_eps);
  model.posterior = take_matrix(from, 2, h->latent, 1, &h->hidden, 1);
  model.initial = take_matrix(from, 2, h->hidden, 1, &h->latent, 1);
}

static float *floats(Source *from, int64_t count) {
  float *found = reserve(count * sizeof(float));
  if (!found) from->failed = 1;
  return found;
}

// A file and the most texts of a batch -> 0, or what is wrong with it. Called once.
EXPORT(engine_load) int engine_load(const void *file, int size, int capacity) {
  const Header *h = file;
  if (size < (int64_t)sizeof(Header) || h->magic != MAGIC || h->version != VERSION) return BAD_HEADER;
  if (h->blocks < 0 || h->blocks > MOST_BLOCKS || h->layers > 1024 || capacity < 1) return BAD_HEADER;
  if (size != (int64_t)sizeof(Header) + 4ll * h->float_count + h->byte_count) return BAD_SIZE;
  model.h = *h, model.capacity = capacity;
  const float *start = (const float *)(h + 1);
  Source from = {start, (const int8_t *)(start + h->float_count), h->float_count, h->byte_count, 0};
  int Z = padded(h->latent), H = padded(h->hidden), D = padded(h->features), V = padded(h->vocabulary);
  if (h->kind == HYBRID) {
    ConvEncoder *e = &model.conv_encoder;
    Deconvolution *d = &model.deconvolution;
    e->vocabulary = h->vocabulary, e->length = h->length, e->blocks = d->blocks = h->blocks;
    d->first = h->length >> h->blocks, d->channels[h->blocks] = h->features;
    for (int n = 0; n < h->blocks; ++n) e->channels[n] = d->channels[h->blocks - 1 - n] = h->channels[n];
    take_encoder(&from, e, h->latent);
    take_deconvolution(&from, d, h->latent, capacity);
  } else {
    take_lstm_encoder(&from);
    model.encoder_state = floats(&from, 6ll * H);
  }
  take_decoder(&from);
  if (!from.failed && (from.floats_left || from.bytes_left)) return BAD_SIZE;
  model.posterior_row = floats(&from, 2 * Z);
  model.z = floats(&from, (int64_t)capacity * Z);
  model.state = floats(&from, (int64_t)capacity * state_size());
  model.cells = floats(&from, (int64_t)capacity * H);
  model.sums = floats(&from, (int64_t)capacity * 4 * H);
  model.inputs = floats(&from, (int64_t)capacity * (H > D ? H : D));
  model.logits = floats(&from, (int64_t)capacity * V);
  run.tokens = reserve((int64_t)capacity * h->length * 4);
  run.text = reserve(capacity * 4ll), run.previous = reserve(capacity * 4ll);
  run.seeds = reserve(capacity * 8ll);
  if (from.failed || !run.tokens || !run.text || !run.previous || !run.seeds) return NO_MEMORY;
  return OK;
}

static void lstm_encode(const int32_t *tokens, float *out) {
  int H = padded(model.h.hidden), length = model.h.length;
  float *a = model.encoder_state, *h = a + 4 * H, *c = h + H;
  while (model.h.mask_pad && length && tokens[length - 1] == model.h.pad) --length;
  clear(h, 2 * H);
  for (int t = 0; t < length; ++t) {
    const float *row = model.encoder_table + (int64_t)tokens[t] * 4 * H;
    multiply(&model.encoder_recurrence, h, 0, 1, row, 0, a, 0);
    lstm_cell(&model.encoder_norm, a, c, h);
  }
  apply(&model.posterior, h, 0, 1, out, 0);
}

// tokens [count, L] -> posterior mean, log-variance [count, Z].
EXPORT(engine_encode) void engine_encode(const int32_t *tokens, int count, float *mean, float *logvar) {
  int Z = model.h.latent;
  for (int b = 0; b < count; ++b) {
    (model.h.kind == HYBRID ? conv_encode(&model.conv_encoder, tokens + b * model.h.length, model.posterior_row)
                            : lstm_encode(tokens + b * model.h.length, model.posterior_row));
    for (int n = 0; n < Z; ++n) {
      mean[b * Z + n] = model.posterior_row[n];
      logvar[b * Z + n] = model.posterior_row[padded(Z) + n];
    }
  }
}

// Starts decoding of z [count, Z], at most `capacity`. seeds [count, 2]: low and high word, read at a temperature above
// 0. forced [count, L] or null: what is fed back instead of the decoded tokens.
EXPORT(engine_begin) void engine_begin(const float *z, int count, float temperature, const uint32_t *seeds,
                                       const int32_t *forced) {
  Header *h = &model.h;
  int Z = h->latent, H = padded(h->hidden);
  for (int b = 0; b < count; ++b)
    for (int n = 0; n < Z; ++n) model.z[b * padded(Z) + n] = z[b * Z + n];
  clear(model.state, (int64_t)count * state_size());
  clear(model.cells, (int64_t)count * H);
  if (h->kind == HYBRID) {
    run.features = deconvolve(&model.deconvolution, model.z, padded(Z), count, &run.rows_per_text);
  } else {
    apply(&model.initial, model.z, padded(Z), count, model.sums, 4 * H);
    for (int b = 0; b < count; ++b)
      for (int n = 0; n < H; n += LANES) {
        store(model.state + b * H + n, tangent(load(model.sums + b * 4 * H + n)));
        store(model.cells + b * H + n, tangent(load(model.sums + b * 4 * H + H + n)));
      }
  }
  run.count = run.active = count, run.position = 0, run.temperature = temperature, run.forced = forced;
  for (int b = 0; b < count; ++b) run.text[b] = b, run.previous[b] = h->vocabulary;
  for (int n = 0; n < count * h->length; ++n) run.tokens[n] = h->pad < 0 ? 0 : h->pad;
  for (int n = 0; seeds && n < 2 * count; ++n) run.seeds[n] = seeds[n];
}

// The four words of Philox4x32-10 at a counter: fastvae/ops/gumbel_noise.py.
static void philox(uint32_t counter, const uint32_t *seed, uint32_t *words) {
  uint32_t c[4] = {counter, 0, 0, 0}, key[2] = {seed[0], seed[1]};
  for (int round = 0; round < 10; ++round) {
    uint64_t first = 0xD2511F53ull * c[0], second = 0xCD9E8D57ull * c[2];
    uint32_t next[4] = {(second >> 32) ^ c[1] ^ key[0], second, (first >> 32) ^ c[3] ^ key[1], first};
    for (int n = 0; n < 4; ++n) c[n] = next[n];
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  for (int n = 0; n < 4; ++n) words[n] = c[n];
}

static void add_noise(float *logits, const uint32_t *seed, int position) {
  uint32_t words[4];
  int V = model.h.vocabulary;
  for (int v = 0; v < V; ++v) {
    uint32_t index = (uint32_t)position * V + v;
    if (!v || index % 4 == 0) philox(index / 4, seed, words);
    double left = 1 - (words[index % 4] + 0.5) / 4294967296.0;
    logits[v] += (float)(-(double)run.temperature * logarithm(-logarithm(left)));
  }
}

static const float *features_of(int row) {
  return run.features + ((int64_t)run.text[row] * run.rows_per_text + run.position) * padded(model.h.features);
}

static void lstm_logits(void) {
  int H = padded(model.h.hidden), D = padded(model.h.features), stride = D + H;
  for (int b = 0; b < run.active; ++b) {
    copy(model.sums + b * 4 * H, model.token_table + (int64_t)run.previous[b] * 4 * H, 4 * H);
    if (D) copy(model.state + b * stride, features_of(b), D);
  }
  multiply(&model.input, model.state, stride, run.active, model.sums, 4 * H, model.sums, 4 * H);
  for (int b = 0; b < run.active; ++b)
    lstm_cell(&model.norm, model.sums + b * 4 * H, model.cells + b * H, model.state + b * stride + D);
  apply(&model.classifier, model.state + D, stride, run.active, model.logits, padded(model.h.vocabulary));
}

static void bytenet_logits(void) {
  int C = padded(model.h.hidden), D = padded(model.h.features), stride = state_size();
  for (int b = 0; b < run.active; ++b) {
    copy(model.sums + b * 4 * C, model.token_table + (int64_t)run.previous[b] * 2 * C, 2 * C);
    copy(model.inputs + b * D, features_of(b), D);
  }
  multiply(&model.input, model.inputs, D, run.active, model.sums, 4 * C, model.sums, 4 * C);
  for (int b = 0; b < run.active; ++b)
    for (int n = 0; n < C; n += LANES) {
      float *p = model.sums + b * 4 * C + n;
      store(model.state + b * stride + C + n, tangent(load(p)) * sigmoid(load(p + C)));
    }
  for (int layer = 0; layer < model.h.layers; ++layer) {
    float *pair = model.state + layer * 2 * C;  // the layer's input before and now
    apply(&model.layers[layer], pair, stride, run.active, model.sums, 4 * C);
    int last = layer + 1 == model.h.layers;
    for (int b = 0; b < run.active; ++b) {
      float *now = pair + b * stride + C, *next = last ? model.inputs + b * C : now + 2 * C;
      highway_gates(model.sums + b * 4 * C, now, next, C, model.h.carry);
      copy(now - C, now, C);
    }
  }
  apply(&model.classifier, model.inputs, C, run.active, model.logits, padded(model.h.vocabulary));
}

static void head_logits(void) {
  int D = padded(model.h.features);
  for (int b = 0; b < run.active; ++b) copy(model.inputs + b * D, features_of(b), D);
  apply(&model.classifier, model.inputs, D, run.active, model.logits, padded(model.h.vocabulary));
}

static void move_row(int to, int from) {
  int S = state_size(), H = padded(model.h.hidden);
  copy(model.state + (int64_t)to * S, model.state + (int64_t)from * S, S);
  copy(model.cells + (int64_t)to * H, model.cells + (int64_t)from * H, H);
  run.text[to] = run.text[from], run.previous[to] = run.previous[from];
}

static void pick(int b) {
  float *logits = model.logits + (int64_t)b * padded(model.h.vocabulary);
  int text = run.text[b], at = text * model.h.length + run.position, best = 0;
  if (run.temperature > 0) add_noise(logits, run.seeds + 2 * text, run.position);
  for (int v = 1; v < model.h.vocabulary; ++v)
    if (logits[v] > logits[best]) best = v;
  run.tokens[at] = best;
  run.previous[b] = run.forced ? run.forced[at] : best;
}

// Decodes up to `steps` tokens of each text -> how many texts have not ended.
EXPORT(engine_step) int engine_step(int steps) {
  for (; steps > 0 && run.active; --steps) {
    (model.h.decoder == LSTM ? lstm_logits : model.h.decoder == BYTENET ? bytenet_logits : head_logits)();
    for (int b = 0; b < run.active; ++b) pick(b);
    if (++run.position == model.h.length) run.active = 0;
    for (int b = run.active - 1; b >= 0 && !run.forced; --b)  // those that have ended make room
      if (run.previous[b] == model.h.end && --run.active != b) move_row(b, run.active);
  }
  return run.active;
}

// The decoded tokens, [count, L]: pads after the end.
EXPORT(engine_tokens) const int32_t *engine_tokens(void) { return run.tokens; }
