// Runs a planned step: owns the KV memory and every buffer of a step, all allocated once. The only
// part of the engine that calls kernels.
//
// On CUDA a step is: one copy of the plan to the device, build_rows, one graph (forward and unmask),
// one copy of the results back. A step that is planned ahead gets its plan while the step in progress
// still runs, and its rows are made right behind that one; the host reads how many there are and
// launches the graph. Beside that the results of the step before are copied; the host looks at them
// last. A graph is captured at start-up for each of a few numbers of rows; a step takes the next
// larger one, with padding behind its rows. Steps without logits rows (prompts alone) or with more
// rows than any graph are launched kernel by kernel, without padding.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "engine/decode_buffers.h"
#include "models/model.h"

namespace optimus {

class Runner {
 public:
  // What one captured graph took.
  struct CapturedGraph {
    int rows;
    double capture_ms;
    size_t bytes;
  };

  // Runs where the model lies. The config's num_pages may be 0 on CUDA: see config().
  Runner(const Model& model, const EngineConfig& config);

  // With the number of pages that there are.
  const EngineConfig& config() const { return config_; }

  ~Runner();

  // Hands a step to the device. While one is in progress, another one that is planned ahead.
  void start(const StepPlan& plan);
  // Waits for the step in progress, and launches the one that was started ahead of its end. The result
  // stays until the next start() or finish().
  StepResult finish();
  // After a failure: no step is in progress.
  void forget_steps() noexcept;
  // Of the last finished step, on the device: its forward with unmask, what lies between that and
  // the one before, and of that, what lies before the step's rows are made.
  double forward_ms() const { return marks_of(turn_ - 1).forward.ms(); }
  double idle_ms() const {
    return turn_ < 2 ? 0 : marks_of(turn_ - 1).forward.ms_since(marks_of(turn_ - 2).forward);
  }
  double rows_ms() const {
    if (turn_ < 2) return 0;
    return marks_of(turn_ - 1).rows_made.ms_since(marks_of(turn_ - 2).forward.stopped());
  }

  // Rows of one sequence over the given pages, none before the first one's position; returns fp32
  // logits [rows, vocab_size].
  std::vector<float> forward(const std::vector<int32_t>& token_ids,
                             const std::vector<int32_t>& positions,
                             const std::vector<int32_t>& kv_limits,
                             const std::vector<int32_t>& page_ids);
  // Milliseconds of one step's forward and unmask: `num_rows` rows in as many sequences as
  // `contexts` (as even as it goes) that read so many positions, in pages of their own as far as
  // those reach.
  // `with_logits`: every row is a mask row; none otherwise.
  double time_forward(int num_rows, const std::vector<int>& contexts, bool with_logits,
                      const std::vector<int32_t>& page_ids);

  // The matrix products alone of a step padded to `rows` rows; on CUDA in one graph.
  double time_gemms(int rows, int repeats);

  Device device() const { return model_.device(); }
  // Rows that steps are padded to, ascending; empty on the CPU.
  const std::vector<int>& padded_rows() const { return padded_rows_; }
  const std::vector<CapturedGraph>& captured_graphs() const { return captured_; }
  size_t kv_cache_bytes() const { return kv_cache_.bytes(); }
  size_t activation_bytes() const { return activations_.bytes(); }
  size_t state_bytes() const { return buffers_.bytes() + unmask_workspace_.bytes(); }
  size_t graph_bytes() const;

 private:
  // Sizes a step is run at, with padding; `graph` is an index of padded_rows_, -1 = exact sizes.
  struct Shape {
    int rows, seqs, logit_rows;
    int graph;
  };
  Shape shape_of(int rows, int seqs, int logit_rows) const;
  // A step that was started.
  struct Step {
    int seqs = 0;
    int rows = 0, logit_rows = 0;
  };
  // How far the stream is with a step.
  struct Marks {
    explicit Marks(Device device) : rows_made(device, true), forward(device) {}
    StreamEvent rows_made;  // its plan has been used
    StreamTimer forward;
  };
  Marks& marks_of(uint64_t turn) { return marks_[turn % marks_.size()]; }
  const Marks& marks_of(uint64_t turn) const { return marks_[turn % marks_.size()]; }
  void upload(const StepPlan& plan);
  void run(const Step& step);
  void fetch(const Step& step);
  // As forward() takes them.
  void check_rows(const std::vector<int32_t>& token_ids, const std::vector<int32_t>& positions,
                  const std::vector<int32_t>& kv_limits, int num_pages) const;
  void forward_rows(const Shape& shape);
  void launch(const Shape& shape);  // forward and unmask, by graph where there is one
  void capture_graphs();

  const Model& model_;
  EngineConfig config_;
  ThreadPool threads_;
  Stream stream_;
  Stream copies_;  // beside it: the next plan while a step runs, its results while rows are made
  StreamEvent plan_copied_, results_copied_;
  // Of the step ahead, the one in progress and the one before, whose times are asked for.
  std::array<Marks, 3> marks_;
  Execution execution_;
  Activations activations_;
  DecodeBuffers buffers_;
  Buffer<char> unmask_workspace_;  // CUDA only
  KvCache kv_cache_;
  std::optional<Step> step_, ahead_;  // in progress, and started ahead of its end
  KeptResult kept_[2];                // of the steps in turn; CPU only
  uint64_t turn_ = 0;                 // of step_; steps that are finished
  std::vector<int> padded_rows_;
  std::vector<Graph> graphs_;  // of padded_rows_; empty when launched kernel by kernel
  std::vector<CapturedGraph> captured_;
};

}  // namespace optimus
