// Places where the engine can run, and what it needs of them: memory, copies, a stream, graphs. In a
// build without CUDA everything but Device::cpu throws, saying so.
#pragma once

#include <cstddef>
#include <functional>
#include <initializer_list>
#include <string>

namespace optimus {

// A process uses one CUDA device: the current one, 0 unless CUDA_VISIBLE_DEVICES says otherwise.
enum class Device : unsigned char { cpu, cuda };

// Why Device::cuda cannot be used (no such build, no GPU); empty when it can.
std::string cuda_problem();
// Of the GPU, as its vendor calls it.
std::string cuda_device_name();

struct DeviceMemoryInfo {
  size_t free, total;  // bytes
};
DeviceMemoryInfo cuda_memory();

// 64-byte aligned, zeroed on CUDA; undefined on the CPU. Throws std::bad_alloc or, naming the bytes,
// std::runtime_error.
void* allocate_memory(size_t bytes, Device device);
void release_memory(void* data, Device device) noexcept;
// Host memory that `device` copies from and to at full speed and asynchronously.
void* allocate_host_memory(size_t bytes, Device device);
void release_host_memory(void* data, Device device) noexcept;
// Between any two places; done on return. On CUDA not ordered with any Stream.
void copy_memory(void* to, const void* from, size_t bytes, Device device);
// `count` pieces of `bytes`, `to_stride` and `from_stride` bytes apart.
void copy_memory_strided(void* to, size_t to_stride, const void* from, size_t from_stride,
                         size_t bytes, size_t count, Device device);

// `count` pieces of `bytes`, `stride` bytes apart on both sides.
struct StreamCopy {
  static constexpr int kMost = 2;  // in one call
  void* to;
  const void* from;
  size_t bytes, stride = 0, count = 1;
};

class Stream;

// A point of a stream: it happens when all of the stream's work before it is done, or at once if it was
// never recorded. On the CPU nothing is ever to be waited for.
class StreamEvent {
 public:
  // `timed`: it also notes when, for ms_since().
  explicit StreamEvent(Device device, bool timed = false);
  ~StreamEvent();
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;

  void record(Stream& stream);
  void synchronize() const;
  // When both have happened, on the device's clock whatever the host does meanwhile.
  double ms_since(const StreamEvent& earlier) const;
  void* handle() const { return handle_; }  // a cudaEvent_t

 private:
  void* handle_ = nullptr;
  double recorded_ms_ = 0;  // cpu
};

// An ordered queue of work. On the CPU work is done at once, and handle() is null.
class Stream {
 public:
  explicit Stream(Device device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device device() const { return device_; }
  void* handle() const { return handle_; }  // a cudaStream_t
  // Between memory of the device and of allocate_host_memory, which must stay until the stream gets
  // there; all aligned to 16 bytes. Nothing is done where source and destination are the same.
  void copy(std::initializer_list<StreamCopy> copies);
  void synchronize();
  // What follows waits until `event` has happened.
  void wait(const StreamEvent& event);
  // Whether all of it is done. Throws what went wrong.
  bool is_done();

 private:
  Device device_;
  void* handle_ = nullptr;
};

// Measures the time that a stream takes from one point to another.
class StreamTimer {
 public:
  explicit StreamTimer(Device device) : started_(device, true), stopped_(device, true) {}

  void start(Stream& stream) { started_.record(stream); }
  void stop(Stream& stream) { stopped_.record(stream); }
  // After the stream has passed both: from start to stop, and from the stop of `before` to the start.
  double ms() const { return stopped_.ms_since(started_); }
  double ms_since(const StreamTimer& before) const { return started_.ms_since(before.stopped_); }
  const StreamEvent& stopped() const { return stopped_; }

 private:
  StreamEvent started_, stopped_;
};

// Work recorded once on a CUDA stream, launched as often as wanted.
class Graph {
 public:
  // Nothing that `record` launches on the stream runs. It must not allocate or synchronise.
  Graph(Stream& stream, const std::function<void()>& record);
  ~Graph();
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&&) = delete;

  void launch(Stream& stream);

 private:
  void* replay_ = nullptr;  // a cudaGraphExec_t
};

}  // namespace optimus
