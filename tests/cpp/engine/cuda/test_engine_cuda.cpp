// The engine on a GPU: logits of the CPU, runs that are sound in every mode, graphs that change no
// bit. Skipped without a GPU.
#include <cmath>

#include "engine/tiny_engine.h"
#include "kernels/cuda/gpu_testing.h"
#include "models/cuda/gpu_model.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kGpuBlock = 16;  // the smallest page

EngineConfig gpu_engine_config(DecodeMode mode, KvPolicy policy = KvPolicy::refresh) {
  EngineConfig config = tiny_engine_config(mode, policy);
  config.block_length = config.page_size = kGpuBlock;
  config.max_num_seqs = 6;
  config.max_num_batched_rows = 128;
  config.max_model_len = 128;
  config.num_pages = 64;
  return config;
}

std::shared_ptr<const Model> model_on_gpu() {
  static std::shared_ptr<const Model> model = gpu_sized_model(Device::cuda);
  return model;
}

class CudaEngine : public GpuTest {};

TEST_F(CudaEngine, LogitsAreThoseOfTheCpu) {
  for (bool tied : {false, true}) {
    Engine gpu(gpu_sized_model(Device::cuda, DType::bfloat16, tied),
               gpu_engine_config(DecodeMode::block));
    Engine cpu(gpu_sized_model(Device::cpu, DType::float32, tied),
               gpu_engine_config(DecodeMode::block));
    Rng rng(11);
    for (int rows : {1, 16, 100, 128}) {
      std::vector<int32_t> tokens = random_prompt(rng, rows), positions, limits;
      for (int i = 0; i < rows; ++i) {
        positions.push_back(i);
        limits.push_back(std::min(rows, (i / kGpuBlock + 1) * kGpuBlock));
      }
      const std::vector<int32_t> pages = {9, 3, 40, 22, 7, 63, 0, 12};
      const auto actual = gpu.forward(tokens, positions, limits, pages);
      const auto expected = cpu.forward(tokens, positions, limits, pages);
      float scale = 0, error = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        scale = std::max(scale, std::abs(expected[i]));
        error = std::max(error, std::abs(actual[i] - expected[i]));
        ASSERT_TRUE(std::isfinite(actual[i])) << i;
      }
      EXPECT_LT(error, 0.05f * scale) << rows << " rows, logit scale " << scale;
    }
  }
}

TEST_F(CudaEngine, RunsAreSoundAndRepeat) {
  const std::vector<Job> jobs = tiny_jobs(3, 24);
  for (DecodeMode mode :
       {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk, DecodeMode::schedule}) {
    for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh}) {
      SCOPED_TRACE(static_cast<int>(mode) * 10 + static_cast<int>(policy));
      EngineConfig config = gpu_engine_config(mode, policy);
      Engine first(model_on_gpu(), config), second(model_on_gpu(), config);
      const auto outcomes = run_jobs(first, jobs);
      if (HasFailure()) return;
      expect_same_outcomes(run_jobs(second, jobs), outcomes);
      config.cuda_graphs = false;
      Engine launched(model_on_gpu(), config);
      EXPECT_TRUE(launched.runner().captured_graphs().empty());
      expect_same_outcomes(run_jobs(launched, jobs), outcomes);
      // Planned ahead, one request at a time, so that its rows have the same company.
      const std::vector<Job> alone = {jobs.front()};
      Engine waiting(model_on_gpu(), config);
      const auto expected = run_jobs(waiting, alone);
      for (const bool graphs : {true, false}) {
        config.cuda_graphs = graphs;
        config.async_scheduling = true;
        Engine ahead(model_on_gpu(), config), again(model_on_gpu(), config);
        expect_same_outcomes(run_jobs(ahead, alone), expected);
        expect_same_outcomes(run_jobs(again, alone), expected);
        const auto planned_ahead = run_jobs(ahead, jobs);
        if (HasFailure()) return;
        expect_same_outcomes(run_jobs(again, jobs), planned_ahead);
      }
    }
  }
}

class CudaEngineAsync : public CudaEngine, public ::testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(AheadOrNot, CudaEngineAsync, ::testing::Bool());

TEST_P(CudaEngineAsync, PreemptionAbortAndArrivalsAreSound) {
  EngineConfig config = gpu_engine_config(DecodeMode::chunk, KvPolicy::freeze);
  config.async_scheduling = GetParam();
  config.num_pages = 9;
  Engine engine(model_on_gpu(), config);
  std::vector<Job> jobs = tiny_jobs(8, 16);
  std::vector<int> arrivals;
  for (size_t i = 0; i < jobs.size(); ++i) arrivals.push_back(static_cast<int>(i) / 2);
  int preemptions = 0;
  for (const Outcome& outcome : run_jobs(engine, jobs, arrivals)) {
    preemptions += outcome.metrics.num_preemptions;
  }
  EXPECT_GT(preemptions, 0);

  std::vector<uint64_t> ids;
  for (const Job& job : jobs) ids.push_back(engine.add_request(job.prompt, job.params));
  for (int step = 0; engine.has_unfinished(); ++step) {
    engine.step();
    if (step < 5) engine.abort(ids[step]);
  }
  for (uint64_t id : ids) engine.release(id);
  expect_all_pages_free(engine);
}

TEST_F(CudaEngine, ElasticModesRunOnAMeasuredProfile) {
  for (DecodeMode mode : {DecodeMode::elastic, DecodeMode::elastic_per_request}) {
    Engine engine(model_on_gpu(), gpu_engine_config(mode, KvPolicy::auto_));
    const LatencyProfile profile = engine.profile(2);
    EXPECT_TRUE(profile.is_padded);
    ASSERT_EQ(profile.decode.size(), engine.runner().padded_rows().size());
    run_jobs(engine, tiny_jobs(5, 16));
  }
}

TEST_F(CudaEngine, PagesFillTheMemoryThatIsAllowed) {
  EngineConfig config = gpu_engine_config(DecodeMode::block);
  config.num_pages = 0;
  config.gpu_memory_utilization = 0.5;
  const DeviceMemoryInfo before = cuda_memory();
  Engine engine(model_on_gpu(), config);
  const double used = static_cast<double>(before.total) - static_cast<double>(cuda_memory().free);
  EXPECT_GT(engine.config().num_pages, 1000);
  EXPECT_LT(used, 0.55 * static_cast<double>(before.total));
  run_jobs(engine, tiny_jobs(2, 4));
  config.gpu_memory_utilization = 1e-6;
  EXPECT_THROW(Engine(model_on_gpu(), config), std::invalid_argument);
}

TEST_F(CudaEngine, WhatKernelsDoNotTakeThrows) {
  ModelConfig config = gpu_config(DType::float32, false);
  EXPECT_THROW(Model(config, Device::cuda), std::invalid_argument);
  config = gpu_config(DType::bfloat16, false);
  config.head_dim = 32;
  EXPECT_THROW(Model(config, Device::cuda), std::invalid_argument);
  EngineConfig engine = gpu_engine_config(DecodeMode::block);
  engine.block_length = engine.page_size = 8;
  EXPECT_THROW(Engine(model_on_gpu(), engine), std::invalid_argument);
}

}  // namespace
}  // namespace optimus
