// The layers: LayerNorm-LSTM cell, highway convolution gates, convolutional encoder, deconvolutions.
#pragma once

#include "matrix.h"

typedef struct {
  int size, stride;  // H, padded(H)
  float eps;
  float *gain, *bias;  // [4 · stride]
} Norm;

static Norm take_norm(Source *from, int size, float eps) {
  Norm norm = {size, padded(size), eps, 0, 0};
  norm.gain = take_row(from, 4, size);
  norm.bias = take_row(from, 4, size);
  return norm;
}

// a [4 · stride], c [stride] -> h, c: gates i, f, g, o of the normalized a. Pads of a are zero and stay out of the sums.
static void lstm_cell(const Norm *norm, float *a, float *c, float *h) {
  int H = norm->stride, pads = H - norm->size;
  f32x4 total = splat(0);
  for (int n = 0; n < 4 * H; n += LANES) total += load(a + n);
  float mean = sum(total) / (4 * norm->size);
  f32x4 squares = splat(0);
  for (int n = 0; n < 4 * H; n += LANES) {
    f32x4 d = load(a + n) - splat(mean);
    squares += d * d;
  }
  float variance = (sum(squares) - 4 * pads * (mean * mean)) / (4 * norm->size);
  f32x4 rstd = splat(1.0f / __builtin_sqrtf((variance > 0 ? variance : 0) + norm->eps));
  for (int n = 0; n < H; n += LANES) {
    f32x4 gates[4];
    for (int k = 0; k < 4; ++k) {
      f32x4 normalized = (load(a + k * H + n) - splat(mean)) * rstd;
      gates[k] = normalized * load(norm->gain + k * H + n) + load(norm->bias + k * H + n);
    }
    f32x4 cell = sigmoid(gates[1]) * load(c + n) + sigmoid(gates[0]) * tangent(gates[2]);
    store(c + n, cell);
    store(h + n, sigmoid(gates[3]) * tangent(cell));
  }
}

// a [3 · stride], x [stride] -> x = σ(i) tanh(g) [+ σ(f) x].
static void highway_gates(const float *a, const float *x, float *y, int stride, int carry) {
  for (int n = 0; n < stride; n += LANES) {
    f32x4 value = sigmoid(load(a + n)) * tangent(load(a + 2 * stride + n));
    if (carry) value += sigmoid(load(a + stride + n)) * load(x + n);
    store(y + n, value);
  }
}

enum { MOST_BLOCKS = 16 };

// Convolutions of kernel 3, stride 2, padding 1 and a ReLU each, batch norm folded in: tokens -> rows [2, padded(Z)].
typedef struct {
  int vocabulary, length, blocks;
  int channels[MOST_BLOCKS];
  float *table, *bias;  // of the first convolution: a row per tap and token
  Matrix convs[MOST_BLOCKS], linear;
  float *rows[2];  // inputs and outputs: a row of zeros, then a row per position
} ConvEncoder;

static void take_encoder(Source *from, ConvEncoder *e, int latent) {
  int stride = padded(e->channels[0]);
  e->table = take_table(from, 3 * e->vocabulary, 1, e->channels[0], 0);
  e->bias = take_row(from, 1, e->channels[0]);
  int64_t most = (e->length / 2 + 2) * (int64_t)stride;
  for (int n = 1; n < e->blocks; ++n) {
    int before = e->channels[n - 1], sizes[3] = {before, before, before};
    e->convs[n] = take_matrix(from, 1, e->channels[n], 3, sizes, 1);
    int64_t size = ((e->length >> (n + 1)) + 2) * (int64_t)padded(e->channels[n]);
    most = size > most ? size : most;
  }
  int taps = e->length >> e->blocks, last = e->channels[e->blocks - 1];
  int *sizes = reserve(taps * sizeof(int));
  if (!sizes) from->failed = 1;
  if (from->failed) return;
  for (int t = 0; t < taps; ++t) sizes[t] = last;
  e->linear = take_matrix(from, 2, latent, taps, sizes, 1);
  for (int k = 0; k < 2; ++k) e->rows[k] = reserve(most * sizeof(float));
  if (!e->rows[0] || !e->rows[1]) from->failed = 1;
}

static void conv_encode(const ConvEncoder *e, const int32_t *tokens, float *out) {
  int stride = padded(e->channels[0]), length = e->length / 2;
  float *x = e->rows[0], *y = e->rows[1];
  clear(x, stride);
  for (int t = 0; t < length; ++t) {
    float *row = x + (t + 1) * stride;
    copy(row, e->bias, stride);
    for (int tap = t ? 0 : 1; tap < 3; ++tap) {
      const float *add = e->table + ((int64_t)tap * e->vocabulary + tokens[2 * t - 1 + tap]) * stride;
      for (int n = 0; n < stride; n += LANES) store(row + n, load(row + n) + load(add + n));
    }
  }
  relu(x + stride, (int64_t)length * stride);
  for (int n = 1; n < e->blocks; ++n) {
    int next = padded(e->channels[n]);
    length /= 2;
    clear(y, next);
    apply(&e->convs[n], x, 2 * stride, length, y + next, next);
    relu(y + next, (int64_t)length * next);
    float *swap = x;
    x = y, y = swap, stride = next;
  }
  apply(&e->linear, x + stride, 0, 1, out, 0);
}

// z -> features: a linear layer, then transposed convolutions that double the length, a ReLU after each.
typedef struct {
  int blocks, first;  // first: positions after the linear layer
  int channels[MOST_BLOCKS + 1];
  Matrix linear, even[MOST_BLOCKS], odd[MOST_BLOCKS];
  float *rows[2];  // for each text first + 1 rows, twice as many after each block; those after the last are zero
} Deconvolution;

static void take_deconvolution(Source *from, Deconvolution *d, int latent, int capacity) {
  d->linear = take_matrix(from, d->first, d->channels[0], 1, &latent, 1);
  int64_t most = (int64_t)(d->first + 1) * padded(d->channels[0]);
  for (int n = 0; n < d->blocks; ++n) {
    int sizes[2] = {d->channels[n], d->channels[n]};
    d->even[n] = take_matrix(from, 1, d->channels[n + 1], 1, sizes, 1);
    d->odd[n] = take_matrix(from, 1, d->channels[n + 1], 2, sizes, 1);
    int64_t size = ((int64_t)(d->first + 1) << (n + 1)) * padded(d->channels[n + 1]);
    most = size > most ? size : most;
  }
  // The last row's window ends one row further.
  int widest = 0;
  for (int n = 0; n <= d->blocks; ++n) widest = d->channels[n] > widest ? d->channels[n] : widest;
  for (int k = 0; k < 2; ++k) d->rows[k] = reserve((most * capacity + padded(widest)) * sizeof(float));
  if (!d->rows[0] || !d->rows[1]) from->failed = 1;
}

// z [count, padded(Z)] -> the features, a row for each position, `*per_text` rows for each text.
static float *deconvolve(const Deconvolution *d, const float *z, int z_stride, int count, int *per_text) {
  float *x = d->rows[0], *y = d->rows[1];
  int rows = d->first + 1, length = d->first, stride = padded(d->channels[0]);
  apply(&d->linear, z, z_stride, count, x, (int64_t)rows * stride);
  for (int n = 0;; ++n) {
    for (int b = 0; b < count; ++b) {
      float *text = x + (int64_t)b * rows * stride;
      relu(text, (int64_t)length * stride);
      clear(text + (int64_t)length * stride, (int64_t)(rows - length) * stride);
    }
    if (n == d->blocks) break;
    clear(x + (int64_t)count * rows * stride, stride);
    int next = padded(d->channels[n + 1]);
    apply(&d->even[n], x, stride, count * rows, y, 2 * next);
    apply(&d->odd[n], x, stride, count * rows, y + next, 2 * next);
    float *swap = x;
    x = y, y = swap, stride = next, rows *= 2, length *= 2;
  }
  *per_text = rows;
  return x;
}
