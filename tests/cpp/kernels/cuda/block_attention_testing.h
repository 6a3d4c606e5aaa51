// Steps of block_attention on the GPU with their pools, and the comparison with the CPU twin in fp32
// over the same bf16 values.
#pragma once

#include <memory>

#include "kernels/cuda/gpu_testing.h"

namespace optimus::testing::attention {

struct Shape {
  int num_q_heads, num_kv_heads, head_dim, page_size;
};

// The limits of each sequence's rows.
using Limits = std::vector<std::vector<int>>;

// Rows whose limits climb in blocks of `block` up to `last`.
inline std::vector<int> staircase(int rows, int block, int last) {
  std::vector<int> limits;
  for (int i = 0; i < rows; ++i) {
    limits.push_back(std::max(1, last - (rows - 1 - i) / block * block));
  }
  return limits;
}

// Rows, limits and page tables of one step; pages of a sequence past its last limit are -1.
struct Step {
  Step(Rng& rng, const Limits& limits, int page_size, int num_pages, int stride) {
    std::vector<int32_t> order = random_permutation(rng, num_pages);
    page_table.assign(limits.size() * stride, -1);
    size_t used = 0;
    for (size_t s = 0; s < limits.size(); ++s) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int>(limits[s].size()));
      kv_limits.insert(kv_limits.end(), limits[s].begin(), limits[s].end());
      int last = limits[s].empty() ? 0 : limits[s].back();
      for (int i = 0; i * page_size < last; ++i) page_table[s * stride + i] = order.at(used++);
    }
  }
  int num_rows() const { return cu_seqlens.back(); }
  std::vector<int32_t> cu_seqlens = {0}, kv_limits, page_table;
};

inline int pages_of(const Limits& limits, int page_size) {
  int pages = 0;
  for (const auto& seq : limits) pages += seq.empty() ? 0 : (seq.back() - 1) / page_size + 1;
  return pages;
}
inline int longest(const Limits& limits) {
  int last = 1;
  for (const auto& seq : limits) last = std::max(last, seq.empty() ? 1 : seq.back());
  return last;
}

// bf16 values in a bf16 and in an fp32 tensor.
struct Values {
  Values(Rng& rng, size_t count, float scale = 1.0f)
      : bf16(random_tensor(rng, DType::bfloat16, count, scale)), fp32(DType::float32, count) {
    for (size_t i = 0; i < count; ++i) fp32.set(i, bf16.get(i));
  }
  void set(size_t i, float value) {
    bf16.set(i, value);
    fp32.set(i, value);
  }
  Tensor bf16, fp32;
};

// A pool and the device memory of up to `max_seqs` sequences and `max_rows` rows, on which one step
// after another can run: as an engine holds it.
struct Fixture {
  Fixture(Rng& rng, Shape shape, int num_pages, int stride, int max_seqs, int max_rows)
      : shape(shape),
        stride(stride),
        max_seqs(max_seqs),
        max_rows(max_rows),
        q(rng, size_t(max_rows) * shape.num_q_heads * shape.head_dim),
        k(rng, size_t(num_pages) * shape.num_kv_heads * shape.page_size * shape.head_dim),
        v(rng, size_t(num_pages) * shape.num_kv_heads * shape.page_size * shape.head_dim),
        num_pages(num_pages),
        cu_seqlens(max_seqs + 1),
        kv_limits(max_rows),
        page_table(size_t(max_seqs) * stride) {
    device_q = std::make_unique<DeviceTensor>(q.bf16);
    BlockAttentionParams params = device_params(nullptr);
    workspace = DeviceBuffer<char>(cuda::block_attention_workspace_bytes(params));
  }

  // Entries no row may see become NaN, in K and in V.
  void poison_pages(const Step& step) {
    std::vector<int> entries(num_pages, 0);  // valid ones of each page
    for (size_t s = 0; s + 1 < step.cu_seqlens.size(); ++s) {
      if (step.cu_seqlens[s] == step.cu_seqlens[s + 1]) continue;
      int last = step.kv_limits[step.cu_seqlens[s + 1] - 1];
      for (int i = 0; i * shape.page_size < last; ++i) {
        entries[step.page_table[s * stride + i]] =
            std::min(shape.page_size, last - i * shape.page_size);
      }
    }
    size_t row = shape.head_dim, head = row * shape.page_size;
    for (int page = 0; page < num_pages; ++page) {
      for (int h = 0; h < shape.num_kv_heads; ++h) {
        size_t first = (size_t(page) * shape.num_kv_heads + h) * head;
        for (size_t i = first + entries[page] * row; i < first + head; ++i) {
          k.set(i, std::numeric_limits<float>::quiet_NaN());
          v.set(i, std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
  }

  void upload_pools() {
    device_k = std::make_unique<DeviceTensor>(k.bf16);
    device_v = std::make_unique<DeviceTensor>(v.bf16);
  }

  // Puts a step's arrays on the device; sequences up to max_seqs have no rows.
  void upload_step(const Step& step) {
    std::vector<int32_t> cu = step.cu_seqlens;
    cu.resize(max_seqs + 1, step.num_rows());
    std::vector<int32_t> table = step.page_table;
    table.resize(size_t(max_seqs) * stride, -1);
    std::vector<int32_t> limits = step.kv_limits;
    limits.resize(max_rows, -1);
    copy_to_device(cu_seqlens.data(), cu.data(), cu.size(), nullptr);
    copy_to_device(kv_limits.data(), limits.data(), limits.size(), nullptr);
    copy_to_device(page_table.data(), table.data(), table.size(), nullptr);
    OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  }

  // All but the pointers.
  BlockAttentionParams params_of(int num_seqs, DType dtype) const {
    BlockAttentionParams params{};
    params.num_seqs = num_seqs;
    params.num_q_heads = shape.num_q_heads;
    params.num_kv_heads = shape.num_kv_heads;
    params.head_dim = shape.head_dim;
    params.page_size = shape.page_size;
    params.page_table_stride = stride;
    params.scale = 0.125f;
    params.dtype = dtype;
    return params;
  }
  BlockAttentionParams device_params(void* out) {
    BlockAttentionParams params = params_of(max_seqs, DType::bfloat16);
    params.q = device_q->data();
    params.k_pages = device_k ? device_k->data() : nullptr;
    params.v_pages = device_v ? device_v->data() : nullptr;
    params.cu_seqlens_q = cu_seqlens.data();
    params.kv_limits = kv_limits.data();
    params.page_table = page_table.data();
    params.out = out;
    params.workspace = workspace.data();
    params.workspace_bytes = workspace.size();
    params.max_rows = max_rows;
    return params;
  }

  Tensor poisoned_out() const {
    return Tensor(DType::bfloat16, size_t(max_rows) * shape.num_q_heads * shape.head_dim);
  }
  // Twice: CTAs that do not wait for each other must come to the same bits.
  Tensor run() {
    DeviceTensor out(poisoned_out()), impatient(poisoned_out());
    cuda::block_attention_schedule(device_params(out.data()), nullptr);
    cuda::block_attention(device_params(out.data()), nullptr);
    BlockAttentionParams params = device_params(impatient.data());
    params.merge_wait_cycles = -1;
    cuda::block_attention(params, nullptr);
    Tensor result = out.read();
    expect_same_bits(impatient.read(), 0, result, 0, result.size());
    return result;
  }

  Tensor expected(const Step& step, ThreadPool& pool) const {
    Tensor out(DType::float32, size_t(max_rows) * shape.num_q_heads * shape.head_dim);
    BlockAttentionParams params =
        params_of(static_cast<int>(step.cu_seqlens.size()) - 1, DType::float32);
    params.q = q.fp32.data();
    params.k_pages = k.fp32.data();
    params.v_pages = v.fp32.data();
    params.cu_seqlens_q = step.cu_seqlens.data();
    params.kv_limits = step.kv_limits.data();
    params.page_table = step.page_table.data();
    params.out = out.data();
    cpu::block_attention(params, pool);
    return out;
  }

  // Each head of each row within 1% in norm; rows past the step's last keep their poison.
  void expect_near(const Tensor& actual, const Tensor& expected, const Step& step) const {
    size_t width = shape.head_dim, heads = size_t(step.num_rows()) * shape.num_q_heads;
    for (size_t head = 0; head < heads; ++head) {
      double error = 0, norm = 0;
      for (size_t i = head * width; i < (head + 1) * width; ++i) {
        error += std::pow(double{actual.get(i)} - expected.get(i), 2);
        norm += std::pow(double{expected.get(i)}, 2);
      }
      ASSERT_LT(std::sqrt(error), 1e-2 * std::sqrt(norm))
          << "row " << head / shape.num_q_heads << ", head " << head % shape.num_q_heads;
    }
    for (size_t i = heads * width; i < actual.size(); ++i) {
      ASSERT_TRUE(std::isnan(actual.get(i))) << "written past the last row, element " << i;
    }
  }

  Shape shape;
  int stride, max_seqs, max_rows;
  Values q, k, v;
  int num_pages;
  DeviceBuffer<int32_t> cu_seqlens, kv_limits, page_table;
  DeviceBuffer<char> workspace;
  std::unique_ptr<DeviceTensor> device_q, device_k, device_v;
};

}  // namespace optimus::testing::attention
