import pytest
import torch

from avatar_ops import Fragments, composite_points, rasterize_points

NAN = float("nan")


def fragments_of(indices):
    return Fragments(indices, torch.zeros(indices.shape), torch.zeros(indices.shape))


def by_hand(indices, features, alphas):
    """One image in plain Python numbers."""
    height, width, slots = indices.shape
    image = torch.zeros(features.shape[1], height, width, dtype=torch.float64)
    opacity = torch.zeros(1, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            through = 1.0
            for slot in range(slots):
                point = int(indices[row, column, slot])
                if point < 0:
                    continue
                weight = float(alphas[row, column, slot]) * through
                image[:, row, column] += weight * features[point]
                opacity[0, row, column] += weight
                through *= 1 - float(alphas[row, column, slot])
    return image, opacity


@pytest.mark.parametrize("channels", [0, 1, 3, 16, 33, 64, 130])
def test_composites_front_to_back(channels, isa):
    indices = torch.randint(-1, 6, (3, 19, 4))
    features = torch.randn(6, channels, dtype=torch.float64)
    alphas = torch.rand(3, 19, 4, dtype=torch.float64) * 3 - 1
    actual = composite_points(fragments_of(indices), features, alphas)
    for a, e in zip(actual, by_hand(indices, features, alphas), strict=True):
        torch.testing.assert_close(a, e)


def test_what_lies_behind_an_opaque_point_is_hidden():
    indices = torch.tensor([[[1, 0]]])
    features = torch.tensor([[5.0], [7.0]])
    image, opacity = composite_points(fragments_of(indices), features, torch.ones(1, 1, 2))
    assert image.item() == 7
    assert opacity.item() == 1


def test_gradients_at_alpha_one_are_those_of_the_formula():
    indices = torch.tensor([[[0, 1, 2]]])
    features = torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64, requires_grad=True)
    alphas = torch.tensor([[[0.5, 1.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    image, opacity = composite_points(fragments_of(indices), features, alphas)
    by_features, by_alphas = torch.autograd.grad(image.sum(), (features, alphas), retain_graph=True)
    assert by_features.flatten().tolist() == [0.5, 0.5, 0.0]
    # a0 f0 + (1 - a0) (a1 f1 + (1 - a1) a2 f2)
    assert by_alphas.flatten().tolist() == [2.0 - 3.0, 0.5 * (3.0 - 5.0), 0.0]
    assert torch.autograd.grad(opacity.sum(), alphas)[0].flatten().tolist() == [0.0, 0.0, 0.0]


def test_the_alpha_of_an_empty_slot_never_counts():
    indices = torch.randint(-1, 5, (2, 7, 6, 4))
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    alphas = torch.rand(indices.shape, dtype=torch.float64)
    results = []
    for value in (0.0, 1.0, NAN):
        leaf = alphas.masked_fill(indices < 0, value).requires_grad_()
        image, opacity = composite_points(fragments_of(indices), features, leaf)
        gradients = torch.autograd.grad(image.sin().sum() + opacity.cos().sum(), (features, leaf))
        assert (gradients[1][indices < 0] == 0).all()
        results.append([image, opacity, *gradients])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_nothing_there_gives_zeros():
    indices = torch.full((1, 2, 3, 4), -1)
    image, opacity = composite_points(fragments_of(indices), torch.rand(1, 5, 2), torch.ones(1, 2, 3, 4))
    assert not image.any()
    assert not opacity.any()


def test_each_gradient_is_found_alone_too():
    indices = torch.randint(-1, 5, (1, 4, 4, 3))
    features, alphas = torch.rand(1, 5, 3, requires_grad=True), torch.rand(1, 4, 4, 3, requires_grad=True)

    def gradients(features, alphas):
        image, opacity = composite_points(fragments_of(indices), features, alphas)
        leaves = [leaf for leaf in (features, alphas) if leaf.requires_grad]
        return torch.autograd.grad(image.square().sum() + opacity.sum(), leaves)

    both = gradients(features, alphas)
    assert torch.equal(gradients(features, alphas.detach())[0], both[0])
    assert torch.equal(gradients(features.detach(), alphas)[0], both[1])


def test_only_the_opacity_may_be_differentiated():
    indices = torch.randint(-1, 5, (1, 4, 4, 3))
    features = torch.rand(1, 5, 3, requires_grad=True)
    alphas = torch.rand(1, 4, 4, 3, requires_grad=True)
    opacity = composite_points(fragments_of(indices), features, alphas)[1]
    by_features, by_alphas = torch.autograd.grad(opacity.sum(), (features, alphas))
    assert not by_features.any()
    assert by_alphas.isfinite().all()


def test_fragments_may_be_a_plain_tuple_or_list_and_int32():
    indices = torch.randint(-1, 5, (1, 4, 4, 3))
    features, alphas = torch.rand(1, 5, 3), torch.rand(1, 4, 4, 3)
    expected = composite_points(fragments_of(indices), features, alphas)
    for indices_like in (indices, indices.int()):
        for fragments in ((indices_like, None, None), [indices_like, None, None]):
            assert all(map(torch.equal, composite_points(fragments, features, alphas), expected))


def test_features_and_alphas_mix_dtypes_only_under_autocast():
    indices = torch.randint(-1, 5, (1, 4, 4, 3))
    features, alphas = torch.rand(1, 5, 3).bfloat16(), torch.rand(1, 4, 4, 3)
    with pytest.raises(TypeError, match=r"alphas: got dtype torch\.float32"):
        composite_points(fragments_of(indices), features, alphas)
    with torch.autocast("cpu", torch.bfloat16):
        image, _ = composite_points(fragments_of(indices), features, alphas)
        with pytest.raises(TypeError, match=r"alphas: got dtype torch\.float64"):
            composite_points(fragments_of(indices), features, alphas.double())
    assert image.dtype == torch.float32
    assert torch.equal(image, composite_points(fragments_of(indices), features.float(), alphas)[0])


def test_a_splat_is_differentiable_end_to_end():
    """Positions through the distances, as point renderers use the two ops together."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(1, 12, 3, generator=generator, dtype=torch.float64) * 6
    features = torch.rand(1, 12, 3, generator=generator, dtype=torch.float64)
    radius = 1.7

    def render(points, features):
        found = rasterize_points(points, (6, 6), radius, 5)
        return composite_points(found, features, 1 - found.distances / radius**2)

    assert torch.autograd.gradcheck(render, (points.requires_grad_(), features.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_low_precision_are_rounded_once(dtype):
    indices = torch.randint(-1, 5, (1, 6, 6, 3))
    features, alphas = torch.rand(1, 5, 3).to(dtype), torch.rand(1, 6, 6, 3).to(dtype)
    flowing = torch.randn(1, 3, 6, 6).to(dtype), torch.randn(1, 1, 6, 6).to(dtype)

    def gradients(dtype):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (features, alphas)]
        outputs = composite_points(fragments_of(indices), *leaves)
        return torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in flowing])

    for low, wide in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, wide.to(dtype))
