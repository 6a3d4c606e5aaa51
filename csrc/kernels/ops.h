// The catalogue of operations: one params struct and one function each, the same names on the CPU
// (kernels/cpu, the oracle) and on CUDA. Raw pointers, the shape beside every pointer, row-major
// unless strides are given. No op allocates; all take an explicit Execution. ops.cpp dispatches.
//
// Words: a *row* is one position of one request computed in this step. Row i attends to keys
// [0, kv_limits[i]) of its own request. K and V live in pages:
//   k_pages, v_pages  [num_pages, num_kv_heads, page_size, head_dim]      (per layer)
// and position p of a request is entry p % page_size of page page_table[p / page_size].
#pragma once

#include <cstdint>

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

// out = silu(gate) * up, where a row of gate_up is [gate | up].
struct SiluMulParams {
  const void* gate_up;  // [rows, 2 * intermediate]
  void* out;            // [rows, intermediate]
  int rows, intermediate;
  DType dtype;
};
void silu_mul(const SiluMulParams&, const Execution&);

// out[m, n] = sum_k x[m, k] * weight[n, k], fp32 accumulation in ascending k for every element:
// a row's result does not depend on how many rows share the call ("batch-invariant").
// `packed_weight` comes from pack_gemm_weight: panels of kGemmPanel output columns,
// [ceil(n / kGemmPanel), k, kGemmPanel], zero-padded.
constexpr int kGemmPanel = 32;
struct GemmParams {
  const void* x;              // [rows, k]
  const void* packed_weight;  // [ceil(n / kGemmPanel), k, kGemmPanel]
  void* out;                  // [rows, n]
  int rows, n, k;
  DType dtype;      // of x and packed_weight
  DType out_dtype;  // of out
};
void gemm(const GemmParams&, const Execution&);
size_t packed_gemm_weight_size(int n, int k);  // elements
// weight [n, k] (row-major) -> packed; CPU only, done once at load.
void pack_gemm_weight(const void* weight, void* packed, int n, int k, DType dtype);

// --------------------------------------------------------------------------------------- attention

// Splits qkv, normalises each q and k head (RMS, when the weights are given), rotates the first
// `rotary_dim` elements of each head (half-split pairs: element j with j + rotary_dim / 2, angle
// position * inv_freq[j]), writes q, and writes k and v to their pages.
struct QkNormRopeKvWriteParams {
  const void* qkv;            // [rows, (num_q_heads + 2 * num_kv_heads) * head_dim]
  const void* q_norm_weight;  // [head_dim], or null
  const void* k_norm_weight;  // [head_dim], or null
  const float* inv_freq;      // [rotary_dim / 2]
  const int32_t* positions;   // [rows]
  const int32_t* kv_slots;    // [rows] page * page_size + entry, where this row's K and V go
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
};
void block_attention(const BlockAttentionParams&, const Execution&);

// Copies whole pages inside one pool: for every layer, K and V of src_pages[i] to dst_pages[i].
struct KvCopyParams {
  void* const* k_pages;      // [num_layers] base pointers
  void* const* v_pages;      // [num_layers]
  const int32_t* src_pages;  // [num_copies]
  const int32_t* dst_pages;  // [num_copies]
  int num_layers, num_copies;
  size_t page_bytes;  // num_kv_heads * page_size * head_dim * element size
};
void kv_copy(const KvCopyParams&, const Execution&);

// ---------------------------------------------------------------------------------- decode state

constexpr int kMaxBlockLength = 1024;

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

// Expands the host's plan into rows, from the device-resident state. Writes StepRows and moves
// statuses: a fed fresh position becomes cached (in block mode those of the current block stay
// fresh: they are fed every step), a fed absent mask becomes present.
//   decode sequence, chunk: fresh positions and the first chunk_lengths[s] masks of the current
//     block; with refresh[s] every position of a previous block that still has fresh ones. The
//     caller keeps the window such that no absent mask precedes a known position.
//   decode sequence, block: all positions of the current block; the previous block as above.
//   decode sequence, ar: the last known token.
//   prefill sequence: prefill_tokens[prefill_offsets[s] ...], prefill_lens[s] of them, from position
//     prefill_starts[s]; kv_limit = end of the block (prefill_causal: position + 1).
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
};
void build_rows(const BuildRowsParams&, const Execution&);

// One logits row's candidate, and whether it was committed.
struct Candidates {
  int32_t* token_ids;  // [max_rows]
  float* confidence;   // [max_rows] probability under softmax(logits / temperature), unfiltered
  float* logprob;      // [max_rows] log probability under softmax(logits), temperature 1
  float* entropy;      // [max_rows] of softmax(logits / temperature), nats
  uint8_t* committed;  // [max_rows]
};

// Reads the logits once, picks a token per row (argmax, or Gumbel-max over the top-k/top-p set with
// noise that is a function of (seed, position, denoise step, token)), applies the slot's unmasking
// strategy to the slot's rows, commits into the state, and slides the window of a slot whose block
// has no mask left. The quota of a step is n_t = B / denoising_steps (+1 in the first
// B % denoising_steps steps), at least 1 and at most the rows there are:
//   low_confidence_dynamic: every row with confidence > threshold if at least n_t, else the n_t best
//   low_confidence_static:  the n_t best;   sequential: the first n_t
//   entropy_bounded:        by ascending entropy while the running sum stays <= entropy_bound, >= 1
// Ties go to the lower position. Source: the SDAR generation script's rules (JetAstra/SDAR).
struct UnmaskParams {
  const void* logits;            // [num_logit_rows, logits_stride], of which vocab_size are read
  const int32_t* logit_slots;    // [num_logit_rows] rows of a slot are contiguous, ascending
  const int32_t* logit_offsets;  // [num_logit_rows]
  DecodeState state;
  Candidates out;
  int32_t* num_fresh;   // [num_slots] after the step: fresh positions in the window
  int32_t* num_masked;  // [num_slots] after the step: masks in the current block
  int num_logit_rows, vocab_size;
  RowMode mode;
  DType dtype;            // of logits
  int logits_stride = 0;  // 0 = vocab_size; larger when the vocabulary is padded
};
void unmask(const UnmaskParams&, const Execution&);

}  // namespace optimus
