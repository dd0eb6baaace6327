"""Stage "adversarial": generator, discriminator and inverter, alternating with the student's optimisation.

A rendering step trains the networks on images of the student, which is frozen; an optimisation step trains
the student through generator and inverter, which are frozen.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from avatar import gan, losses
from avatar.camera import Camera
from avatar.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from avatar.config import AdversarialConfig, RunConfig
from avatar.data import Frames
from avatar.head import HeadModel
from avatar.models.discriminator import Discriminator
from avatar.models.inverter import Inverter
from avatar.models.renderer import Renderer, RenderInput
from avatar.random import keyed_generator
from avatar.stages.distill import StudentModel, load_student, student_values
from avatar.stages.fit import correct_tracking
from avatar.stages.loop import (
    FrameCache,
    Stage,
    below_prefix,
    draw_batch,
    linear_decay,
    parameter_group,
    perceptual_to_frames,
    run_stage,
    set_rates,
    trained_checkpoint,
    with_prefix,
)

STAGE = "adversarial"
DECAY_START = 0.6


@dataclass(frozen=True)
class Moment:
    """What a step of the schedule does."""

    renders: bool  # else it optimises the student
    phase: int  # phases since the start; the first is the networks' pre-training
    count: int  # steps of its kind before it


def schedule_moment(options: AdversarialConfig, step: int) -> Moment:
    """Pre-training of the networks, then rounds of first optimisation, then rendering steps."""
    if step < options.pretrain_steps:
        return Moment(True, 0, step)
    optimization, rendering = options.optimization_steps, options.rendering_steps
    turn, within = divmod(step - options.pretrain_steps, optimization + rendering)
    if within < optimization:
        return Moment(False, 2 * turn + 1, turn * optimization + within)
    before = options.pretrain_steps + turn * rendering
    return Moment(True, 2 * turn + 2, before + within - optimization)


@contextmanager
def frozen(*modules: nn.Module):
    """Gradients pass through the modules but reach none of their parameters."""
    parameters = [value for module in modules for value in module.parameters() if value.requires_grad]
    for value in parameters:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in parameters:
            value.requires_grad_(True)


class Networks(nn.Module):
    """What is trained in rendering steps, and the renderer's moving average."""

    def __init__(self, config: RunConfig, model: StudentModel):
        super().__init__()
        student = model.student
        self.renderer = Renderer(config, student.avatar.num_points, student.fusion.out_channels)
        self.renderer.latent.load_state_dict(student.latent.state_dict())
        self.discriminator = Discriminator(config.discriminator, config.size)
        self.inverter = Inverter(config.inverter, config.generator, config.size)
        self.average = gan.Ema(self.renderer, config.adversarial.ema_images)
        self.path_length = gan.PathLength(config.adversarial.path_length_decay)


class Adversarial(Stage):
    name = STAGE

    def __init__(
        self,
        config: RunConfig,
        model: StudentModel,
        networks: Networks,
        frames: Frames,
        device: torch.device,
    ):
        self.config, self.model, self.networks, self.frames = config, model, networks, frames
        self.device = device
        options = config.adversarial
        self.cache, self.cached_phase = FrameCache(config.cache_gigabytes), 0
        self.optimizers = self._build_optimizers()
        strongest = max(options.vgg, options.optimization_vgg)
        self.perceptual = perceptual_to_frames(
            "adversarial.vgg=0 adversarial.optimization_vgg", strongest, options.vgg_size, config, frames
        )
        self.r1_gamma = options.r1
        if self.r1_gamma is None:
            self.r1_gamma = 2e-4 * config.size**2 / options.batch
        self.done = 0
        # The student's statistics stay those of its own stage: both kinds of step see the same function.
        model.student.eval()

    def _build_optimizers(self) -> dict[str, torch.optim.Adam]:
        options, networks, student = self.config.adversarial, self.networks, self.model.student
        renderer = networks.renderer

        def adam(groups: list[dict], lazy_every: int = 0) -> torch.optim.Adam:
            # Steps that only regularise now and then shorten the others' (Karras et al. 2020, appendix B).
            share = lazy_every / (lazy_every + 1) if lazy_every else 1.0
            for group in groups:
                group["lr"] = group["base_rate"] = group["base_rate"] * share
            betas = (float(options.beta1) ** share, float(options.beta2) ** share)
            return torch.optim.Adam(groups, betas=betas)

        conditions, painters = [], list(renderer.latent.parameters())
        for name, value in renderer.generator.named_parameters():
            (conditions if ".inject." in name else painters).append(value)
        points = [
            value
            for name, value in student.named_parameters()
            if name != "avatar.points" and not name.startswith("latent.")
        ]
        return {
            "renderer": adam(
                [
                    parameter_group(painters, options.generator_rate),
                    parameter_group(conditions, options.condition_rate),
                    parameter_group([renderer.point_features], options.point_feature_rate),
                ],
                options.path_length_every if options.path_length else 0,
            ),
            "discriminator": adam(
                [parameter_group(list(networks.discriminator.parameters()), options.discriminator_rate)],
                options.r1_every if self.uses_r1 else 0,
            ),
            "inverter": adam([parameter_group(list(networks.inverter.parameters()), options.inverter_rate)]),
            "student": adam(
                [
                    parameter_group([student.avatar.points], options.point_rate),
                    parameter_group(points, options.student_rate),
                ]
            ),
        }

    @property
    def uses_r1(self) -> bool:
        options = self.config.adversarial
        return options.gan > 0 and options.r1 != 0

    @property
    def steps_done(self) -> int:
        return self.done

    def total_steps(self) -> int:
        options = self.config.adversarial
        per_round = options.optimization_steps + options.rendering_steps
        return options.pretrain_steps + options.rounds * per_round

    def step(self) -> dict[str, Tensor]:
        options = self.config.adversarial
        moment = schedule_moment(options, self.done)
        kind = "frames" if moment.renders else "optimization frames"
        index = draw_batch(
            self.config.seed, moment.count * options.batch, options.batch, len(self.frames), kind
        ).to(self.device)
        if options.decay == "linear":
            factor = linear_decay(self.done / self.total_steps(), DECAY_START)
            for optimizer in self.optimizers.values():
                set_rates(optimizer, factor)
        if moment.renders:
            if moment.phase != self.cached_phase:
                self.cache, self.cached_phase = FrameCache(self.config.cache_gigabytes), moment.phase
            terms = self._render(index, moment.count)
        else:
            terms = self._optimize(index, moment.count)
        self.done += 1
        return {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def _see(self, index: Tensor) -> dict[str, Tensor]:
        """The renderer's input for a frame of the frozen student."""
        refined = self.model.refine(self.frames.expression[index], self.frames.pose[index])
        return RenderInput.of(refined, self.model.draw(refined, self.frames.camera(index))).tensors()

    def _render(self, index: Tensor, count: int) -> dict[str, Tensor]:
        options, networks = self.config.adversarial, self.networks
        given = RenderInput.from_tensors(self.cache.batch(index, self._see))
        real = self.frames.image(index)
        generator = keyed_generator(self.config.seed, "noise", count)
        z, synthesis = networks.renderer(given, noise="random", generator=generator)
        terms = {"rgb": losses.rgb(synthesis.image, real)}
        total = options.rgb * terms["rgb"]
        if options.vgg and count % options.vgg_every == 0:
            terms["vgg"] = self.perceptual(synthesis.image, index)
            total = total + options.vgg * options.vgg_every * terms["vgg"]
        adversary = options.gan > 0 and count >= options.gan_from
        if adversary:
            with frozen(networks.discriminator):
                terms["gan"] = gan.generator_loss(networks.discriminator(synthesis.image))
            total = total + options.gan * terms["gan"]
        if options.path_length and count % options.path_length_every == 0:
            terms["path"] = self._path_length(given, generator)
            total = total + options.path_length * options.path_length_every * terms["path"]
        self._update("renderer", total)
        networks.average.update(networks.renderer, len(index))
        if adversary:
            terms["discriminator"] = self._discriminate(real, synthesis.image.detach(), count)
        if count % options.inverter_every == 0:
            terms["inversion"] = gan.inversion_loss(networks.inverter, z, synthesis)
            self._update("inverter", terms["inversion"])
        return terms

    def _path_length(self, given: RenderInput, generator: torch.Generator) -> Tensor:
        """On half of the batch, as published."""
        renderer = self.networks.renderer
        half = max(1, len(given.pooled) // 2)
        tensors = {name: value[:half] for name, value in given.tensors().items()}
        some = RenderInput.from_tensors(tensors)
        styles = renderer.generator.mapping(renderer.latent(some.pooled))
        synthesis = renderer.generator.synthesize(
            styles, renderer.condition(some), noise="random", generator=generator
        )
        return self.networks.path_length(synthesis.image, styles, generator)

    def _discriminate(self, real: Tensor, fake: Tensor, count: int) -> Tensor:
        options, discriminator = self.config.adversarial, self.networks.discriminator
        loss = gan.discriminator_loss(discriminator(real), discriminator(fake))
        total = loss
        if self.uses_r1 and count % options.r1_every == 0:
            total = total + options.r1_every * gan.r1_penalty(discriminator, real, self.r1_gamma)
        self._update("discriminator", total)
        return loss

    def _optimize(self, index: Tensor, count: int) -> dict[str, Tensor]:
        options, networks, student = self.config.adversarial, self.networks, self.model.student
        frames = self.frames
        real = frames.image(index)
        refined = self.model.refine(frames.expression[index], frames.pose[index])
        splats = self.model.draw(refined, frames.camera(index))
        generator = keyed_generator(self.config.seed, "optimization noise", count)
        terms = {}
        total = refined.posed.new_zeros(())
        with frozen(networks):
            z, synthesis = networks.renderer(
                RenderInput.of(refined, splats), noise="random", generator=generator
            )
            if options.cycle:
                terms["cycle"] = gan.cosine_distance(z, networks.inverter(synthesis.image).z)
                total = total + options.cycle * terms["cycle"]
            if options.target_cycle:
                with torch.no_grad():
                    target = networks.inverter(real).z
                terms["target cycle"] = gan.cosine_distance(z, target)
                total = total + options.target_cycle * terms["target cycle"]
            if options.optimization_rgb:
                terms["optimization rgb"] = losses.rgb(synthesis.image, real)
                total = total + options.optimization_rgb * terms["optimization rgb"]
            if options.optimization_vgg:
                terms["optimization vgg"] = self.perceptual(synthesis.image, index)
                total = total + options.optimization_vgg * terms["optimization vgg"]
            if options.splat_rgb:
                terms["splat rgb"] = losses.rgb(splats.image, real)
                total = total + options.splat_rgb * terms["splat rgb"]
            self._update("student", total)
        student.zero_grad(set_to_none=True)
        return terms

    def _update(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def preview(self) -> Tensor:
        frames, index = self.frames, torch.zeros(1, dtype=torch.int64, device=self.device)
        draw = draw_full(self.model, self.networks.average.model)
        return draw(frames.expression[index], frames.pose[index], frames.camera(index))

    def checkpoint(self) -> Checkpoint:
        tensors = self.model.tensors() | with_prefix("networks", self.networks.state_dict())
        values = student_values(self.model, self.frames)
        for name, optimizer in self.optimizers.items():
            moments, values[name] = pack_optimizer(f"optimizer.{name}", optimizer)
            tensors |= moments
        return Checkpoint(STAGE, self.done, tensors, values)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.model.student.load_state_dict(below_prefix("student", checkpoint.tensors))
        self.networks.load_state_dict(below_prefix("networks", checkpoint.tensors))
        tensors = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        for name, optimizer in self.optimizers.items():
            unpack_optimizer(f"optimizer.{name}", optimizer, tensors, checkpoint.values[name])
        self.done = checkpoint.step


def create_networks(config: RunConfig, model: StudentModel) -> Networks:
    """Untrained networks; their weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 3)
        return Networks(config, model)


def train_adversarial(
    config: RunConfig,
    head: HeadModel,
    frames: Frames,
    folder: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> Networks:
    """Train the renderer on the run's distilled student, going on from the run's last checkpoint.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    model = load_student(folder, config, head, device)
    networks = create_networks(config, model).to(device)
    run = Adversarial(config, model, networks, correct_tracking(folder, frames).to(device), device)
    run_stage(run, config.adversarial, folder, should_stop)
    return networks


def load_renderer(
    folder: Path, config: RunConfig, head: HeadModel, device: torch.device
) -> tuple[StudentModel, Renderer]:
    """The student as this stage left it and the averaged renderer, in evaluation mode."""
    model = load_student(folder, config, head, device, STAGE)
    checkpoint = trained_checkpoint(folder, STAGE)
    renderer = create_networks(config, model).average.model
    renderer.load_state_dict(below_prefix("networks.average.model", checkpoint.tensors))
    return model, renderer.to(device).eval()


def draw_full(model: StudentModel, renderer: Renderer) -> Callable[[Tensor, Tensor, Camera], Tensor]:
    """Draws frames by student and renderer."""

    def draw(expression: Tensor, pose: Tensor, camera: Camera) -> Tensor:
        refined = model.refine(expression, pose)
        given = RenderInput.of(refined, model.draw(refined, camera))
        return renderer(given, noise="constant")[1].image

    return draw
