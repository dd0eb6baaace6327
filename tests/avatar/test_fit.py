import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from avatar.checkpoint import latest_checkpoint
from avatar.config import FitConfig
from avatar.data import load_frames
from avatar.errors import AvatarError, Stopped
from avatar.head import embedded_head
from avatar.presets import make_config
from avatar.stages.fit import (
    Fit,
    Position,
    create_avatar,
    fit,
    flame_weight,
    grow,
    learning_rate_factor,
    load_avatar,
    prune,
)
from avatar.stages.loop import batch_size, draw_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frames(dataset):
    return load_frames(dataset, "train", 32)


@pytest.fixture
def avatar(tiny_config, head, frames):
    return create_avatar(tiny_config, head, frames)


def final_state(folder):
    checkpoint = latest_checkpoint(folder / "checkpoints", "fit")
    return checkpoint.step, checkpoint.tensors, checkpoint.values


def assert_same_state(first, second):
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert torch.equal(tensor, second[1][name]), name


@pytest.fixture(scope="module")
def undisturbed(dataset, frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(make_config(str(dataset), "small", 0, TINY), embedded_head(), frames, folder, CPU)
    return final_state(folder)


def test_the_seed_alone_decides_the_start(tiny_config, head, frames, avatar):
    torch.rand(7)
    again = create_avatar(tiny_config, head, frames)
    for name, value in avatar.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other = create_avatar(replace(tiny_config, seed=1), head, frames)
    assert not torch.equal(other.points, avatar.points)


def test_growth_doubles_near_the_points_and_shrinks_the_radius(avatar):
    before, radius = avatar.points.detach().clone(), avatar.radius
    origin = grow(avatar, torch.Generator().manual_seed(0), 0.75)
    assert avatar.num_points == 2 * len(before) == len(avatar.visible)
    assert avatar.radius == 0.75 * radius
    assert torch.equal(avatar.points[: len(before)], before)
    moved = (avatar.points - before[origin]).detach()
    assert moved.abs().max() <= radius / 2
    assert moved[len(before) :].std() == pytest.approx(radius / 12**0.5, rel=0.1)


def test_pruning_keeps_what_was_seen(avatar):
    before = avatar.points.detach().clone()
    avatar.visible[torch.tensor([3, 5, 8])] = True
    assert prune(avatar).tolist() == [3, 5, 8]
    assert torch.equal(avatar.points, before[[3, 5, 8]])
    assert not avatar.visible.any()
    with pytest.raises(AvatarError, match="no frame shows any of the points"):
        prune(avatar)


def test_moments_follow_their_points(tiny_config, avatar, frames):
    run = Fit(tiny_config, avatar, frames, CPU)
    run.step()
    moments = run.optimizer.state[avatar.points]["exp_avg"].clone()
    assert moments.any()
    origin = grow(avatar, torch.Generator().manual_seed(0), 0.75)
    run._points_replaced(origin, rebuild=False)
    assert torch.equal(run.optimizer.state[avatar.points]["exp_avg"], moments[origin])
    run.step()
    run._points_replaced(torch.arange(avatar.num_points), rebuild=True)
    assert not run.optimizer.state


def test_paper_growth_without_pruning_reaches_the_cap(tiny_config, head, frames):
    config = make_config("x", "paper", 0, ("size=32", "point_avatar.points=400", "fit.prune_from=none"))
    run = Fit(
        replace(config, fit=replace(config.fit, vgg=0.0)),
        create_avatar(tiny_config, head, frames),
        frames,
        CPU,
    )
    run.avatar.set_points(torch.rand(400, 3))
    run.avatar.radius = 0.16875
    history = {}
    for epoch in range(63):
        run.position.epoch = epoch
        run.start_epoch()
        history[epoch] = run.avatar.num_points
    assert (history[4], history[5], history[25], history[40], history[50], history[62]) == (
        400,
        800,
        12_800,
        102_400,
        409_600,
        409_600,
    )
    assert run.avatar.radius == pytest.approx(0.0095, abs=1e-4)


def test_paper_preset_fits_prunes_and_tracks(dataset, frames, tmp_path):
    overrides = ("size=32", "fit.vgg=0", "fit.epochs=3", "fit.tracking_from=1", "fit.grow_every=2")
    config = make_config(str(dataset), "paper", 0, overrides)
    avatar = fit(config, embedded_head(), frames, tmp_path, CPU)
    step, tensors, values = final_state(tmp_path)
    assert step == 3
    assert values["radius"] == pytest.approx(0.16875 * 0.75)
    assert 0 < avatar.num_points < 800
    assert not torch.equal(tensors["tracking.pose.weight"], frames.pose)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_schedules_count_epochs():
    paper = FitConfig()
    assert [batch_size(paper, n) for n in (400, 102_400, 204_800, 409_600, 10**7)] == [8, 8, 4, 2, 1]
    assert [flame_weight(paper, epoch) for epoch in (0, 10, 25, 62)] == [10, 5, 2.5, 0.625]
    assert learning_rate_factor(paper, Position(epoch=60)) == 1
    decaying = replace(paper, rebuild_optimizer=False)
    assert [learning_rate_factor(decaying, Position(epoch=e)) for e in (39, 40, 60)] == [1, 0.5, 0.25]
    linear = replace(paper, decay="linear")
    assert learning_rate_factor(linear, Position(fraction=0.5)) == 1
    assert learning_rate_factor(linear, Position(fraction=1.0)) == pytest.approx(0.1)


def test_batches_pass_over_all_frames_and_depend_on_the_place_alone():
    drawn = torch.cat([draw_batch(0, start, 3, 6) for start in (0, 3, 6, 9)])
    assert sorted(drawn[:6].tolist()) == sorted(drawn[6:].tolist()) == list(range(6))
    assert torch.equal(drawn[4:8], draw_batch(0, 4, 4, 6))
    assert not torch.equal(drawn, torch.cat([draw_batch(1, 0, 12, 6)]))


def test_an_epoch_is_a_pass_where_no_steps_are_given(avatar, tiny_config, frames):
    config = replace(tiny_config, fit=replace(tiny_config.fit, steps_per_epoch=None, batch_max=4, epochs=2))
    run = Fit(config, avatar, frames, CPU)
    assert run.total_steps() == 4
    places = []
    while not run.finished():
        run.step()
        places.append((run.position.epoch, run.position.drawn))
    assert places == [(0, 4), (1, 6), (1, 10), (2, 12)]


def test_fitting_lowers_the_loss(tiny_config, frames, avatar):
    config = replace(tiny_config, fit=replace(tiny_config.fit, steps_per_epoch=40, epochs=1, grow_epochs=()))
    run = Fit(config, avatar, frames, CPU)
    history = []
    while not run.finished():
        history.append(run.step()["rgb"].item())
    assert sum(history[-6:]) < 0.95 * sum(history[:6])


def test_tracking_starts_at_its_epoch(tiny_config, frames, avatar):
    run = Fit(tiny_config, avatar, frames, CPU)
    start = run.tracking.pose.weight.clone()
    for _ in range(4):
        run.step()
    assert torch.equal(run.tracking.pose.weight, start)
    for _ in range(4):
        run.step()
    assert not torch.equal(run.tracking.pose.weight, start)


def test_pruning_waits_for_an_epoch_and_growth_happens(undisturbed):
    step, tensors, values = undisturbed
    assert step == 16
    assert values["radius"] == pytest.approx(0.04 * 0.75)
    assert len(tensors["avatar.points"]) < 2 * 300


def test_stopping_at_every_step_changes_nothing(dataset, frames, tmp_path, undisturbed):
    config = make_config(str(dataset), "small", 0, TINY)
    stops = 0
    while True:
        calls = iter([False, True])
        try:
            fit(config, embedded_head(), frames, tmp_path, CPU, lambda calls=calls: next(calls))
            break
        except Stopped:
            stops += 1
            torch.rand(5)
    assert stops == 15
    assert_same_state(final_state(tmp_path), undisturbed)


def test_killed_runs_resume_bit_for_bit(dataset, tmp_path, undisturbed):
    """kill -9 at random moments, then the same command again: nothing shows in the result."""
    command = [
        sys.executable,
        "-m",
        "avatar",
        "train",
        str(dataset),
        "--out",
        str(tmp_path / "run"),
        "--set",
        *TINY,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    moments = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_checkpoints = time.monotonic() + 60
        known = set((tmp_path / "run").glob("checkpoints/*"))
        while process.poll() is None and time.monotonic() < wait_for_checkpoints:
            if set((tmp_path / "run").glob("checkpoints/*")) - known:
                break
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_state(final_state(tmp_path / "run"), undisturbed)


def test_a_finished_run_is_left_alone(dataset, frames, tmp_path, undisturbed):
    config = make_config(str(dataset), "small", 0, TINY)
    for _ in range(2):
        fit(config, embedded_head(), frames, tmp_path, CPU)
        assert_same_state(final_state(tmp_path), undisturbed)
    restored = load_avatar(tmp_path, config, embedded_head())
    assert torch.equal(restored.points, undisturbed[1]["avatar.points"])


def test_reports_land_in_the_run_folder(dataset, frames, tmp_path):
    fit(make_config(str(dataset), "small", 0, TINY), embedded_head(), frames, tmp_path, CPU)
    assert [path.name for path in sorted((tmp_path / "images").glob("*"))] == [
        "fit-0000008.png",
        "fit-0000016.png",
    ]
    assert any(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir())


def test_rejects_a_run_without_checkpoint_and_other_heads(tiny_config, head, frames, tmp_path):
    with pytest.raises(AvatarError, match="holds no checkpoint"):
        load_avatar(tmp_path, tiny_config, head)
    short = replace(frames, expression=frames.expression[:, :10])
    with pytest.raises(AvatarError, match="10 expression coefficients, the head model 50"):
        create_avatar(tiny_config, head, short)
