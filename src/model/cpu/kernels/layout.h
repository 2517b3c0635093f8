// Which positions one task computes, and how their keys and values are laid out in its buffers.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace {

using at::Tensor;
using Floats = std::vector<float>;

// Sizes are rounded up to a multiple of LANES, so that oneDNN compiles few kernels whatever the lengths are.
constexpr int64_t LANES = 16;
// Tile size in query rows and keys, measured: larger tiles leave the cache, smaller ones cost more calls.
constexpr int64_t QUERY_TILE = 96, KEY_TILE = 128;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Segment {
  int64_t start, end, prefix_start, prefix_end;
};

// A segment without prefix and the segments whose prefix lies in it. No other position attends to them, so one task
// computes them.
struct PrefixGroup {
  std::vector<Segment> segments;
  std::vector<int64_t> offsets;  // row of each segment's first key in the gathered buffer; each starts a new tile
  int64_t num_rows = 0;          // of the gathered buffer
};

// Up to KEY_TILE consecutive keys.
struct Tile {
  int64_t offset;          // row of the first key in the gathered buffer
  int64_t num_valid;       // keys
  int64_t num_padded;      // keys, rounded up to LANES
  int64_t first_position;  // of the first key; -1 in a prefix, which every query attends to
};

// View of (heads, positions, d); d must be contiguous, the other strides are free.
struct HeadView {
  explicit HeadView(const Tensor& x)
      : data(x.data_ptr<float>()), head_stride(x.stride(0)), position_stride(x.stride(1)) {
    TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "the last dimension must be contiguous");
  }
  float* at(int64_t head, int64_t position) const { return data + head * head_stride + position * position_stride; }
  float* data;
  int64_t head_stride, position_stride;
};

struct Sizes {
  Sizes(const Tensor& query, const Tensor& key)
      : heads(query.size(0)), n(query.size(1)), d(query.size(2)), kv_heads(key.size(0)),
        heads_per_kv(heads / kv_heads) {
    TORCH_CHECK(heads_per_kv * kv_heads == heads && key.size(1) == n && key.size(2) == d,
                "shapes of query and key do not match");
  }
  int64_t heads, n, d, kv_heads, heads_per_kv;
};

// Raises an error unless the segments cover the n positions without gap or overlap.
std::vector<PrefixGroup> make_prefix_groups(const Tensor& segments, int64_t n) {
  std::vector<PrefixGroup> groups;
  int64_t covered = 0;
  const auto table = segments.accessor<int64_t, 2>();
  for (int64_t i = 0; i < table.size(0); i++) {
    const Segment s{table[i][0], table[i][1], table[i][2], table[i][3]};
    const bool has_prefix = s.prefix_end > s.prefix_start;
    TORCH_CHECK(s.start == covered && s.end >= s.start, "segments must be consecutive");
    covered = s.end;
    if (!has_prefix) groups.emplace_back();
    TORCH_CHECK(!groups.empty(), "the first segment must not have a prefix");
    PrefixGroup& group = groups.back();
    TORCH_CHECK(!has_prefix || (s.prefix_start == group.segments[0].start && s.prefix_end <= group.segments[0].end),
                "a prefix must be the beginning of the last segment without prefix");
    group.segments.push_back(s);
    group.offsets.push_back(group.num_rows);
    group.num_rows += round_up(s.end - s.start, KEY_TILE);
  }
  TORCH_CHECK(covered == n, "segments must cover all positions");
  return groups;
}

void add_tiles(std::vector<Tile>& tiles, int64_t offset, int64_t num_keys, int64_t first_position) {
  for (int64_t i = 0; i < num_keys; i += KEY_TILE) {
    const int64_t num_valid = std::min(KEY_TILE, num_keys - i);
    const int64_t position = first_position < 0 ? first_position : first_position + i;
    tiles.push_back({offset + i, num_valid, round_up(num_valid, LANES), position});
  }
}

// Calls action(begin, end, tiles) for each block of a group's queries: its positions, and the keys they attend to.
template <typename Action>
void for_query_blocks(const PrefixGroup& group, int64_t heads_per_kv, const Action& action) {
  const int64_t block = std::max(LANES, QUERY_TILE / heads_per_kv / LANES * LANES);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < group.segments.size(); i++) {
    const Segment& s = group.segments[i];
    for (int64_t begin = s.start; begin < s.end; begin += block) {
      const int64_t end = std::min(begin + block, s.end);
      tiles.clear();
      add_tiles(tiles, 0, s.prefix_end - s.prefix_start, -1);
      add_tiles(tiles, group.offsets[i], end - s.start, s.start);
      action(begin, end, tiles);
    }
  }
}

// Calls action(position in the batch, row in the gathered buffer) for each position of a group.
template <typename Action>
void for_positions(const PrefixGroup& group, const Action& action) {
  for (size_t i = 0; i < group.segments.size(); i++) {
    const Segment& s = group.segments[i];
    for (int64_t n = s.start; n < s.end; n++) action(n, group.offsets[i] + n - s.start);
  }
}

// Copies one head of a group's positions to a buffer (num_rows, d); padding rows are zero.
void gather(const PrefixGroup& group, const HeadView& x, int64_t head, int64_t d, Floats& buffer) {
  buffer.assign(group.num_rows * d, 0.0f);
  for_positions(group, [&](int64_t n, int64_t row) { std::copy_n(x.at(head, n), d, buffer.data() + row * d); });
}

void scatter(const PrefixGroup& group, const Floats& buffer, int64_t head, int64_t d, const HeadView& x) {
  for_positions(group, [&](int64_t n, int64_t row) { std::copy_n(buffer.data() + row * d, d, x.at(head, n)); });
}

}  // namespace
