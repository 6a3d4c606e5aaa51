// A logical vector of kLanes floats made of hardware vectors (`Part`), written with the compilers'
// vector extensions; included per instruction set, see simd.cpp.

constexpr int kPartLanes = sizeof(Part) / sizeof(float);
constexpr int kParts = kLanes / kPartLanes;
typedef int32_t PartInts __attribute__((vector_size(sizeof(Part))));
typedef uint32_t PartBits __attribute__((vector_size(sizeof(Part))));
typedef uint16_t PartHalves __attribute__((vector_size(sizeof(Part) / 2)));

struct Vec {
  Part part[kParts];
};

[[gnu::always_inline]] inline Vec broadcast(float value) {
  Vec out;
  for (int i = 0; i < kParts; ++i) out.part[i] = value - Part{};
  return out;
}

[[gnu::always_inline]] inline Vec load(const float* in) {
  Vec out;
  for (int i = 0; i < kParts; ++i) std::memcpy(&out.part[i], in + i * kPartLanes, sizeof(Part));
  return out;
}

[[gnu::always_inline]] inline Vec load(const bfloat16* in) {
  Vec out;
  for (int i = 0; i < kParts; ++i) {
    PartHalves halves;
    std::memcpy(&halves, in + i * kPartLanes, sizeof(halves));
    out.part[i] = (Part)(__builtin_convertvector(halves, PartBits) << 16);
  }
  return out;
}

[[gnu::always_inline]] inline void store(float* out, Vec value) {
  for (int i = 0; i < kParts; ++i) std::memcpy(out + i * kPartLanes, &value.part[i], sizeof(Part));
}

// The same rounding as to_bfloat16: to nearest, ties to even, NaN stays NaN.
[[gnu::always_inline]] inline void store(bfloat16* out, Vec value) {
  for (int i = 0; i < kParts; ++i) {
    PartBits wide = (PartBits)value.part[i];
    PartBits rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    PartBits quiet = (wide >> 16) | 0x40u;
    PartBits is_nan = (PartBits)((wide & 0x7fffffffu) > 0x7f800000u);
    PartBits bits = (is_nan & quiet) | (~is_nan & rounded);
    PartHalves halves = __builtin_convertvector(bits, PartHalves);
    std::memcpy(out + i * kPartLanes, &halves, sizeof(halves));
  }
}

// The first `count` <= kLanes elements; the other lanes are 0.
template <class T>
[[gnu::always_inline]] inline Vec load_first(const T* in, int count) {
  if (count >= kLanes) return load(in);
  T padded[kLanes] = {};
  std::memcpy(padded, in, count * sizeof(T));
  return load(padded);
}

template <class T>
[[gnu::always_inline]] inline void store_first(T* out, Vec value, int count) {
  if (count >= kLanes) return store(out, value);
  T padded[kLanes];
  store(padded, value);
  std::memcpy(out, padded, count * sizeof(T));
}

[[gnu::always_inline]] inline Vec operator+(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] + b.part[i];
  return a;
}
[[gnu::always_inline]] inline Vec operator-(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] - b.part[i];
  return a;
}
[[gnu::always_inline]] inline Vec operator*(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] * b.part[i];
  return a;
}
[[gnu::always_inline]] inline Vec operator/(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] / b.part[i];
  return a;
}
[[gnu::always_inline]] inline Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kParts; ++i) c.part[i] = part_multiply_add(a.part[i], b.part[i], c.part[i]);
  return c;
}

// b where a is not greater, so a NaN in b stays (a NaN in a does not).
[[gnu::always_inline]] inline Vec max(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) b.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return b;
}
[[gnu::always_inline]] inline Vec min(Vec a, Vec b) {
  for (int i = 0; i < kParts; ++i) b.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return b;
}

// `value` in the lanes where limits[lane] > key, `other` elsewhere.
[[gnu::always_inline]] inline Vec where_below(int32_t key, const int32_t* limits, Vec value,
                                              Vec other) {
  for (int i = 0; i < kParts; ++i) {
    PartInts limit;
    std::memcpy(&limit, limits + i * kPartLanes, sizeof(limit));
    value.part[i] = limit > key ? value.part[i] : other.part[i];
  }
  return value;
}

// Sum of the lanes, as a fixed tree.
[[gnu::always_inline]] inline float sum(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x within 2 units in the last place. Exactly 1 at 0; 0 below -87.3 (no subnormals, so -inf is
// 0); 1.65e38 above 88; NaN stays NaN. x = n ln 2 + r with |r| <= ln(2) / 2, then a polynomial in
// r.
[[gnu::always_inline]] inline Vec exp(Vec x) {
  const Vec lowest = broadcast(-87.3f);
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec clamped = min(broadcast(88.0f), max(lowest, x));
  Vec shifted = multiply_add(clamped, broadcast(1.44269504f), magic);
  Vec n = shifted - magic;
  Vec r = multiply_add(n, broadcast(-0.693145752f), clamped);  // high bits of ln 2: n * it is exact
  r = multiply_add(n, broadcast(-1.42860677e-6f), r);
  Vec p = broadcast(1.0f / 720);
  p = multiply_add(p, r, broadcast(1.0f / 120));
  p = multiply_add(p, r, broadcast(1.0f / 24));
  p = multiply_add(p, r, broadcast(1.0f / 6));
  p = multiply_add(p, r, broadcast(0.5f));
  p = multiply_add(p, r, broadcast(1.0f));
  p = multiply_add(p, r, broadcast(1.0f));
  for (int i = 0; i < kParts; ++i) {
    PartInts exponent = (PartInts)shifted.part[i] - (PartInts)magic.part[i];
    Part scaled = p.part[i] * (Part)((exponent + 127) << 23);
    p.part[i] = x.part[i] < lowest.part[i] ? Part{} : scaled;
  }
  return p;
}
