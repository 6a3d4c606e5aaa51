// The catalogue of operations: one params struct and one function each, the same names on the CPU
// (kernels/cpu, the oracle) and on CUDA. Raw pointers, the shape beside every pointer, row-major
// unless strides are given. No op allocates; all take an explicit Execution. ops.cpp dispatches.
//
// Words: a *row* is one position of one request computed in this step. Row i attends to keys
// [0, kv_limits[i]) of its own request. K and V live in pages:
//   k_pages, v_pages  [num_pages, num_kv_heads, page_size, head_dim]      (per layer)
// and position p of a request is entry p % page_size of page page_table[p / page_size].
//
// Padding: a CUDA graph replays a whole bucket of rows, so rows behind the real ones exist. Such a
// row has token id 0, position 0, kv_limit 1 and kv_slot -1; it belongs to no sequence. Ops that
// work row by row compute it like any other (finite or not, nobody reads it), but a kv_slot < 0
// writes no K or V, and block_attention leaves rows of no sequence alone. A padding logits row has
// logit_row 0 and logit_slot -1: unmask does not look at it. Counts are always the real counts.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/dtype.h"
#include "core/execution.h"

namespace optimus {

// ---------------------------------------------------------------------------- dense building blocks

struct EmbeddingParams {
  const void* table;         // [vocab_size, hidden]
  const int32_t* token_ids;  // [rows]
  void* out;                 // [rows, hidden]
  int rows, hidden;
  DType dtype;
  bool packed = false;  // CPU only: table comes from pack_gemm_weight, shared with a tied head
};
void embedding(const EmbeddingParams&, const Execution&);

// out = x / rms(x) * weight. With `residual`: residual += x first (in place), and the sum is normed.
// With `row_idx` (distinct rows): output row i is the norm of row row_idx[i] of x and residual.
struct RmsNormParams {
  const void* x;           // [input rows, hidden]
  void* residual;          // [input rows, hidden], or null
  const int32_t* row_idx;  // [rows], or null
  const void* weight;      // [hidden]
  void* out;               // [rows, hidden]; may alias x when row_idx is null
  int rows, hidden;
  float eps;
  DType dtype;
};
void rms_norm(const RmsNormParams&, const Execution&);

// out = silu(gate) * up, where a row of gate_up is [gate | up], or with `in_turn` kGatesInTurn gates,
// as many ups, and so on (then intermediate is a multiple).
constexpr int kGatesInTurn = 8;
struct SiluMulParams {
  const void* gate_up;  // [rows, 2 * intermediate]
  void* out;            // [rows, intermediate]
  int rows, intermediate;
  DType dtype;
  bool in_turn = false;
};
void silu_mul(const SiluMulParams&, const Execution&);

// out[m, n] = sum_k x[m, k] * weight[n, k], fp32 accumulation in ascending k for every element:
// a row's result does not depend on how many rows share the call ("batch-invariant").
// On the CPU `packed_weight` comes from pack_gemm_weight: panels of kGemmPanel output columns,
// [ceil(n / kGemmPanel), k, kGemmPanel], zero-padded. On CUDA it is the weight itself, [n, k], and
// the chosen kernel fixes the order of sums; see kernels/cuda/kernels.h for planning ahead. There no
// kernel in the stream may write the weight: it is read while earlier kernels still run.
constexpr int kGemmPanel = 32;
struct GemmParams {
  const void* x;              // [rows, k]
  const void* packed_weight;  // [ceil(n / kGemmPanel), k, kGemmPanel]
  void* out;                  // [rows, n]
  int rows, n, k;
  DType dtype;      // of x and packed_weight
  DType out_dtype;  // of out
  // CUDA only: scratch of the library, kGemmWorkspaceBytes is enough; calls in flight may not share.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  // CUDA only, where gemm_takes_silu(): the rows of the weight are gates and ups in turn (see
  // SiluMulParams), and out [rows, n / 2] = silu(gate) * up, of products rounded to bf16.
  bool silu = false;
};
constexpr size_t kGemmWorkspaceBytes = size_t(32) << 20;
void gemm(const GemmParams&, const Execution&);
// Before serving: chooses, for products of one number of rows, the kernels that make `chain` the fastest.
// It calls gemm for each of them, and runs whatever lies between them in a step, over weights that no
// cache holds: kernels overlap, so what one costs depends on its neighbours. A product with `silu`
// stands for the one without too (its out has room for n columns), and gemm_takes_silu says from then
// on which of the two is faster. Products that have been planned keep their kernels. Does nothing on
// the CPU.
void plan_gemms(const std::vector<GemmParams>& products, const std::function<void()>& chain,
                const Execution&);
// Whether gemm takes these with `silu` and, where that was planned, it pays.
bool gemm_takes_silu(const GemmParams&, const Execution&);
size_t packed_gemm_weight_size(int n, int k);  // elements
// weight [n, k] (row-major) -> packed; CPU only, done once at load.
void pack_gemm_weight(const void* weight, void* packed, int n, int k, DType dtype);

// --------------------------------------------------------------------------------------- attention

// Splits qkv, normalises each q and k head (RMS, when the weights are given), rotates the first
// `rotary_dim` elements of each head (half-split pairs: element j with j + rotary_dim / 2, angle
// position * inv_freq[j]), writes q, and writes k and v to their pages. On CUDA positions and kv_slots
// are read while the kernel before this one may still run: they are the step's, not a layer's.
struct QkNormRopeKvWriteParams {
  const void* qkv;            // [rows, (num_q_heads + 2 * num_kv_heads) * head_dim]
  const void* q_norm_weight;  // [head_dim], or null
  const void* k_norm_weight;  // [head_dim], or null
  const float* inv_freq;      // [rotary_dim / 2]
  const int32_t* positions;   // [rows]
  const int32_t* kv_slots;    // [rows] page * page_size + entry of this row's K and V; < 0: nowhere
  void* q;                    // [rows, num_q_heads, head_dim]
  void* k_pages;              // [num_pages, num_kv_heads, page_size, head_dim]
  void* v_pages;              // [num_pages, num_kv_heads, page_size, head_dim]
  int rows, num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  float eps;
  DType dtype;
};
void qk_norm_rope_kv_write(const QkNormRopeKvWriteParams&, const Execution&);

// softmax(q k^T * scale) v for ragged rows over paged KV. Within a request kv_limits do not decrease.
// A row's result depends only on its own q and keys (fixed summation order): batch-invariant.
struct BlockAttentionParams {
  const void* q;                // [rows, num_q_heads, head_dim]
  const void* k_pages;          // [num_pages, num_kv_heads, page_size, head_dim]
  const void* v_pages;          // [num_pages, num_kv_heads, page_size, head_dim]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1] rows of sequence s are [cu[s], cu[s + 1])
  const int32_t* kv_limits;     // [rows], each >= 1
  const int32_t* page_table;    // [num_seqs, page_table_stride]
  void* out;                    // [rows, num_q_heads, head_dim]
  int num_seqs, num_q_heads, num_kv_heads, head_dim, page_size, page_table_stride;
  float scale;
  DType dtype;
  // CUDA only. The workspace holds the step's schedule and partial results: filled by
  // block_attention_schedule, then used by block_attention of every layer with the same
  // cu_seqlens_q, kv_limits, positions and shapes, num_seqs and max_rows among them; one step at a
  // time.
  void* workspace = nullptr;   // 256-byte aligned
  size_t workspace_bytes = 0;  // at least block_attention_workspace_bytes
  int max_rows = 0;            // bound on cu_seqlens_q[num_seqs], which only the device knows
  // For how long a CTA that has done its share waits for others that had parts of the same rows,
  // before it leaves the merge to the last of them.
  int64_t merge_wait_cycles = 100000;
  // [rows] where the step writes keys, in a sequence nowhere before its first row's; or null. Keys
  // before that, which no kernel behind block_attention_schedule may write, are read while the kernel
  // before block_attention still runs.
  const int32_t* positions = nullptr;
};
// On CUDA: bf16, head_dim 64 or 128, page_size 16, 32, 64 or 128, at most 16 q heads per KV head,
// scale > 0. The lengths are read on the device alone, so a captured graph serves any lengths within
// num_seqs, max_rows and page_table_stride. Where the step's keys are cut depends on all of its
// rows: the same call gives the same bits every time, but a row's bits may change with its batch.
void block_attention(const BlockAttentionParams&, const Execution&);
// Once per step, before the first layer's block_attention; reads num_seqs, the head counts,
// cu_seqlens_q, kv_limits, positions, max_rows and the workspace. Does nothing on the CPU.
void block_attention_schedule(const BlockAttentionParams&, const Execution&);
// From num_seqs, max_rows, the head counts and head_dim, for the current device; 0 on the CPU.
size_t block_attention_workspace_bytes(const BlockAttentionParams&, const Execution&);

// Copies whole pages inside one pool, or to another: for every layer, K and V of src_pages[i] to
// dst_pages[i]. No page is a source and a destination of one call. On CUDA the other pool may be
// page-locked host memory (preempted requests), and the arrays are read by the GPU.
struct KvCopyParams {
  void* const* k_pages;      // [num_layers] base pointers
  void* const* v_pages;      // [num_layers]
  const int32_t* src_pages;  // [num_copies]
  const int32_t* dst_pages;  // [num_copies]
  int num_layers, num_copies;
  size_t page_bytes;                   // num_kv_heads * page_size * head_dim * element size
  void* const* dst_k_pages = nullptr;  // [num_layers] the other pool, or null: the same pool
  void* const* dst_v_pages = nullptr;  // [num_layers]
};
void kv_copy(const KvCopyParams&, const Execution&);

// ---------------------------------------------------------------------------------- decode state

constexpr int kMaxBlockLength = 1024;
constexpr int kMaxStopTokens = 8;

// What a position of the decode window is. The mask state never comes from token ids: a prompt may
// hold the mask token's text.
enum PositionStatus : uint8_t {
  kAbsent = 0,   // masked, its KV was never computed: nobody sees it
  kPresent = 1,  // masked, its KV comes from a MASK input
  kFresh = 2,    // token known, KV missing or from a MASK input: must be a row once more
  kCached = 3,   // token known, KV computed from it
};

enum UnmaskingStrategy : uint8_t {
  kLowConfidenceDynamic = 0,
  kLowConfidenceStatic = 1,
  kSequential = 2,
  kEntropyBounded = 3,
};

// Per-request decode state, structure of arrays indexed by slot; it lives where the kernels run.
// The window of a slot is two blocks: [block_start - B, block_start) the previous block, which may
// hold positions that still have to be fed, and [block_start, block_start + B) the current one.
struct DecodeState {
  int32_t* block_start;         // [num_slots] first position of the current block
  int32_t* window_tokens;       // [num_slots, 2 * B] token ids where known
  uint8_t* window_status;       // [num_slots, 2 * B] PositionStatus
  int32_t* denoise_step;        // [num_slots] steps already spent on the current block
  int32_t* page_table;          // [num_slots, page_table_stride]
  float* temperature;           // [num_slots] 0 = greedy
  int32_t* top_k;               // [num_slots] 0 = off
  float* top_p;                 // [num_slots] 1 = off
  float* confidence_threshold;  // [num_slots]
  float* entropy_bound;         // [num_slots]
  int32_t* denoising_steps;     // [num_slots] 1..B
  uint8_t* unmasking_strategy;  // [num_slots]
  uint64_t* seed;               // [num_slots]
  // Where a request is done, so that a step planned before anybody looked has no rows of it.
  int32_t*
      first_output;  // [num_slots] position of its first own token: stop tokens count from there
  int32_t* end_position;    // [num_slots] behind the last token it may have
  int32_t* stop_token_ids;  // [num_slots, kMaxStopTokens] -1 = none
  uint8_t* ended;  // [num_slots] of its own tokens the last one, or a stop token, is known,
                   // and so is every token before
  int num_slots, block_length, page_table_stride;
};

// How decode rows are laid out.
enum class RowMode : uint8_t {
  chunk,  // fresh rows + masks of the current block; committed rows leave once cached
  block,  // every position of the current block, every step (the published reference)
  ar,     // B = 1, no mask rows: the last token's row predicts the next position (shifted logits)
};

// Rows of one step. Sequence s is one request: a prefill slice or decode rows, in ascending position.
struct StepRows {
  int32_t* token_ids;      // [max_rows]
  int32_t* positions;      // [max_rows]
  int32_t* kv_limits;      // [max_rows]
  int32_t* kv_slots;       // [max_rows]
  int32_t* cu_seqlens_q;   // [num_seqs + 1]
  int32_t* page_table;     // [num_seqs, page_table_stride] rows of the slots' tables, gathered
  int32_t* logit_rows;     // [max_rows] row index of each logits row
  int32_t* logit_slots;    // [max_rows] slot of each logits row
  int32_t* logit_offsets;  // [max_rows] position the logits row predicts, minus block_start
  int32_t* counts;         // [2] rows, logits rows
};

// Starts the decode windows of slots, which have not ended: of the current block (ar: of the position before block_start)
// the first num_fresh tokens are known and fresh, the rest is masked and absent; the previous block
// is cached. The other fields of the state are the host's to write.
struct OpenWindowsParams {
  DecodeState state;
  const int32_t* slots;         // [num_openings] distinct
  const int32_t* block_starts;  // [num_openings]
  const int32_t* num_fresh;     // [num_openings] 0..B
  const int32_t* tokens;        // [num_openings, B], of which num_fresh are read
  int num_openings;
  RowMode mode;
};
void open_windows(const OpenWindowsParams&, const Execution&);

// Expands the host's plan into rows, from the device-resident state. Writes StepRows and moves
// statuses: a fed fresh position becomes cached (in block mode those of the current block stay
// fresh: they are fed every step), a fed absent mask becomes present. A plan of more than max_rows
// rows throws on the CPU; on CUDA the rows behind are lost, and counts tells.
//   decode sequence, chunk: fresh positions and the first chunk_lengths[s] masks of the current
//     block; with refresh[s] every position of a previous block that still has fresh ones. The
//     caller keeps the window such that no absent mask precedes a known position.
//   decode sequence, block: all positions of the current block; the previous block as above.
//   decode sequence, ar: the last known token.
//   decode sequence whose slot has ended: no rows.
//   prefill sequence: prefill_tokens[prefill_offsets[s] ...], prefill_lens[s] of them, from position
//     prefill_starts[s]; kv_limit = end of the block (prefill_causal: position + 1).
constexpr uint64_t kNoCounts = ~uint64_t{0};
struct BuildRowsParams {
  DecodeState state;
  const int32_t* slots;            // [num_seqs]
  const int32_t* chunk_lengths;    // [num_seqs] masks to evaluate; ignored for prefill
  const uint8_t* refresh;          // [num_seqs]
  const int32_t* prefill_lens;     // [num_seqs] 0 = decode sequence
  const int32_t* prefill_starts;   // [num_seqs]
  const int32_t* prefill_offsets;  // [num_seqs] into prefill_tokens
  const int32_t* prefill_tokens;   // [total prefill rows]
  StepRows rows;
  int num_seqs, max_rows, page_size, mask_token_id;
  bool prefill_causal;
  RowMode mode;
  // Padding behind the real rows and logits rows up to `pad_rows_to` (at most max_rows), and empty
  // sequences of page 0 up to `pad_seqs_to` (which StepRows has room for); 0 = none. Where there are
  // more rows than that, none of these are padded.
  int pad_rows_to = 0, pad_seqs_to = 0;
  // CUDA only: page-locked memory that gets the counts in one word while the kernel still runs, rows
  // in its low half and logits rows in its high half; or null. Who has set it to kNoCounts can wait.
  uint64_t* host_counts = nullptr;
};
void build_rows(const BuildRowsParams&, const Execution&);

// One logits row's candidate, and whether it was committed.
struct Candidates {
  int32_t* token_ids;  // [max_rows]
  float* confidence;   // [max_rows] probability under softmax(logits / temperature), unfiltered
  float* logprob;      // [max_rows] log probability under softmax(logits), temperature 1
  float* entropy;      // [max_rows] of softmax(logits / temperature), nats
  uint8_t* committed;  // [max_rows]
  // The row's slot and offset once more, for whoever reads results when the rows are already those of
  // the next step; or null.
  int32_t* slots = nullptr;    // [max_rows]
  int32_t* offsets = nullptr;  // [max_rows]
};

// Reads the logits once, picks a token per row (argmax, or Gumbel-max over the top-k/top-p set with
// noise that is a function of (seed, position, denoise step, token)), applies the slot's unmasking
// strategy to the slot's rows, commits into the state, notes whether the slot has ended, and slides the
// window of a slot whose block has no mask left. The quota of a step is n_t = B / denoising_steps (+1 in the first
// B % denoising_steps steps), at least 1 and at most the rows there are:
//   low_confidence_dynamic: every row with confidence > threshold if at least n_t, else the n_t best
//   low_confidence_static:  the n_t best;   sequential: the first n_t
//   entropy_bounded:        by ascending entropy while the running sum stays <= entropy_bound, >= 1
// Ties go to the lower position. Source: the SDAR generation script's rules (JetAstra/SDAR).
struct UnmaskParams {
  const void* logits;  // [num_logit_rows, logits_stride], of which vocab_size are read
  // [num_logit_rows] rows of a slot are contiguous, ascending, block_length at most
  const int32_t* logit_slots;
  const int32_t* logit_offsets;  // [num_logit_rows]
  DecodeState state;
  Candidates out;
  int32_t* num_fresh;   // [num_slots] after the step: fresh positions in the window
  int32_t* num_masked;  // [num_slots] after the step: masks in the current block
  int num_logit_rows, vocab_size;
  RowMode mode;
  DType dtype;            // of logits
  int logits_stride = 0;  // 0 = vocab_size; larger when the vocabulary is padded
  // When given, the real number of logits rows (build_rows' counts + 1), at most num_logit_rows:
  // then a captured graph covers num_logit_rows rows and looks only at those.
  const int32_t* num_logit_rows_device = nullptr;
  // CUDA only: unmask_workspace_bytes, 16-byte aligned; all zero, as each call leaves it.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};
void unmask(const UnmaskParams&, const Execution&);
// For up to num_logit_rows rows.
size_t unmask_workspace_bytes(int num_logit_rows, int vocab_size);

}  // namespace optimus
