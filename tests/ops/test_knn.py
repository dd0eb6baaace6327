"""What is special to knn, PointIndex and knn_graph."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import avatar_ops
from avatar_ops import KNN, PointIndex, knn, knn_graph, reference
from avatar_ops.knn import arrange_by_build, knn_graph_by_clouds

INF, NAN = float("inf"), float("nan")


def assert_same(actual, expected, tolerance=0.0):
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)


@st.composite
def searches(draw):
    """Arguments of knn whose distances are exact, so that every answer is determined to the last bit."""
    dims = draw(st.sampled_from([1, 2, 3, 4, 8, 10, 11, 16, 37]))
    points = draw(st.integers(0, 150))
    spread = draw(st.sampled_from([0, 1, 3, 40]))
    offset = draw(st.sampled_from([0, 2**18]))
    unit = 2.0 ** draw(st.integers(-20, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def cloud(batch, rows):
        return (offset + torch.randint(-spread, spread + 1, (batch, rows, dims), generator=generator)).to(
            dtype
        ) * unit

    batch = draw(st.integers(1, 3))
    arguments = {"points": cloud(batch, points), "k": draw(st.sampled_from([0, 1, 3, 8, 9, 20, 40, 66, 200]))}
    if draw(st.booleans()):
        arguments["lengths"] = torch.randint(0, points + 1, (batch,), generator=generator)
    kind = draw(st.sampled_from(["self", "exclude_self", "queries"]))
    queries = points
    if kind == "queries":
        queries = draw(st.integers(0, 50))
        arguments["queries"] = cloud(batch, queries)
    arguments["exclude_self"] = kind == "exclude_self"
    if draw(st.booleans()):
        arguments["query_lengths"] = torch.randint(0, queries + 1, (batch,), generator=generator)
    return arguments


@settings(max_examples=150, deadline=None)
@given(searches())
def test_equals_brute_force_in_every_index_and_bit(arguments):
    expected = reference.knn(**arguments)
    assert_same(knn(**arguments), expected)
    index = PointIndex(arguments["points"], arguments.get("lengths"))
    rest = {name: value for name, value in arguments.items() if name not in ("points", "lengths", "k")}
    assert_same(index.knn(arguments["k"], **rest), expected)


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([1, 3, 7, 12, 65]),
    count=st.integers(1, 400),
    k=st.integers(1, 70),
    scale=st.floats(-18, 18),
    offset=st.floats(-5, 8),
    seed=st.integers(0, 2**31),
)
def test_distances_are_those_of_direct_differences_at_any_scale_and_offset(
    dims, count, k, scale, offset, seed
):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dims, generator=generator) * 10**scale
    points = points + (10**offset * 10**scale if offset > 0 else 0)
    distances, indices = knn(points, k)
    wide = points.double()
    exact = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").square()
    kept = min(k, count)
    direct = (wide.unsqueeze(1) - wide[indices[:, :kept]]).square().sum(-1)
    torch.testing.assert_close(distances[:, :kept].double(), direct, rtol=3e-6, atol=1e-37)
    nearest = exact.sort(dim=1).values[:, :kept]
    torch.testing.assert_close(direct, nearest, rtol=3e-6, atol=1e-37)
    ascending = distances[:, 1:] >= distances[:, :-1]
    assert ascending.all()


@pytest.mark.parametrize("dims", [3, 10, 11, 64])
def test_breaks_ties_by_index(dims, isa):
    points = torch.zeros(1000, dims)
    points[500:] = 1
    distances, indices = knn(points, 20)
    assert torch.equal(indices[:500], torch.arange(20).expand(500, -1))
    assert torch.equal(indices[500:], torch.arange(500, 520).expand(500, -1))
    assert not distances.any()


def cloud_of(kind, count):
    """Clouds whose distances are exact, with many ties."""
    generator = torch.Generator().manual_seed(count)
    points = torch.randint(-30, 31, (count, 3), generator=generator).float()
    if kind == "far clusters":
        points[::2] += 2.0**16
    elif kind == "outliers":
        points[:: count // 3] = 2.0**20
    elif kind == "scales":
        points *= 2.0 ** torch.randint(-20, 20, (count, 1), generator=generator)
    elif kind == "line":
        points = torch.arange(count).float().unsqueeze(1) * torch.tensor([1.0, 0.0, -2.0])
    return points


@pytest.mark.parametrize("kind", ["block", "far clusters", "outliers", "scales", "line"])
@pytest.mark.parametrize("k", [1, 8, 16, 20, 33])
def test_equals_brute_force_over_many_leaves(kind, k, isa):
    points = cloud_of(kind, 600)
    queries = points[::7] + 1
    # Sums of squares of very different size are rounded, and not alike on every instruction set.
    tolerance = 1e-6 if kind == "scales" else 0.0
    for arguments in ({"exclude_self": True}, {}, {"queries": queries}):
        (distances, indices), expected = knn(points, k, **arguments), reference.knn(points, k, **arguments)
        torch.testing.assert_close(distances, expected[0], rtol=tolerance, atol=0)
        if not tolerance:
            assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_of_points_may_mislead_about_where_the_others_are(exclude_self, dtype, isa):
    # Every sixteenth point lies in a cluster; by their share among all, its neighbours would be nearer than they are.
    points = torch.randint(-40, 41, (2, 2048, 16)).to(dtype)
    points[:, ::16] = 100 + torch.randint(-2, 3, (2, 128, 16)).to(dtype)
    for arguments in ({}, {"lengths": torch.tensor([2048, 1999])}):
        arguments["exclude_self"] = exclude_self
        assert_same(knn(points, 8, **arguments), reference.knn(points, 8, **arguments))


@pytest.mark.parametrize("kind", ["block", "outliers"])
def test_the_tree_does_not_depend_on_the_number_of_threads(kind, scaled):
    points = cloud_of(kind, scaled(100_000, 2_000))
    points[::5] = float("nan")
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        index = PointIndex(points)
        results.append([*index.index, *index.knn(9, exclude_self=True)])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dims", [3, 20])
def test_exclude_self_goes_by_index_and_keeps_duplicates(dims):
    points = torch.ones(100, dims)
    _, indices = knn(points, 3, exclude_self=True)
    assert indices[0].tolist() == [1, 2, 3]
    assert indices[2].tolist() == [0, 1, 3]
    assert indices[99].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dims", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflowing_distances_still_are_neighbors(dims, dtype):
    points = torch.zeros(5, dims, dtype=dtype)
    points[1:, 0] = torch.tensor([1.0, -1.0, 0.5, 1.0], dtype=dtype) * torch.finfo(dtype).max
    distances, indices = knn(points, 6)
    assert_same((distances, indices), reference.knn(points, 6))
    assert distances[0].tolist() == [0, INF, INF, INF, INF, INF]
    assert indices[0].tolist() == [0, 1, 2, 3, 4, -1]


@pytest.mark.parametrize("dims", [3, 20])
def test_half_distances_may_overflow_but_are_ordered_in_float32(dims):
    points = torch.zeros(4, dims, dtype=torch.float16)
    points[:, 0] = torch.tensor([0.0, 3000, 1000, 2000])
    distances, indices = knn(points, 5)
    assert indices[0].tolist() == [0, 2, 3, 1, -1]
    assert distances[0].tolist() == [0, INF, INF, INF, INF]


@pytest.mark.parametrize("dims", [2, 3, 5, 20])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_vanishing_and_overflowing_differences_are_ordered_by_index(dims, scale):
    points = torch.randn(700, dims) * scale
    assert_same(knn(points, 10), reference.knn(points, 10))


@pytest.mark.parametrize("dims", [3, 24])
def test_one_hundred_thousand_equal_points_take_no_longer_than_others(dims, scaled):
    points = torch.full((scaled(100_000, 4_000) if dims == 3 else scaled(5_000, 500), dims), 0.1)
    distances, indices = knn(points, 8)
    assert torch.equal(indices, torch.arange(8).expand_as(indices))
    assert not distances.any()


def test_nan_and_infinite_points_are_nobodys_neighbors_and_find_none():
    points = torch.randn(50, 3)
    points[7, 1] = float("nan")
    points[9, 0] = -INF
    distances, indices = knn(points, 60)
    assert (indices[[7, 9]] == -1).all()
    assert (distances[[7, 9]] == INF).all()
    found = indices[0][indices[0] >= 0]
    assert sorted(found.tolist()) == [i for i in range(50) if i not in (7, 9)]


def test_query_lengths_default_to_lengths_only_without_queries():
    points = torch.randn(2, 10, 3)
    lengths = torch.tensor([4, 10])
    assert (knn(points, 2, lengths=lengths).indices[0, 4:] == -1).all()
    assert (knn(points, 2, queries=points, lengths=lengths).indices[0] >= 0).all()
    more = knn(points, 2, lengths=lengths, query_lengths=torch.tensor([7, 3]), exclude_self=True)
    expected = reference.knn(
        points, 2, lengths=lengths, query_lengths=torch.tensor([7, 3]), exclude_self=True
    )
    assert_same(more, expected, 1e-6)
    assert (more.indices[0, 4:7] >= 0).all()


def test_lengths_may_be_int32_and_a_scalar_for_one_cloud():
    points = torch.randn(10, 3)
    expected = knn(points[:6], 3)
    for lengths in (torch.tensor(6), torch.tensor([6], dtype=torch.int32)):
        assert torch.equal(knn(points, 3, lengths=lengths).indices[:6], expected.indices)


def test_one_huge_and_many_tiny_clouds_are_searched_alike(scaled):
    huge = scaled(3000, 400)
    points = torch.randn(65, huge, 3)
    lengths = torch.tensor([huge] + [3] * 64)
    distances, indices = knn(points, 5, lengths=lengths)
    assert_same((distances[0], indices[0]), knn(points[0], 5))
    for cloud in (1, 64):
        assert_same((distances[cloud, :3], indices[cloud, :3]), knn(points[cloud, :3], 5))


@pytest.mark.parametrize("dims", [3, 20])
def test_same_neighbors_for_every_instruction_set(dims):
    from avatar_ops import _native

    points = torch.randint(-9, 10, (2, 500, dims)).float()
    before, results = _native.isa(), []
    for name in _native.available_isas():
        _native.set_isa(name)
        results.append(knn(points, 17))
    _native.set_isa(before)
    for result in results:
        assert_same(result, reference.knn(points, 17))


@pytest.mark.parametrize("dims", [3, 20])
def test_gradient_ignores_what_flows_into_missing_slots(dims):
    points = torch.randn(5, dims, requires_grad=True)
    queries = torch.randn(4, dims, requires_grad=True)
    distances, indices = knn(points, 8, queries=queries)
    grad = torch.ones_like(distances).masked_fill(indices < 0, float("nan"))
    grads = torch.autograd.grad(distances, (points, queries), grad)
    assert all(g.isfinite().all() for g in grads)
    expected = torch.autograd.grad(
        (queries.unsqueeze(1) - points[indices[:, :5]]).square().sum(), (points, queries)
    )
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_gradient_adds_both_roles_where_points_are_the_queries():
    points = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    (both,) = torch.autograd.grad(knn(points, 5).distances.sum(), points)
    queries = points.detach().clone().requires_grad_()
    apart = torch.autograd.grad(knn(points, 5, queries=queries).distances.sum(), (points, queries))
    torch.testing.assert_close(both, apart[0] + apart[1])


def test_gradient_of_queries_alone_is_given_alone():
    points, queries = torch.randn(9, 3), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(knn(points, 3, queries=queries).distances.sum(), queries)
    assert grad.shape == (4, 3)


def test_backward_op_refuses_indices_out_of_range():
    with pytest.raises(IndexError, match=r"neighbors\[0, 1, 0\] = 7"):
        torch.ops.avatar_ops.knn_backward(
            torch.ones(1, 2, 1), torch.ones(1, 5, 3), None, torch.tensor([[[4], [7]]]), True, False
        )


@pytest.mark.parametrize("queries", ["dtype", "size", "batch"])
def test_rejects_queries_unlike_the_points(queries):
    points = torch.randn(2, 10, 3)
    wrong = {"dtype": points.double(), "size": points[..., :2], "batch": points[:1]}[queries]
    with pytest.raises(TypeError if queries == "dtype" else ValueError, match="queries"):
        knn(points, 3, queries=wrong)


def test_rejects_queries_on_another_device():
    with pytest.raises(ValueError, match="queries"):
        knn(torch.randn(3, 3), 3, queries=torch.empty(3, 3, device="meta"))


@pytest.mark.parametrize("dims", [3, 20])
def test_point_index_gives_what_knn_gives_with_gradients(dims):
    points = torch.randn(2, 50, dims, requires_grad=True)
    queries = torch.randn(2, 20, dims, requires_grad=True)
    lengths = torch.tensor([50, 20])
    index = PointIndex(points, lengths)
    for k, options in (
        (4, {}),
        (9, {"exclude_self": True}),
        (5, {"queries": queries, "query_lengths": torch.tensor([3, 20])}),
    ):
        actual, expected = index.knn(k, **options), knn(points, k, lengths=lengths, **options)
        assert_same(actual, expected)
        leaves = (points, queries) if "queries" in options else (points,)
        gradients = [
            torch.autograd.grad(result.distances.where(result.indices >= 0, 0).sum(), leaves)
            for result in (actual, expected)
        ]
        for a, e in zip(*gradients, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(
    "arrange", [torch.ops.avatar_ops.knn_arrange, arrange_by_build], ids=["cpu", "build"]
)
@pytest.mark.parametrize("dims", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arranged_index_is_one_of_the_points_in_its_order(dtype, dims, arrange):
    points = torch.randn(3, 70, dims).to(dtype)
    points[0, 5], points[0, 9, -1], points[2, 1] = NAN, INF, -INF
    lengths = torch.tensor([70, 0, 64])
    order, parts = arrange(points, lengths)
    assert torch.equal(order.sort(1).values, torch.arange(70).expand(3, -1))
    # Those that are not in the index come last.
    assert order[0, -2:].tolist() == [5, 9]
    assert order[1].tolist() == list(range(70))
    assert order[2, -7:].tolist() == [1, *range(64, 70)]
    arranged = points.take_along_dim(order.unsqueeze(2), 1)
    for own in (False, True):
        actual = torch.ops.avatar_ops.knn_search(parts, arranged, None, 4, None, own)
        assert_same(KNN(*actual), knn(arranged, 4, lengths=lengths, exclude_self=own))


def test_arranged_index_has_near_points_near_each_other():
    points = torch.rand(5000, 3)
    index, order = PointIndex.arranged(points)
    assert torch.equal(index.points, points[order])
    assert_same(index.knn(5), knn(points[order], 5))
    # Twelve that follow each other span an eighth of the cloud at most, here and there more.
    spans = index.points[:4992].view(-1, 12, 3)
    spans = (spans.amax(1) - spans.amin(1)).amax(1)
    assert spans.median() < 1 / 4


def test_arranged_index_has_gradients_compiles_and_passes_opcheck():
    points = torch.randn(2, 40, 3, requires_grad=True)

    def search(points):
        index, order = PointIndex.arranged(points)
        return index.knn(3, exclude_self=True).distances, order

    torch._dynamo.reset()
    compiled = torch.compile(search, backend="aot_eager", fullgraph=True)
    (actual, order), (expected, expected_order) = compiled(points), search(points)
    assert torch.equal(order, expected_order)
    rows = points.take_along_dim(order.unsqueeze(2), 1)
    literal = torch.autograd.grad(knn(rows, 3, exclude_self=True).distances.sum(), points)
    for distances in (actual, expected):
        torch.testing.assert_close(torch.autograd.grad(distances.sum(), points), literal)
    for dims in (3, 20):
        args = (torch.randn(2, 40, dims), None)
        torch.library.opcheck(torch.ops.avatar_ops.knn_arrange.default, args)


def test_point_index_without_batch_and_moved():
    points, queries = torch.randn(30, 3), torch.randn(4, 3)
    index = PointIndex(points, torch.tensor(20)).to("cpu")
    assert_same(index.knn(3, queries=queries), knn(points[:20], 3, queries=queries))
    with pytest.raises(ValueError, match="exclude_self"):
        index.knn(3, queries=queries, exclude_self=True)


@pytest.mark.parametrize("dims", [3, 20])
def test_point_index_compiles_and_passes_opcheck(dims):
    points = torch.randn(1, 40, dims, requires_grad=True)
    queries = torch.randn(1, 6, dims, requires_grad=True)

    def search(points, queries):
        index = PointIndex(points)
        return index.knn(3, exclude_self=True).distances.sum() + index.knn(4, queries=queries).distances.sum()

    torch._dynamo.reset()
    compiled = torch.compile(search, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(points, queries), (points, queries))
    expected = torch.autograd.grad(search(points, queries), (points, queries))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    index = torch.ops.avatar_ops.knn_build(points.detach(), None)
    torch.library.opcheck(torch.ops.avatar_ops.knn_build, (points.detach(), None))
    torch.library.opcheck(torch.ops.avatar_ops.knn_search, (index, points, queries, 3, None, False))


def test_search_refuses_an_index_of_other_points():
    points = torch.randn(1, 40, 3)
    index = torch.ops.avatar_ops.knn_build(points, None)
    with pytest.raises(ValueError, match="index"):
        torch.ops.avatar_ops.knn_search(index, points[:, :7], None, 3, None, False)
    index[1][0, 0, 0] = 1000
    with pytest.raises(ValueError, match="index"):
        torch.ops.avatar_ops.knn_search(index, points, None, 3, None, False)


def test_compiles_with_queries_and_changing_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(knn, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (10, 25):
        points, queries = torch.randn(rows, 3, requires_grad=True), torch.randn(rows + 3, 3)
        actual, expected = compiled(points, 4, queries=queries), knn(points, 4, queries=queries)
        assert_same(actual, expected)


def brute_force_graph(x, k, batch, loop, cosine=False):
    """(neighbour, query) pairs by query, nearest first."""
    x = x.double()
    if cosine:
        unit = x / x.norm(dim=1, keepdim=True)
        distances = 1 - unit @ unit.T
    else:
        distances = (x.unsqueeze(1) - x).square().sum(-1)
    edges = []
    for query in range(len(x)):
        allowed = [
            n
            for n in range(len(x))
            if batch[n] == batch[query] and (loop or n != query) and not distances[query, n].isnan()
        ]
        allowed.sort(key=lambda n: (distances[query, n].item(), n))
        edges += [(n, query) for n in allowed[:k]]
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T


@pytest.mark.parametrize("dims", [2, 3, 20])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_graph_equals_brute_force(dims, loop, cosine):
    x = torch.randn(60, dims)
    batch = torch.tensor([0] * 30 + [1] * 2 + [3] + [7] * 27)
    expected = brute_force_graph(x, 4, batch, loop, cosine)
    assert torch.equal(knn_graph(x, 4, batch, loop, cosine=cosine), expected)
    flipped = knn_graph(
        x, 4, batch, loop, flow="target_to_source", cosine=cosine, num_workers=3, batch_size=8
    )
    assert torch.equal(flipped, expected.flip(0))


@pytest.mark.parametrize("neighbors_first", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_graph_by_padded_clouds_equals_the_kernel(loop, neighbors_first):
    x = torch.randn(75, 3)
    x[11] = float("nan")
    batch = torch.tensor([0] * 40 + [1] * 2 + [3] + [7] * 32)
    for rows, k in ((75, 4), (75, 60), (75, 0), (0, 3)):
        for clouds in (batch[:rows], None):
            arguments = (x[:rows], k, clouds, loop, neighbors_first, None)
            expected = torch.ops.avatar_ops.knn_graph(*arguments)
            assert torch.equal(knn_graph_by_clouds(*arguments), expected)


def test_graph_by_padded_clouds_rejects_what_the_kernel_rejects():
    for values, batch_size in (([0, 1, 0], None), ([-1, 0, 0], None), ([0, 1, 2], 2)):
        arguments = (torch.randn(3, 2), 1, torch.tensor(values), False, True, batch_size)
        messages = []
        for graph in (torch.ops.avatar_ops.knn_graph, knn_graph_by_clouds):
            with pytest.raises(ValueError, match="knn_graph: batch") as caught:
                graph(*arguments)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_graph_of_one_cloud_without_a_batch_vector():
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    assert knn_graph(x, 2).tolist() == [[1, 2, 0, 3, 0, 3, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]]
    assert knn_graph(torch.tensor([0.0, 5.0, 6.0]), 1).tolist() == [[1, 2, 1], [0, 1, 2]]


def test_graph_by_cosine_leaves_out_zero_vectors_and_ignores_length():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1e30, 1e29], [-1e-30, 0.0]])
    assert knn_graph(x, 5, cosine=True).tolist() == [[2, 3, 0, 3, 2, 0], [0, 0, 2, 2, 3, 3]]
    assert knn_graph(x, 1, loop=True, cosine=True).tolist() == [[0, 2, 3], [0, 2, 3]]
    half = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float16)
    assert knn_graph(half, 1, cosine=True).tolist() == [[1, 0, 1], [0, 1, 2]]


def test_graph_drops_the_point_itself_and_not_its_duplicates():
    assert knn_graph(torch.zeros(4, 3), 2).tolist() == [[1, 2, 0, 2, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("rows", [0, 1])
def test_graph_without_edges(rows):
    graph = knn_graph(torch.zeros(rows, 3), 4, torch.zeros(rows, dtype=torch.int64))
    assert graph.shape == (2, 0)
    assert graph.dtype == torch.int64
    assert knn_graph(torch.zeros(3, 2), 0).shape == (2, 0)


def test_graph_of_one_huge_and_many_tiny_clouds(scaled):
    huge = scaled(5000, 500)
    batch = torch.cat([torch.zeros(huge, dtype=torch.int64), torch.arange(1, 2001).repeat_interleave(2)])
    x = torch.randn(huge + 4000, 3)
    graph = knn_graph(x, 6, batch)
    assert graph.shape[1] == huge * 6 + 4000
    assert torch.equal(batch[graph[0]], batch[graph[1]])
    assert torch.equal(graph[0, : huge * 6].view(huge, 6), knn(x[:huge], 6, exclude_self=True).indices)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"batch": torch.tensor([0, 1, 0])}, ValueError, r"batch\[2\] = 0 after 1"),
        ({"batch": torch.tensor([-1, 0, 0])}, ValueError, r"batch\[0\] = -1"),
        ({"batch": torch.tensor([0, 1, 2]), "batch_size": 2}, ValueError, r"batch\[2\] = 2; expected .* = 2"),
        ({"batch": torch.tensor([0, 1])}, ValueError, "batch"),
        ({"batch": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "batch"),
        ({"flow": "sideways"}, ValueError, "flow"),
        ({"k": -1}, ValueError, "k"),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "x"),
        ({"x": torch.ones(3, 2, 2)}, ValueError, "x"),
    ],
)
def test_graph_rejects(change, error, match):
    with pytest.raises(error, match=match):
        knn_graph(**{"x": torch.randn(3, 2), "k": 1, **change})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_graph_compiles_and_exports_with_its_size_left_open(backend):
    x, batch = torch.randn(30, 3), torch.tensor([0] * 28 + [1] * 2)

    def degrees(x, batch):
        graph = knn_graph(x, 5, batch)
        return graph, torch.zeros(30).index_add(0, graph[0], torch.ones(graph.shape[1]))

    torch._dynamo.reset()
    actual = torch.compile(degrees, backend=backend, fullgraph=True)(x, batch)
    for a, e in zip(actual, degrees(x, batch), strict=True):
        assert torch.equal(a, e)


def test_graph_exports_and_passes_opcheck():
    x, batch = torch.randn(30, 3), torch.tensor([0] * 28 + [1] * 2)

    class Graph(torch.nn.Module):
        def forward(self, x, batch):
            return knn_graph(x, 5, batch, cosine=True)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Graph(), (x, batch)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x, batch), knn_graph(x, 5, batch, cosine=True))
    torch.library.opcheck(torch.ops.avatar_ops.knn_graph, (x, 5, batch, False, True, None))


@pytest.mark.parametrize("dims", [3, 20])
def test_autocast_runs_in_float32_and_leaves_float64(dims):
    points = torch.randn(40, dims)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(knn(points, 5), reference.knn(points, 5), 1e-5)
        assert knn(points.bfloat16(), 5).distances.dtype == torch.float32
        assert knn(points.double(), 5).distances.dtype == torch.float64
        assert_same(PointIndex(points).knn(5), reference.knn(points, 5), 1e-5)
        assert knn_graph(points, 3).shape == (2, 120)


def test_result_is_a_named_tuple():
    result = avatar_ops.knn(torch.randn(4, 3), 2)
    assert isinstance(result, avatar_ops.KNN)
    assert result.distances is result[0]
    assert result.indices is result[1]


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("cosine", [False, True])
def test_graph_equals_its_reference(flow, cosine):
    x = torch.randn(60, 3, dtype=torch.float64)
    x[7] = 0
    batch = torch.randint(5, (60,)).sort().values
    for loop in (False, True):
        options = {"batch": batch, "loop": loop, "flow": flow, "cosine": cosine}
        assert torch.equal(
            avatar_ops.knn_graph(x, 4, **options), avatar_ops.reference.knn_graph(x, 4, **options)
        )
