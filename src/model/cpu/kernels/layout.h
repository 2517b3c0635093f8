// Which positions one task computes, and how their keys and values lie while it does.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <vector>

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

}  // namespace
