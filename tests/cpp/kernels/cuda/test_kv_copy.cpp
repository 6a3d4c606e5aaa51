// kv_copy on the GPU: the same bytes as the CPU twin, in one pool, and out to host memory and back.
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

using CudaKvCopy = GpuTest;

struct Pools {
  Pools(int num_layers, size_t bytes, Rng* rng) {
    for (int i = 0; i < 2 * num_layers; ++i) {
      host.emplace_back(bytes);
      for (auto& byte : host.back()) byte = rng != nullptr ? random_int(*rng, 0, 255) : 0x5a;
      device.push_back(upload(host.back()));
    }
    for (int i = 0; i < num_layers; ++i) {
      host_k.push_back(host[2 * i].data());
      host_v.push_back(host[2 * i + 1].data());
      device_k.push_back(device[2 * i].data());
      device_v.push_back(device[2 * i + 1].data());
    }
    k_table = upload(device_k);
    v_table = upload(device_v);
  }
  void expect_same() const {
    for (size_t i = 0; i < host.size(); ++i) EXPECT_EQ(download(device[i]), host[i]);
  }

  std::vector<std::vector<uint8_t>> host;
  std::vector<DeviceBuffer<uint8_t>> device;
  std::vector<void*> host_k, host_v, device_k, device_v;
  DeviceBuffer<void*> k_table, v_table;
};

TEST_F(CudaKvCopy, MatchesTheCpuTwin) {
  Rng rng(131);
  for (size_t page_bytes : {size_t(3), size_t(16), size_t(4096), size_t(40000)}) {
    for (int num_copies : {0, 1, 9}) {
      const int num_layers = 3, num_pages = 20;
      Pools pools(num_layers, num_pages * page_bytes, &rng);
      Pools others(num_layers, num_pages * page_bytes, nullptr);
      auto order = random_permutation(rng, num_pages);
      std::vector<int32_t> src(order.begin(), order.begin() + num_copies);
      std::vector<int32_t> dst(order.end() - num_copies, order.end());
      auto device_src = upload(src), device_dst = upload(dst);
      KvCopyParams params{pools.host_k.data(), pools.host_v.data(), src.data(), dst.data(),
                          num_layers,          num_copies,          page_bytes};
      KvCopyParams on_device{
          pools.k_table.data(), pools.v_table.data(), device_src.data(), device_dst.data(),
          num_layers,           num_copies,           page_bytes};
      cpu::kv_copy(params, pool);
      cuda::kv_copy(on_device, nullptr);
      pools.expect_same();

      params.dst_k_pages = others.host_k.data();
      params.dst_v_pages = others.host_v.data();
      on_device.dst_k_pages = others.k_table.data();
      on_device.dst_v_pages = others.v_table.data();
      cpu::kv_copy(params, pool);
      cuda::kv_copy(on_device, nullptr);
      others.expect_same();
    }
  }
}

TEST_F(CudaKvCopy, SwapsOutToHostMemoryAndBack) {
  Rng rng(132);
  const size_t page_bytes = 2048;
  const int num_pages = 4;
  Pools pools(1, num_pages * page_bytes, &rng);
  PinnedBuffer<uint8_t> swap_k(num_pages * page_bytes), swap_v(num_pages * page_bytes);
  auto swap_k_table = upload(std::vector<void*>{swap_k.data()});
  auto swap_v_table = upload(std::vector<void*>{swap_v.data()});
  auto from = upload(std::vector<int32_t>{2, 0}), to = upload(std::vector<int32_t>{1, 3});
  cuda::kv_copy({pools.k_table.data(), pools.v_table.data(), from.data(), to.data(), 1, 2,
                 page_bytes, swap_k_table.data(), swap_v_table.data()},
                nullptr);
  pools.device[0].fill_bytes(0);
  pools.device[1].fill_bytes(0);
  cuda::kv_copy({swap_k_table.data(), swap_v_table.data(), to.data(), from.data(), 1, 2, page_bytes,
                 pools.k_table.data(), pools.v_table.data()},
                nullptr);
  for (int i = 0; i < 2; ++i) {
    std::vector<uint8_t> expected(num_pages * page_bytes, 0);
    for (int page : {0, 2}) {
      std::copy_n(pools.host[i].begin() + page * page_bytes, page_bytes,
                  expected.begin() + page * page_bytes);
    }
    EXPECT_EQ(download(pools.device[i]), expected);
  }
}

}  // namespace
}  // namespace optimus
