// The register-blocked matrix product under gemm and both products of attention; included per
// instruction set, see simd.cpp.
//
// out[r, c] (+)= sum over i of x(r, i) * w[i * w_stride + c], one accumulator per element, i
// ascending, every step a multiply-add: the result of a row does not depend on the tile it is in.

// How x(r, i) is laid out: row after row, or the rows of one i side by side.
enum class Rows { contiguous, interleaved };

template <int kRows, int kVecs, Rows kLayout, class W>
void product_tile(const float* x, ptrdiff_t x_stride, const W* w, ptrdiff_t w_stride, int k,
                  float* out, ptrdiff_t out_stride, bool accumulate) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = accumulate ? load(out + r * out_stride + v * kLanes) : broadcast(0.0f);
    }
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
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(out + r * out_stride + v * kLanes, acc[r][v]);
  }
}

template <class W>
using ProductTile = void (*)(const float*, ptrdiff_t, const W*, ptrdiff_t, int, float*, ptrdiff_t,
                             bool);

// The tile function for `rows` in 1..kTileRows.
template <int kVecs, Rows kLayout, class W, int... kRows>
ProductTile<W> pick_tile(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr ProductTile<W> table[] = {product_tile<kRows + 1, kVecs, kLayout, W>...};
  return table[rows - 1];
}

// `columns` is a multiple of kLanes. Rows are split into tiles of almost equal height: a last tile
// of one row would read all of w for little work.
template <Rows kLayout, class W>
void product(const float* x, ptrdiff_t x_stride, int rows, const W* w, ptrdiff_t w_stride,
             int columns, int k, float* out, ptrdiff_t out_stride, bool accumulate) {
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
      run(tile_x, x_stride, w + c, w_stride, k, tile_out + c, out_stride, accumulate);
      c += vecs * kLanes;
    }
  }
}

template <class T>
void gemm_panel(const float* x, ptrdiff_t x_stride, int rows, const T* panel, int k, float* out,
                ptrdiff_t out_stride) {
  product<Rows::contiguous>(x, x_stride, rows, panel, kGemmPanel, kGemmPanel, k, out, out_stride,
                            false);
}
