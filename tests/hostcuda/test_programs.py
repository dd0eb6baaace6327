"""What csrc/hostcuda emulates, and that it catches what is wrong with a kernel: the programs beside this file."""

import os
import re
import subprocess

import hostcuda
import pytest

BROKEN = sorted(path.stem for path in (hostcuda.ROOT / "tests/hostcuda/broken").glob("*.cu"))
# Program, its arguments, the builds that catch it, the seeds of orders in which they do, what they say.
CAUGHT = [
    ("missing_barrier", [], ["plain"], [0, 1, 2], r"^wrong$"),
    (
        "missing_barrier",
        [],
        ["race"],
        [0, 1],
        r"data race: .*missing_barrier\.cu:\d+.*missing_barrier\.cu:\d+",
    ),
    ("unread_tile", [], ["plain"], [0, 1, 2], r"^wrong$"),
    ("unread_tile", [], ["race"], [0, 1], r"data race: .*unread_tile\.cu"),
    (
        "early_return",
        [],
        ["plain"],
        [0, 1, 2],
        r"returned.* the barrier \S*early_return\.cu:\d+|the barrier.*returned",
    ),
    (
        "divergent_barrier",
        [],
        ["plain"],
        [0, 1, 2],
        r"the barrier \S*_barrier\.cu:\d+, but .*_barrier\.cu:\d+",
    ),
    (
        "missing_lane",
        [],
        ["plain"],
        [0, 1, 2],
        r"missing_lane\.cu:\d+ with mask 0xffffffff, but .* has returned",
    ),
    ("shared_overrun", [], ["sanitize"], [0, 1], "AddressSanitizer: heap-buffer-overflow"),
    ("shared_overrun", ["dynamic"], ["sanitize"], [0, 1], "AddressSanitizer: heap-buffer-overflow"),
    ("shared_overwrite", [], ["plain"], [0, 1], "wrote past a shared array of 128 bytes"),
    ("global_overrun", [], ["sanitize"], [0, 1], "AddressSanitizer: heap-buffer-overflow"),
    ("write_race", [], ["plain"], [1], r"^wrong$"),
    ("write_race", [], ["race"], [0, 1], r"data race: write .* and write .*write_race\.cu"),
    ("lost_update", [], ["race"], [0, 1], r"data race: .*lost_update\.cu"),
    ("bad_index", [], ["plain", "sanitize"], [0, 1], r"^indices\[2\] = 8; expected an index in \[0, 8\)$"),
]


@pytest.fixture(scope="session")
def program():
    """Runs a program of a build with a seed; returns its exit code and what it printed."""
    built = {}

    def run(variant, name, *arguments, seed=0):
        if variant not in built:
            target = "program_intrinsics" if variant == "ucontext" else "hostcuda_programs"
            built[variant] = hostcuda.build(variant, target)
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
@pytest.mark.parametrize("variant", ["plain", "sanitize", "race", "ucontext"])
def test_intrinsics_do_what_cuda_documents(program, variant, seed):
    code, text = program(variant, "intrinsics", seed=seed)
    assert code == 0, text


@pytest.mark.parametrize("variant", ["plain", "sanitize", "race"])
@pytest.mark.parametrize("name", BROKEN)
def test_correct_kernel_passes(program, name, variant):
    for seed in (0, 1, 2):
        assert program(variant, name, "correct", seed=seed) == (0, "right\n")


@pytest.mark.parametrize(
    ("name", "arguments", "variants", "seeds", "says"),
    CAUGHT,
    ids=["-".join([case[0], *case[1], *case[2]]) for case in CAUGHT],
)
def test_broken_kernel_is_caught(program, name, arguments, variants, seeds, says):
    for variant in variants:
        for seed in seeds:
            code, text = program(variant, name, "broken", *arguments, seed=seed)
            assert code != 0
            assert re.search(says, text, re.MULTILINE), text


def test_every_broken_kernel_has_something_that_catches_it():
    assert {case[0] for case in CAUGHT} == set(BROKEN)
