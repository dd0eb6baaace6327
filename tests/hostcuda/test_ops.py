"""The op tests on every CUDA kernel, compiled for the host by csrc/hostcuda, each run in a fresh process."""

import subprocess

import hostcuda
import pytest

SOURCES = hostcuda.cuda_sources()
# One shuffled order; orders.py compares several.
SEEDS = (1,)


def pytest_generate_tests(metafunc):
    if "run" in metafunc.fixturenames:
        variants = metafunc.config.getoption("hostcuda_variant") or ["plain"]
        runs = [(variant, seed) for variant in variants for seed in SEEDS]
        ids = [f"{variant}-seed{seed}" for variant, seed in runs]
        metafunc.parametrize("run", runs, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def run(request, tmp_path_factory):
    """The finished run of all op tests on a build in one order: its library, process and log of launches."""
    variant, seed = request.param
    log = tmp_path_factory.mktemp("hostcuda") / "launches"
    log.touch()
    done = hostcuda.run_op_tests(
        variant,
        seed,
        list(SOURCES),
        ["-p", "no:cacheprovider"],
        log=log,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return hostcuda.library(variant), done, log


def test_op_tests_pass(run):
    _, done, _ = run
    assert done.returncode == 0, done.stdout[-8000:]


def test_every_kernel_is_launched(run):
    built, _, log = run
    launched = hostcuda.launched_kernels(built, log)
    for source in hostcuda.kernel_files():
        kernels = set(hostcuda.kernels_of(source))
        assert kernels <= launched, f"{source.name}: no test launches {sorted(kernels - launched)}"


def test_every_cuda_source_belongs_to_an_op_that_is_run():
    for source in (hostcuda.ROOT / "csrc").rglob("*.cu"):
        assert source in SOURCES.values(), f"{source} is not named csrc/<op>/<op>_cuda.cu"
