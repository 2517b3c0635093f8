// Attention of packed, shared-prefix segments in float32 on a CPU; called by src/model/cpu/attention.py.
// Matrix products are oneDNN's brgemm (torch's gemm where oneDNN has no kernel for the processor), compiled at a
// thread's first call; what lies between them stays in the cache. Buffers are named as in FlashAttention-2.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "layout.h"
#include "vectors.h"

namespace {

// c (m, n) = a (m, k) b (k, n), or c += a b
void matmul(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
            int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/false);
}

// Runs work(task) for each task on the next free thread. Tasks write to disjoint memory and each sums in a fixed
// order, so results do not depend on the number of threads.
template <typename Work>
void for_tasks(int64_t num_tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(num_tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    Work thread_work(work);  // each thread needs its own buffers
    for (int64_t task; (task = next++) < num_tasks;) thread_work(task);
  });
}

// (heads, positions, d) that lies in memory as (positions, heads, d), which the output projection reads.
Tensor empty_positions_first(const Tensor& x) {
  return at::empty({x.size(1), x.size(0), x.size(2)}, x.options()).transpose(0, 1);
}

struct Forward : Sizes {
  Forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<PrefixGroup>& groups,
          float scaling, const Tensor& output, const Tensor& softmax)
      : Sizes(query, key), query(query), key(key), value(value), output(output),
        saved_max(softmax.data_ptr<float>()), saved_inverse_sum(saved_max + softmax[0].numel()), groups(groups),
        scaling(scaling) {}

  // A task is one key-value head of one group.
  void operator()(int64_t task) {
    const PrefixGroup& group = groups[task / kv_heads];
    const int64_t kv_head = task % kv_heads;
    gather(group, key, kv_head, d, K);
    gather(group, value, kv_head, d, V);
    transpose_tiles(K, d, Kt);
    for_query_blocks(group, heads_per_kv, [&](int64_t begin, int64_t end, const std::vector<Tile>& tiles) {
      const int64_t m = end - begin, num_valid = m * heads_per_kv, rows = round_up(num_valid, LANES);
      Q.assign(rows * d, 0.0f);
      O.resize(rows * d);
      S.resize(tiles.size() * rows * KEY_TILE);
      for (auto* x : {&position, &row_max, &row_sum}) x->resize(rows);
      for (int64_t r = 0; r < num_valid; r++) {
        scale(query.at(kv_head * heads_per_kv + r / m, begin + r % m), Q.data() + r * d, d, scaling);
        position[r] = begin + r % m;
      }
      for (size_t i = 0; i < tiles.size(); i++)
        matmul(rows, tiles[i].num_padded, d, Q.data(), d, Kt.data() + tiles[i].offset * d, KEY_TILE,
               S.data() + i * rows * KEY_TILE, KEY_TILE, false);
      softmax_numerators(S.data(), num_valid, rows, tiles, position.data(), row_max.data(), row_sum.data());
      for (size_t i = 0; i < tiles.size(); i++)
        matmul(rows, d, tiles[i].num_padded, S.data() + i * rows * KEY_TILE, KEY_TILE, V.data() + tiles[i].offset * d,
               d, O.data(), d, i > 0);
      for (int64_t r = 0; r < num_valid; r++) {
        const int64_t head = kv_head * heads_per_kv + r / m, n_query = begin + r % m;
        saved_max[head * n + n_query] = row_max[r];
        saved_inverse_sum[head * n + n_query] = 1 / row_sum[r];
        scale(O.data() + r * d, output.at(head, n_query), d, 1 / row_sum[r]);
      }
    });
  }

  HeadView query, key, value, output;
  float *saved_max, *saved_inverse_sum;
  const std::vector<PrefixGroup>& groups;
  float scaling;
  Floats K, V, Kt, Q, O, S, position, row_max, row_sum;  // t: transposed
};

struct Backward : Sizes {
  Backward(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<PrefixGroup>& groups,
           float scaling, const Tensor& output, const Tensor& softmax, const Tensor& grad_output,
           const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value)
      : Sizes(query, key), query(query), key(key), value(value), output(output), grad_output(grad_output),
        grad_query(grad_query), grad_key(grad_key), grad_value(grad_value), saved_max(softmax.data_ptr<float>()),
        saved_inverse_sum(saved_max + softmax[0].numel()), groups(groups), scaling(scaling) {}

  void operator()(int64_t task) {
    const PrefixGroup& group = groups[task / kv_heads];
    const int64_t kv_head = task % kv_heads;
    gather(group, key, kv_head, d, K);
    gather(group, value, kv_head, d, V);
    transpose_tiles(K, d, Kt);
    dK.assign(K.size(), 0.0f);
    dV.assign(V.size(), 0.0f);
    for_query_blocks(group, heads_per_kv, [&](int64_t begin, int64_t end, const std::vector<Tile>& tiles) {
      const int64_t m = end - begin, num_valid = m * heads_per_kv, rows = round_up(num_valid, LANES);
      for (auto* x : {&Q, &dO}) x->assign(rows * d, 0.0f);
      for (auto* x : {&Qt, &dOt, &dQt, &dQ}) x->resize(rows * d);
      for (auto* x : {&S, &dP}) x->resize(rows * KEY_TILE);
      for (auto* x : {&row_max, &inverse_sum, &delta}) x->assign(rows, 0.0f);
      position.assign(rows, -INFINITE);
      for (int64_t r = 0; r < num_valid; r++) {
        const int64_t head = kv_head * heads_per_kv + r / m, n_query = begin + r % m;
        scale(query.at(head, n_query), Q.data() + r * d, d, scaling);
        std::copy_n(grad_output.at(head, n_query), d, dO.data() + r * d);
        // delta = rowsum(P * dP), which equals rowsum(O * dO).
        delta[r] = dot(output.at(head, n_query), grad_output.at(head, n_query), d);
        row_max[r] = saved_max[head * n + n_query];
        inverse_sum[r] = saved_inverse_sum[head * n + n_query];
        position[r] = n_query;
      }
      transpose(Q.data(), Qt.data(), rows, d);
      transpose(dO.data(), dOt.data(), rows, d);
      for (size_t i = 0; i < tiles.size(); i++) {
        const Tile& tile = tiles[i];
        const int64_t keys = tile.num_padded, offset = tile.offset * d;
        // S and dP are (keys, rows), so that no product needs them transposed.
        matmul(keys, rows, d, K.data() + offset, d, Qt.data(), rows, S.data(), rows, false);
        matmul(keys, rows, d, V.data() + offset, d, dOt.data(), rows, dP.data(), rows, false);
        softmax_backward_tile(S.data(), dP.data(), rows, tile, row_max.data(), inverse_sum.data(), delta.data(),
                              position.data());
        matmul(keys, d, rows, S.data(), rows, dO.data(), d, dV.data() + offset, d, true);
        matmul(keys, d, rows, dP.data(), rows, Q.data(), d, dK.data() + offset, d, true);
        matmul(d, rows, keys, Kt.data() + offset, KEY_TILE, dP.data(), rows, dQt.data(), rows, i > 0);
      }
      transpose(dQt.data(), dQ.data(), d, rows);
      for (int64_t r = 0; r < num_valid; r++)
        scale(dQ.data() + r * d, grad_query.at(kv_head * heads_per_kv + r / m, begin + r % m), d, scaling);
    });
    scatter(group, dK, kv_head, d, grad_key);
    scatter(group, dV, kv_head, d, grad_value);
  }

  HeadView query, key, value, output, grad_output, grad_query, grad_key, grad_value;
  const float *saved_max, *saved_inverse_sum;
  const std::vector<PrefixGroup>& groups;
  float scaling;
  Floats K, V, Kt, dK, dV, Q, Qt, dO, dOt, dQ, dQt, S, dP, row_max, inverse_sum, delta, position;  // t: transposed
};

// query (heads, n, d), key and value (kv_heads, n, d), segments (s, 4) int64 -> output (heads, n, d) and softmax
// (2, heads, n): the row maximum, and 1 / the row sum of exponentials. Saving their log-sum-exp instead would round
// every probability of the backward pass where it is large.
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& segments,
                                   double scaling) {
  TORCH_CHECK(value.sizes() == key.sizes(), "shapes of key and value do not match");
  const auto groups = make_prefix_groups(segments, query.size(1));
  Tensor output = empty_positions_first(query);
  Tensor softmax = at::empty({2, query.size(0), query.size(1)}, query.options());
  for_tasks(groups.size() * key.size(0),
            Forward(query, key, value, groups, static_cast<float>(scaling), output, softmax));
  return {output, softmax};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& segments, double scaling, const Tensor& output,
                                            const Tensor& softmax, const Tensor& grad_output) {
  const auto groups = make_prefix_groups(segments, query.size(1));
  Tensor grad_query = empty_positions_first(query);
  Tensor grad_key = empty_positions_first(key), grad_value = empty_positions_first(value);
  for_tasks(groups.size() * key.size(0),
            Backward(query, key, value, groups, static_cast<float>(scaling), output, softmax, grad_output, grad_query,
                     grad_key, grad_value));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY(alignment_sweep, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor query, Tensor key, Tensor value, Tensor segments, float scaling, Tensor output, "
      "Tensor softmax, Tensor grad_output) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alignment_sweep, CPU, library) {
  library.impl("attention", forward);
  library.impl("attention_backward", backward);
}
