// One key tile of attention for up to kAttentionLanes query rows, in vector lanes; included per
// instruction set, see simd.cpp.
//
// Lanes are query rows, so maximum and sum over keys are vertical and no lane sees another. A lane
// whose limit ends inside or before the tile takes part with probability exactly 0, which changes
// none of its values (except the sign of a zero, which the caller removes).

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
  for (int i = 0; i < kLanes; ++i) {
    if (factors[i] == 1.0f) continue;  // the common case: the maximum stood
    float* out = tile.out + (lane + i) * tile.head_stride;
    for (int d = 0; d < tile.head_stride; d += kLanes) {
      store(out + d, load(out + d) * broadcast(factors[i]));
    }
  }
}

inline void attention_tile(const AttentionTile& tile) {
  int width = round_up(tile.lanes, kLanes);
  product<Rows::contiguous>(tile.k, tile.head_stride, tile.num_keys, tile.q, kAttentionLanes, width,
                            tile.head_dim, tile.scores, kAttentionLanes, false);
  for (int lane = 0; lane < width; lane += kLanes) softmax_lanes(tile, lane);
  product<Rows::interleaved>(tile.scores, kAttentionLanes, tile.lanes, tile.v, tile.head_stride,
                             tile.head_stride, tile.num_keys, tile.out, tile.head_stride, true);
}
