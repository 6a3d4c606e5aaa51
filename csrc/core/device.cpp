#include "core/device.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "core/check.h"
#if defined(OPTIMUS_WITH_CUDA)
#include "core/cuda_check.h"
#include "core/stream_copy.h"
#endif

namespace optimus {
namespace {

constexpr size_t kAlignment = 64;

void* allocate_on_cpu(size_t bytes) {
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void copy_on_host(void* to, size_t to_stride, const void* from, size_t from_stride, size_t bytes,
                  size_t count) {
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_stride,
                static_cast<const char*>(from) + i * from_stride, bytes);
  }
}

void copy_at_once(std::initializer_list<StreamCopy> copies) {
  for (const StreamCopy& copy : copies) {
    if (copy.to == copy.from) continue;
    copy_on_host(copy.to, copy.stride, copy.from, copy.stride, copy.bytes, copy.count);
  }
}

double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if !defined(OPTIMUS_WITH_CUDA)
[[noreturn]] void throw_no_cuda() {
  throw std::invalid_argument("[device] this build has no CUDA backend");
}
#endif

}  // namespace

#if defined(OPTIMUS_WITH_CUDA)

namespace {

cudaStream_t stream_of(void* handle) { return static_cast<cudaStream_t>(handle); }
cudaEvent_t event_of(void* handle) { return static_cast<cudaEvent_t>(handle); }

}  // namespace

std::string cuda_problem() {
  int count = 0, device = 0, major = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) return "no CUDA device was found";
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return concat("no CUDA device answers: ", cudaGetErrorString(error));
  }
  if (major >= 8) return "";
  return concat("the kernels need compute capability 8.0 or later, the GPU has ", major, ".x");
}

std::string cuda_device_name() {
  int device = 0;
  cudaDeviceProp properties;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  OPTIMUS_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

DeviceMemoryInfo cuda_memory() {
  DeviceMemoryInfo info{};
  OPTIMUS_CUDA_CHECK(cudaMemGetInfo(&info.free, &info.total));
  return info;
}

void* allocate_memory(size_t bytes, Device device) {
  if (device == Device::cpu) return allocate_on_cpu(bytes);
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    const DeviceMemoryInfo info = cuda_memory();
    throw std::runtime_error(concat("[device] out of GPU memory: ", bytes, " bytes wanted, ",
                                    info.free, " of ", info.total, " free"));
  }
  // Rows that pad a graph read what nothing wrote: let that be numbers. Workspaces begin as zeros.
  OPTIMUS_CUDA_CHECK(cudaMemset(data, 0, bytes));
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(nullptr));
  return data;
}

// Errors are ignored: at exit the driver may be gone before the last buffer.
void release_memory(void* data, Device device) noexcept {
  if (device == Device::cpu) {
    std::free(data);
  } else {
    static_cast<void>(cudaFree(data));
  }
}

void* allocate_host_memory(size_t bytes, Device device) {
  if (device == Device::cpu) return allocate_on_cpu(bytes);
  void* data = nullptr;
  OPTIMUS_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocPortable));
  return data;
}

void release_host_memory(void* data, Device device) noexcept {
  if (device == Device::cpu) {
    std::free(data);
  } else {
    static_cast<void>(cudaFreeHost(data));
  }
}

void copy_memory(void* to, const void* from, size_t bytes, Device device) {
  if (bytes == 0) return;  // the pointers may be null
  if (device == Device::cpu) {
    std::memcpy(to, from, bytes);
    return;
  }
  OPTIMUS_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(nullptr));
}

void copy_memory_strided(void* to, size_t to_stride, const void* from, size_t from_stride,
                         size_t bytes, size_t count, Device device) {
  if (device == Device::cpu) return copy_on_host(to, to_stride, from, from_stride, bytes, count);
  OPTIMUS_CUDA_CHECK(
      cudaMemcpy2D(to, to_stride, from, from_stride, bytes, count, cudaMemcpyDefault));
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(nullptr));
}

Stream::Stream(Device device) : device_(device) {
  if (device == Device::cpu) return;
  cudaStream_t stream = nullptr;
  OPTIMUS_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  handle_ = stream;
}

Stream::~Stream() {
  if (handle_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_of(handle_)));
}

void Stream::copy(std::initializer_list<StreamCopy> copies) {
  if (device_ == Device::cpu) return copy_at_once(copies);
  launch_copies(copies.begin(), static_cast<int>(copies.size()), stream_of(handle_));
}

void Stream::synchronize() {
  if (device_ == Device::cuda) OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_of(handle_)));
}

bool Stream::is_done() {
  if (device_ == Device::cpu) return true;
  const cudaError_t status = cudaStreamQuery(stream_of(handle_));
  if (status == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());  // no error of anybody's
    return false;
  }
  OPTIMUS_CUDA_CHECK(status);
  return true;
}

void Stream::wait(const StreamEvent& event) {
  if (device_ == Device::cpu) return;
  OPTIMUS_CUDA_CHECK(cudaStreamWaitEvent(stream_of(handle_), event_of(event.handle()), 0));
}

StreamEvent::StreamEvent(Device device, bool timed) {
  if (device == Device::cpu) return;
  cudaEvent_t event = nullptr;
  OPTIMUS_CUDA_CHECK(
      cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
  handle_ = event;
}

StreamEvent::~StreamEvent() {
  if (handle_ != nullptr) static_cast<void>(cudaEventDestroy(event_of(handle_)));
}

void StreamEvent::record(Stream& stream) {
  recorded_ms_ = now_ms();
  if (handle_ == nullptr) return;
  OPTIMUS_CUDA_CHECK(cudaEventRecord(event_of(handle_), stream_of(stream.handle())));
}

void StreamEvent::synchronize() const {
  if (handle_ != nullptr) OPTIMUS_CUDA_CHECK(cudaEventSynchronize(event_of(handle_)));
}

double StreamEvent::ms_since(const StreamEvent& earlier) const {
  if (handle_ == nullptr) return recorded_ms_ - earlier.recorded_ms_;
  float ms = 0;
  OPTIMUS_CUDA_CHECK(cudaEventElapsedTime(&ms, event_of(earlier.handle_), event_of(handle_)));
  return ms;
}

Graph::Graph(Stream& stream, const std::function<void()>& record) {
  OPTIMUS_INVARIANT(stream.device() == Device::cuda, "a graph on the CPU");
  const cudaStream_t handle = stream_of(stream.handle());
  cudaGraph_t graph = nullptr;
  OPTIMUS_CUDA_CHECK(cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal));
  try {
    record();
  } catch (...) {
    static_cast<void>(cudaStreamEndCapture(handle, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    throw;
  }
  OPTIMUS_CUDA_CHECK(cudaStreamEndCapture(handle, &graph));
  cudaGraphExec_t replay = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&replay, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  OPTIMUS_CUDA_CHECK(error);
  replay_ = replay;
}

Graph::~Graph() {
  if (replay_ != nullptr) {
    static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(replay_)));
  }
}

void Graph::launch(Stream& stream) {
  OPTIMUS_CUDA_CHECK(
      cudaGraphLaunch(static_cast<cudaGraphExec_t>(replay_), stream_of(stream.handle())));
}

#else

std::string cuda_problem() { return "this build has no CUDA backend"; }
std::string cuda_device_name() { throw_no_cuda(); }
DeviceMemoryInfo cuda_memory() { throw_no_cuda(); }

void* allocate_memory(size_t bytes, Device device) {
  if (device != Device::cpu) throw_no_cuda();
  return allocate_on_cpu(bytes);
}
void release_memory(void* data, Device) noexcept { std::free(data); }
void* allocate_host_memory(size_t bytes, Device device) { return allocate_memory(bytes, device); }
void release_host_memory(void* data, Device) noexcept { std::free(data); }

void copy_memory(void* to, const void* from, size_t bytes, Device) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // or the pointers may be null
}

void copy_memory_strided(void* to, size_t to_stride, const void* from, size_t from_stride,
                         size_t bytes, size_t count, Device) {
  copy_on_host(to, to_stride, from, from_stride, bytes, count);
}

Stream::Stream(Device device) : device_(device) {
  if (device != Device::cpu) throw_no_cuda();
}
Stream::~Stream() = default;
void Stream::copy(std::initializer_list<StreamCopy> copies) { copy_at_once(copies); }
void Stream::synchronize() {}
void Stream::wait(const StreamEvent&) {}
bool Stream::is_done() { return true; }

StreamEvent::StreamEvent(Device device, bool) {
  if (device != Device::cpu) throw_no_cuda();
}
StreamEvent::~StreamEvent() = default;
void StreamEvent::record(Stream&) { recorded_ms_ = now_ms(); }
void StreamEvent::synchronize() const {}
double StreamEvent::ms_since(const StreamEvent& earlier) const {
  return recorded_ms_ - earlier.recorded_ms_;
}

Graph::Graph(Stream&, const std::function<void()>&) { throw_no_cuda(); }
Graph::~Graph() = default;
void Graph::launch(Stream&) { throw_no_cuda(); }

#endif

Graph::Graph(Graph&& other) noexcept : replay_(std::exchange(other.replay_, nullptr)) {}

}  // namespace optimus
