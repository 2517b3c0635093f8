// Attention of packed, shared-prefix segments in float32 on a CPU, for src/cpu_attention.py. Its products are oneDNN's
// (brgemm; where that knows no such processor, torch's gemm), compiled as a thread first asks for them; what is between
// them stays in the cache.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "layout.h"
#include "vectors.h"

namespace {

// c (m, n) = a (m, k) b (k, n), or added to it
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
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
          float scaling, const Tensor& output, const Tensor& softmax)
      : Sizes(query, key), q(query), k(key), v(value), out(output), largests(softmax.data_ptr<float>()),
        inverses(largests + softmax[0].numel()), families(families), scaling(scaling) {}

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
        largests[head * n + at] = largest[r];
        inverses[head * n + at] = 1 / sums[r];
        scale(os.data() + r * d, out.at(head, at), d, 1 / sums[r]);
      }
    });
  }

  Heads q, k, v, out;
  float *largests, *inverses;
  const std::vector<Family>& families;
  float scaling;
  Floats ks, kt, vs, qs, os, scores, position, largest, sums;  // t: turned, (d, keys) instead of (keys, d)
};

struct Backward : Sizes {
  Backward(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<Family>& families,
           float scaling, const Tensor& output, const Tensor& softmax, const Tensor& gradient,
           const Tensor& of_query, const Tensor& of_key, const Tensor& of_value)
      : Sizes(query, key), q(query), k(key), v(value), out(output), of_out(gradient), of_q(of_query), of_k(of_key),
        of_v(of_value), largests(softmax.data_ptr<float>()), inverses(largests + softmax[0].numel()),
        families(families), scaling(scaling) {}

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
      for (auto* x : {&largest, &inverse, &inner}) x->assign(rows, 0.0f);
      position.assign(rows, -INFINITE);
      for (int64_t r = 0; r < real; r++) {
        const int64_t head = h * group + r / m, at = from + r % m;
        scale(q.at(head, at), qs.data() + r * d, d, scaling);
        std::copy_n(of_out.at(head, at), d, os.data() + r * d);
        // Of a softmax: dS = P * (dP - sum of P * dP), and that sum is the one of output * gradient.
        inner[r] = dot(out.at(head, at), of_out.at(head, at), d);
        largest[r] = largests[head * n + at];
        inverse[r] = inverses[head * n + at];
        position[r] = at;
      }
      transpose(qs.data(), qt.data(), rows, d);
      transpose(os.data(), ot.data(), rows, d);
      for (size_t i = 0; i < tiles.size(); i++) {
        const Tile& t = tiles[i];
        const int64_t at = t.offset * d;
        product(t.keys, rows, d, ks.data() + at, d, qt.data(), rows, scores.data(), rows, false);
        product(t.keys, rows, d, vs.data() + at, d, ot.data(), rows, of_p.data(), rows, false);
        of_scores(scores.data(), of_p.data(), rows, t, largest.data(), inverse.data(), inner.data(),
                  position.data());
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
  const float *largests, *inverses;
  const std::vector<Family>& families;
  float scaling;
  // Scores are (keys, rows) here: then no product asks for them turned.
  Floats ks, kt, vs, of_ks, of_vs, qs, qt, os, ot, of_qs, of_qt, scores, of_p, largest, inverse, inner, position;
};

// query (heads, n, d), key and value (kv_heads, n, d), segments (s, 4) int64 -> (heads, n, d) and (2, heads, n): each
// query's largest score, and one over what its exponentials sum to. The logarithm of both in one would be rounded
// where it is large, and every probability of the backward pass with it.
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& segments,
                                   double scaling) {
  TORCH_CHECK(value.sizes() == key.sizes(), "keys and values do not fit");
  const auto families = families_of(segments, query.size(1));
  Tensor output = like_heads(query), softmax = at::empty({2, query.size(0), query.size(1)}, query.options());
  for_tasks(families.size() * key.size(0),
            Forward(query, key, value, families, static_cast<float>(scaling), output, softmax));
  return {output, softmax};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& segments, double scaling, const Tensor& output,
                                            const Tensor& softmax, const Tensor& gradient) {
  const auto families = families_of(segments, query.size(1));
  Tensor of_query = like_heads(query), of_key = like_heads(key), of_value = like_heads(value);
  for_tasks(families.size() * key.size(0),
            Backward(query, key, value, families, static_cast<float>(scaling), output, softmax, gradient, of_query, of_key,
                     of_value));
  return {of_query, of_key, of_value};
}

}  // namespace

TORCH_LIBRARY(alignment_sweep, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling, Tensor output, "
      "Tensor softmax, Tensor gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignment_sweep, CPU, library) {
  library.impl("attention", forward);
  library.impl("attention_backward", backward);
}
