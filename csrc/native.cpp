// avatar_ops._native: what this build holds, and the instruction set in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build and processor introspection of avatar_ops.";
  m.attr("cuda_architectures") = AVATAR_CUDA_ARCHITECTURES;
  m.attr("compiler") = AVATAR_COMPILER;
  m.def(
      "isa", [] { return avatar::isa_name(avatar::current_isa()); },
      "Name of the instruction set that the CPU kernels use.");
  m.def("available_isas", &avatar::available_isas, "Instruction sets built and supported, weakest first.");
  m.def("set_isa", &avatar::set_isa, pybind11::arg("name"),
        "Selects one of available_isas(), else ValueError.");
}
