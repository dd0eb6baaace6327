"""Packages avatar_ops and avatar; CMake and Ninja compile (see CMakeLists.txt).

Environment:
    AVATAR_OPS_CUDA       AUTO (default: when nvcc is found), ON or OFF.
    TORCH_CUDA_ARCH_LIST  CUDA architectures, default "8.0;9.0;10.0+PTX".
    AVATAR_OPS_SANITIZE   1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    AVATAR_OPS_EMULATE_AVX512
                          1 makes the AVX-512 kernels run on AVX2, for tests.
    AVATAR_OPS_BUILD_DIR  build folder, default build/cmake.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the native libraries into the package folder."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        target = ROOT if in_place else Path(self.build_lib).resolve()
        build = Path(os.environ.get("AVATAR_OPS_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "AVATAR_OPS_CUDA": os.environ.get("AVATAR_OPS_CUDA", "AUTO").upper(),
            "AVATAR_OPS_CUDA_ARCHITECTURES": ";".join(architectures.replace(";", " ").split()),
            **{
                name: "ON" if os.environ.get(name) == "1" else "OFF"
                for name in ("AVATAR_OPS_SANITIZE", "AVATAR_OPS_EMULATE_AVX512")
            },
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        # cmake and ninja may come from packages beside this interpreter.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        for command in (
            ["-G", "Ninja", "-S", ROOT, "-B", build, *arguments],
            ["--build", build],
            ["--install", build, "--prefix", target / "avatar_ops"],
        ):
            subprocess.check_call(["cmake", *command], env={**os.environ, "PATH": path})

    # The installed libraries are not setuptools' own outputs.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    packages=find_packages(include=["avatar_ops*", "avatar*"]),
    package_data={"avatar": ["assets/**/*"]},
    ext_modules=[Extension("avatar_ops._native", [])],
    cmdclass={"build_ext": CMakeBuild},
)
