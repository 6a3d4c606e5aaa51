// Host side of block attention: argument checks, the workspace's layout, tensor maps, launches.
#include <algorithm>

#include "core/launch.cuh"
#include "kernels/cuda/block_attention_cut.h"
#include "kernels/cuda/block_attention_kernel.cuh"
#include "kernels/cuda/block_attention_schedule.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_map.cuh"

namespace optimus::cuda {
namespace attention {
namespace {

void check_shape(const BlockAttentionParams& params) {
  OPTIMUS_CHECK(params.dtype == DType::bfloat16, "[block_attention] dtype must be bfloat16, got ",
                dtype_name(params.dtype));
  OPTIMUS_CHECK(params.head_dim == 64 || params.head_dim == 128,
                "[block_attention] head_dim must be 64 or 128, got ", params.head_dim);
  OPTIMUS_CHECK(params.num_kv_heads >= 1 && params.num_q_heads >= 1 &&
                    params.num_q_heads % params.num_kv_heads == 0 &&
                    params.num_q_heads / params.num_kv_heads <= 16,
                "[block_attention] num_q_heads must be 1 to 16 times num_kv_heads, got ",
                params.num_q_heads, " and ", params.num_kv_heads);
  OPTIMUS_CHECK(params.num_seqs >= 0 && params.max_rows >= 0,
                "[block_attention] num_seqs and max_rows must be >= 0, got ", params.num_seqs,
                " and ", params.max_rows);
}

void check_step(const BlockAttentionParams& params) {
  check_shape(params);
  OPTIMUS_CHECK(params.workspace != nullptr, "[block_attention] workspace must not be null");
  size_t needed = block_attention_workspace_bytes(params);
  OPTIMUS_CHECK(params.workspace_bytes >= needed,
                "[block_attention] workspace_bytes must be >= ", needed, ", got ",
                params.workspace_bytes);
  OPTIMUS_CHECK(params.cu_seqlens_q != nullptr && params.kv_limits != nullptr,
                "[block_attention] null pointer for cu_seqlens_q or kv_limits");
}

void check_layer(const BlockAttentionParams& params) {
  check_step(params);
  int page_size = params.page_size;
  OPTIMUS_CHECK(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
                "[block_attention] page_size must be 16, 32, 64 or 128, got ", page_size);
  OPTIMUS_CHECK(params.scale > 0, "[block_attention] scale must be > 0, got ", params.scale);
  OPTIMUS_CHECK(params.q != nullptr && params.k_pages != nullptr && params.v_pages != nullptr &&
                    params.page_table != nullptr && params.out != nullptr,
                "[block_attention] null pointer for q, k_pages, v_pages, page_table or out");
}

// Every sequence has at most one item more than its packed rows fill, of half the rows at least.
Workspace layout_workspace(const BlockAttentionParams& params) {
  Workspace ws = {};
  int packed_rows = params.max_rows * (params.num_q_heads / params.num_kv_heads);
  ws.num_shares = device_properties().num_sms;
  ws.max_items = params.num_seqs + packed_rows / kHalfPackedRows;
  ws.partial_rows = std::min(kMaxPackedRows, (packed_rows + 15) / 16 * 16);
  char* base = static_cast<char*>(params.workspace);
  auto take = [&](size_t bytes) {
    char* at = base + ws.bytes;
    ws.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  size_t partial_rows = size_t{2} * ws.num_shares * ws.partial_rows;
  ws.shares = reinterpret_cast<Share*>(take(sizeof(Share) * ws.num_shares));
  ws.claims = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t)));
  ws.kv_policy = reinterpret_cast<uint64_t*>(take(sizeof(uint64_t)));
  ws.arrivals = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t) * ws.num_shares));
  ws.left_rows = reinterpret_cast<uint32_t*>(take(sizeof(uint32_t) * 2 * ws.num_shares));
  ws.items = reinterpret_cast<Item*>(take(sizeof(Item) * ws.max_items));
  ws.cost_offsets = reinterpret_cast<int*>(take(sizeof(int) * ws.max_items));
  ws.next_pairs =
      reinterpret_cast<int*>(take(sizeof(int) * kDealingWays * ws.max_items * params.num_kv_heads));
  ws.partial_ml = reinterpret_cast<float2*>(take(sizeof(float2) * partial_rows));
  ws.partial_out = reinterpret_cast<float*>(take(sizeof(float) * partial_rows * params.head_dim));
  return ws;
}

// K or V pages as rows of head_dim elements; a box is 64 columns by the keys of a tile that share a
// page. The number of pages is not known here, so the row bound is nominal.
CUtensorMap make_page_map(const void* pages, int head_dim, int page_size) {
  return make_tensor_map("block_attention", pages, 0x7fffffff, head_dim,
                         std::min(page_size, kTileKeys));
}

template <int kHeadDim>
void launch_attention(const BlockAttentionParams& params, const Workspace& ws,
                      cudaStream_t stream) {
  using Layout = SharedLayout<kHeadDim>;
  // Claims are of pairs whose items have all of a sequence's rows.
  const int most_pairs = std::min(params.num_seqs, params.max_rows) * params.num_kv_heads;
  auto* kernel = may_claim(most_pairs, ws.num_shares) ? attention_kernel<kHeadDim, true>
                                                      : attention_kernel<kHeadDim, false>;
  int device = 0, available = 0;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  OPTIMUS_CUDA_CHECK(
      cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const bool bulk = device_properties().code >= 90;
  const int beside_slots = Layout::bytes(0, bulk);
  int num_slots = std::min(kMaxSlots, (available - beside_slots) / (2 * kTileBytes<kHeadDim>));
  // Two warpgroups that take tiles in turn hold the V of one while they wait for the one after next.
  const int least_slots = bulk ? 3 : 1;
  OPTIMUS_CHECK(num_slots >= least_slots, "[block_attention] needs ",
                Layout::bytes(least_slots, bulk),
                " bytes of shared memory per block, this GPU has ", available);
  int shared_bytes = Layout::bytes(num_slots, bulk);
  OPTIMUS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  CUtensorMap k_map = {}, v_map = {};
  if (bulk) {
    k_map = make_page_map(params.k_pages, kHeadDim, params.page_size);
    v_map = make_page_map(params.v_pages, kHeadDim, params.page_size);
  }
  const int group = params.num_q_heads / params.num_kv_heads;
  int page_shift = 0;
  while (1 << page_shift < params.page_size) ++page_shift;
  AttentionArgs args = {static_cast<const __nv_bfloat16*>(params.q),
                        static_cast<const __nv_bfloat16*>(params.k_pages),
                        static_cast<const __nv_bfloat16*>(params.v_pages),
                        params.kv_limits,
                        params.page_table,
                        static_cast<__nv_bfloat16*>(params.out),
                        params.num_q_heads,
                        params.num_kv_heads,
                        group,
                        inverse_of(group),
                        inverse_of(params.num_kv_heads),
                        page_shift,
                        params.page_table_stride,
                        num_slots,
                        params.scale * 1.44269504f,
                        params.merge_wait_cycles,
                        ws};
  launch(kernel, {dim3(ws.num_shares), dim3(kThreads), 1, static_cast<size_t>(shared_bytes)},
         stream, args, k_map, v_map);
}

}  // namespace
}  // namespace attention

size_t block_attention_workspace_bytes(const BlockAttentionParams& params) {
  attention::check_shape(params);
  return attention::layout_workspace(params).bytes;
}

void block_attention_schedule(const BlockAttentionParams& params, cudaStream_t stream) {
  if (params.num_seqs == 0 || params.max_rows == 0) return;
  attention::check_step(params);
  attention::launch_schedule(params, attention::layout_workspace(params), stream);
}

void block_attention(const BlockAttentionParams& params, cudaStream_t stream) {
  if (params.num_seqs == 0 || params.max_rows == 0) return;
  attention::check_layer(params);
  attention::Workspace ws = attention::layout_workspace(params);
  if (params.head_dim == 128) {
    attention::launch_attention<128>(params, ws, stream);
  } else {
    attention::launch_attention<64>(params, ws, stream);
  }
}

}  // namespace optimus::cuda
