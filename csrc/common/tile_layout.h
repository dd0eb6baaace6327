// Tensors as the tiles of tile_product.h take them.
#pragma once

#include <algorithm>
#include <vector>

#include "common/memory.h"
#include "common/project_rows_simd.h"
#include "common/tensor.h"

namespace avatar {

// How tiles of some widths are padded and packed for an instruction set.
template <typename T>
struct TileLayout {
  Isa isa;

  // The instruction set in use, but shorter vectors where those of AVX-512 would hold padding instead of
  // more.
  static TileLayout of(const std::vector<int64_t>& widths) {
    const TileLayout longer{current_isa()}, shorter{Isa::avx2};
    int64_t vectors = 0;
    for (const int64_t width : widths) {
      vectors += shorter.padded(width) / shorter.lanes() - longer.padded(width) / longer.lanes();
    }
    return longer.isa == Isa::avx512 && vectors <= 0 ? shorter : longer;
  }

  // As in tile_product.h.
  int64_t lanes() const {
    return (isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16) / static_cast<int64_t>(sizeof(T));
  }
  int64_t padded(int64_t width) const { return (width + lanes() - 1) / lanes() * lanes(); }

  // A (depth, columns) matrix in panels of two vectors' width, each (depth, width); `columns` is padded.
  template <typename Value>
  Buffer<T> pack(int64_t depth, int64_t columns, const Value& value) const {
    // Blocks of rows stay in the first-level cache however `value` reads.
    constexpr int64_t kBlock = 16;
    Buffer<T> packed = buffer<T>(depth * columns);
    T* target = packed.get();
    const int64_t wide = 2 * lanes(), panels = (columns + wide - 1) / wide;
    torch::stable::parallel_for(0, panels, 1 + (1 << 14) / (depth * wide + 1), [&](int64_t from, int64_t to) {
      for (int64_t first = from * wide; first < std::min(to * wide, columns); first += wide) {
        const int64_t width = std::min(wide, columns - first);
        T* panel = target + depth * first;
        for (int64_t begin = 0; begin < depth; begin += kBlock) {
          const int64_t end = std::min(begin + kBlock, depth);
          for (int64_t c = 0; c < width; ++c) {
            for (int64_t d = begin; d < end; ++d) panel[d * width + c] = value(d, first + c);
          }
        }
      }
    });
    return packed;
  }

  // rows (rows, sum of widths) with every part padded; the tensor itself where nothing is to pad.
  Tensor pad_parts(const Tensor& rows, const std::vector<int64_t>& widths) const {
    const int64_t count = rows.size(0);
    int64_t width = 0, wide = 0;
    for (const int64_t part : widths) width += part, wide += padded(part);
    if (width == wide) return rows;
    Tensor result = torch::stable::new_zeros(rows, {count, wide});
    const T* from = const_data<T>(rows);
    T* to = mutable_data<T>(result);
    torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* source = from + row * width;
        T* target = to + row * wide;
        for (const int64_t part : widths) {
          std::copy_n(source, part, target);
          source += part;
          target += padded(part);
        }
      }
    });
    return result;
  }

  // (rows, columns) = a (rows, depth) times packed b.
  Buffer<T> project(const Tensor& a, int64_t columns, const Buffer<T>& packed, const T* bias) const {
    const int64_t rows = a.size(0), depth = a.size(1);
    Buffer<T> target = buffer<T>(rows * columns);
    const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(1, depth * columns));
    parallel_parts(rows, grain, 48, [&](int64_t begin, int64_t end) {
      AVATAR_ISA_CALL_OF(isa, project_rows, end - begin, depth, columns, const_data<T>(a) + begin * depth,
                         packed.get(), bias, target.get() + begin * columns);
    });
    return target;
  }
};

}  // namespace avatar
