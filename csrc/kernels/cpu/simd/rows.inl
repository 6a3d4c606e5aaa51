// Routines over one row of elements; included per instruction set, see simd.cpp.

template <class T>
void widen(const T* in, float* out, int count) {
  for (int i = 0; i < count; i += kLanes)
    store_first(out + i, load_first(in + i, count - i), count - i);
}

template <class T>
void narrow(const float* in, T* out, int count) {
  for (int i = 0; i < count; i += kLanes)
    store_first(out + i, load_first(in + i, count - i), count - i);
}

// x / rms(x) is x times this. Lane j sums the squares of elements j, j + kLanes, ...; then the lanes
// are summed.
template <class T>
float inverse_rms(const T* x, int count, float eps) {
  Vec squares = broadcast(0.0f);
  for (int i = 0; i < count; i += kLanes) {
    Vec value = load_first(x + i, count - i);
    squares = multiply_add(value, value, squares);
  }
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
}

template <class X, class T>
void scale_by_weight(const X* x, float scale, const T* weight, X* out, int count) {
  Vec factor = broadcast(scale);
  for (int i = 0; i < count; i += kLanes) {
    int lanes = count - i;
    Vec value = load_first(x + i, lanes) * factor * load_first(weight + i, lanes);
    store_first(out + i, value, lanes);
  }
}

// The residual is rounded to T first, and what is normed is what was stored.
template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int count, float eps) {
  if (residual != nullptr) {
    for (int i = 0; i < count; i += kLanes) {
      int lanes = count - i;
      store_first(residual + i, load_first(residual + i, lanes) + load_first(x + i, lanes), lanes);
    }
    x = residual;
  }
  scale_by_weight(x, inverse_rms(x, count, eps), weight, out, count);
}

template <class T>
void norm_head(float* head, const T* weight, int count, float eps) {
  scale_by_weight(head, inverse_rms(head, count, eps), weight, head, count);
}

inline void rotate_head(float* head, const float* cosine, const float* sine, int half) {
  for (int j = 0; j < half; j += kLanes) {
    int lanes = half - j;
    Vec c = load_first(cosine + j, lanes), s = load_first(sine + j, lanes);
    Vec a = load_first(head + j, lanes), b = load_first(head + half + j, lanes);
    store_first(head + j, a * c - b * s, lanes);
    store_first(head + half + j, b * c + a * s, lanes);
  }
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, int count) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  for (int i = 0; i < count; i += kLanes) {
    int lanes = count - i;
    Vec g = load_first(gate + i, lanes);
    store_first(out + i, g / (one + exp(zero - g)) * load_first(up + i, lanes), lanes);
  }
}

// The first element equal to `value` after scaling.
template <class T>
int find_first(const T* logits, int count, float scale, float value) {
  for (int i = 0; i < count; ++i) {
    if (to_float(logits[i]) * scale == value) return i;
  }
  return 0;
}

// fp32 sums run over stretches of kStretch elements, then in double: a vocabulary is long. Lanes
// behind the end hold -inf, whose weight is 0.
template <class T>
SoftmaxSums softmax_sums(const T* logits, int count, float scale) {
  constexpr int kStretch = 1024;
  const Vec factor = broadcast(scale);
  const float infinity = std::numeric_limits<float>::infinity();
  auto scaled = [&](int i) {
    if (count - i >= kLanes) return load(logits + i) * factor;
    float padded[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      padded[lane] = i + lane < count ? to_float(logits[i + lane]) * scale : -infinity;
    }
    return load(padded);
  };
  Vec largest = broadcast(-infinity);
  for (int i = 0; i < count; i += kLanes) largest = max(scaled(i), largest);
  float lanes[kLanes];
  store(lanes, largest);
  float top = *std::max_element(lanes, lanes + kLanes);

  SoftmaxSums sums{top, find_first(logits, count, scale, top), 0, 0};
  // exp() is 0 below its range: clamping keeps 0 * inf out of the weighted sum.
  const Vec lowest = broadcast(-1e30f);
  for (int begin = 0; begin < count; begin += kStretch) {
    Vec weights = broadcast(0.0f), weighted = broadcast(0.0f);
    for (int i = begin; i < std::min(count, begin + kStretch); i += kLanes) {
      Vec shifted = max(lowest, scaled(i) - broadcast(top));
      Vec weight = exp(shifted);
      weights = weights + weight;
      weighted = multiply_add(weight, shifted, weighted);
    }
    sums.sum += sum(weights);
    sums.weighted_sum += sum(weighted);
  }
  return sums;
}
