import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from avatar_ops import Fragments, rasterize_points

INF, NAN = float("inf"), float("nan")


def brute_force(points, image_size, radii, points_per_pixel, length):
    """One cloud, float64 in and exact for the small dyadic numbers of these tests."""
    height, width = image_size
    shape = (height, width, points_per_pixel)
    indices, depths, distances = np.full(shape, -1), np.full(shape, INF), np.full(shape, INF)
    for row in range(height):
        for column in range(width):
            covering = []
            for n in range(length):
                x, y, z = points[n]
                distance = (x - column - 0.5) ** 2 + (y - row - 0.5) ** 2
                if z > 0 and radii[n] > 0 and distance < radii[n] ** 2:
                    covering.append((z, n, distance))
            for slot, (z, n, distance) in enumerate(sorted(covering)[:points_per_pixel]):
                indices[row, column, slot] = n
                depths[row, column, slot] = z
                distances[row, column, slot] = distance
    return indices, depths, distances


# Quarters make equal depths, duplicate points and distances of exactly the radius common.
coordinates = st.one_of(st.integers(-12, 100).map(lambda n: n / 4), st.sampled_from([NAN, INF, -INF]))
depths = st.one_of(st.integers(-2, 12).map(lambda n: n / 4), st.sampled_from([NAN, INF, -INF]))
radii = st.one_of(st.integers(-2, 30).map(lambda n: n / 4), st.sampled_from([NAN, INF, 1e6]))


@settings(max_examples=150, deadline=None)
@given(
    cloud=st.lists(st.tuples(coordinates, coordinates, depths, radii), max_size=25),
    image_size=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    points_per_pixel=st.integers(0, 6),
    data=st.data(),
)
def test_finds_what_a_search_over_all_points_finds(cloud, image_size, points_per_pixel, data):
    length = data.draw(st.integers(0, len(cloud)))
    table = torch.tensor(cloud, dtype=torch.float64).reshape(len(cloud), 4)
    expected = brute_force(table[:, :3].numpy(), image_size, table[:, 3].numpy(), points_per_pixel, length)
    for dtype in (torch.float64, torch.float32):
        actual = rasterize_points(
            table[:, :3].to(dtype),
            image_size,
            table[:, 3].to(dtype),
            points_per_pixel,
            lengths=torch.tensor(length),
        )
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a.numpy(), e)


def test_orders_equal_depths_by_index():
    points = torch.tensor([[1.5, 1.5, 2.0], [1.5, 1.5, 1.0], [1.5, 1.5, 2.0], [1.5, 1.5, 1.0]])
    indices = rasterize_points(points, (3, 3), 0.5, 5).indices
    assert indices[1, 1].tolist() == [1, 3, 0, 2, -1]


def test_a_point_at_exactly_its_radius_covers_nothing():
    points = torch.tensor([[0.5, 0.5, 1.0]])
    assert rasterize_points(points, (1, 3), 1.0, 1).indices.flatten().tolist() == [0, -1, -1]
    assert rasterize_points(points, (1, 3), 1.0001, 1).indices.flatten().tolist() == [0, 0, -1]


def test_rows_count_downwards_and_centers_lie_at_halves():
    found = rasterize_points(torch.tensor([[2.5, 1.25, 3.0]]), (4, 5), 0.6, 1)
    assert found.indices.squeeze(-1).nonzero().shape[0] == 19
    assert found.indices[1, 2, 0] == 0
    assert found.distances[1, 2, 0] == 0.0625
    assert found.depths[1, 2, 0] == 3


def test_bad_radii_in_a_tensor_cover_nothing():
    points = torch.tensor([1.0, 1.0, 1.0]).expand(4, 3)
    radius = torch.tensor([-3.0, NAN, 0.0, 2.0])
    assert rasterize_points(points, (2, 2), radius, 2).indices[0, 0].tolist() == [3, -1]


def test_an_infinite_depth_is_a_depth():
    found = rasterize_points(torch.tensor([[0.5, 0.5, INF], [0.5, 0.5, 1.0]]), (1, 1), 1, 3)
    assert found.indices.flatten().tolist() == [1, 0, -1]


def test_a_number_as_radius_is_not_rounded_to_half():
    points = torch.tensor([[0.5, 0.5, 1.0]], dtype=torch.float16)
    assert rasterize_points(points, (1, 3), 2.0, 1).indices.flatten().tolist() == [0, 0, -1]
    assert torch.tensor(2.0004, dtype=torch.float16) == 2
    assert rasterize_points(points, (1, 3), 2.0004, 1).indices.flatten().tolist() == [0, 0, 0]


def test_accepts_int32_lengths_and_a_list_as_size():
    points = torch.rand(2, 9, 3) * 4
    narrow = rasterize_points(points, [4, 4], 1.0, lengths=torch.tensor([3, 9], dtype=torch.int32))
    wide = rasterize_points(points, (4, 4), 1.0, lengths=torch.tensor([3, 9]))
    assert all(map(torch.equal, narrow, wide))


def nearest_at(points, radius, points_per_pixel, rows, columns):
    """indices at some pixels, by brute force."""
    center = torch.stack([columns + 0.5, rows + 0.5], -1).double()
    hit = (points[:, :2] - center[:, None]).square().sum(-1) < radius**2
    depth = points[:, 2].expand_as(hit).masked_fill(~hit, INF)
    value, index = depth.sort(stable=True)
    return index.masked_fill(value.isinf(), -1)[:, :points_per_pixel]


def test_many_tiles_per_point_are_taken_in_portions():
    """Low arcs: each disc's bounding box spans all 4096 tiles and leaves most of them open."""
    count, width = 2500, 1 << 16
    radius = 1e6
    points = torch.rand(count, 3, dtype=torch.float64)
    points[:, 0] = width / 2
    points[:, 1] += radius - 0.5 + 15
    points[:, 2] += 1
    indices = rasterize_points(points, (16, width), radius, 4).indices
    columns = width // 2 + torch.arange(-3000, 3000, 7)
    for row in (14, 15):
        expected = nearest_at(points, radius, 4, torch.full_like(columns, row), columns)
        assert torch.equal(indices[row, columns], expected)
    assert (indices[15, width // 2] >= 0).all()
    assert (indices[:, :20000] == -1).all()


def test_points_beyond_the_first_portion_are_found():
    """Half a million near points crowd the left of the image, and farther ones are alone on the right."""
    left, right = 560_000, 50
    points = torch.rand(left + right, 3, dtype=torch.float64) * torch.tensor([3.0, 8.0, 1.0])
    points[:left, 2] += 0.5
    points[left:, 0] += 4
    points[left:, 2] += 2
    points = points[torch.randperm(left + right)]
    indices = rasterize_points(points, (8, 8), 0.7, 3).indices
    columns = torch.arange(8)
    for row in (0, 5):
        expected = nearest_at(points, 0.7, 3, torch.full_like(columns, row), columns)
        assert torch.equal(indices[row], expected)


def test_many_points_on_many_tiles_are_taken_in_portions():
    count, width = 40_000, 1 << 16
    points = torch.rand(count, 3, dtype=torch.float64) * torch.tensor([width, 16.0, 1.0]) + 0.01
    indices = rasterize_points(points, (16, width), 4.0, 5).indices
    columns, rows = torch.randint(width, (150,)), torch.randint(16, (150,))
    expected = nearest_at(points, 4.0, 5, rows, columns)
    assert torch.equal(indices[rows, columns], expected)
    assert (expected[:, 3] >= 0).any()


def test_ignores_what_flows_into_empty_slots():
    points = (torch.rand(2, 30, 3, dtype=torch.float64) * 8).requires_grad_()
    found = rasterize_points(points, (9, 7), 1.5, 4)
    empty = found.indices < 0
    assert empty.any()
    assert not empty.all()
    flowing = torch.randn(found.depths.shape, dtype=torch.float64)
    clean, poisoned = (flowing.masked_fill(empty, value) for value in (0, NAN))
    outputs = (found.depths, found.distances)
    expected = torch.autograd.grad(outputs, points, (clean, clean), retain_graph=True)[0]
    actual = torch.autograd.grad(outputs, points, (poisoned, poisoned))[0]
    assert torch.equal(actual, expected)


def test_gradients_match_finite_differences_where_slots_are_empty():
    points = torch.tensor([[1.2, 1.4, 2.0], [2.1, 0.9, 1.0], [9.0, 9.0, 1.0]], dtype=torch.float64)

    def values(points):
        found = rasterize_points(points, (3, 4), 1.3, 2)
        return [t.where(found.indices >= 0, 0) for t in (found.depths, found.distances)]

    assert torch.autograd.gradcheck(values, points.requires_grad_())


def test_a_radius_that_requires_grad_gets_none():
    points = torch.rand(1, 5, 3).requires_grad_()
    radius = torch.ones(1, 5).requires_grad_()
    found = rasterize_points(points, (2, 2), radius, 2)
    found.depths.where(found.indices >= 0, 0).sum().backward()
    assert points.grad is not None
    assert radius.grad is None


def test_another_size_or_radius_does_not_compile_for_ever():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rasterize_points, backend=counter, fullgraph=True, dynamic=None)
    points = torch.rand(1, 20, 3) * 9
    for step in range(8):
        radius, size = 1.0 + 0.3 * step, (5 + step, 6 + 2 * step)
        found = compiled(points, size, radius, 3)
        assert all(map(torch.equal, found, rasterize_points(points, size, radius, 3)))
    assert counter.frame_count <= 3


def test_radius_and_points_mix_dtypes_only_under_autocast():
    points, radius = torch.rand(1, 5, 3).bfloat16() * 4, torch.rand(1, 5)
    with pytest.raises(TypeError, match=r"radius: got dtype torch\.float32"):
        rasterize_points(points, (4, 4), radius)
    with torch.autocast("cpu", torch.bfloat16):
        found = rasterize_points(points, (4, 4), radius)
        with pytest.raises(TypeError, match=r"radius: got dtype torch\.float64"):
            rasterize_points(points, (4, 4), radius.double())
    assert all(map(torch.equal, found, rasterize_points(points.float(), (4, 4), radius)))


def test_fragments_are_saved_and_loaded_without_trust():
    found = rasterize_points(torch.rand(1, 5, 3), (2, 2), 1.0)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, Fragments)
    assert all(map(torch.equal, loaded, found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_low_precision_are_rounded_once(dtype):
    points = (torch.rand(1, 30, 3) * 8).to(dtype)
    flowing = torch.randn(1, 8, 8, 4).to(dtype)

    def gradient(dtype):
        leaf = points.to(dtype).requires_grad_()
        found = rasterize_points(leaf, (8, 8), 1.5, 4)
        return torch.autograd.grad(found[1:], leaf, [flowing.to(dtype)] * 2)[0]

    assert torch.equal(gradient(dtype), gradient(torch.float32).to(dtype))
