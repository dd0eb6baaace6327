// How kernels that read half types themselves are told of them.
#pragma once

namespace avatar {

// `compute` is the type that is computed in.
enum class PixelType { compute, bfloat16, float16 };

}  // namespace avatar
