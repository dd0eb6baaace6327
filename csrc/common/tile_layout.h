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
    return pack_panels(depth, columns,
                       [&](T* panel, int64_t width, int64_t first, int64_t begin, int64_t end) {
                         for (int64_t c = 0; c < width; ++c) {
                           for (int64_t d = begin; d < end; ++d) panel[d * width + c] = value(d, first + c);
                         }
                       });
  }

  // `pack` of columns that are in memory as row(column), `given` of `depth` numbers, the others 0, or nullptr
  // for a column of zeros; times `factor`.
  template <typename Row>
  Buffer<T> pack_rows(int64_t depth, int64_t given, int64_t columns, T factor, const Row& row) const {
    return pack_panels(
        depth, columns, [&](T* panel, int64_t width, int64_t first, int64_t begin, int64_t end) {
          const int64_t whole = std::max(begin, begin + (std::min(end, given) - begin) / 4 * 4);
          for (int64_t c = 0; c < width; c += 4) {
            const T* rows[4];
            const int64_t count = std::min<int64_t>(4, width - c);
            bool all = count == 4;
            for (int64_t i = 0; i < count; ++i) all &= (rows[i] = row(first + c + i)) != nullptr;
            if (all) {
              for (int64_t d = begin; d < whole; d += 4)
                transpose(rows, d, factor, panel + d * width + c, width);
            }
            for (int64_t d = all ? whole : begin; d < end; ++d) {
              for (int64_t i = 0; i < count; ++i) {
                panel[d * width + c + i] = rows[i] && d < given ? factor * rows[i][d] : T(0);
              }
            }
          }
        });
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

 private:
  // fill(panel, width, first column, begin, end): rows [begin, end) of each panel.
  template <typename Fill>
  Buffer<T> pack_panels(int64_t depth, int64_t columns, const Fill& fill) const {
    // Blocks of rows stay in the first-level cache however `fill` reads.
    constexpr int64_t kBlock = 16;
    Buffer<T> packed = buffer<T>(depth * columns);
    T* target = packed.get();
    const int64_t wide = 2 * lanes(), panels = (columns + wide - 1) / wide;
    torch::stable::parallel_for(0, panels, 1 + (1 << 14) / (depth * wide + 1), [&](int64_t from, int64_t to) {
      for (int64_t first = from * wide; first < std::min(to * wide, columns); first += wide) {
        const int64_t width = std::min(wide, columns - first);
        for (int64_t begin = 0; begin < depth; begin += kBlock) {
          fill(target + depth * first, width, first, begin, std::min(begin + kBlock, depth));
        }
      }
    });
    return packed;
  }

  // Four numbers from `begin` on of each of four rows, times `factor`, as columns of rows `stride` apart.
  static void transpose(const T* const* rows, int64_t begin, T factor, T* target, int64_t stride) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Four in[4], out[4];
    for (int i = 0; i < 4; ++i) {
      __builtin_memcpy(&in[i], rows[i] + begin, sizeof(Four));
      in[i] *= factor;
    }
    const Four low01 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
    const Four low23 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
    const Four high01 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
    const Four high23 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
    out[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
    out[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    out[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    out[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
    for (int i = 0; i < 4; ++i) __builtin_memcpy(target + i * stride, &out[i], sizeof(Four));
  }
};

}  // namespace avatar
