// Paged attention of ragged rows, grouped by KV head.
//
// A task is up to kAttentionLanes packed queries (rows x the GQA group) of one sequence and KV
// head. It walks its keys in tiles of kAttentionKeys positions, anchored at position 0 whatever the
// page size, copies each tile from its pages to fp32 scratch, and hands it to the vector routine:
// an online softmax. So the order of all sums depends on key positions alone. Tasks cost what their
// sequences are long, so threads draw them one by one.
#include <algorithm>
#include <atomic>
#include <limits>

#include "core/buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus::cpu {
namespace {

constexpr int kMaxHeadDim = 512;
constexpr int64_t kMinFlopsPerThread = 200000;

struct Scratch {
  Buffer<float> q{kMaxHeadDim * kAttentionLanes};
  Buffer<float> k{kAttentionKeys * kMaxHeadDim};
  Buffer<float> v{kAttentionKeys * kMaxHeadDim};
  Buffer<float> out{kAttentionLanes * kMaxHeadDim};
  Buffer<float> transposed{kAttentionKeys * kMaxHeadDim};
  alignas(64) float scores[kAttentionKeys * kAttentionLanes];
  alignas(64) float max[kAttentionLanes];
  alignas(64) float sum[kAttentionLanes];
  alignas(64) int32_t limits[kAttentionLanes];
};

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

struct Task {
  int seq, kv_head;
  int first;  // packed query of the sequence: row * group + head within the group
  int lanes;
};

int group_size(const BlockAttentionParams& params) {
  return params.num_q_heads / params.num_kv_heads;
}

int tiles_of(const BlockAttentionParams& params, int seq) {
  int queries = (params.cu_seqlens_q[seq + 1] - params.cu_seqlens_q[seq]) * group_size(params);
  return (queries + kAttentionLanes - 1) / kAttentionLanes;
}

// Finds tasks by index, for ascending indices, without a table.
class TaskCursor {
 public:
  explicit TaskCursor(const BlockAttentionParams& params) : params_(params) {}

  Task at(int64_t index) {
    while (index >= first_ + tasks_of(seq_)) first_ += tasks_of(seq_++);
    int tile = static_cast<int>((index - first_) / params_.num_kv_heads);
    int kv_head = static_cast<int>((index - first_) % params_.num_kv_heads);
    int rows = params_.cu_seqlens_q[seq_ + 1] - params_.cu_seqlens_q[seq_];
    int queries = rows * group_size(params_), tiles = tiles_of(params_, seq_);
    int begin = static_cast<int>(static_cast<int64_t>(queries) * tile / tiles);
    int end = static_cast<int>(static_cast<int64_t>(queries) * (tile + 1) / tiles);
    return {seq_, kv_head, begin, end - begin};
  }

 private:
  int64_t tasks_of(int seq) const {
    return static_cast<int64_t>(tiles_of(params_, seq)) * params_.num_kv_heads;
  }

  const BlockAttentionParams& params_;
  int seq_ = 0;
  int64_t first_ = 0;  // index of the sequence's first task
};

// Element offset, in q and out, of a task's packed query.
size_t query_offset(const BlockAttentionParams& params, const Task& task, int lane) {
  int group = group_size(params), packed = task.first + lane;
  size_t row = params.cu_seqlens_q[task.seq] + packed / group;
  size_t head = task.kv_head * group + packed % group;
  return (row * params.num_q_heads + head) * params.head_dim;
}

// Transposes the scaled queries and resets the running state; unused lanes repeat the last query,
// so that they stay finite. Returns the number of keys the task reads.
template <class T>
int load_queries(const BlockAttentionParams& params, const Task& task, int head_stride,
                 Scratch& scratch) {
  const T* q = static_cast<const T*>(params.q);
  int num_keys = 0;
  for (int lane = 0; lane < kAttentionLanes; ++lane) {
    int source = std::min(lane, task.lanes - 1);
    const T* in = q + query_offset(params, task, source);
    for (int d = 0; d < params.head_dim; ++d) {
      scratch.q[d * kAttentionLanes + lane] = to_float(in[d]) * params.scale;
    }
    int row = params.cu_seqlens_q[task.seq] + (task.first + source) / group_size(params);
    scratch.limits[lane] = params.kv_limits[row];
    num_keys = std::max(num_keys, scratch.limits[lane]);
  }
  std::fill_n(scratch.max, kAttentionLanes, -std::numeric_limits<float>::infinity());
  std::fill_n(scratch.sum, kAttentionLanes, 0.0f);
  std::fill_n(scratch.out.data(), kAttentionLanes * head_stride, 0.0f);
  return num_keys;
}

// Copies K and V of positions [first_key, first_key + num_keys) to scratch, page by page. The
// padding of each V entry up to head_stride is zeroed.
template <class T>
void load_keys(const BlockAttentionParams& params, const Task& task, int first_key, int num_keys,
               int head_stride, Scratch& scratch) {
  const SimdKernels<T>& simd = simd_kernels<T>();
  const int32_t* table =
      params.page_table + static_cast<size_t>(task.seq) * params.page_table_stride;
  for (int done = 0; done < num_keys;) {
    int position = first_key + done, entry = position % params.page_size;
    int count = std::min(num_keys - done, params.page_size - entry);
    size_t page = table[position / params.page_size];
    size_t at =
        ((page * params.num_kv_heads + task.kv_head) * params.page_size + entry) * params.head_dim;
    const T* k = static_cast<const T*>(params.k_pages) + at;
    const T* v = static_cast<const T*>(params.v_pages) + at;
    float* out_k = scratch.k.data() + done * head_stride;
    float* out_v = scratch.v.data() + done * head_stride;
    if (head_stride == params.head_dim) {
      simd.widen(k, out_k, count * head_stride);
      simd.widen(v, out_v, count * head_stride);
    } else {
      for (int i = 0; i < count; ++i) {
        simd.widen(k + i * params.head_dim, out_k + i * head_stride, params.head_dim);
        simd.widen(v + i * params.head_dim, out_v + i * head_stride, params.head_dim);
        std::fill(out_v + i * head_stride + params.head_dim, out_v + (i + 1) * head_stride, 0.0f);
      }
    }
    done += count;
  }
}

template <class T>
void store_out(const BlockAttentionParams& params, const Task& task, int head_stride,
               Scratch& scratch) {
  for (int lane = 0; lane < task.lanes; ++lane) {
    float* row = scratch.out.data() + lane * head_stride;
    float inverse = 1.0f / scratch.sum[lane];
    // + 0 turns -0 into 0: keys a lane does not see may have changed a zero's sign, nothing else.
    for (int d = 0; d < params.head_dim; ++d) row[d] = row[d] * inverse + 0.0f;
    simd_kernels<T>().narrow(row, static_cast<T*>(params.out) + query_offset(params, task, lane),
                             params.head_dim);
  }
}

template <class T>
void run_task(const BlockAttentionParams& params, const Task& task) {
  Scratch& scratch = thread_scratch();
  const int head_stride = round_up(params.head_dim, kLanes);
  const int num_keys = load_queries<T>(params, task, head_stride, scratch);
  AttentionTile tile{};
  tile.q = scratch.q.data();
  tile.k = scratch.k.data();
  tile.v = scratch.v.data();
  tile.limits = scratch.limits;
  tile.scores = scratch.scores;
  tile.transposed = scratch.transposed.data();
  tile.max = scratch.max;
  tile.sum = scratch.sum;
  tile.out = scratch.out.data();
  tile.lanes = task.lanes;
  tile.head_dim = params.head_dim;
  tile.head_stride = head_stride;
  for (int first = 0; first < num_keys; first += kAttentionKeys) {
    tile.first_key = first;
    tile.num_keys = std::min(kAttentionKeys, num_keys - first);
    load_keys<T>(params, task, first, tile.num_keys, head_stride, scratch);
    simd_kernels<T>().attention_tile(tile);
  }
  store_out<T>(params, task, head_stride, scratch);
}

void check_rows(const BlockAttentionParams& params) {
  const int32_t* cu = params.cu_seqlens_q;
  OPTIMUS_CHECK(cu[0] == 0, "[block_attention] cu_seqlens_q[0] must be 0, got ", cu[0]);
  for (int s = 0; s < params.num_seqs; ++s) {
    OPTIMUS_CHECK(cu[s + 1] >= cu[s], "[block_attention] cu_seqlens_q must not decrease, got ",
                  cu[s], " then ", cu[s + 1], " at sequence ", s);
    for (int row = cu[s]; row < cu[s + 1]; ++row) {
      int least = row == cu[s] ? 1 : params.kv_limits[row - 1];
      OPTIMUS_CHECK(params.kv_limits[row] >= least, "[block_attention] kv_limits[", row,
                    "] must be >= ", least, " (1, and no decrease within a sequence), got ",
                    params.kv_limits[row]);
    }
    if (cu[s] == cu[s + 1]) continue;
    int pages = (params.kv_limits[cu[s + 1] - 1] + params.page_size - 1) / params.page_size;
    OPTIMUS_CHECK(pages <= params.page_table_stride, "[block_attention] sequence ", s, " needs ",
                  pages, " pages, page_table_stride is ", params.page_table_stride);
    for (int i = 0; i < pages; ++i) {
      int page = params.page_table[static_cast<size_t>(s) * params.page_table_stride + i];
      OPTIMUS_CHECK(page >= 0, "[block_attention] page ", i, " of sequence ", s,
                    " must be >= 0, got ", page);
    }
  }
}

void check(const BlockAttentionParams& params) {
  OPTIMUS_CHECK(params.num_seqs >= 0 && params.page_size >= 1,
                "[block_attention] need num_seqs >= 0 and page_size >= 1, got ", params.num_seqs,
                " and ", params.page_size);
  OPTIMUS_CHECK(params.num_kv_heads >= 1 && params.num_q_heads >= 1 &&
                    params.num_q_heads % params.num_kv_heads == 0,
                "[block_attention] num_q_heads must be a multiple of num_kv_heads, got ",
                params.num_q_heads, " and ", params.num_kv_heads);
  OPTIMUS_CHECK(params.head_dim >= 1 && params.head_dim <= kMaxHeadDim,
                "[block_attention] head_dim must be in 1..", kMaxHeadDim, ", got ",
                params.head_dim);
  if (params.num_seqs == 0) return;
  OPTIMUS_CHECK(params.q != nullptr && params.k_pages != nullptr && params.v_pages != nullptr &&
                    params.cu_seqlens_q != nullptr && params.kv_limits != nullptr &&
                    params.page_table != nullptr && params.out != nullptr,
                "[block_attention] null pointer for q, k_pages, v_pages, cu_seqlens_q, kv_limits, "
                "page_table or out");
  check_rows(params);
}

}  // namespace

void block_attention(const BlockAttentionParams& params, ThreadPool& threads) {
  check(params);
  int64_t num_tasks = 0, flops = 0;
  for (int s = 0; s < params.num_seqs; ++s) {
    num_tasks += static_cast<int64_t>(tiles_of(params, s)) * params.num_kv_heads;
    for (int row = params.cu_seqlens_q[s]; row < params.cu_seqlens_q[s + 1]; ++row) {
      flops += 4ll * params.kv_limits[row] * params.num_q_heads * params.head_dim;
    }
  }
  if (num_tasks == 0) return;
  int64_t shares =
      std::min<int64_t>({threads.num_threads(), num_tasks, 1 + flops / kMinFlopsPerThread});
  std::atomic<int64_t> next{0};
  dispatch_dtype(params.dtype, [&](auto zero) {
    threads.parallel_for(shares, 1, [&](int64_t, int64_t) {
      TaskCursor cursor(params);
      for (int64_t i = next++; i < num_tasks; i = next++) {
        run_task<decltype(zero)>(params, cursor.at(i));
      }
    });
  });
}

// Threads draw tasks as they go: nothing to plan.
void block_attention_schedule(const BlockAttentionParams&, ThreadPool&) {}

}  // namespace optimus::cpu
