"""The compiler's view of the kernels, in a process of its own: there the interpreter is off."""

import json
import os
import subprocess
import sys

import pytest
import triton


def compile_all(root, *options: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(root / "bench" / "aot.py"), *options],
        capture_output=True, text=True, env=environment, check=False, timeout=3600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(root):
    return json.loads((root / "bench" / "aot.json").read_text(encoding="utf-8"))


def test_record_has_no_spill_and_uses_the_matrix_units(recorded):
    units = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
    products = ("logits_kernel", "dx_kernel", "dweight_kernel", "flash_fwd_kernel",
                "flash_dweight_kernel")  # fmt: skip
    streams = ("mixed_embedding_fwd_kernel", "mixed_embedding_bwd_kernel", "gather_rows_kernel",
               "cross_entropy_dlogits_kernel", "residual_layer_norm_fwd_kernel",
               "residual_layer_norm_bwd_kernel", "kl_dlogits_kernel",
               "spread_rows_kernel")  # fmt: skip
    seen = set()
    for key, by_arch in recorded.items():
        if key == "triton":
            continue
        kernel = key.split(" / ")[1].split()[0]
        seen.add(kernel)
        for arch, found in by_arch.items():
            assert found["stack"] == 0, (key, arch)
            if kernel in products and "fp32" not in key:
                assert found["matrix"] == units[arch], (key, arch)
            # A program's few rows of 32 values are too little for 16 bytes a thread.
            if kernel in products + streams and "H32" not in key:
                assert found["wide_loads"] > 0, (key, arch)
    assert {*products, *streams} <= seen


@pytest.mark.parametrize(
    "only", ["H256 V4928 / flash", "H1024 V30522 / dx", "embedding B256 T128 H256"]
)
def test_compiles_as_recorded_on_hopper(root, only):
    """A few of every kind: spills fail under any compiler, growth under the recorded one."""
    result = compile_all(root, "--arch", "90", "--only", only)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_90" in result.stdout


@pytest.mark.slow
def test_everything_compiles_as_recorded(root):
    result = compile_all(root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_recorded_compiler_is_named(recorded):
    assert recorded["triton"].split(".")[0] == triton.__version__.split(".")[0]
