"""Plain-PyTorch definition of every op: the specification that the kernels are tested against.

Each function takes the arguments of the public function of the same name, batched and unbatched, and is
written for clarity: it may form every pair and every edge. All of them run in the dtype they are given
(half and bfloat16 as eager PyTorch would), on any device, and differentiate by torch's own autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _gather_rows(values: Tensor, neighbors: Tensor) -> Tensor:
    """values (B, N, C), neighbors (B, M, K) with -1 read as 0 -> (B, M, K, C)."""
    batch, rows, k = neighbors.shape
    index = neighbors.clamp(min=0).reshape(batch, rows * k, 1).expand(-1, -1, values.shape[2])
    return values.gather(1, index).reshape(batch, rows, k, values.shape[2])


def _unbatch(result, batched: bool):
    if batched:
        return result
    if isinstance(result, Tensor):
        return result.squeeze(0)
    return tuple(part.squeeze(0) for part in result)


def knn(
    points: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """(squared distances, indices), both (B, M, k): see avatar_ops.knn."""
    batched = points.dim() == 3
    if not batched:
        points = points.unsqueeze(0)
        queries = None if queries is None else queries.unsqueeze(0)
    if queries is None:
        queries = points
        query_lengths = lengths if query_lengths is None else query_lengths
    dtype = points.dtype
    accumulate = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    points, queries = points.to(accumulate), queries.to(accumulate)
    batch, num_points = points.shape[:2]
    num_queries = queries.shape[1]
    device = points.device

    point_valid = points.isfinite().all(-1)
    query_valid = queries.isfinite().all(-1)
    if lengths is not None:
        point_valid = point_valid & (torch.arange(num_points, device=device) < lengths.view(-1, 1))
    if query_lengths is not None:
        query_valid = query_valid & (torch.arange(num_queries, device=device) < query_lengths.view(-1, 1))
    pair_valid = query_valid.unsqueeze(2) & point_valid.unsqueeze(1)
    if exclude_self:
        pair_valid = pair_valid & ~torch.eye(num_queries, num_points, dtype=torch.bool, device=device)

    with torch.no_grad():
        squared = (queries.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)
        squared = squared.masked_fill(~pair_valid, float("inf"))
        order = squared.argsort(dim=-1, stable=True)
        # An overflowed distance of a real pair also is +inf, and comes before the missing ones.
        order = order.gather(2, (~pair_valid).gather(2, order).byte().argsort(dim=-1, stable=True))[:, :, :k]
        order = F.pad(order, (0, k - order.shape[2]), value=-1)
        found = (order >= 0) & F.pad(pair_valid, (0, 1)).gather(2, order.where(order >= 0, num_points))
        indices = order.where(found, -1)
    if num_points == 0:
        nothing = 0 * (points.sum() + queries.where(query_valid.unsqueeze(-1), 0).sum())
        distances = squared.new_full((batch, num_queries, k), float("inf")) + nothing
    else:
        neighbor = _gather_rows(points, indices)
        difference = torch.where(found.unsqueeze(-1), queries.unsqueeze(2) - neighbor, 0)
        distances = difference.square().sum(-1).masked_fill(~found, float("inf"))
    return _unbatch((distances.to(dtype), indices), batched)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
) -> Tensor:
    """(2, E) edges, grouped by query, nearest first: see avatar_ops.knn_graph."""
    x = x.unsqueeze(1) if x.dim() == 1 else x
    if cosine:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # A zero vector has no direction: NaN, hence no edges.
        x = x / x.abs().amax(1, keepdim=True)
        x = x / x.square().sum(1, keepdim=True).sqrt()
    batch = x.new_zeros(x.shape[0], dtype=torch.int64) if batch is None else batch
    edges = [x.new_zeros(2, 0, dtype=torch.int64)]
    for cloud in batch.unique():
        rows = (batch == cloud).nonzero().squeeze(1)
        neighbors = knn(x[rows], k, exclude_self=not loop)[1]
        query, slot = (neighbors >= 0).nonzero(as_tuple=True)
        edges.append(torch.stack([rows[neighbors[query, slot]], rows[query]]))
    edges = torch.cat(edges, 1)
    return edges if flow == "source_to_target" else edges.flip(0)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    rest: Tensor | None = None,
    places: Tensor | None = None,
    negative_slope: float = 1.0,
) -> Tensor:
    """(B, N, O): see avatar_ops.linear_act.linear_act."""
    y = F.linear(x if beside is None else torch.cat([x, beside], -1), weight, bias)
    if rest is not None:
        y = y + (rest if places is None else rest[..., places.long(), :])
    return F.leaky_relu(y, negative_slope)


def nearest_sampled(neighbors: Tensor, places: Tensor) -> Tensor:
    """(M,) int64: see avatar_ops.nearest_sampled.nearest_sampled."""
    nearest = torch.full((len(neighbors),), -1)
    for slot in reversed(range(neighbors.shape[1])):
        neighbor = neighbors[:, slot].long()
        held = torch.where(neighbor >= 0, places[neighbor].long(), -1)
        nearest = torch.where(held >= 0, held, nearest)
    return nearest


def edge_max(features: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """(values, argmax), both (B, M, C): see avatar_ops.edge_max."""
    batched = features.dim() == 3
    if not batched:
        features, neighbors = features.unsqueeze(0), neighbors.unsqueeze(0)
    neighbors = neighbors.long()
    batch, rows, k = neighbors.shape
    channels = features.shape[2]
    if k == 0 or features.shape[1] == 0:
        values = features.new_zeros(batch, rows, channels) + 0 * features.sum()
        return _unbatch((values, neighbors.new_full((batch, rows, channels), -1)), batched)
    valid = (neighbors >= 0).unsqueeze(-1)
    edges = _gather_rows(features, neighbors)
    with torch.no_grad():
        masked = edges.masked_fill(~valid, float("-inf"))
        hit = valid & ((masked == masked.amax(2, keepdim=True)) | masked.isnan())
        slot = torch.arange(k, device=features.device).view(1, 1, k, 1)
        first = slot.where(hit, k).amin(2, keepdim=True)
        some = first < k
        first = first.where(some, 0)
        argmax = neighbors.unsqueeze(-1).expand_as(edges).gather(2, first).masked_fill(~some, -1)
    values = edges.gather(2, first).where(some, 0)
    return _unbatch((values.squeeze(2), argmax.squeeze(2)), batched)


def edge_conv(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """(B, N, O), one hidden vector per edge: see avatar_ops.edge_conv."""
    batched = x.dim() == 3
    if not batched:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    neighbors = neighbors.long()
    if neighbors.numel() * weight.shape[0] == 0:
        terms = [t.sum() for t in (x, weight, bias, scale, shift) if t is not None]
        return _unbatch(x.new_zeros(*x.shape[:2], weight.shape[0]) + 0 * sum(terms), batched)
    valid = (neighbors >= 0).unsqueeze(-1)
    center = x.unsqueeze(2).expand(-1, -1, neighbors.shape[2], -1)
    edge = torch.cat([center, center - _gather_rows(x, neighbors)], -1)
    hidden = F.linear(torch.where(valid, edge, 0), weight, bias)
    if scale is not None:
        hidden = hidden * scale
    if shift is not None:
        hidden = hidden + shift
    hidden = F.leaky_relu(hidden, negative_slope)
    edges = hidden.reshape(x.shape[0], -1, weight.shape[0])
    rows = torch.arange(edges.shape[1], device=x.device).view(neighbors.shape[1], -1)
    own_edges = rows.expand_as(neighbors).masked_fill(neighbors < 0, -1)
    return _unbatch(edge_max(edges, own_edges)[0], batched)


def _edges(x: Tensor, neighbors: Tensor) -> Tensor:
    """[x_i ; x_i - x_j] of the edges that exist, (E, 2C), cloud by cloud and row by row."""
    b, i, slot = (neighbors >= 0).nonzero(as_tuple=True)
    return torch.cat([x[b, i], x[b, i] - x[b, neighbors[b, i, slot]]], -1)


def edge_mlp(x: Tensor, neighbors: Tensor, weights, scales, shifts, *, negative_slope: float = 0.2) -> Tensor:
    """(B, N, O), an MLP per edge: see avatar_ops.edge_mlp."""
    batched = x.dim() == 3
    if not batched:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    neighbors = neighbors.long()
    hidden = _edges(x, neighbors)
    for weight, scale, shift in zip(weights, scales, shifts, strict=True):
        hidden = F.leaky_relu(F.linear(hidden, weight) * scale + shift, negative_slope)
    valid = neighbors >= 0
    own_edges = (valid.flatten().cumsum(0) - 1).view(neighbors.shape).masked_fill(~valid, -1)
    output = edge_max(hidden, own_edges.flatten(0, 1))[0].view(*x.shape[:2], weights[-1].shape[0])
    return _unbatch(output, batched)


def edge_mlp_statistics(
    x: Tensor, neighbors: Tensor, weights, scales, shifts, *, negative_slope: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, count) over the edges: see avatar_ops.edge_mlp_statistics."""
    if x.dim() == 2:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    linear = F.linear(_edges(x, neighbors.long()), weights[0])
    for weight, scale, shift in zip(weights[1:], scales, shifts, strict=True):
        linear = F.linear(F.leaky_relu(linear * scale + shift, negative_slope), weight)
    count = max(linear.shape[0], 1)
    mean = linear.sum(0) / count
    variance = (linear - mean).square().sum(0) / count
    return mean, variance, torch.tensor(linear.shape[0], device=x.device)


def edge_conv_norm(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(output, (mean, variance, count)): see avatar_ops.edge_conv_norm."""
    mean, variance, count = edge_mlp_statistics(x, neighbors, [weight], [], [])
    scale = gamma * (variance + eps).rsqrt()
    output = edge_mlp(x, neighbors, [weight], [scale], [beta - mean * scale], negative_slope=negative_slope)
    return output, (mean.detach(), variance.detach(), count)


_SAMPLE_ROUNDS = 12
_SMALL_CLOUD = 64
_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


def _mix64(value: int) -> int:
    """The finaliser of SplitMix64 on integers modulo 2**64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


def _key_stream(key: int, count: int) -> list[int]:
    return [_mix64(key + 0x9E3779B97F4A7C15 * (i + 1) & _MASK64) for i in range(count)]


def _keyed_hash(values: Tensor, key: int, size: int) -> Tensor:
    """Maps int64 values below 2**32 to [0, size) by the finaliser of MurmurHash3."""
    h = values + (key & _MASK32) & _MASK32
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK32
    h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK32
    h = h ^ h >> 16 ^ key >> 32
    return h * size >> 32


def _permuted(key: int, length: int, count: int) -> Tensor:
    """The images of 0 .. count-1 under the permutation of [0, length) that `key` chooses."""
    if length <= _SMALL_CLOUD:
        order = list(range(length))
        for i, word in enumerate(_key_stream(key, count)):
            j = i + ((word >> 32) * (length - i) >> 32)
            order[i], order[j] = order[j], order[i]
        return torch.tensor(order[:count], dtype=torch.int64)
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    keys = _key_stream(key, _SAMPLE_ROUNDS)
    indices = torch.arange(count)
    outside = torch.ones(count, dtype=torch.bool)
    while outside.any():
        left, right = indices // columns, indices % columns
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _keyed_hash(right, even, rows)) % rows
            right = (right + _keyed_hash(left, odd, columns)) % columns
        indices = torch.where(outside, left * columns + right, indices)
        outside = indices >= length
    return indices


def random_sample(
    num_points: int,
    num_samples: int,
    *,
    batch_size: int | None = None,
    lengths: Tensor | None = None,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """(num_samples,) or (B, num_samples) int64, bit for bit: see avatar_ops.random_sample."""
    batched = batch_size is not None or lengths is not None
    sizes = [num_points] * (1 if batch_size is None else batch_size) if lengths is None else lengths.tolist()
    key = _mix64(seed + 0x9E3779B97F4A7C15 & _MASK64)
    device = device if lengths is None else lengths.device
    indices = torch.full((len(sizes), num_samples), -1, device=device)
    for b, size in enumerate(sizes):
        count = min(size, num_samples)
        indices[b, :count] = _permuted(_mix64(key + b & _MASK64), size, count)
    return indices if batched else indices.squeeze(0)


def _position_network(points: Tensor, neighbors: Tensor, weights, biases, negative_slope: float) -> Tensor:
    """(B, N, K, P): the layers on [p_i ; p_j ; p_i - p_j ; |p_i - p_j|], anything where there is no edge."""
    valid = (neighbors >= 0).unsqueeze(-1)
    center = points.unsqueeze(2).expand(-1, -1, neighbors.shape[2], -1)
    neighbor = _gather_rows(points, neighbors)
    difference = torch.where(valid, center - neighbor, 0)
    squared = difference.square().sum(-1, keepdim=True)
    distance = torch.where(squared > 0, squared.where(squared > 0, 1).sqrt(), 0)
    position = torch.cat([center, neighbor, difference, distance], -1)
    for weight, bias in zip(weights, biases, strict=True):
        position = F.leaky_relu(F.linear(position, weight, bias), negative_slope)
    return position


def edge_moments(
    points: Tensor,
    neighbors: Tensor,
    position_weight=(),
    position_bias=(),
    *,
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (P,), covariance (P, P), count ()) in float64: see avatar_ops.edge_moments."""
    if points.dim() == 2:
        points, neighbors = points.unsqueeze(0), neighbors.unsqueeze(0)
    neighbors = neighbors.long()
    valid = neighbors >= 0
    count = valid.sum().double()
    if valid.numel():
        position = _position_network(points, neighbors, position_weight, position_bias, negative_slope)[valid]
    else:
        width = position_weight[-1].shape[0] if position_weight else 3 * points.shape[2] + 1
        inputs = [points, *position_weight, *position_bias]
        position = points.new_zeros(0, width) + 0 * sum(t.sum() for t in inputs)
    position = position.double()
    mean = position.sum(0) / count.clamp(min=1)
    deviation = position - mean
    return mean, deviation.mT @ deviation / count.clamp(min=1), count


def local_attention_pool(
    points: Tensor,
    features: Tensor,
    neighbors: Tensor,
    position_weight,
    position_bias,
    score_weight: Tensor,
    *,
    negative_slope: float = 0.2,
) -> Tensor:
    """(B, M, C+P), softmax over the neighbours per channel: see avatar_ops.local_attention_pool."""
    batched = points.dim() == 3
    if not batched:
        points, features, neighbors = points.unsqueeze(0), features.unsqueeze(0), neighbors.unsqueeze(0)
    if isinstance(position_weight, Tensor):
        position_weight, position_bias = [position_weight], [position_bias]
    neighbors = neighbors.long()
    valid = (neighbors >= 0).unsqueeze(-1)
    if neighbors.shape[2] == 0 or points.shape[1] == 0:
        inputs = [points, features, *position_weight, *position_bias, score_weight]
        empty = points.new_zeros(*points.shape[:2], score_weight.shape[0])
        return _unbatch(empty + 0 * sum(t.sum() for t in inputs), batched)
    position = _position_network(points, neighbors, position_weight, position_bias, negative_slope)
    hidden = torch.cat([_gather_rows(features, neighbors), position], -1)
    hidden = torch.where(valid, hidden, 0)
    scores = F.linear(hidden, score_weight).masked_fill(~valid, float("-inf"))
    some = valid.any(2, keepdim=True)
    attention = scores.where(some, 0).softmax(2)
    return _unbatch((attention * hidden).sum(2), batched)


def upfirdn2d(x: Tensor, f: Tensor, *, up: int = 1, down: int = 1, padding=0, gain: float = 1) -> Tensor:
    """(B, C, H', W'): see avatar_ops.upfirdn2d."""
    x0, x1, y0, y1 = (padding,) * 4 if isinstance(padding, int) else padding
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels, 1, height, 1, width, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(batch * channels, 1, height * up, width * up)
    x = F.pad(x, (x0, x1, y0, y1))
    f = (torch.outer(f, f) if f.dim() == 1 else f).to(x.dtype) * gain
    x = F.conv2d(x, f.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return x.reshape(batch, channels, x.shape[2], x.shape[3])


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """The shape of x: see avatar_ops.bias_act."""
    if bias is not None:
        x = x + bias.view(1, -1, *[1] * (x.dim() - 2))
    if activation == "lrelu":
        x = F.leaky_relu(x, 0.2)
    gain = (2**0.5 if activation == "lrelu" else 1.0) if gain is None else gain
    x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    padding: int | None = None,
    resample_filter: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """(B, O, H', W'), one weight per sample: see avatar_ops.modulated_conv2d."""
    k = weight.shape[2]
    p = k // 2 if padding is None else padding
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) if resample_filter is None else resample_filter.to(x)
    f = torch.outer(taps, taps) if taps.dim() == 1 else taps
    f = f / f.sum()
    n = f.shape[0]
    per_sample = weight.unsqueeze(0) * styles[:, None, :, None, None]
    if demodulate:
        per_sample = per_sample / (per_sample.square().sum((2, 3, 4), keepdim=True) + eps).sqrt()
    # Torch's convolutions refuse images without channels; one that holds zeros changes nothing.
    images = x if x.shape[1] else F.pad(x, (0, 0, 0, 0, 0, 1))
    per_sample = per_sample if x.shape[1] else F.pad(per_sample, (0, 0, 0, 0, 0, 1))
    outputs = weight.shape[0]
    per_sample = per_sample if outputs else F.pad(per_sample, (0, 0, 0, 0, 0, 0, 0, 1))
    # No image at all splits into one part without images.
    filters = per_sample if x.shape[0] else per_sample.new_zeros(1, *per_sample.shape[1:])
    samples = []
    for image, w in zip(images.split(1), filters, strict=True):
        if up == 2:
            z = F.conv_transpose2d(image, w.flip(2, 3).transpose(0, 1), stride=2)
            a, b = p + (n + 1) // 2 - (k - 1), p + (n - 2) // 2 - (k - 2)
            samples.append(upfirdn2d(z, f, padding=(a, b, a, b), gain=4))
        elif down == 2:
            a, b = p + (n - 1) // 2, p + (n - 2) // 2
            samples.append(F.conv2d(upfirdn2d(image, f, padding=(a, b, a, b)), w, stride=2))
        else:
            samples.append(F.conv2d(image, w, padding=p))
    y = torch.cat(samples)[:, :outputs]
    if noise is not None:
        y = y + noise
    return bias_act(y, bias, activation=activation, gain=gain, clamp=clamp)


def rasterize_points(
    points: Tensor,
    image_size: tuple[int, int],
    radius: float | Tensor,
    points_per_pixel: int = 10,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, depths, distances), each (B, H, W, points_per_pixel): see avatar_ops.rasterize_points."""
    batched = points.dim() == 3
    if not batched:
        points = points.unsqueeze(0)
    height, width = image_size
    batch, num_points = points.shape[:2]
    accumulate = torch.float32 if points.dtype in (torch.float16, torch.bfloat16) else points.dtype
    positions = points.to(accumulate)
    radii = torch.as_tensor(radius, dtype=accumulate, device=points.device).expand(batch, num_points)
    present = (positions[..., 2] > 0) & (radii > 0)
    if lengths is not None:
        present = present & (torch.arange(num_points, device=points.device) < lengths.view(-1, 1))
    column = torch.arange(width, device=points.device, dtype=accumulate) + 0.5
    row = torch.arange(height, device=points.device, dtype=accumulate) + 0.5
    center = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1).reshape(1, -1, 1, 2)
    with torch.no_grad():
        squared = (positions[:, None, :, :2] - center).square().sum(-1)
        hit = (squared < radii.square().unsqueeze(1)) & present.unsqueeze(1)
        depth = positions[:, None, :, 2].expand_as(squared).masked_fill(~hit, float("inf"))
        order = depth.argsort(dim=-1, stable=True)
        order = order.gather(2, (~hit).gather(2, order).byte().argsort(dim=-1, stable=True))[
            ..., :points_per_pixel
        ]
        order = F.pad(order, (0, points_per_pixel - order.shape[2]), value=num_points)
        found = F.pad(hit, (0, 1)).gather(2, order)
        indices = order.where(found, -1)
    if num_points == 0:
        depths = distances = positions.new_full(indices.shape, float("inf")) + positions.sum()
    else:
        chosen = _gather_rows(positions, indices)
        depths = chosen[..., 2].masked_fill(~found, float("inf"))
        difference = torch.where(found.unsqueeze(-1), chosen[..., :2] - center, 0)
        distances = difference.square().sum(-1).masked_fill(~found, float("inf"))
    shape = (batch, height, width, points_per_pixel)
    found = indices.view(shape), depths.to(points.dtype).view(shape), distances.to(points.dtype).view(shape)
    return _unbatch(found, batched)


def composite_points(fragments, features: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """(colours (B, C, H, W), opacity (B, 1, H, W)): see avatar_ops.composite_points."""
    batched = features.dim() == 3
    indices = fragments[0]
    if not batched:
        indices, features, alphas = indices.unsqueeze(0), features.unsqueeze(0), alphas.unsqueeze(0)
    batch, height, width, depth = indices.shape
    found = indices >= 0
    alpha = torch.where(found, alphas, 0)
    through = torch.cumprod(1 - alpha, -1)
    weights = alpha * torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], -1)[..., :depth]
    if features.shape[1] == 0:
        gathered = features.new_zeros(batch, height, width, depth, features.shape[2]) + 0 * features.sum()
    else:
        gathered = _gather_rows(features, indices.reshape(batch, height * width, depth))
        gathered = gathered.view(batch, height, width, depth, features.shape[2])
    gathered = torch.where(found.unsqueeze(-1), gathered, 0)
    image = (weights.unsqueeze(-1) * gathered).sum(3).permute(0, 3, 1, 2)
    return _unbatch((image, weights.sum(-1).unsqueeze(1)), batched)
