"""What is special to random_sample: fixed values, uniformity, independence, where the key comes from."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2
from torch._dynamo.testing import CompileCounter

import avatar_ops

# A fair sample lands below this with one chance in a thousand; seeds are fixed, so the outcome is too.
LEAST_CHANCE = 1e-3


def chance(counts, expected):
    """Chance of a chi-square statistic at least as large as that of the counts, if all were as expected."""
    counts = counts.double()
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(counts)
    return chi2.sf(((counts - expected) ** 2 / expected).sum().item(), counts.numel() - 1)


def samples(num_points, num_samples, count, seed=0):
    return avatar_ops.random_sample(num_points, num_samples, batch_size=count, seed=seed)


def by_seed(num_points, num_samples, seeds):
    return torch.stack([avatar_ops.random_sample(num_points, num_samples, seed=s) for s in seeds])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_points": 10, "num_samples": 6, "seed": 1}, [4, 0, 6, 8, 5, 1]),
        (
            {"num_points": 10**6, "num_samples": 6, "seed": 1},
            [214923, 486567, 759783, 576366, 720785, 569830],
        ),
        (
            {"num_points": 2**62, "num_samples": 2, "seed": -(2**63)},
            [4115082473496980849, 2649728638172312014],
        ),
        (
            {"num_points": 1000, "num_samples": 3, "seed": 2**63 - 1, "batch_size": 2},
            [[214, 916, 88], [616, 426, 523]],
        ),
    ],
)
def test_random_sample_gives_the_same_indices_in_every_release(options, expected, isa):
    assert avatar_ops.random_sample(**options).tolist() == expected


@pytest.mark.parametrize("num_points", [0, 1, 2, 3, 4, 5, 63, 64, 65, 66, 81, 1000])
def test_random_sample_of_all_points_is_a_permutation(num_points):
    indices = samples(num_points, num_points, 20)
    assert torch.equal(indices.sort(1).values, torch.arange(num_points).expand(20, -1))


@pytest.mark.parametrize("num_points", [2, 3, 4, 5, 6])
def test_random_sample_orders_small_clouds_in_every_way_equally_often(num_points):
    count = 120_000
    digits = num_points ** torch.arange(num_points)
    codes = torch.tensor(
        [(torch.tensor(p) * digits).sum() for p in itertools.permutations(range(num_points))]
    )
    seen = (samples(num_points, num_points, count) * digits).sum(1)
    counts = torch.bincount(seen, minlength=num_points**num_points)[codes]
    assert counts.sum() == count
    assert chance(counts, count / math.factorial(num_points)) > LEAST_CHANCE


@pytest.mark.parametrize("num_points", [65, 81, 100])
@pytest.mark.parametrize("places", [(0, 1), (0, 9), (1, 11), (3, 40)])
def test_random_sample_draws_every_pair_equally_often(num_points, places):
    count = 40 * num_points**2
    indices = samples(num_points, 41, count)
    pairs = indices[:, places[0]] * num_points + indices[:, places[1]]
    counts = torch.bincount(pairs, minlength=num_points**2).view(num_points, num_points)
    assert counts.diagonal().sum() == 0
    off_diagonal = counts[~torch.eye(num_points, dtype=torch.bool)]
    assert chance(off_diagonal, count / (num_points * (num_points - 1))) > LEAST_CHANCE


def test_random_sample_covers_a_large_cloud_uniformly():
    num_points, cells = 1_000_003, 1000
    indices = avatar_ops.random_sample(num_points, 200_000, seed=5)
    assert indices.unique().numel() == indices.numel()
    edges = torch.arange(cells + 1) * num_points // cells
    sizes = edges.diff().double()
    counts = torch.bincount(torch.bucketize(indices, edges[1:], right=True), minlength=cells)
    # Drawing without replacement narrows the spread by this share.
    remaining = 1 - indices.numel() / num_points
    statistic = ((counts - sizes / num_points * indices.numel()) ** 2 / (sizes / num_points)).sum()
    assert 1e-3 < chi2.sf(statistic.item() / indices.numel() / remaining, cells - 1) < 1 - 1e-3


@pytest.mark.parametrize("step", [1, 2**32, 0x9E3779B97F4A7C15 - 2**64], ids=["one", "high-word", "golden"])
def test_random_sample_of_related_seeds_is_independent(step):
    num_points, count = 70, 40_000
    first = by_seed(num_points, 1, range(0, count)).squeeze(1)
    second = by_seed(num_points, 1, [(s + step + 2**63) % 2**64 - 2**63 for s in range(count)]).squeeze(1)
    counts = torch.bincount(first * num_points + second, minlength=num_points**2)
    assert chance(counts, count / num_points**2) > LEAST_CHANCE


def test_random_samples_of_different_seeds_share_as_many_points_as_chance_has_it():
    """The overlap of two samples is hypergeometric; its mean and its spread over many pairs of seeds."""
    num_points, count, pairs = 20_000, 2000, 400
    drawn = by_seed(num_points, count, range(pairs + 1))
    kept = torch.zeros(pairs + 1, num_points, dtype=torch.bool).scatter_(1, drawn, True)
    overlap = (kept[:-1] & kept[1:]).sum(1).double()
    mean = count**2 / num_points
    variance = mean * (1 - count / num_points) ** 2 * num_points / (num_points - 1)
    assert abs(overlap.mean() - mean) < 3.3 * (variance / pairs) ** 0.5
    assert 1e-3 < chi2.sf((((overlap - mean) ** 2).sum() / variance).item(), pairs) < 1 - 1e-3


def test_random_sample_gives_the_same_indices_for_any_thread_count(isa):
    """So many that several threads take part."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(avatar_ops.random_sample(400_000, 50_000, seed=11))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    # Of every instruction set.
    assert results[0][::12_500].tolist() == [245007, 270195, 342145, 254441]


def test_random_sample_of_neighboring_clouds_is_independent():
    num_points, count = 70, 200_000
    first = samples(num_points, 1, count).squeeze(1)
    counts = torch.bincount(first[:-1] * num_points + first[1:], minlength=num_points**2)
    assert chance(counts, (count - 1) / num_points**2) > LEAST_CHANCE


def test_random_sample_differs_between_seeds_and_between_clouds():
    rows = torch.cat([samples(1000, 50, 4, seed=s) for s in (0, 1, -1, 2**63 - 1, -(2**63))])
    assert rows.unique(dim=0).shape[0] == 20


def test_random_sample_alone_equals_the_first_of_a_batch():
    assert torch.equal(avatar_ops.random_sample(300, 40, seed=9), samples(300, 40, 5, seed=9)[0])


def test_random_sample_of_short_clouds_gives_all_points_then_missing():
    lengths = torch.tensor([0, 1, 7, 70, 200])
    indices = avatar_ops.random_sample(200, 100, lengths=lengths, seed=3)
    for row, length in zip(indices, lengths.tolist(), strict=True):
        count = min(length, 100)
        assert row[:count].unique().numel() == count
        assert ((row[:count] >= 0) & (row[:count] < length)).all()
        assert (row[count:] == -1).all()
    assert indices[3, :70].tolist() != list(range(70))


def test_random_sample_of_full_lengths_equals_no_lengths():
    full = avatar_ops.random_sample(200, 50, lengths=torch.full((3,), 200), seed=3)
    assert torch.equal(full, samples(200, 50, 3, seed=3))


def test_random_sample_accepts_int32_lengths():
    lengths = torch.tensor([5, 9])
    narrow = avatar_ops.random_sample(10, 6, lengths=lengths.int(), seed=3)
    assert torch.equal(narrow, avatar_ops.random_sample(10, 6, lengths=lengths, seed=3))


def test_random_sample_without_a_seed_follows_manual_seed():
    torch.manual_seed(7)
    first, second = avatar_ops.random_sample(1000, 20), avatar_ops.random_sample(1000, 20)
    torch.manual_seed(7)
    assert torch.equal(first, avatar_ops.random_sample(1000, 20))
    assert not torch.equal(first, second)


def test_random_sample_takes_its_key_from_a_generator():
    state = torch.get_rng_state()
    first = avatar_ops.random_sample(1000, 20, generator=torch.Generator().manual_seed(1))
    again = avatar_ops.random_sample(1000, 20, generator=torch.Generator().manual_seed(1))
    other = avatar_ops.random_sample(1000, 20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_sample_refuses_seed_and_generator_together():
    with pytest.raises(ValueError, match="seed and generator"):
        avatar_ops.random_sample(10, 5, seed=1, generator=torch.Generator())


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1])
def test_random_sample_refuses_seeds_beyond_64_bits(seed):
    with pytest.raises(ValueError, match="seed: got"):
        avatar_ops.random_sample(10, 5, seed=seed)


def test_random_sample_refuses_more_samples_than_points():
    with pytest.raises(ValueError, match="num_samples: got 11, expected at most num_points = 10"):
        avatar_ops.random_sample(10, 11, seed=0)


def test_random_sample_refuses_clouds_beyond_its_range():
    with pytest.raises(ValueError, match="num_points"):
        avatar_ops.random_sample(2**62 + 1, 5, seed=0)


def test_random_sample_uses_the_device_asked_for():
    assert avatar_ops.random_sample(100, 5, seed=1, device="cpu").device.type == "cpu"
    with torch.device("meta"):
        assert avatar_ops.random_sample(100, 5, seed=1).device.type == "meta"
    with pytest.raises(ValueError, match="lengths: got device"):
        avatar_ops.random_sample(100, 5, lengths=torch.tensor([5]), seed=1, device="meta")


def test_random_sample_compiles_once_for_all_seeds():
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(
        lambda seed: avatar_ops.random_sample(1000, 20, seed=seed), backend=counter, fullgraph=True
    )
    for seed in (5, 6, 7, 12345, -3, 2**40, 2**63 - 1, -(2**63)):
        assert torch.equal(run(seed), avatar_ops.random_sample(1000, 20, seed=seed))
    # The second compilation is the one that makes the seed a variable of the graph.
    assert counter.frame_count <= 2


def test_random_sample_without_a_seed_compiles_and_exports():
    torch._dynamo.reset()

    class Module(torch.nn.Module):
        def forward(self, x):
            return x[avatar_ops.random_sample(x.shape[0], 20)]

    x = torch.arange(1000)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Module(), (x,)).module()
    for run in (compiled, exported):
        torch.manual_seed(3)
        first, second = run(x), run(x)
        torch.manual_seed(3)
        assert torch.equal(first, Module()(x))
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_points", 5.0), ("num_points", "5"), ("num_samples", 1.0), ("batch_size", 2.0), ("seed", 2.5)],
)
def test_options_that_are_no_integers_are_named(name, value):
    options = {"num_points": 5, "num_samples": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
        avatar_ops.random_sample(**options)
