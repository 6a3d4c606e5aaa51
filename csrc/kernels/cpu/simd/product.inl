// The register-blocked matrix product under gemm and both products of attention; included per
// instruction set, see simd.cpp.
//
// out[r, c] (+)= sum over i of x(r, i) * w[i * w_stride + c]. The sum is cut into stretches of i:
// each is a chain of multiply-adds from 0, i ascending, in one accumulator; then their sums are
// added in order. So a result depends on k and the length of a stretch, and not on the tile its row
// is in. Cut, because the rounding error of one chain grows with its length: at 4096 terms it would
// be five times that of stretches of 128.

// How x(r, i) is laid out: row after row, or the rows of one i side by side.
enum class Rows { contiguous, interleaved };

// acc = the sum over i < k, in one chain. Leaves x and w behind what it read.
template <Rows kLayout, int kRows, int kVecs, class W>
[[gnu::always_inline]] inline void sum_products(const float*& x, ptrdiff_t x_stride, const W*& w,
                                                ptrdiff_t w_stride, int k,
                                                Vec (&acc)[kRows][kVecs]) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) acc[r][v] = broadcast(0.0f);
  }
  for (int i = 0; i < k; ++i) {
    Vec weight[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec value = broadcast(kLayout == Rows::contiguous ? x[r * x_stride] : x[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = multiply_add(value, weight[v], acc[r][v]);
    }
    x += kLayout == Rows::contiguous ? 1 : x_stride;
    w += w_stride;
  }
}

// to = from + acc, or acc where from is null; from may be to.
template <int kRows, int kVecs>
[[gnu::always_inline]] inline void store_sum(const Vec (&acc)[kRows][kVecs], const float* from,
                                             ptrdiff_t from_stride, float* to,
                                             ptrdiff_t to_stride) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec value = acc[r][v];
      store(to + r * to_stride + v * kLanes,
            from == nullptr ? value : load(from + r * from_stride + v * kLanes) + value);
    }
  }
}

template <int kRows, int kVecs, Rows kLayout, class W>
void product_tile(const float* x, ptrdiff_t x_stride, const W* w, ptrdiff_t w_stride, int k,
                  int stretch, float* out, ptrdiff_t out_stride, bool accumulate) {
  alignas(64) float partial[kRows * kVecs * kLanes];  // sum of the stretches so far
  constexpr ptrdiff_t partial_stride = kVecs * kLanes;
  const float* sum = accumulate ? out : nullptr;
  ptrdiff_t sum_stride = out_stride;
  for (; k > 0; k -= stretch) {
    Vec acc[kRows][kVecs];
    sum_products<kLayout>(x, x_stride, w, w_stride, std::min(k, stretch), acc);
    const bool is_last = k <= stretch;
    float* to = is_last ? out : partial;
    const ptrdiff_t to_stride = is_last ? out_stride : partial_stride;
    if (sum != nullptr) {
      store_sum(acc, sum, sum_stride, to, to_stride);
    } else {
      store_sum(acc, nullptr, 0, to, to_stride);
    }
    sum = to;
    sum_stride = to_stride;
  }
}

template <class W>
using ProductTile = void (*)(const float*, ptrdiff_t, const W*, ptrdiff_t, int, int, float*,
                             ptrdiff_t, bool);

// The tile function for `rows` in 1..kTileRows.
template <int kVecs, Rows kLayout, class W, int... kRows>
ProductTile<W> pick_tile(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr ProductTile<W> table[] = {product_tile<kRows + 1, kVecs, kLayout, W>...};
  return table[rows - 1];
}

// `columns` is a multiple of kLanes, k >= 1. Rows are split into tiles of almost equal height: a last tile
// of one row would read all of w for little work.
template <Rows kLayout, class W>
void product(const float* x, ptrdiff_t x_stride, int rows, const W* w, ptrdiff_t w_stride,
             int columns, int k, int stretch, float* out, ptrdiff_t out_stride, bool accumulate) {
  using Heights = std::make_integer_sequence<int, kTileRows>;
  int num_tiles = (rows + kTileRows - 1) / kTileRows;
  for (int tile = 0; tile < num_tiles; ++tile) {
    int begin = rows * tile / num_tiles, end = rows * (tile + 1) / num_tiles;
    const float* tile_x = x + (kLayout == Rows::contiguous ? begin * x_stride : begin);
    float* tile_out = out + begin * out_stride;
    for (int c = 0; c < columns;) {
      int vecs = std::min((columns - c) / kLanes, kTileVecs);
      auto run = vecs == kTileVecs ? pick_tile<kTileVecs, kLayout, W>(end - begin, Heights{})
                                   : pick_tile<1, kLayout, W>(end - begin, Heights{});
      run(tile_x, x_stride, w + c, w_stride, k, stretch, tile_out + c, out_stride, accumulate);
      c += vecs * kLanes;
    }
  }
}

// Few terms in four stretches, many in stretches of 128: one more costs a tile about 20 cycles.
inline int gemm_stretch(int k) { return std::min(128, std::max(16, (k + 3) / 4)); }

template <class T>
void gemm_panel(const float* x, ptrdiff_t x_stride, int rows, const T* panel, int k, float* out,
                ptrdiff_t out_stride) {
  product<Rows::contiguous>(x, x_stride, rows, panel, kGemmPanel, kGemmPanel, k, gemm_stretch(k),
                            out, out_stride, false);
}
