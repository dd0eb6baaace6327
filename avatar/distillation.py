"""What holds the student to the teacher: the losses of the first stage (eq. 3 to 5 and 11 to 13).

Eq. 10, the perceptual loss, is perceptual.VggLoss with the teacher's image as its target. No loss has a
gradient in what the teacher gives. Points are posed, in head units (the head enlarged as in head/model.py).

Source: "Efficient Realistic Avatar Generation via Model Compression and Enhanced Rendering", section 3.2 and
3.5. The readings of eq. 3 and 4 are ours: it names the divergence, not how clouds become distributions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar import losses
from avatar.config import DistillConfig
from avatar.models.point_avatar import Fields

DENSITY_FLOOR = 1e-6
SMALLEST_PEAK = 1e-30
SMALLEST_TEMPERATURE = 1e-12
NORM_FLOOR = 1e-3
TERMS = ("kl", "ce", "vgg", "flame", "mask", "rgb", "match", "surface", "eikonal")


def density_kl(
    teacher_points: Tensor,
    teacher_colors: Tensor,
    student_points: Tensor,
    student_colors: Tensor,
    *,
    matched: bool,
    anchors: int = 2048,
    points: int = 8192,
    width: float = 0.05,
    color_width: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """KL(P || Q) between the densities of two clouds at common anchors (eq. 3 and 4), a scalar.

        p_m = mean_i exp(-|(x_i - a_m) / h|^2 / 2),   P_m = (p_m + 1e-6 max p) / sum_m (p_m + 1e-6 max p)

    with x = XYZRGB of the teacher's points, Q likewise of the student's, and anchors a_m drawn from the
    teacher's points; the mean over frames. It sees neither the points' order nor their number. Without
    `matched` sampling alone gives 0.01 (two draws of 8192 points of one head), as a shift by 0.04 does.

    Args:
        teacher_points, teacher_colors: (B, N, 3) head units and [0, 1].
        student_points, student_colors: (B, M, 3), likewise.
        matched: student's point i is the teacher's point i: the same draw of both, whose noise cancels.
        anchors: at most so many, all N where there are fewer.
        points: at most so many of each cloud, likewise.
        width, color_width: h, standard deviations of the kernel in position and colour.
        generator: of the draws, on the CPU. One draw serves all frames.

    Raises:
        ValueError: `matched`, but N is not M.

    Differentiable in the student's points and colours. Time and memory O(B anchors points).
    """
    count, student_count = teacher_points.shape[1], student_points.shape[1]
    if matched and student_count != count:
        raise ValueError(f"student_points has {student_count} points, matched wants the teacher's {count}")
    device = teacher_points.device
    anchor_draw = _draw(count, anchors, generator).to(device)
    teacher_draw = _draw(count, points, generator).to(device)
    student_draw = teacher_draw if matched else _draw(student_count, points, generator).to(device)
    with torch.no_grad():
        teacher = _scaled(teacher_points, teacher_colors, width, color_width)
        anchor = teacher[:, anchor_draw]
        target = _log_density(anchor, teacher[:, teacher_draw])
    student = _scaled(student_points, student_colors, width, color_width)
    estimate = _log_density(anchor, student[:, student_draw])
    return F.kl_div(estimate, target, reduction="batchmean", log_target=True)


def _draw(count: int, wanted: int, generator: torch.Generator | None) -> Tensor:
    """`wanted` different indices below `count`, or all of them in order."""
    if wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted]


def _scaled(points: Tensor, colors: Tensor, width: float, color_width: float) -> Tensor:
    """XYZRGB in units of the widths: (B, N, 6)."""
    return torch.cat([points / width, colors / color_width], -1)


def _log_density(anchors: Tensor, points: Tensor) -> Tensor:
    """Logarithm of the normalised kernel densities of points (B, N, 6) at anchors (B, M, 6): (B, M)."""
    # About the anchors' mean the squares are small enough for the expanded square in float32.
    center = anchors.mean(1, keepdim=True)
    anchors, points = anchors - center, points - center
    one = torch.ones_like
    anchor_squares, point_squares = ((x**2).sum(-1, keepdim=True) for x in (anchors, points))
    left = torch.cat([anchors, -0.5 * anchor_squares, one(anchor_squares)], -1)
    right = torch.cat([points, one(point_squares), -0.5 * point_squares], -1)
    density = (left @ right.mT).exp_().mean(-1)
    # A cloud out of reach of every anchor has zero density everywhere: it counts as uniform.
    highest = density.amax(-1, keepdim=True).clamp_min(SMALLEST_PEAK)
    density = density + DENSITY_FLOOR * highest
    return density.log() - density.sum(-1, keepdim=True).log()


def graph_kl(
    teacher_points: Tensor,
    student_points: Tensor,
    neighbors: Tensor,
    *,
    teacher_colors: Tensor | None = None,
    student_colors: Tensor | None = None,
    width: float = 0.05,
    color_width: float = 0.1,
    temperature: float | None = None,
) -> Tensor:
    """KL(P || Q) between each point's nearness to its neighbours in the teacher's graph, a scalar.

        P_ik = softmax_k(-|x_i - x_k|^2 / t),   loss = mean_i sum_k P_ik log(P_ik / Q_ik)

    with x of the teacher, Q likewise of the student: eq. 4 on the graph topology of the cloud. It compares
    shapes of neighbourhoods: a cloud moved as a whole costs nothing.

    Args:
        teacher_points, student_points: (B, N, 3); student's point i is the teacher's point i.
        neighbors: (N, K) int64 in [0, N), or -1 for "none"; one graph for all frames.
        teacher_colors, student_colors: (B, N, 3); with both, x is XYZRGB in units of the widths.
        width, color_width: see density_kl; without colours the widths are not used.
        temperature: t, in units of x squared; by default each frame's mean squared distance of neighbours in
            the teacher, which makes the loss independent of the cloud's size.

    Raises:
        ValueError: clouds of different sizes, or colours of one cloud only.

    Differentiable in the student's points and colours. Memory O(B N K).
    """
    _check_same_shape("student_points", student_points, teacher_points)
    if (teacher_colors is None) != (student_colors is None):
        raise ValueError("teacher_colors and student_colors want both or neither")
    teacher, student = teacher_points, student_points
    if teacher_colors is not None and student_colors is not None:
        _check_same_shape("student_colors", student_colors, teacher_colors)
        teacher = _scaled(teacher, teacher_colors, width, color_width)
        student = _scaled(student, student_colors, width, color_width)
    missing = neighbors < 0
    with torch.no_grad():
        distances = _squared_distances(teacher, neighbors)
        if temperature is None:
            mean = distances.masked_fill(missing, 0).sum((1, 2)) / (~missing).sum().clamp_min(1)
            scale = mean.clamp_min(SMALLEST_TEMPERATURE)[:, None, None]
        else:
            scale = torch.full_like(distances[:, :1, :1], temperature)
        target = _log_softmax(-distances / scale, missing)
    estimate = _log_softmax(-_squared_distances(student, neighbors) / scale, missing)
    divergence = F.kl_div(estimate, target, reduction="none", log_target=True)
    return divergence.sum(-1).mean()


def _squared_distances(points: Tensor, neighbors: Tensor) -> Tensor:
    """From each of (B, N, D) points to its neighbours (N, K): (B, N, K); to point 0 where none."""
    table = points.transpose(0, 1).flatten(1)
    # An embedding sums its gradient in the same order every time; that of indexing depends on the threads.
    gathered = F.embedding(neighbors.clamp_min(0), table).unflatten(-1, (len(points), -1))
    return ((gathered - points.transpose(0, 1)[:, None]) ** 2).sum(-1).permute(2, 0, 1)


def _log_softmax(logits: Tensor, missing: Tensor) -> Tensor:
    return torch.log_softmax(logits.masked_fill(missing, torch.finfo(logits.dtype).min), -1)


def feature_cosine(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """1 - cos(T, S) of every point's features, the mean over points and frames (eq. 5).

    In [0, 2]. Lengths below 0.001 count as 0.001, which bounds the gradient where features vanish.

    Args:
        student_features, teacher_features: (B, N, C).

    Differentiable in student_features.
    """
    _check_same_shape("student_features", student_features, teacher_features)
    return 1 - F.cosine_similarity(student_features, teacher_features.detach(), -1, NORM_FLOOR).mean()


def field_consistency(
    student: Fields,
    teacher: Fields,
    *,
    expression: float = 1000.0,
    pose: float = 1000.0,
    skinning: float = 0.1,
    squared: bool = True,
) -> Tensor:
    """Hold the student's deformer to the teacher's (eq. 11).

        mean_i  l_e |E_i - E'_i|^2 + l_p |P_i - P'_i|^2 + l_w |W_i - W'_i|^2

    with the squared norm over all of a point's components, which is the mean over points of a sum, not of a
    mean as in losses.flame. The offset has no term. A head without pose correctives has no pose term.

    Args:
        student, teacher: both deformers' fields at the same N points, the student's canonical ones.
        expression, pose, skinning: l_e, l_p, l_w. Expression and pose are compared in head units, in which
            the head is four times its size in metres: IMavatar's weights, the defaults, are for these units.
        squared: else the norms themselves, as eq. 11 is printed. IMavatar, whose loss it is, squares.

    Differentiable in the student's fields.
    Source of the weights: Zheng et al., I M Avatar: Implicit Morphable Head Avatars from Videos, CVPR 2022.
    """
    loss = student.weights.new_zeros(())
    for name, weight in (("expression", expression), ("pose", pose), ("weights", skinning)):
        field, target = getattr(student, name), getattr(teacher, name)
        _check_same_shape(f"student.{name}", field, target)
        difference = (field - target.detach()).flatten(1)
        norm = (difference**2).sum(-1) if squared else difference.norm(dim=-1)
        loss = loss + weight * norm.mean()
    return loss


def mask_consistency(opacity: Tensor, teacher_opacity: Tensor) -> Tensor:
    """Mean absolute difference of the accumulated opacities (eq. 12), both (B, 1, H, W)."""
    _check_same_shape("opacity", opacity, teacher_opacity)
    return losses.mask(opacity, teacher_opacity.detach())


def matched_points(
    teacher_points: Tensor,
    teacher_colors: Tensor,
    student_points: Tensor,
    student_colors: Tensor,
    *,
    width: float = 0.05,
    color_width: float = 0.1,
) -> Tensor:
    """Mean absolute error of positions and of colours, in units of the widths; not in the paper.

    Args:
        teacher_points, teacher_colors, student_points, student_colors: (B, N, 3); student's point i is the
            teacher's point i.
    """
    _check_same_shape("student_points", student_points, teacher_points)
    _check_same_shape("student_colors", student_colors, teacher_colors)
    positions = F.l1_loss(student_points, teacher_points.detach()) / width
    return positions + F.l1_loss(student_colors, teacher_colors.detach()) / color_width


def distillation_total(terms: dict[str, Tensor], config: DistillConfig) -> Tensor:
    """The first stage's weighted sum (eq. 13, with the terms that the paper leaves out).

    Args:
        terms: unweighted scalars named as their weights in the configuration; a term may be missing, and one
            of weight 0 is left out. "vgg" counts `vgg_every` times, for the steps that go without it.

    Raises:
        ValueError: an unknown term, or nothing of weight above 0.
    """
    unknown = terms.keys() - set(TERMS)
    if unknown:
        raise ValueError(f"terms has '{min(unknown)}', wants names among {', '.join(TERMS)}")
    weights = {name: getattr(config, name) for name in terms}
    if "vgg" in weights:
        weights["vgg"] *= config.vgg_every
    weighted = [weights[name] * term for name, term in terms.items() if weights[name]]
    if not weighted:
        raise ValueError(f"terms has {', '.join(terms) or 'nothing'}, wants one whose weight is not 0")
    return torch.stack(weighted).sum()


def _check_same_shape(name: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise ValueError(f"{name} has shape {tuple(got.shape)}, the teacher's has {tuple(wanted.shape)}")
