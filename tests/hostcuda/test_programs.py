"""What csrc/hostcuda emulates, and that it catches what is wrong with a kernel: the programs beside this file."""

import os
import re
import subprocess

import hostcuda
import pytest

PROGRAMS = sorted(path.stem for path in (hostcuda.ROOT / "tests/hostcuda/broken").glob("*.cu"))
EVERY = ("plain", "sanitize", "race")
OVERRUN = "AddressSanitizer: heap-buffer-overflow"
# Broken program, more arguments, the builds that catch it, the seeds of orders in which they do, what is said.
CAUGHT = [
    ("missing_barrier", [], ("plain", "sanitize"), (0, 1, 2), r"^wrong$"),
    (
        "missing_barrier",
        [],
        ("race",),
        (0, 1),
        r"data race: .*missing_barrier\.cu:\d+.*missing_barrier\.cu:\d+",
    ),
    ("unread_tile", [], ("plain", "sanitize"), (0, 1, 2), r"^wrong$"),
    ("unread_tile", [], ("race",), (0, 1), r"data race: .*unread_tile\.cu"),
    ("early_return", [], EVERY, (0, 1, 2), r"the barrier \S*early_return\.cu:\d+"),
    ("divergent_barrier", [], EVERY, (0, 1, 2), r"the barrier \S*barrier\.cu:\d+, but .*barrier\.cu:\d+"),
    ("missing_lane", [], EVERY, (0, 1, 2), r"missing_lane\.cu:\d+ with mask 0xffffffff, but .* has returned"),
    ("shared_overrun", [], ("sanitize",), (0, 1), OVERRUN),
    ("shared_overrun", ["dynamic"], ("sanitize",), (0, 1), OVERRUN),
    ("shared_overwrite", [], ("plain", "race"), (0, 1), "wrote past a shared array of 128 bytes"),
    ("shared_overwrite", [], ("sanitize",), (0, 1), OVERRUN),
    ("global_overrun", [], ("sanitize",), (0, 1), OVERRUN),
    ("write_race", [], ("plain", "sanitize"), (1,), r"^wrong$"),
    ("write_race", [], ("race",), (0, 1), r"data race: write .* and write .*write_race\.cu"),
    ("lost_update", [], ("race",), (0, 1), r"data race: .*lost_update\.cu"),
    ("unrounded_operand", [], EVERY, (0, 1), r"multiplies a number that is no TensorFloat-32"),
    ("bad_index", [], EVERY, (0, 1), r"^indices\[2\] = 8; expected an index in \[0, 8\)$"),
]


def pytest_generate_tests(metafunc):
    variants = metafunc.config.getoption("hostcuda_variant") or ["plain"]
    if "caught" in metafunc.fixturenames:
        caught = [(variant, case) for case in CAUGHT for variant in case[2] if variant in variants]
        ids = ["-".join([case[0], *case[1], variant]) for variant, case in caught]
        metafunc.parametrize(("variant", "caught"), caught, ids=ids)
    elif "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", variants)


@pytest.fixture(scope="session")
def program():
    """Runs a program of a build with a seed; returns its exit code and what it printed."""
    built = {}

    def run(variant, name, *arguments, seed=0):
        if variant not in built:
            built[variant] = hostcuda.build(variant, "hostcuda_programs")
        done = subprocess.run(
            [built[variant] / "programs" / name, *arguments],
            env={**os.environ, "AVATAR_HOSTCUDA_SEED": str(seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intrinsics_do_what_cuda_documents(program, variant, seed):
    code, text = program(variant, "intrinsics", seed=seed)
    assert code == 0, text


@pytest.mark.parametrize("name", PROGRAMS)
def test_correct_kernel_passes(program, variant, name):
    for seed in (0, 1, 2):
        assert program(variant, name, "correct", seed=seed) == (0, "right\n")


def test_broken_kernel_is_caught(program, variant, caught):
    name, arguments, _, seeds, says = caught
    for seed in seeds:
        code, text = program(variant, name, "broken", *arguments, seed=seed)
        assert code != 0
        assert re.search(says, text, re.MULTILINE), text


def test_every_broken_kernel_is_caught_by_something():
    assert {case[0] for case in CAUGHT} == set(PROGRAMS)
