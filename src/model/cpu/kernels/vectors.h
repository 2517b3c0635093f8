// What lies between the products, a vector of numbers at a time.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.h"

// One version for each kind of processor, chosen as the library is loaded: the nodes of a cluster need not be alike.
// Compilers learnt the names of levels late; the older ones know those of instructions.
#if defined(__x86_64__) && defined(__GLIBC__)
#if (defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 12)
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define EACH_PROCESSOR
#endif

namespace {

// (rows, columns) -> (columns, rows)
EACH_PROCESSOR void transpose(const float* from, float* to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += LANES) {
    const int64_t lanes = std::min(LANES, rows - i);
    for (int64_t j = 0; j < columns; j++)
#pragma omp simd
      for (int64_t k = 0; k < lanes; k++) to[j * rows + i + k] = from[(i + k) * columns + j];
  }
}

// tile by tile: (width, d) -> (d, KEYS) of each
void transpose_tiles(const Floats& from, int64_t d, Floats& to) {
  to.resize(from.size());
  for (size_t at = 0; at < from.size(); at += KEYS * d) transpose(from.data() + at, to.data() + at, KEYS, d);
}

// e^x for x of 0 or less, to about an ulp: 2^n, ln 2 in two parts, and the series of what is left.
inline __attribute__((always_inline)) float exponential(float x) {
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

// scores, (rows, KEYS) of each tile -> e^(score - largest of its row), 0 where a row does not see, for `real` of the
// rows; largest, sums: (real,)
EACH_PROCESSOR void exponentials(float* scores, int64_t real, int64_t rows, const std::vector<Tile>& tiles,
                                 const float* position, float* largest, float* sums) {
  for (int64_t r = 0; r < real; r++) {
    const auto seen = [&](const Tile& t) {
      return t.first < 0 ? t.real : std::clamp<int64_t>(static_cast<int64_t>(position[r]) - t.first + 1, 0, t.real);
    };
    float most = -INFINITE, sum = 0;
    for (size_t i = 0; i < tiles.size(); i++) {
      const float* row = scores + (i * rows + r) * KEYS;
      const int64_t n = seen(tiles[i]);
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < n; j++) most = row[j] > most ? row[j] : most;
    }
    for (size_t i = 0; i < tiles.size(); i++) {
      float* row = scores + (i * rows + r) * KEYS;
      const int64_t n = seen(tiles[i]);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; j++) sum += row[j] = exponential(row[j] - most);
      std::fill(row + n, row + tiles[i].keys, 0.0f);
    }
    largest[r] = most;
    sums[r] = sum;
  }
}

// scores, of_probabilities (keys, rows) -> probabilities and the gradient of the scores, in place
EACH_PROCESSOR void of_scores(float* scores, float* of_probabilities, int64_t rows, const Tile& tile,
                              const float* largest, const float* inverse, const float* inner,
                              const float* position) {
  for (int64_t j = 0; j < tile.keys; j++) {
    float* s = scores + j * rows;
    float* g = of_probabilities + j * rows;
    const float at = j >= tile.real ? INFINITE : tile.first < 0 ? -1.0f : static_cast<float>(tile.first + j);
#pragma omp simd
    for (int64_t r = 0; r < rows; r++) {
      const float p = at <= position[r] ? exponential(s[r] - largest[r]) * inverse[r] : 0.0f;
      s[r] = p;
      g[r] = p * (g[r] - inner[r]);
    }
  }
}

EACH_PROCESSOR void scale(const float* from, float* to, int64_t n, float by) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = from[i] * by;
}

EACH_PROCESSOR float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

}  // namespace
