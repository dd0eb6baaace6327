"""What nvcc made of the CUDA kernels, against docs/kernels.json."""

import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch's CUDA builds, and brings cuobjdump")
import kernel_report

REPORT = json.loads(Path(kernel_report.ROOT, "docs", "kernels.json").read_text())
RENEW = "; python tools/kernel_report.py --out docs/kernels takes down what is meant to be"
# Bytes of shared memory that a block may have.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# These read or write 16 bytes at a time, in the instantiations for packs.
WIDE = (
    "bias_act_kernel<float, float, 4>",
    "bias_act_backward_kernel<float, float, 4>",
    "composite_features_kernel<float, float>",
    "composite_kernel<float, float>",
    "edge_gather_kernel<float, float, unsigned char>",
    "edge_max_backward_kernel<float, float, 4>",
    "edge_max_kernel<float, float, 4>",
    "edge_norm_gather_kernel<float, unsigned char>",
    "edge_products_kernel<float, float>",
    "edge_reverse_kernel<true, float, unsigned char>",
    "knn_feature_kernel<float, RegisterList<float> >",
    "knn_product_kernel<false>",
    "knn_product_kernel<true>",
)
# These multiply on matrix units.
MATRIX = ("knn_product_kernel<false>", "knn_product_kernel<true>")


@pytest.fixture(scope="module")
def kernels():
    """(architecture, name) -> usage."""
    if not kernel_report.LIBRARY.exists():
        pytest.skip("the CUDA library is not built: no nvcc")
    found = kernel_report.library_usage()
    assert found
    return {(capability, name): usage for capability in found for name, usage in found[capability].items()}


def test_no_kernel_uses_local_memory(kernels):
    """Nothing is spilled, and no array is indexed that registers cannot be."""
    local = {key: usage for key, usage in kernels.items() if usage.stack_bytes or usage.local_accesses}
    assert not local


def test_shared_memory_suffices(kernels):
    for (capability, name), usage in kernels.items():
        assert usage.shared_bytes <= SHARED_BYTES[capability], (name, usage)


def test_packs_are_loaded_16_bytes_at_a_time(kernels):
    for capability in {capability for capability, _ in kernels}:
        for name in WIDE:
            assert kernels[capability, name].wide_accesses > 0, (capability, name)


def test_cuda_products_use_matrix_units(kernels):
    for capability in {capability for capability, _ in kernels}:
        for name in MATRIX:
            assert kernels[capability, name].matrix_instructions > 0, (capability, name)


def test_registers_are_those_of_the_report(kernels):
    if not shutil.which("nvcc") or kernel_report.nvcc_version() != REPORT["nvcc"]:
        pytest.skip(f"the report is of nvcc {REPORT['nvcc']}")
    recorded = REPORT["cuda_kernels"]
    changed = [
        f"sm_{capability} {name}: {usage}, was {recorded.get(str(capability), {}).get(name)}"
        for (capability, name), usage in kernels.items()
        if vars(usage) != recorded.get(str(capability), {}).get(name)
    ]
    assert not changed, "\n".join(changed) + RENEW


def test_report_has_every_call_and_no_local_memory():
    sys.path.insert(0, str(kernel_report.ROOT / "benchmarks"))
    import calls

    named = {(call["op"], call["name"]) for call in REPORT["calls"]}
    assert named == {(call.op, call.name) for call in calls.calls()}
    for call in REPORT["calls"]:
        assert call["launches"], call["name"]
        for launch in call["launches"]:
            for capability in kernel_report.CAPABILITIES:
                usage = kernel_report.kernel_usage(REPORT, launch, capability)
                assert usage.stack_bytes == 0, (launch, usage)


@pytest.mark.parametrize("op", ["modulated_conv2d", "local_attention_pool", "edge_mlp"])
def test_products_use_matrix_units(op):
    for call in REPORT["calls"]:
        if call["op"] != op or call["is_backward"]:
            continue
        for capability in kernel_report.CAPABILITIES:
            used = [
                kernel_report.kernel_usage(REPORT, launch, capability).matrix_instructions
                for launch in call["launches"]
            ]
            assert any(used), (call["name"], capability)
