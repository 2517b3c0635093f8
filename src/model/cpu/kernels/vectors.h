// Vectorized loops between the matrix products.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.h"

// Compiles a function once for each x86-64 level; the loader picks the version for the processor, since the nodes of a
// cluster may differ. Older compilers know the names of instruction sets but not those of levels.
#if defined(__x86_64__) && defined(__GLIBC__)
#if (defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 12)
#define CPU_DISPATCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_DISPATCH __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CPU_DISPATCH
#endif

namespace {

// (rows, columns) -> (columns, rows)
CPU_DISPATCH void transpose(const float* in, float* out, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += LANES) {
    const int64_t lanes = std::min(LANES, rows - i);
    for (int64_t j = 0; j < columns; j++)
#pragma omp simd
      for (int64_t k = 0; k < lanes; k++) out[j * rows + i + k] = in[(i + k) * columns + j];
  }
}

// Transposes each tile: (num_rows, d) -> (d, KEY_TILE) for each KEY_TILE rows.
void transpose_tiles(const Floats& in, int64_t d, Floats& out) {
  out.resize(in.size());
  for (size_t i = 0; i < in.size(); i += KEY_TILE * d) transpose(in.data() + i, out.data() + i, KEY_TILE, d);
}

// e^x for x <= 0 to about one ulp (Cody and Waite): x = n ln 2 + r with ln 2 in two parts, e^r by its Taylor series.
inline __attribute__((always_inline)) float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Replaces scores, (rows, KEY_TILE) for each tile, by exp(score - row_max), and by 0 where a key is masked, in the
// first num_valid rows. row_max, row_sum: (num_valid,)
CPU_DISPATCH void softmax_numerators(float* scores, int64_t num_valid, int64_t rows, const std::vector<Tile>& tiles,
                                     const float* position, float* row_max, float* row_sum) {
  for (int64_t r = 0; r < num_valid; r++) {
    const auto num_attended = [&](const Tile& t) {
      const int64_t up_to_query = static_cast<int64_t>(position[r]) - t.first_position + 1;
      return t.first_position < 0 ? t.num_valid : std::clamp<int64_t>(up_to_query, 0, t.num_valid);
    };
    float max = -INFINITE, sum = 0;
    for (size_t i = 0; i < tiles.size(); i++) {
      const float* row = scores + (i * rows + r) * KEY_TILE;
      const int64_t n = num_attended(tiles[i]);
#pragma omp simd reduction(max : max)
      for (int64_t j = 0; j < n; j++) max = row[j] > max ? row[j] : max;
    }
    for (size_t i = 0; i < tiles.size(); i++) {
      float* row = scores + (i * rows + r) * KEY_TILE;
      const int64_t n = num_attended(tiles[i]);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; j++) sum += row[j] = fast_exp(row[j] - max);
      std::fill(row + n, row + tiles[i].num_padded, 0.0f);
    }
    row_max[r] = max;
    row_sum[r] = sum;
  }
}

// In place, (keys, rows): scores S -> probabilities P, and dP -> dS = P * (dP - delta).
CPU_DISPATCH void softmax_backward_tile(float* S, float* dP, int64_t rows, const Tile& tile, const float* row_max,
                                        const float* inverse_sum, const float* delta, const float* position) {
  for (int64_t j = 0; j < tile.num_padded; j++) {
    float* s = S + j * rows;
    float* g = dP + j * rows;
    const bool is_padding = j >= tile.num_valid, in_prefix = tile.first_position < 0;
    const float key = is_padding ? INFINITE : in_prefix ? -1.0f : static_cast<float>(tile.first_position + j);
#pragma omp simd
    for (int64_t r = 0; r < rows; r++) {
      const float p = key <= position[r] ? fast_exp(s[r] - row_max[r]) * inverse_sum[r] : 0.0f;
      s[r] = p;
      g[r] = p * (g[r] - delta[r]);
    }
  }
}

CPU_DISPATCH void scale(const float* in, float* out, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = in[i] * factor;
}

CPU_DISPATCH float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

}  // namespace
