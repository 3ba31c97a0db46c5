"""The test cases of Liger and of ml-cross-entropy, run against our linear cross-entropy.

    git clone https://github.com/linkedin/Liger-Kernel
    git clone https://github.com/apple/ml-cross-entropy
    LIGER_CHECKOUT=Liger-Kernel ML_CROSS_ENTROPY_CHECKOUT=ml-cross-entropy \\
        pytest -m slow -s tests/test_peer_suites.py

Each suite runs in a process of its own, where this file is a plugin that puts our function in the
place of theirs; on a machine without CUDA, CPU tensors in the place of CUDA's, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = "MVBERT_PEER_SUITE"
# The environment variable with the checkout, what goes on the path, the files of tests.
LIGER = ("LIGER_CHECKOUT", (".", "src"), ("test/transformers/test_fused_linear_cross_entropy.py",))
CCE = (
    "ML_CROSS_ENTROPY_CHECKOUT",
    (".",),
    ("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py"),
)
# Not run: their tests of kernels that are no part of the interface, and of a vocabulary that is
# split over processes, which ours does not do.


@pytest.mark.slow
@pytest.mark.parametrize("suite", [LIGER, CCE], ids=["liger", "ml-cross-entropy"])
def test_the_cases_of_a_peer_pass(suite):
    variable, places, files = suite
    if variable not in os.environ:
        pytest.skip(f"needs a checkout, its folder in {variable}")
    folder = Path(os.environ[variable]).resolve()
    here = Path(__file__)
    path = [str(folder / place) for place in places] + [str(here.parent)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        # Their definitions are compiled functions; what they compute is the same.
        "TORCHDYNAMO_DISABLE": "1",
        SUITE: variable,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--no-header", "-rs", "--tb=short", *files],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# ---- the plugin, in the process that runs a peer's tests ---------------------------------------


def pytest_configure(config):
    suite = os.environ.get(SUITE)
    if suite == LIGER[0]:
        put_in_place_of_liger()
    elif suite == CCE[0]:
        put_in_place_of_cce()


def put_in_place_of_liger():
    import torch
    from liger_kernel import ops
    from liger_kernel.transformers import functional, fused_linear_cross_entropy

    from mvbert.functional import linear_cross_entropy

    def reduced(rows, kept, reduction):
        return (
            rows if reduction == "none" else rows.sum() / (kept.sum() if reduction == "mean" else 1)
        )

    class Function:
        @staticmethod
        def apply(
            hidden, weight, target, bias=None, ce_weight=None, ignore_index=-100,
            lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None,
            return_z_loss=False, accum_dtype=None, use_token_scaling=False,
            return_token_accuracy=False, return_predicted_tokens=False,
        ):  # fmt: skip
            options = {
                "ignore_index": ignore_index, "label_smoothing": label_smoothing,
                "class_weight": ce_weight, "softcap": softcap, "z_loss": lse_square_scale,
            }  # fmt: skip
            kept = target != ignore_index
            if use_token_scaling:
                rows = linear_cross_entropy(
                    hidden, weight, target, bias, reduction="none", **options
                )
                return reduced(rows * (-rows.detach()).exp(), kept, reduction), None, None, None
            loss, metrics = linear_cross_entropy(
                hidden, weight, target, bias, reduction=reduction, return_metrics=True, **options
            )
            z_loss = reduced(lse_square_scale * metrics.lse.square(), kept, reduction)
            accuracy = metrics.correct.sum() / kept.sum()
            return (
                loss,
                z_loss if return_z_loss else None,
                accuracy if return_token_accuracy else None,
                metrics.predicted if return_predicted_tokens else None,
            )

    for module in (ops, functional, fused_linear_cross_entropy):
        assert torch.autograd.Function in module.LigerFusedLinearCrossEntropyFunction.__mro__
        module.LigerFusedLinearCrossEntropyFunction = Function


def put_in_place_of_cce():
    import torch

    if not torch.cuda.is_available():

        class OnCpu(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                kwargs = dict(kwargs or {})
                if kwargs.get("device") == "cuda":
                    kwargs["device"] = "cpu"
                return function(*args, **kwargs)

        OnCpu().__enter__()
        torch.cuda.is_available = lambda: True
        torch.cuda.manual_seed = torch.manual_seed

    import cut_cross_entropy

    from mvbert.functional import linear_cross_entropy

    def ours(  # `impl` names one of their kernels
        e, c, targets, bias=None, *, softcap=None, shift=0, reduction="mean", impl="cce",
        return_lse=False,
    ):  # fmt: skip
        return linear_cross_entropy(
            e, c, targets, bias, softcap=softcap, shift=int(shift), reduction=reduction,
            return_lse=return_lse, backend="auto" if e.is_cuda else "chunked",
        )  # fmt: skip

    cut_cross_entropy.linear_cross_entropy = ours
