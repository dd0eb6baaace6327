"""Options of a training run: networks, stages, evaluation. Defaults are those of the preset `paper`."""

import math
from dataclasses import dataclass, field
from typing import Literal

Preset = Literal["small", "paper"]
STAGES = ("fit", "teacher", "distill", "adversarial")


@dataclass(frozen=True)
class PointAvatarConfig:
    """Networks and start of the points. Defaults are the paper's."""

    sdf_width: int = 256
    sdf_layers: int = 10
    sdf_skip: int = 4
    sdf_frequencies: int = 6
    """Octaves of the SDF network's positional encoding."""
    deformer_width: int = 128
    deformer_layers: int = 4
    texture_widths: tuple[int, ...] = (64, 64)
    deformer: Literal["learned", "head"] = "learned"
    """learned: fields from scratch, held to the head's; head: the head's own plus a learned residual."""
    normals: Literal["jacobian", "skinning"] = "jacobian"
    """How normals follow the warp: by its exact inverse Jacobian, or turned by the skinning."""
    points: int = 400
    start: Literal["sphere", "surface"] = "sphere"
    sphere_radius: float = 0.5
    dense_share: float = 5.0
    """Times as many points on surface that moves much with expressions or eyes (start = surface)."""
    radius: float | None = None
    """Splat radius at the start, in [-1, 1] image coordinates; by default 0.3 * 0.75^log2(points / 100)."""
    points_per_pixel: int = 10
    albedo_gain: float = 10.0
    jaw_opening: float = 0.4
    """Rotation of the jaw in the canonical pose, radians."""

    def start_radius(self) -> float:
        if self.radius is not None:
            return self.radius
        return 0.3 * 0.75 ** math.log2(self.points / 100)


@dataclass(frozen=True)
class ReportConfig:
    """How often a stage saves and shows what it has."""

    checkpoint_every: int = 500
    image_every: int = 500
    log_every: int = 20


@dataclass(frozen=True)
class ScheduleConfig(ReportConfig):
    """Length and batch of a stage."""

    epochs: int = 60
    steps_per_epoch: int | None = None
    """By default an epoch is one pass over the training frames."""
    batch_pixels: int = 819200
    """Frames in a batch: this over the number of points, at least 1 and at most `batch_max`."""
    batch_max: int = 8
    decay: Literal["linear", "none"] = "none"
    """linear: to a tenth over the second half."""


@dataclass(frozen=True)
class FitConfig(ScheduleConfig):
    """Schedule, losses and optimisers of the point avatar. Defaults are the paper's."""

    epochs: int = 63
    max_points: int = 409600
    grow_every: int = 5
    grow_epochs: tuple[int, ...] | None = None
    """Epochs that start by doubling the points; by default every `grow_every`."""
    grow_shrink: float = 0.75
    prune_from: int | None = 1
    """First epoch that starts by dropping points no training frame saw; none = never."""
    prune_until: int | None = None
    prune_radius: float = 0.006
    rebuild_optimizer: bool = True
    """As published: forget Adam's moments whenever points are pruned, and never decay the rate."""
    rate: float = 1e-4
    point_rate: float = 1e-4
    deformer_rate: float = 1e-4
    decay: Literal["milestones", "linear", "none"] = "milestones"
    """milestones: halve at epochs 40 and 60; linear: to a tenth over the second half."""
    tracking_rate: float = 5e-4
    tracking_from: int | None = 11
    """First epoch that corrects each frame's expression, pose and translation; none = trust the tracking."""
    rgb: float = 1.0
    mask: float = 1.0
    vgg: float = 0.1
    vgg_every: int = 1
    """Perceptual loss at every n-th step only, n times as strong."""
    vgg_size: int | None = 224
    """Side the images are resized to for the perceptual loss; none = as they are."""
    vgg_from: int = 0
    """First epoch with the perceptual loss."""
    surface: float = 1.0
    eikonal: float = 0.1
    eikonal_samples: int | None = None
    """Samples of the eikonal term; by default the points and as many beside them."""
    flame: float = 10.0
    flame_halvings: tuple[int, ...] = (10, 20, 30, 40)


@dataclass(frozen=True)
class PointFeaturesConfig:
    """RandLA-Net beside a stack of EdgeConv layers. Defaults are the teacher's."""

    randla_widths: tuple[int, ...] = (16, 64, 128, 256)
    """d of every level; a level puts out 2 d channels."""
    randla_neighbors: int = 16
    randla_ratio: int = 4
    """Points of a level over points of the next."""
    randla_last_ratio: int | None = None
    """That of the last level, where it differs: 2 in the published networks of five levels."""
    gcn_widths: tuple[int, ...] = (64, 64, 128)
    gcn_neighbors: int = 20
    gcn_output: int | None = 256
    """Width of the linear layer over all EdgeConv outputs; none = their concatenation as it is."""
    gcn_level: int = 0
    """Level of RandLA-Net's pyramid the EdgeConv layers work on; their features are copied up from there."""
    norm_momentum: float = 0.01
    """Of RandLA-Net's batch normalisation."""

    def randla_ratios(self) -> tuple[int, ...]:
        last = self.randla_ratio if self.randla_last_ratio is None else self.randla_last_ratio
        return (self.randla_ratio,) * (len(self.randla_widths) - 1) + (last,)


@dataclass(frozen=True)
class TeacherConfig:
    """What refines a fitted point avatar: point features fused with those of an image."""

    features: PointFeaturesConfig = field(default_factory=PointFeaturesConfig)
    resnet: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    image_widths: tuple[int, ...] = (1024, 512)
    """Of the layers over ResNet's pooled features."""
    fusion_widths: tuple[int, ...] = (512, 256)
    """Of the layers over a point's and the image's features; the last is that of the feature T."""
    head_widths: tuple[int, ...] = (256,)
    """Of the hidden layers from T to the offsets of position and colour."""
    latent_width: int = 512
    image: Literal["frame", "enhanced"] = "frame"
    """enhanced: the super-resolved frames of the data set's folder `enhanced`."""


@dataclass(frozen=True)
class StudentConfig:
    """The compressed model: three small networks, small point features, no image."""

    avatar: PointAvatarConfig = PointAvatarConfig(
        sdf_width=64, sdf_layers=6, sdf_skip=3, deformer_width=64, deformer_layers=3, texture_widths=(32,)
    )
    features: PointFeaturesConfig = PointFeaturesConfig(
        randla_widths=(16, 32, 96, 192),
        randla_neighbors=12,
        gcn_widths=(32, 32),
        gcn_neighbors=8,
        gcn_output=None,
        gcn_level=1,
    )
    fusion_widths: tuple[int, ...] = (64, 64)
    head_widths: tuple[int, ...] = ()
    latent_width: int = 512


@dataclass(frozen=True)
class GeneratorConfig:
    """StyleGAN2's generator, conditioned on splatted buffers."""

    channel_base: int = 16384
    """A resolution r has channel_base / r channels, at most `channel_max`."""
    channel_max: int = 512
    latent_size: int = 512
    style_size: int = 512
    mapping_layers: int = 8
    mapping_rate: float = 0.01
    """Learning rate of the mapping network relative to the rest."""
    condition: Literal["splat", "none"] = "splat"
    """splat: point buffers enter every resolution; none: the latent code alone, as the paper has it."""
    point_features: int = 8
    """Learned features per point among the splatted buffers."""
    start: int | None = None
    """First resolution; by default a quarter of the image with splats, 4 without."""
    start_input: Literal["constant", "buffer"] = "constant"
    """What the first resolution starts from: a learned constant or a convolution of the buffers."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """StyleGAN2's residual discriminator."""

    channel_base: int = 16384
    channel_max: int = 512
    group: int = 4
    """Images that share a standard deviation."""


@dataclass(frozen=True)
class InverterConfig:
    """The renderer inversion network; its maps have the generator's sizes."""

    mapping_layers: int = 8
    mapping_width: int = 512


@dataclass(frozen=True)
class TeacherTrainingConfig(ScheduleConfig):
    """Training of what refines the point avatar, which is frozen."""

    rate: float = 1e-3
    own_frame_share: float = 0.5
    """How often the image branch sees the frame to be drawn; else it sees another training frame."""
    rgb: float = 1.0
    mask: float = 1.0
    vgg: float = 0.1
    vgg_every: int = 1
    vgg_size: int | None = 224
    norm_frozen_from: float = 1.0
    """Share of the schedule after which batch normalisation goes by its running statistics."""


@dataclass(frozen=True)
class DistillConfig(ScheduleConfig):
    """Distillation of the teacher into the student (eq. 3 to 5, 10 to 13)."""

    rate: float = 1e-3
    point_rate: float = 1e-4
    warmup_steps: int = 0
    """Steps before the first epoch in which the student's own point avatar alone learns the teacher's points."""
    kl: float = 1.0
    kl_form: Literal["density", "graph"] = "density"
    """density: both clouds' densities at common anchors; graph: softmax over each point's neighbours."""
    kl_anchors: int = 2048
    kl_points: int = 8192
    kl_width: float = 0.05
    """Width of the kernels, in head units."""
    kl_color_width: float = 0.1
    ce: float = 1.0
    ce_features: Literal["fused", "points"] = "fused"
    """The teacher's features after or before they are fused with the image's."""
    vgg: float = 0.1
    vgg_every: int = 1
    vgg_size: int | None = 224
    flame: float = 1.0
    flame_expression: float = 1000.0
    flame_pose: float = 1000.0
    flame_skinning: float = 0.1
    flame_squared: bool = True
    """Squared differences of the fields, as published code has them; else their norms, as eq. 11 is printed."""
    mask: float = 1.0
    rgb: float = 1.0
    """Mean absolute error to the true frame, which the paper leaves out."""
    match: float = 0.0
    """Mean absolute error of positions and colours, in units of the kernels, to the teacher's same points."""
    surface: float = 1.0
    eikonal: float = 0.1
    eikonal_samples: int | None = None
    norm_frozen_from: float = 1.0
    """Share of the schedule after which batch normalisation goes by its running statistics."""


@dataclass(frozen=True)
class AdversarialConfig(ReportConfig):
    """Training of generator, discriminator and inverter, alternating with the student's optimisation."""

    pretrain_steps: int = 4000
    """Rendering steps before the first round."""
    rounds: int = 20
    optimization_steps: int = 200
    """Steps of the student that begin a round."""
    rendering_steps: int = 200
    """Steps of the networks that end a round. The paper also says 1 and S - 1 of every S."""
    batch: int = 4
    decay: Literal["linear", "none"] = "none"
    """linear: to a tenth over the last two fifths."""
    generator_rate: float = 0.002
    discriminator_rate: float = 0.002
    inverter_rate: float = 0.002
    inverter_every: int = 1
    """Train the inverter at every n-th rendering step only."""
    condition_rate: float = 0.002
    """Of the generator's convolutions of the buffers."""
    point_feature_rate: float = 0.002
    beta1: float = 0.0
    beta2: float = 0.99
    rgb: float = 5.0
    vgg: float = 1.0
    vgg_every: int = 1
    vgg_size: int | None = None
    gan: float = 0.02
    gan_from: int = 0
    """First rendering step with the discriminator."""
    r1: float | None = None
    """R1's gamma; by default 2e-4 * size^2 / batch."""
    r1_every: int = 16
    path_length: float = 0.0
    path_length_every: int = 4
    path_length_decay: float = 0.01
    ema_images: float = 10000.0
    """Half-life of the averaged generator, in images."""
    student_rate: float = 1e-3
    point_rate: float = 1e-4
    cycle: float = 1.0
    """Optimisation phase: 1 - cos(z, R(G(z))), the paper's only term."""
    target_cycle: float = 1.0
    """Optimisation phase: 1 - cos(z, R(frame))."""
    optimization_rgb: float = 1.0
    optimization_vgg: float = 0.1
    splat_rgb: float = 0.0
    """Optimisation phase: mean absolute error of the student's own splatted image."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How held-out frames are rendered and scored."""

    refine_steps: int = 20
    """Adam steps that fit expression, pose and translation to each test frame first; 0 = none."""
    refine_rate: float = 5e-4
    open_image: bool = True
    """Erode then dilate the prediction by 3 x 3 pixels, as the published evaluation does."""


@dataclass(frozen=True)
class RunConfig:
    """What a run folder was trained with; written to its config.json."""

    data: str
    preset: Preset = "small"
    head: str = "embedded"
    """embedded, the head that comes with the package; or a file: FLAME's generic_model.pkl, or an npz file in its
    layout."""
    size: int = 512
    seed: int = 0
    cache_gigabytes: float = 2.0
    """Kept at most by each of a stage's caches of what frozen networks give of the frames."""
    point_avatar: PointAvatarConfig = field(default_factory=PointAvatarConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    inverter: InverterConfig = field(default_factory=InverterConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    teacher_training: TeacherTrainingConfig = field(default_factory=TeacherTrainingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
