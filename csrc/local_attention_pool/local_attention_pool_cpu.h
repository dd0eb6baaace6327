// Attention over neighbours, for ops that are made of it.
#pragma once

#include "common/tensor.h"

namespace avatar {

// points (B, N, D), features (B, N, C), neighbors (B, N, K) int64, position_weight[0] (P', 3 D + 1) ...,
// score_weight (C + P, C + P) -> pooled (B, N, C + P), statistics the same or empty.
std::tuple<Tensor, Tensor> local_attention_pool_cpu(const Tensor& points, const Tensor& features,
                                                    const Tensor& neighbors,
                                                    std::vector<Tensor> position_weight,
                                                    std::vector<Tensor> position_bias,
                                                    const Tensor& score_weight, double negative_slope,
                                                    bool save_statistics);

}  // namespace avatar
