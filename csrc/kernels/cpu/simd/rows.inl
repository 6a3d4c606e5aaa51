// Routines over one row of elements; included per instruction set, see simd.cpp.

template <class T>
void widen(const T* in, float* out, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  if (i < count) store_first(out + i, load_first(in + i, count - i), count - i);
}

template <class T>
void narrow(const float* in, T* out, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  if (i < count) store_first(out + i, load_first(in + i, count - i), count - i);
}

// residual += x, rounded to T, and returned as it was stored.
template <class T>
[[gnu::always_inline]] inline Vec add_to(T* residual, Vec x, int count) {
  if (count == kLanes) {
    store(residual, load(residual) + x);
    return load(residual);
  }
  store_first(residual, load_first(residual, count) + x, count);
  return load_first(residual, count);
}

// 1 / rms. Lane j sums elements j, j + 16, ...; then the lanes are summed.
[[gnu::always_inline]] inline float inverse_rms(Vec squares, int count, float eps) {
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
}

template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int count, float eps) {
  Vec squares = broadcast(0.0f);
  for (int i = 0; i < count; i += kLanes) {
    int lanes = std::min(kLanes, count - i);
    Vec value = lanes == kLanes ? load(x + i) : load_first(x + i, lanes);
    if (residual != nullptr) value = add_to(residual + i, value, lanes);
    squares = multiply_add(value, value, squares);
  }
  Vec scale = broadcast(inverse_rms(squares, count, eps));
  const T* in = residual != nullptr ? residual : x;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i) * scale * load(weight + i));
  if (i < count) {
    int lanes = count - i;
    store_first(out + i, load_first(in + i, lanes) * scale * load_first(weight + i, lanes), lanes);
  }
}

template <class T>
void norm_head(float* head, const T* weight, int count, float eps) {
  Vec squares = broadcast(0.0f);
  for (int i = 0; i < count; i += kLanes) {
    int lanes = std::min(kLanes, count - i);
    Vec value = lanes == kLanes ? load(head + i) : load_first(head + i, lanes);
    squares = multiply_add(value, value, squares);
  }
  Vec scale = broadcast(inverse_rms(squares, count, eps));
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(head + i, load(head + i) * scale * load(weight + i));
  if (i < count) {
    int lanes = count - i;
    store_first(head + i, load_first(head + i, lanes) * scale * load_first(weight + i, lanes),
                lanes);
  }
}

inline void rotate_head(float* head, const float* cosine, const float* sine, int half) {
  for (int j = 0; j < half; j += kLanes) {
    int lanes = std::min(kLanes, half - j);
    Vec c = load_first(cosine + j, lanes), s = load_first(sine + j, lanes);
    Vec a = load_first(head + j, lanes), b = load_first(head + half + j, lanes);
    store_first(head + j, a * c - b * s, lanes);
    store_first(head + half + j, b * c + a * s, lanes);
  }
}

[[gnu::always_inline]] inline Vec silu_mul_lanes(Vec gate, Vec up) {
  Vec one = broadcast(1.0f);
  return gate / (one + exp(broadcast(0.0f) - gate)) * up;
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, silu_mul_lanes(load(gate + i), load(up + i)));
  }
  if (i < count) {
    int lanes = count - i;
    store_first(out + i, silu_mul_lanes(load_first(gate + i, lanes), load_first(up + i, lanes)),
                lanes);
  }
}
