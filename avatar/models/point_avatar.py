"""A head avatar of learnable points: canonical colour and shape, a warp by the head's motion, splatting.

Source: Zheng et al., "PointAvatar: Deformable point-based head avatars from videos", CVPR 2023.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avatar_ops
from avatar.camera import Camera
from avatar.config import PointAvatarConfig
from avatar.head.model import HeadModel, apply_transforms, blend_transforms
from avatar.models.mlp import DeformerNetwork, SdfNetwork, TextureNetwork, linear_macs
from avatar.splatting import Splats, draw_points

SKINNING_GAIN = 20.0
VISIBLE_WEIGHT = 0.5
DENSE_MOTION = 0.004  # metres
CHUNK = 65536  # points at a time in inference, where a derivative needs every layer's output
JAW = 2


@dataclass
class Fields:
    """What the deformer knows of N canonical points."""

    offset: Tensor  # (N, 3), canonical points to the head's canonical surface
    expression: Tensor  # (N, 3, E)
    pose: Tensor  # (N, 3, P)
    weights: Tensor  # (N, J + 1), the first for the bone that never moves


@dataclass
class PosedPoints:
    """The points of B frames and what the losses need of the pass that made them."""

    posed: Tensor  # (B, N, 3)
    normals: Tensor  # (B, N, 3)
    colors: Tensor  # (B, N, 3)
    fields: Fields
    sdf: Tensor  # (N,)
    sdf_gradient: Tensor  # (N, 3)


def inverse_3x3(matrices: Tensor) -> Tensor:
    """Inverse by the adjugate: (..., 3, 3)."""
    a, b, c = matrices.unbind(-1)
    rows = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-2)
    return rows / (a * rows[..., 0, :]).sum(-1)[..., None, None]


class LearnedDeformer(nn.Module):
    """Fields from scratch: zero bases and equal weights at first."""

    def __init__(self, head: HeadModel, width: int, layers: int):
        super().__init__()
        self.expressions, self.pose_features = head.num_expressions, head.num_pose_features
        blend = 3 * (self.expressions + self.pose_features + 1)
        self.network = DeformerNetwork(blend, len(head.parents) + 1, width, layers)

    def locate(self, points: Tensor) -> None:
        """Nothing to look up: the network takes the points as they are."""

    def forward(self, points: Tensor, place: None = None) -> Fields:
        blend, logits = self.network(points)
        pose, expression, offset = blend.split([3 * self.pose_features, 3 * self.expressions, 3], -1)
        weights = torch.softmax(SKINNING_GAIN * logits, -1)
        return Fields(offset, expression.unflatten(-1, (3, -1)), pose.unflatten(-1, (3, -1)), weights)


class HeadDeformer(nn.Module):
    """The head's own fields, interpolated from the three nearest canonical vertices, plus a residual."""

    NEIGHBORS = 3

    def __init__(self, head: HeadModel, canonical_vertices: Tensor, width: int, layers: int):
        super().__init__()
        self.residual = LearnedDeformer(head, width, layers)
        tables = [head.pose_basis.flatten(1), head.expression_basis.flatten(1), head.weights_with_ghost()]
        self.register_buffer("vertices", canonical_vertices, persistent=False)
        self.register_buffer("table", torch.cat(tables, 1), persistent=False)

    def locate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest vertices (N, 3) and their shares (N, 3), by inverse squared distance."""
        distances, neighbors = avatar_ops.knn(self.vertices, self.NEIGHBORS, queries=points.detach())
        shares = 1 / (distances + 1e-6)
        return neighbors, shares / shares.sum(-1, keepdim=True)

    def forward(self, points: Tensor, place: tuple[Tensor, Tensor] | None = None) -> Fields:
        neighbors, shares = self.locate(points) if place is None else place
        values = F.embedding_bag(neighbors, self.table, per_sample_weights=shares, mode="sum")
        learned = self.residual
        sizes = [3 * learned.pose_features, 3 * learned.expressions, self.table.shape[1]]
        sizes[2] -= sizes[0] + sizes[1]
        pose, expression, weights = values.split(sizes, -1)
        blend, logits = learned.network(points)
        d_pose, d_expression, offset = blend.split([sizes[0], sizes[1], 3], -1)
        return Fields(
            offset,
            (expression + d_expression).unflatten(-1, (3, -1)),
            (pose + d_pose).unflatten(-1, (3, -1)),
            torch.softmax(torch.log(weights + 1e-6) + logits, -1),
        )


class PointAvatar(nn.Module):
    """Points, SDF (shape and albedo), deformer and texture of one person.

    Args:
        config: sizes and options.
        head: the head that moves the points, identity baked in.
        canonical_expression: (E,), the mean over the training frames.
        expression_variance: (E,), over the training frames.
        generator: draws the points' start.
    """

    def __init__(
        self,
        config: PointAvatarConfig,
        head: HeadModel,
        canonical_expression: Tensor,
        expression_variance: Tensor,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.config = config
        self.head = head
        self.radius = config.start_radius()
        canonical_pose = canonical_expression.new_zeros(3 * len(head.parents))
        canonical_pose[3 * JAW] = config.jaw_opening
        self.register_buffer("canonical_expression", canonical_expression.clone())
        self.register_buffer("expression_variance", expression_variance.clone())
        self.register_buffer("canonical_pose", canonical_pose, persistent=False)
        with torch.no_grad():
            vertices = head(canonical_expression[None], canonical_pose[None])[0]
        self.register_buffer("canonical_vertices", vertices, persistent=False)

        self.sdf = SdfNetwork(config.sdf_width, config.sdf_layers, config.sdf_skip, config.sdf_frequencies)
        if config.deformer == "head":
            self.deformer = HeadDeformer(head, vertices, config.deformer_width, config.deformer_layers)
        else:
            self.deformer = LearnedDeformer(head, config.deformer_width, config.deformer_layers)
        self.texture = TextureNetwork(config.texture_widths)
        self.points = nn.Parameter(self._start(generator))
        self.register_buffer("visible", torch.zeros(len(self.points), dtype=torch.bool))

    def _start(self, generator: torch.Generator | None) -> Tensor:
        if self.config.start == "sphere":
            draws = torch.rand(self.config.points, 3, generator=generator) - 0.5
            return F.normalize(draws, dim=-1) * self.config.sphere_radius
        return sample_surface(
            self.head, self.canonical_vertices, self.config.points, self.config.dense_share, generator
        )

    @property
    def num_points(self) -> int:
        return len(self.points)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names `macs` counts them under."""
        return {"sdf": self.sdf, "deformer": self.deformer, "texture": self.texture}

    def macs(self, num_points: int) -> dict[str, int]:
        """Multiply-accumulates of one pass of each network over the points; derivatives take more."""
        return {name: num_points * linear_macs(part) for name, part in self.parts().items()}

    def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """SDF network outputs (N, 4) and the gradient of the distance (N, 3), itself differentiable.

        Without gradients, large clouds are evaluated in chunks.
        """
        if torch.is_grad_enabled():
            return self._sdf_and_gradient(points, create_graph=True)
        chunks = [self._sdf_and_gradient(chunk, create_graph=False) for chunk in points.split(CHUNK)]
        outputs, gradients = zip(*chunks, strict=True)
        return torch.cat(outputs), torch.cat(gradients)

    def _sdf_and_gradient(self, points: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            outputs = self.sdf(points)
            (gradient,) = torch.autograd.grad(outputs[:, 0].sum(), points, create_graph=create_graph)
        return (outputs if create_graph else outputs.detach()), gradient

    def warp(self, points: Tensor, fields: Fields, expression: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical points to the frames' poses.

            x_f = x + o;  x_0 = T_can^-1 x_f - E b_can - P t_can;  x_d = T (x_0 + E b + P t)

        Returns:
            posed (B, N, 3) and the linear part of T T_can^-1 (B, N, 3, 3).
        """
        head = self.head
        canonical_bones = head.bone_transforms(self.canonical_expression[None], self.canonical_pose[None])
        to_canonical = blend_transforms(fields.weights, canonical_bones)[0]
        from_canonical = inverse_3x3(to_canonical[..., :3])
        rest = (from_canonical @ (points + fields.offset - to_canonical[..., 3])[..., None])[..., 0]
        offsets = torch.einsum("nde,be->bnd", fields.expression, expression - self.canonical_expression)
        if head.num_pose_features:
            features = head.pose_features(pose) - head.pose_features(self.canonical_pose[None])
            offsets = offsets + torch.einsum("ndp,bp->bnd", fields.pose, features)
        transforms = blend_transforms(fields.weights, head.bone_transforms(expression, pose))
        return apply_transforms(transforms, rest + offsets), transforms[..., :3] @ from_canonical

    def warp_jacobian(self, points: Tensor, expression: Tensor, pose: Tensor) -> Tensor:
        """d posed / d canonical, deformer included, by forward-mode differentiation: (B, N, 3, 3).

        The shares of a head deformer's vertices count as constants, as they do in training. Without gradients,
        large clouds are evaluated in chunks.
        """
        if not torch.is_grad_enabled() and len(points) > CHUNK:
            chunks = [self.warp_jacobian(chunk, expression, pose) for chunk in points.split(CHUNK)]
            return torch.cat(chunks, 1)
        place = self.deformer.locate(points)

        def posed(x: Tensor) -> Tensor:
            return self.warp(x, self.deformer(x, place), expression, pose)[0]

        columns = []
        for axis in range(3):
            direction = torch.zeros_like(points)
            direction[:, axis] = 1
            columns.append(torch.func.jvp(posed, (points,), (direction,))[1])
        return torch.stack(columns, -1)

    def pose_points(self, expression: Tensor, pose: Tensor) -> PosedPoints:
        """Points of frames with expression (B, E) and pose (B, 15)."""
        # The networks see the points where they are; only the splat moves them.
        fixed = self.points.detach()
        outputs, gradient = self.sdf_and_gradient(fixed)
        fields = self.deformer(self.points)
        posed, turn = self.warp(self.points, fields, expression, pose)

        canonical_normals = F.normalize(gradient, dim=-1)
        if self.config.normals == "jacobian":
            inverse = inverse_3x3(self.warp_jacobian(fixed, expression, pose))
            normals = F.normalize((canonical_normals[:, None] @ inverse)[..., 0, :], dim=-1)
        else:
            normals = F.normalize((turn.detach() @ canonical_normals[..., None])[..., 0], dim=-1)
        albedo = torch.sigmoid(self.config.albedo_gain * outputs[:, 1:])
        colors = (2 * self.texture(normals) * albedo).clamp(0, 1)
        return PosedPoints(posed, normals, colors, fields, outputs[:, 0], gradient)

    def draw(self, posed: Tensor, colors: Tensor, camera: Camera) -> Splats:
        """Splat posed points (B, N, 3) with colours (B, N, 3), these or those of a model on top."""
        return draw_points(posed, colors, camera, self.radius, self.config.points_per_pixel)

    def forward(self, expression: Tensor, pose: Tensor, camera: Camera) -> tuple[PosedPoints, Splats]:
        """Pose and draw frames with expression (B, E) and pose (B, 15)."""
        points = self.pose_points(expression, pose)
        return points, self.draw(points.posed, points.colors, camera)

    @torch.no_grad()
    def note_visible(self, splats: Splats) -> None:
        """Mark the points that are in front at some pixel or make up more than half of one."""
        indices = splats.fragments.indices
        alphas = torch.where(indices >= 0, splats.alphas, 0.0)
        passed = torch.cumprod(1 - alphas, -1)
        weights = alphas * torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], -1)
        seen = (weights > VISIBLE_WEIGHT) & (indices >= 0)
        seen[..., 0] = indices[..., 0] >= 0
        self.visible[indices[seen]] = True

    @torch.no_grad()
    def set_points(self, points: Tensor) -> None:
        """Replace the points; optimisers must be told of the new parameter."""
        self.points = nn.Parameter(points)
        self.visible = torch.zeros(len(points), dtype=torch.bool, device=points.device)


def sample_surface(
    head: HeadModel, vertices: Tensor, count: int, dense_share: float, generator: torch.Generator | None
) -> Tensor:
    """Points spread over a mesh by area, denser where expressions move it: (count, 3).

    Args:
        vertices: (V, 3), the head's vertices in the pose to sample.
        dense_share: density of faces that some expression moves by more than 4 mm, or that turn with the
            eyes, relative to the rest.
    """
    corners = vertices[head.faces].cpu()
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1)
    moving = head.expression_basis.norm(dim=1).amax(-1) > DENSE_MOTION * head.scale
    moving |= head.weights[:, JAW + 1 :].sum(-1) > 0.5
    density = area * torch.where(moving[head.faces].any(-1).cpu(), dense_share, 1.0)
    faces = torch.multinomial(density, count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, generator=generator)
    flip = u + v > 1
    u, v = torch.where(flip, 1 - u, u), torch.where(flip, 1 - v, v)
    shares = torch.stack([1 - u - v, u, v], -1)
    return (shares[..., None] * corners[faces]).sum(1)
