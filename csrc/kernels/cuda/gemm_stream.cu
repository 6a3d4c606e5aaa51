// Host side of the streaming gemm: its instances, the ways to run them, tensor maps, the launch.
#include "kernels/cuda/gemm_stream.h"

#include <algorithm>

#include "kernels/cuda/gemm_stream_kernel.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

using Kernel = void (*)(stream::Args, CUtensorMap, CUtensorMap);

constexpr double kMinBusySms = 0.6;
constexpr int kMaxSplits = 8;  // CTAs of a cluster, on any GPU that has clusters
constexpr int kAlignmentBytes = 1024;
// Shared memory of an SM that is left to small kernels: they must be resident beside this one.
constexpr int kLeftBytes = 9 << 10;
// Copies under way in an SM, at most. Before the kernel's turn: few or more, to be measured. After:
// with many rows of x, whose loads queue behind those of the weight, what keeps the memory busy.
constexpr int kEarlyBytes[] = {32 << 10, 64 << 10};
constexpr int kManyRows = 64, kManyRowsBytes = 96 << 10;
// Stages of x: few rows take little memory, so as many as of the weight.
constexpr int kFewRows = 16, kXSlots = 6, kMinXSlots = 4;

struct Variant {
  int tile_n, tile_rows, stage_columns, weight_bytes, x_bytes, threads;
  Kernel kernel;
  int (*end_bytes)(int splits, int groups_each);
};

template <int kTileN, int kTileRows>
Variant variant() {
  using Shape = stream::Tile<kTileN, kTileRows>;
  return {kTileN,
          kTileRows,
          Shape::kStageColumns,
          Shape::kWeightBytes,
          Shape::kXBytes,
          Shape::kThreads,
          stream::stream_kernel<kTileN, kTileRows>,
          Shape::end_bytes};
}

template <int kTileRows>
void add_variants(std::vector<Variant>& all) {
  if constexpr (kTileRows <= 64) all.push_back(variant<64, kTileRows>());
  all.push_back(variant<128, kTileRows>());
  all.push_back(variant<192, kTileRows>());
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> found;
    add_variants<8>(found);
    add_variants<16>(found);
    add_variants<32>(found);
    add_variants<64>(found);
    add_variants<96>(found);
    add_variants<128>(found);
    add_variants<160>(found);
    add_variants<192>(found);
    return found;
  }();
  return all;
}

const Variant& find_variant(const StreamGemm& way) {
  for (const Variant& variant : variants()) {
    if (variant.tile_n == way.tile_n && variant.tile_rows == way.tile_rows) return variant;
  }
  throw std::invalid_argument(
      concat("[gemm] the streaming kernel has no tile of ", way.tile_n, " x ", way.tile_rows));
}

stream::Args make_args(const GemmParams& params, const StreamGemm& way, const Variant& variant) {
  stream::Args args{};
  args.out = params.out;
  args.rows = params.rows;
  args.n = params.n;
  args.splits = way.splits;
  const int num_chunks = ceil_div(params.k, variant.stage_columns);
  args.chunks_each = num_chunks / way.splits;
  args.more_chunks = num_chunks % way.splits;
  const int num_tiles = ceil_div(params.n, variant.tile_n), clusters = way.ctas / way.splits;
  args.tiles_each = num_tiles / clusters;
  args.more_tiles = num_tiles % clusters;
  args.groups = ceil_div(params.rows, 8);
  args.groups_each = args.groups / way.splits;
  args.more_groups = args.groups % way.splits;
  args.num_slots = way.num_slots;
  args.num_x_slots = way.num_x_slots;
  args.num_early_copies = way.num_early_copies;
  args.num_copies = way.num_copies;
  args.out_is_float = params.out_dtype == DType::float32;
  args.silu = params.silu;
  return args;
}

stream::RingShape make_ring(const StreamGemm& way, const Variant& variant) {
  return {variant.weight_bytes, variant.x_bytes, way.num_slots, way.num_x_slots};
}

bool fits(const stream::Args& args, const StreamGemm& way, const Variant& variant) {
  const stream::RingShape ring = make_ring(way, variant);
  const int end_bytes =
      variant.end_bytes(args.adds_up() ? way.splits : 0, ceil_div(way.tile_rows / 8, way.splits));
  const bool has_one_tile = args.tiles_each == 1 && args.more_tiles == 0;
  return args.rows <= way.tile_rows && args.chunks_each >= 1 && way.num_x_slots <= way.num_slots &&
         ring.data_bytes() >= end_bytes && (!args.adds_up() || has_one_tile);
}

int shared_bytes_per_cta() {
  int device = 0, available = 0;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  OPTIMUS_CUDA_CHECK(
      cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return available - kLeftBytes;
}

int shared_bytes_of(const StreamGemm& way, const Variant& variant) {
  return kAlignmentBytes + make_ring(way, variant).bytes();
}

// Clusters of `splits` CTAs that run at once: fewer than would fill the SMs, since a cluster lies in one
// of the GPU's groups of SMs.
int clusters_at_once(const StreamGemm& way, const Variant& variant, int splits) {
  const auto shared_bytes = static_cast<size_t>(shared_bytes_of(way, variant));
  OPTIMUS_CUDA_CHECK(cudaFuncSetAttribute(
      variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(splits);
  config.blockDim = dim3(variant.threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  OPTIMUS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, variant.kernel, &config));
  return clusters;
}

// One wave of CTAs with equal shares: the two finest splits of k that the SMs take, or whole tiles
// in rounds. Too few CTAs do not keep the memory busy.
std::vector<std::pair<int, int>> splits_and_ctas(const StreamGemm& way, const Variant& variant,
                                                 int num_tiles, int num_chunks) {
  const int sms = device_properties().num_sms;
  std::vector<std::pair<int, int>> found;
  for (int splits = std::min(kMaxSplits, num_chunks); splits > 1 && found.size() < 2; --splits) {
    if (splits * num_tiles > sms || num_tiles > clusters_at_once(way, variant, splits)) continue;
    found.emplace_back(splits, splits * num_tiles);
  }
  if (found.size() < 2) found.emplace_back(1, ceil_div(num_tiles, ceil_div(num_tiles, sms)));
  while (found.size() > 1 && found.back().second < kMinBusySms * sms) found.pop_back();
  return found;
}

int copies(const StreamGemm& way, const Variant& variant, int bytes) {
  return std::max(1, std::min(way.num_slots, bytes / variant.weight_bytes));
}

void set_slots(StreamGemm& way, const Variant& variant, int bytes) {
  constexpr int kBarrier = 8;
  const int left = bytes - kAlignmentBytes - 2 * kBarrier;
  const int x_slot = variant.x_bytes + kBarrier, slot = variant.weight_bytes + 2 * kBarrier;
  if (way.tile_rows <= kFewRows) {
    way.num_slots = way.num_x_slots = left / (slot + x_slot);
  } else {
    way.num_x_slots = (left - kXSlots * x_slot) / slot >= kXSlots ? kXSlots : kMinXSlots;
    way.num_slots = (left - way.num_x_slots * x_slot) / slot;
  }
  way.num_copies =
      way.tile_rows >= kManyRows ? copies(way, variant, kManyRowsBytes) : way.num_slots;
}

}  // namespace

// Compiled for compute capability 9.0 alone; tensor maps want alignment.
bool stream_gemm_takes(const GemmParams& params) {
  const size_t out_row = params.n / (params.silu ? 2 : 1) * dtype_size(params.out_dtype);
  if (params.silu && params.n % (2 * kGatesInTurn) != 0) return false;
  if (params.silu && params.out_dtype != DType::bfloat16) return false;
  const DeviceProperties& device = device_properties();
  return device.major == 9 && device.code == 90 && params.rows >= 1 &&
         params.rows <= kStreamGemmMaxRows && params.dtype == DType::bfloat16 &&
         params.k % 8 == 0 && out_row % 16 == 0 && is_aligned(params.x) &&
         is_aligned(params.packed_weight) && is_aligned(params.out);
}

std::vector<StreamGemm> stream_gemm_candidates(const GemmParams& params) {
  std::vector<StreamGemm> found;
  if (!stream_gemm_takes(params)) return found;
  const int bytes = shared_bytes_per_cta();
  int tile_rows = kStreamGemmMaxRows;
  for (const Variant& variant : variants()) {
    if (variant.tile_rows >= params.rows) tile_rows = std::min(tile_rows, variant.tile_rows);
  }
  for (const Variant& variant : variants()) {
    if (variant.tile_rows != tile_rows) continue;
    StreamGemm way{};
    way.tile_n = variant.tile_n;
    way.tile_rows = tile_rows;
    set_slots(way, variant, bytes);
    const int num_tiles = ceil_div(params.n, way.tile_n);
    const int num_chunks = ceil_div(params.k, variant.stage_columns);
    for (auto [splits, ctas] : splits_and_ctas(way, variant, num_tiles, num_chunks)) {
      way.splits = splits;
      way.ctas = ctas;
      if (!fits(make_args(params, way, variant), way, variant)) continue;
      for (int early : kEarlyBytes) {
        way.num_early_copies = copies(way, variant, early);
        found.push_back(way);
      }
    }
  }
  return found;
}

void stream_gemm(const GemmParams& params, const StreamGemm& way, cudaStream_t stream) {
  const Variant& variant = find_variant(way);
  const stream::Args args = make_args(params, way, variant);
  OPTIMUS_CHECK(stream_gemm_takes(params) && fits(args, way, variant),
                "[gemm] the streaming kernel does not take rows ", params.rows, ", n ", params.n,
                ", k ", params.k, " as ", describe(way));
  const CUtensorMap weight_map =
      make_tensor_map("gemm", params.packed_weight, params.n, params.k, way.tile_n);
  const CUtensorMap x_map = make_tensor_map("gemm", params.x, params.rows, params.k, way.tile_rows);
  const int shared_bytes = shared_bytes_of(way, variant);
  OPTIMUS_CUDA_CHECK(cudaFuncSetAttribute(
      variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  launch(variant.kernel,
         {dim3(way.splits, way.ctas / way.splits), dim3(variant.threads), way.splits,
          static_cast<size_t>(shared_bytes)},
         stream, args, weight_map, x_map);
}

std::string describe(const StreamGemm& way) {
  return concat("stream ", way.tile_n, "x", way.tile_rows, ", ", way.ctas, " CTAs, k in ",
                way.splits, ", ", way.num_slots, "+", way.num_x_slots, " stages, ",
                way.num_early_copies, " early");
}

}  // namespace optimus::cuda
