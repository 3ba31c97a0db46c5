"""What the kernel tests share: the interpreter, the truth, inputs at unit scale."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # Triton is a Linux package

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# bfloat16 in the interpreter is silently wrong in arithmetic; loads cast at once are not, so it is
# left to a GPU, where the same tests run.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE == "cpu" and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=DTYPES, ids=name)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _draw(*shape: int, dtype: torch.dtype, requires_grad: bool = True) -> torch.Tensor:
    """Standard normal values in steps of 1/256, representable in `dtype`.

    Logits of them are exact in float32, in whatever order products are added. The narrow loss makes
    its logits twice, by x @ weight.T and by weight @ x.T, which the BLAS under the interpreter adds
    in two orders; the last bit of a logit is several of its probability.
    """
    x = ((torch.randn(shape, device=DEVICE) * 256).round() / 256).to(dtype)
    return x.requires_grad_(requires_grad)


def _gradients(function, inputs, upstream_seed: int = 1):
    """[output, gradient of each input] for a random upstream gradient, all float64."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(upstream_seed)
    total = 0.0
    for output in outputs:
        weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
        total = total + (output.double() * weight.to(output.device)).sum()
    found = torch.autograd.grad(total, [x for x in inputs if x.requires_grad])
    return [o.detach().double() for o in outputs], [g.double() for g in found]


@pytest.fixture
def draw():
    """draw(*shape, dtype=..): standard normal values on the device, requiring a gradient."""
    return _draw


@pytest.fixture
def gradients():
    """gradients(function, inputs): ([outputs], [gradients]) for a random upstream gradient."""
    return _gradients


@pytest.fixture
def check_against(assert_rounded):
    """check_against(kernel, reference, inputs, longest_sum): outputs and gradients are the truth.

    The truth is the reference in float64; errors are those of rounding in the inputs' dtype.
    """

    def check(kernel, reference, inputs, longest_sum: int) -> None:
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        outputs, gradients = _gradients(kernel, inputs)
        truths, true_gradients = _gradients(reference, exact)
        for found, truth in zip(outputs + gradients, truths + true_gradients, strict=True):
            assert_rounded(found, truth, longest_sum, inputs[0].dtype)

    return check
