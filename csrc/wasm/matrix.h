// Weights: read from the file as int8 with a scale per row, expanded to float32, multiplied.
#pragma once

#include "simd.h"

void *reserve(int64_t size);

// What is left of the file: its floats and its bytes, which the tensors take in order.
typedef struct {
  const float *floats;
  const int8_t *bytes;
  int64_t floats_left, bytes_left;
  int failed;
} Source;

static const float *take_floats(Source *from, int64_t count) {
  if (from->failed || count > from->floats_left) {
    from->failed = 1;
    return 0;
  }
  const float *found = from->floats;
  from->floats += count, from->floats_left -= count;
  return found;
}

static const int8_t *take_bytes(Source *from, int64_t count) {
  if (from->failed || count > from->bytes_left) {
    from->failed = 1;
    return 0;
  }
  const int8_t *found = from->bytes;
  from->bytes += count, from->bytes_left -= count;
  return found;
}

// Rows in groups (the gates of an LSTM, say), each padded to PANEL with zeros; so are the parts of a row.
typedef struct {
  int groups, size, width;  // width: groups · padded(size)
  int depth;                // of a padded row
  float *bias;              // [width] or null
  float *panels;            // [width / PANEL, depth, PANEL]
} Matrix;

static float *padded_row(const float *values, int groups, int size) {
  int stride = padded(size);
  float *row = reserve((int64_t)groups * stride * sizeof(float));
  if (!row) return 0;
  for (int n = 0; n < groups * size; ++n) row[n / size * stride + n % size] = values[n];
  return row;
}

static float *take_row(Source *from, int groups, int size) {
  const float *values = take_floats(from, (int64_t)groups * size);
  float *row = values ? padded_row(values, groups, size) : 0;
  if (!row) from->failed = 1;
  return row;
}

// Parts of a row have `sizes`, and a scale per row each; then comes the bias, where there is one.
static Matrix take_matrix(Source *from, int groups, int size, int parts, const int *sizes, int has_bias) {
  Matrix m = {groups, size, groups * padded(size), 0, 0, 0};
  for (int p = 0; p < parts; ++p) m.depth += padded(sizes[p]);
  m.panels = reserve((int64_t)m.width * m.depth * sizeof(float));
  if (!m.panels) from->failed = 1;
  for (int p = 0, offset = 0; p < parts; offset += padded(sizes[p++])) {
    const float *scales = take_floats(from, (int64_t)groups * size);
    const int8_t *values = take_bytes(from, (int64_t)groups * size * sizes[p]);
    if (from->failed) return m;
    for (int n = 0; n < groups * size; ++n) {
      int row = n / size * padded(size) + n % size;
      float *lane = m.panels + ((int64_t)(row / PANEL) * m.depth + offset) * PANEL + row % PANEL;
      for (int k = 0; k < sizes[p]; ++k) lane[k * PANEL] = scales[n] * (float)values[(int64_t)n * sizes[p] + k];
    }
  }
  if (has_bias) m.bias = take_row(from, groups, size);
  return m;
}

// Rows of a table, which one-hot inputs select: [count, groups · padded(size)], a scale per column, bias added.
static float *take_table(Source *from, int count, int groups, int size, int has_bias) {
  int width = groups * padded(size);
  float *table = reserve((int64_t)count * width * sizeof(float));
  const float *scales = take_floats(from, (int64_t)groups * size);
  const float *bias = has_bias ? take_floats(from, (int64_t)groups * size) : 0;
  const int8_t *values = take_bytes(from, (int64_t)count * groups * size);
  if (!table) from->failed = 1;
  if (from->failed) return 0;
  for (int r = 0; r < count; ++r)
    for (int n = 0; n < groups * size; ++n) {
      float value = scales[n] * (float)values[(int64_t)r * groups * size + n];
      table[(int64_t)r * width + n / size * padded(size) + n % size] = bias ? value + bias[n] : value;
    }
  return table;
}

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// `count` rows of x, a constant, times one panel; the terms of every sum are added in order, whatever `count` is.
ALWAYS_INLINE void multiply_panel(const float *panel, int depth, const float *x, int64_t x_stride, const float *start,
                                  int64_t start_stride, float *y, int64_t y_stride, const int count) {
  f32x4 low[4], high[4];
  for (int b = 0; b < count; ++b) {
    low[b] = start ? load(start + b * start_stride) : splat(0);
    high[b] = start ? load(start + b * start_stride + LANES) : splat(0);
  }
  for (int k = 0; k < depth; ++k) {
    f32x4 w_low = load(panel + k * PANEL), w_high = load(panel + k * PANEL + LANES);
    for (int b = 0; b < count; ++b) {
      f32x4 value = splat(x[b * x_stride + k]);
      low[b] += w_low * value;
      high[b] += w_high * value;
    }
  }
  for (int b = 0; b < count; ++b) {
    store(y + b * y_stride, low[b]);
    store(y + b * y_stride + LANES, high[b]);
  }
}

// y = start + W x for `count` rows; start may be y, or one row for all (stride 0), or null for zeros.
static void multiply(const Matrix *w, const float *x, int64_t x_stride, int count, const float *start,
                     int64_t start_stride, float *y, int64_t y_stride) {
  for (int n = 0; n < w->width; n += PANEL) {
    const float *panel = w->panels + (int64_t)n * w->depth;
    int b = 0;
#define ROWS(rows)                                                                                                  \
  multiply_panel(panel, w->depth, x + b * x_stride, x_stride, start ? start + b * start_stride + n : 0, start_stride, \
                 y + b * y_stride + n, y_stride, rows)
    for (; b + 4 <= count; b += 4) ROWS(4);
    if (count - b == 3) ROWS(3);
    if (count - b == 2) ROWS(2);
    if (count - b == 1) ROWS(1);
#undef ROWS
  }
}

static void apply(const Matrix *w, const float *x, int64_t x_stride, int count, float *y, int64_t y_stride) {
  multiply(w, x, x_stride, count, w->bias, 0, y, y_stride);
}

static inline void relu(float *x, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES) store(x + n, larger(load(x + n), splat(0)));
}

static inline void clear(float *x, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES) store(x + n, splat(0));
}

static inline void copy(float *to, const float *from, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES) store(to + n, load(from + n));
}
