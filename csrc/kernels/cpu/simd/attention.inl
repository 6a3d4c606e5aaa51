// One key tile of attention for up to kAttentionLanes query rows, in vector lanes; included per
// instruction set, see simd.cpp.
//
// Lanes are query rows, so maximum and sum over keys are vertical and no lane sees another. A lane
// whose limit ends inside or before the tile takes part with probability exactly 0, which changes
// none of its values (except the sign of a zero, which the caller removes).

constexpr int kFewLanes = 8;
constexpr int kAttentionStretch = 32;  // of both products; divides kAttentionKeys

// Scores -> probabilities against the new running maximum, for lanes [lane, lane + kLanes).
inline void softmax_lanes(const AttentionTile& tile, int lane) {
  float* scores = tile.scores + lane;
  const Vec masked = broadcast(-std::numeric_limits<float>::infinity());
  int smallest_limit = *std::min_element(tile.limits + lane, tile.limits + lane + kLanes);
  for (int i = std::max(0, smallest_limit - tile.first_key); i < tile.num_keys; ++i) {
    float* row = scores + i * kAttentionLanes;
    store(row, where_below(tile.first_key + i, tile.limits + lane, load(row), masked));
  }
  Vec old_max = load(tile.max + lane);
  Vec new_max = old_max;
  for (int i = 0; i < tile.num_keys; ++i)
    new_max = max(new_max, load(scores + i * kAttentionLanes));
  Vec scale = exp(old_max - new_max);
  Vec total = broadcast(0.0f);
  for (int i = 0; i < tile.num_keys; ++i) {
    Vec p = exp(load(scores + i * kAttentionLanes) - new_max);
    store(scores + i * kAttentionLanes, p);
    total = total + p;
  }
  store(tile.max + lane, new_max);
  store(tile.sum + lane, multiply_add(load(tile.sum + lane), scale, total));
  float factors[kLanes];
  store(factors, scale);
  for (int i = 0; i < std::min(kLanes, tile.lanes - lane); ++i) {
    if (factors[i] == 1.0f) continue;  // the common case: the maximum stood
    float* out = tile.out + (lane + i) * tile.head_stride;
    for (int d = 0; d < tile.head_stride; d += kLanes) {
      store(out + d, load(out + d) * broadcast(factors[i]));
    }
  }
}

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInts __attribute__((vector_size(16)));

// Elements a..d of x (0..3) and y (4..7).
template <int a, int b, int c, int d>
[[gnu::always_inline]] inline Quad shuffle(Quad x, Quad y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, a, b, c, d);
#else
  return __builtin_shuffle(x, y, QuadInts{a, b, c, d});
#endif
}

// k [num_keys, head_stride] -> [head_stride, kAttentionKeys], in blocks of 4 x 4.
inline void transpose_keys(const AttentionTile& tile) {
  const int stride = tile.head_stride;
  for (int d = 0; d < stride; d += 4) {
    for (int key = 0; key < tile.num_keys; key += 4) {
      Quad row[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&row[i], tile.k + (key + i) * stride + d, 16);
      Quad low01 = shuffle<0, 4, 1, 5>(row[0], row[1]),
           high01 = shuffle<2, 6, 3, 7>(row[0], row[1]);
      Quad low23 = shuffle<0, 4, 1, 5>(row[2], row[3]),
           high23 = shuffle<2, 6, 3, 7>(row[2], row[3]);
      Quad column[4] = {shuffle<0, 1, 4, 5>(low01, low23), shuffle<2, 3, 6, 7>(low01, low23),
                        shuffle<0, 1, 4, 5>(high01, high23), shuffle<2, 3, 6, 7>(high01, high23)};
      for (int i = 0; i < 4; ++i) {
        std::memcpy(tile.transposed + (d + i) * kAttentionKeys + key, &column[i], 16);
      }
    }
  }
}

// With few lanes, keys fill the vectors instead. Each score is the same chain of multiply-adds as in
// the other arrangement, so which of the two runs does not show in its bits.
inline void scores_of_few_lanes(const AttentionTile& tile) {
  alignas(64) float scores[kFewLanes * kAttentionKeys];
  transpose_keys(tile);
  product<Rows::interleaved>(tile.q, kAttentionLanes, tile.lanes, tile.transposed, kAttentionKeys,
                             round_up(tile.num_keys, kLanes), tile.head_dim, kAttentionStretch,
                             scores, kAttentionKeys, false);
  for (int key = 0; key < tile.num_keys; ++key) {
    for (int lane = 0; lane < tile.lanes; ++lane) {
      tile.scores[key * kAttentionLanes + lane] = scores[lane * kAttentionKeys + key];
    }
  }
}

inline void attention_tile(const AttentionTile& tile) {
  int width = round_up(tile.lanes, kLanes);
  if (tile.lanes <= kFewLanes) {
    scores_of_few_lanes(tile);
  } else {
    product<Rows::contiguous>(tile.k, tile.head_stride, tile.num_keys, tile.q, kAttentionLanes,
                              width, tile.head_dim, kAttentionStretch, tile.scores, kAttentionLanes,
                              false);
  }
  for (int lane = 0; lane < width; lane += kLanes) softmax_lanes(tile, lane);
  product<Rows::interleaved>(tile.scores, kAttentionLanes, tile.lanes, tile.v, tile.head_stride,
                             tile.head_stride, tile.num_keys, kAttentionStretch, tile.out,
                             tile.head_stride, true);
}
