"""Every op is a vertical slice, and the two packages depend on each other one way only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Op -> folder of its native sources, where it has some of its own.
OPS = {path.stem for path in (ROOT / "avatar_ops" / "testing").glob("*.py")} - {"__init__"}
SOURCES = [
    path
    for folder in ("csrc", "avatar_ops", "avatar", "benchmarks", "tests", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"} and "build" not in path.relative_to(ROOT).parts
]


@pytest.mark.parametrize("op", sorted(OPS))
def test_op_has_every_part_of_its_slice(op):
    for path in (f"avatar_ops/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"):
        assert (ROOT / path).exists(), f"{op} has no {path}"


def test_native_sources_bear_the_name_of_their_op():
    for folder in (path for path in (ROOT / "csrc").iterdir() if path.is_dir()):
        if folder.name in {"common", "hostcuda"}:
            continue
        assert folder.name in OPS, f"csrc/{folder.name} belongs to no op"
        for source in folder.iterdir():
            assert source.name.startswith(folder.name + "_"), source


def test_avatar_ops_never_imports_avatar():
    for path in (ROOT / "avatar_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not any(name.split(".")[0] == "avatar" for name in names), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 600
