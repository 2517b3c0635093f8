// Attention of packed, shared-prefix segments in float32 on a CPU, for src/cpu_attention.py. Its products are oneDNN's
// (brgemm; where that knows no such processor, torch's gemm), compiled as a thread first asks for them; what is between
// them stays in the cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

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

using at::Tensor;
using Floats = std::vector<float>;

// Sizes are rounded up to what oneDNN multiplies at once: few compiled products, whatever the lengths.
constexpr int64_t LANES = 16;
// Query vectors and keys that meet at once, measured: more leave the cache, fewer cost more calls.
constexpr int64_t ROWS = 96, KEYS = 128;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Segment {
  int64_t start, end, prefix_start, prefix_end;
};

// A segment and those whose prefix lies in it, which no other positions see: what one task computes.
struct Family {
  std::vector<Segment> segments;
  std::vector<int64_t> offsets;  // where the keys of each are laid out, each from a new tile on
  int64_t width = 0;
};

// Up to KEYS keys that follow one another.
struct Tile {
  int64_t offset;  // in what is laid out for the family
  int64_t real;    // how many there are
  int64_t keys;    // that, rounded up
  int64_t first;   // position of the first; -1: of a prefix, all of them seen by all queries
};

// (heads, positions, d) with any strides but that of d.
struct Heads {
  explicit Heads(const Tensor& x) : data(x.data_ptr<float>()), head(x.stride(0)), position(x.stride(1)) {
    TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "each vector in one piece");
  }
  float* at(int64_t h, int64_t n) const { return data + h * head + n * position; }
  float* data;
  int64_t head, position;
};

struct Sizes {
  Sizes(const Tensor& query, const Tensor& key)
      : heads(query.size(0)), n(query.size(1)), d(query.size(2)), kv_heads(key.size(0)), group(heads / kv_heads) {
    TORCH_CHECK(group * kv_heads == heads && key.size(1) == n && key.size(2) == d, "queries and keys do not fit");
  }
  int64_t heads, n, d, kv_heads, group;
};

// Raises unless the segments cover the n positions one after the other.
std::vector<Family> families_of(const Tensor& segments, int64_t n) {
  std::vector<Family> families;
  int64_t covered = 0;
  const auto table = segments.accessor<int64_t, 2>();
  for (int64_t i = 0; i < table.size(0); i++) {
    const Segment s{table[i][0], table[i][1], table[i][2], table[i][3]};
    const bool prefixed = s.prefix_end > s.prefix_start;
    TORCH_CHECK(s.start == covered && s.end >= s.start, "segments cover the positions one after the other");
    covered = s.end;
    if (!prefixed) families.emplace_back();
    TORCH_CHECK(!families.empty(), "the first segment has a prefix");
    Family& family = families.back();
    TORCH_CHECK(!prefixed || (s.prefix_start == family.segments[0].start && s.prefix_end <= family.segments[0].end),
                "a prefix is the beginning of the last segment that has none");
    family.segments.push_back(s);
    family.offsets.push_back(family.width);
    family.width += rounded_up(s.end - s.start, KEYS);
  }
  TORCH_CHECK(covered == n, "segments cover all positions");
  return families;
}

void add_tiles(std::vector<Tile>& tiles, int64_t offset, int64_t count, int64_t first) {
  for (int64_t a = 0; a < count; a += KEYS) {
    const int64_t real = std::min(KEYS, count - a);
    tiles.push_back({offset + a, real, rounded_up(real, LANES), first < 0 ? first : first + a});
  }
}

// action(from, to, tiles) for each block of a family's queries: its positions and the keys they see.
template <typename Action>
void for_blocks(const Family& family, int64_t group, const Action& action) {
  const int64_t most = std::max(LANES, ROWS / group / LANES * LANES);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < family.segments.size(); i++) {
    const Segment& s = family.segments[i];
    for (int64_t from = s.start; from < s.end; from += most) {
      const int64_t to = std::min(from + most, s.end);
      tiles.clear();
      add_tiles(tiles, 0, s.prefix_end - s.prefix_start, -1);
      add_tiles(tiles, family.offsets[i], to - s.start, s.start);
      action(from, to, tiles);
    }
  }
}

// (position in the batch, row in what is laid out) of each of a family's positions.
template <typename Action>
void for_positions(const Family& family, const Action& action) {
  for (size_t i = 0; i < family.segments.size(); i++) {
    const Segment& s = family.segments[i];
    for (int64_t n = s.start; n < s.end; n++) action(n, family.offsets[i] + n - s.start);
  }
}

// -> (width, d), zero where there is no position
void gather(const Family& family, const Heads& x, int64_t h, int64_t d, Floats& to) {
  to.assign(family.width * d, 0.0f);
  for_positions(family, [&](int64_t n, int64_t row) { std::copy_n(x.at(h, n), d, to.data() + row * d); });
}

void scatter(const Family& family, const Floats& from, int64_t h, int64_t d, const Heads& to) {
  for_positions(family, [&](int64_t n, int64_t row) { std::copy_n(from.data() + row * d, d, to.at(h, n)); });
}

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

// c (m, n) = a (m, k) b (k, n), or added to it
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
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
                              const float* normaliser, const float* inner, const float* position) {
  for (int64_t j = 0; j < tile.keys; j++) {
    float* s = scores + j * rows;
    float* g = of_probabilities + j * rows;
    const float at = j >= tile.real ? INFINITE : tile.first < 0 ? -1.0f : static_cast<float>(tile.first + j);
#pragma omp simd
    for (int64_t r = 0; r < rows; r++) {
      const float p = at <= position[r] ? exponential(s[r] - normaliser[r]) : 0.0f;
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

// work(task) for each task, the next one to the thread that is free. No two write to one place, and each is summed in
// its own order: which thread takes which changes nothing.
template <typename Work>
void for_tasks(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    Work own(work);  // what it computes in is the thread's
    for (int64_t task; (task = next++) < count;) own(task);
  });
}

Tensor like_heads(const Tensor& x) {  // in memory (positions, heads, d), as what comes next wants it
  return at::empty({x.size(1), x.size(0), x.size(2)}, x.options()).transpose(0, 1);
}

struct Forward : Sizes {
  Forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<Family>& families,
          float scaling, const Tensor& output, const Tensor& normaliser)
      : Sizes(query, key), q(query), k(key), v(value), out(output), normalisers(normaliser.data_ptr<float>()),
        families(families), scaling(scaling) {}

  void operator()(int64_t task) {
    const Family& family = families[task / kv_heads];
    const int64_t h = task % kv_heads;
    gather(family, k, h, d, ks);
    gather(family, v, h, d, vs);
    transpose_tiles(ks, d, kt);
    for_blocks(family, group, [&](int64_t from, int64_t to, const std::vector<Tile>& tiles) {
      const int64_t m = to - from, real = m * group, rows = rounded_up(real, LANES);
      qs.assign(rows * d, 0.0f);
      os.resize(rows * d);
      scores.resize(tiles.size() * rows * KEYS);
      for (auto* x : {&position, &largest, &sums}) x->resize(rows);
      for (int64_t r = 0; r < real; r++) {
        scale(q.at(h * group + r / m, from + r % m), qs.data() + r * d, d, scaling);
        position[r] = from + r % m;
      }
      for (size_t i = 0; i < tiles.size(); i++)
        product(rows, tiles[i].keys, d, qs.data(), d, kt.data() + tiles[i].offset * d, KEYS,
                scores.data() + i * rows * KEYS, KEYS, false);
      exponentials(scores.data(), real, rows, tiles, position.data(), largest.data(), sums.data());
      for (size_t i = 0; i < tiles.size(); i++)
        product(rows, d, tiles[i].keys, scores.data() + i * rows * KEYS, KEYS, vs.data() + tiles[i].offset * d, d,
                os.data(), d, i > 0);
      for (int64_t r = 0; r < real; r++) {
        const int64_t head = h * group + r / m, at = from + r % m;
        scale(os.data() + r * d, out.at(head, at), d, 1 / sums[r]);
        normalisers[head * n + at] = largest[r] + std::log(sums[r]);
      }
    });
  }

  Heads q, k, v, out;
  float* normalisers;
  const std::vector<Family>& families;
  float scaling;
  Floats ks, kt, vs, qs, os, scores, position, largest, sums;  // t: turned, (d, keys) instead of (keys, d)
};

struct Backward : Sizes {
  Backward(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<Family>& families,
           float scaling, const Tensor& output, const Tensor& normaliser, const Tensor& gradient,
           const Tensor& of_query, const Tensor& of_key, const Tensor& of_value)
      : Sizes(query, key), q(query), k(key), v(value), out(output), of_out(gradient), of_q(of_query), of_k(of_key),
        of_v(of_value), normalisers(normaliser.data_ptr<float>()), families(families), scaling(scaling) {}

  void operator()(int64_t task) {
    const Family& family = families[task / kv_heads];
    const int64_t h = task % kv_heads;
    gather(family, k, h, d, ks);
    gather(family, v, h, d, vs);
    transpose_tiles(ks, d, kt);
    of_ks.assign(ks.size(), 0.0f);
    of_vs.assign(vs.size(), 0.0f);
    for_blocks(family, group, [&](int64_t from, int64_t to, const std::vector<Tile>& tiles) {
      const int64_t m = to - from, real = m * group, rows = rounded_up(real, LANES);
      for (auto* x : {&qs, &os}) x->assign(rows * d, 0.0f);
      for (auto* x : {&qt, &ot, &of_qt, &of_qs}) x->resize(rows * d);
      for (auto* x : {&scores, &of_p}) x->resize(rows * KEYS);
      for (auto* x : {&normaliser, &inner}) x->assign(rows, 0.0f);
      position.assign(rows, -INFINITE);
      for (int64_t r = 0; r < real; r++) {
        const int64_t head = h * group + r / m, at = from + r % m;
        scale(q.at(head, at), qs.data() + r * d, d, scaling);
        std::copy_n(of_out.at(head, at), d, os.data() + r * d);
        // Of a softmax: dS = P * (dP - sum of P * dP), and that sum is the one of output * gradient.
        inner[r] = dot(out.at(head, at), of_out.at(head, at), d);
        normaliser[r] = normalisers[head * n + at];
        position[r] = at;
      }
      transpose(qs.data(), qt.data(), rows, d);
      transpose(os.data(), ot.data(), rows, d);
      for (size_t i = 0; i < tiles.size(); i++) {
        const Tile& t = tiles[i];
        const int64_t at = t.offset * d;
        product(t.keys, rows, d, ks.data() + at, d, qt.data(), rows, scores.data(), rows, false);
        product(t.keys, rows, d, vs.data() + at, d, ot.data(), rows, of_p.data(), rows, false);
        of_scores(scores.data(), of_p.data(), rows, t, normaliser.data(), inner.data(), position.data());
        product(t.keys, d, rows, scores.data(), rows, os.data(), d, of_vs.data() + at, d, true);
        product(t.keys, d, rows, of_p.data(), rows, qs.data(), d, of_ks.data() + at, d, true);
        product(d, rows, t.keys, kt.data() + at, KEYS, of_p.data(), rows, of_qt.data(), rows, i > 0);
      }
      transpose(of_qt.data(), of_qs.data(), d, rows);
      for (int64_t r = 0; r < real; r++)
        scale(of_qs.data() + r * d, of_q.at(h * group + r / m, from + r % m), d, scaling);
    });
    scatter(family, of_ks, h, d, of_k);
    scatter(family, of_vs, h, d, of_v);
  }

  Heads q, k, v, out, of_out, of_q, of_k, of_v;
  const float* normalisers;
  const std::vector<Family>& families;
  float scaling;
  // Scores are (keys, rows) here: then no product asks for them turned.
  Floats ks, kt, vs, of_ks, of_vs, qs, qt, os, ot, of_qs, of_qt, scores, of_p, normaliser, inner, position;
};

// query (heads, n, d), key and value (kv_heads, n, d), segments (s, 4) int64 -> (heads, n, d) and (heads, n): the
// logarithm of what each query's exponentials sum to.
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& segments,
                                   double scaling) {
  TORCH_CHECK(value.sizes() == key.sizes(), "keys and values do not fit");
  const auto families = families_of(segments, query.size(1));
  Tensor output = like_heads(query), normaliser = at::empty({query.size(0), query.size(1)}, query.options());
  for_tasks(families.size() * key.size(0),
            Forward(query, key, value, families, static_cast<float>(scaling), output, normaliser));
  return {output, normaliser};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& segments, double scaling, const Tensor& output,
                                            const Tensor& normaliser, const Tensor& gradient) {
  const auto families = families_of(segments, query.size(1));
  Tensor of_query = like_heads(query), of_key = like_heads(key), of_value = like_heads(value);
  for_tasks(families.size() * key.size(0),
            Backward(query, key, value, families, static_cast<float>(scaling), output, normaliser, gradient, of_query,
                     of_key, of_value));
  return {of_query, of_key, of_value};
}

}  // namespace

TORCH_LIBRARY(alignment_sweep, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling, Tensor output, "
      "Tensor normaliser, Tensor gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignment_sweep, CPU, library) {
  library.impl("attention", forward);
  library.impl("attention_backward", backward);
}
