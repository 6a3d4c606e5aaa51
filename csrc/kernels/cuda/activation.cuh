// The activation of the MLP, for the kernels that apply it.
#pragma once

namespace optimus::cuda {

// A gate so negative that exp overflows gives -0, as it should.
__device__ __forceinline__ float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }

}  // namespace optimus::cuda
