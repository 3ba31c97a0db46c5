"""Where and how a run computes: the device, and the dtype of its matrix products."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from mvbert.config import TrainConfig
from mvbert.errors import InputError

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# torch's own questions to the processor; not public, so they may be gone in another version.
_BFLOAT16_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@dataclass(frozen=True)
class Device:
    """Where and how a run computes, and why."""

    device: torch.device
    autocast: torch.dtype | None
    reason: str

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside it, matrix products have the run's dtype."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Inside it, a GPU works on a stream of its own, as capturing a graph demands."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # on which the weights came
        return torch.cuda.stream(stream)


def choose_graph(config: TrainConfig, device: torch.device, processes: int) -> tuple[bool, str]:
    """Whether a step is captured as a CUDA graph, and why (or why not)."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = "there is no GPU"
    elif processes > 1:
        obstacle = "gradients of several processes are summed outside of graphs"
    if config.cuda_graph == "on":
        if obstacle:
            raise InputError(f"cuda_graph is on, but {obstacle}: make it auto")
        return True, "each step is one CUDA graph: asked for"
    if config.cuda_graph == "off":
        return False, "steps run eagerly: asked for"
    if obstacle:
        return False, f"steps run eagerly: {obstacle}"
    return True, "each step is one CUDA graph"


def choose_device(config: TrainConfig, local_rank: int = 0, local_count: int = 1) -> Device:
    """Reads `device` and `dtype`; `auto` takes CUDA, and bfloat16 where the hardware has it.

    Of several processes on a machine each takes the GPU of its number.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_count > 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda[:N], got {config.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda[:N], got {config.device!r}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device wants a number
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"device {name}: this torch sees {torch.cuda.device_count()} CUDA devices"
            )
    if config.dtype == "float32":
        return Device(device, None, "float32: asked for")
    if config.dtype == "bfloat16":
        return Device(device, torch.bfloat16, "bfloat16 products, float32 weights: asked for")
    if device.type == "cuda":
        return Device(device, torch.bfloat16, "bfloat16 products, float32 weights: CUDA")
    if any(getattr(torch.cpu, name, lambda: False)() for name in _BFLOAT16_CHECKS):
        return Device(
            device, torch.bfloat16, "bfloat16 products, float32 weights: the CPU has them"
        )
    return Device(device, None, "float32: this CPU has no bfloat16 products")


def keep_memory() -> None:
    """Tells glibc's malloc to keep what this process frees, for its next tensors.

    As it comes, malloc gives large blocks back to the system at once, and the same step of a
    training meets them again as page faults, tens of thousands a step: a fifth of a student's step,
    more than half of the step of transformers' BertForMaskedLM. Nothing happens where malloc is
    not glibc's. The process stays as large as it once was, until `give_memory_back`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # An older glibc refuses more than 32 MiB.
        if not mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
            mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_memory_back() -> None:
    """Gives the system what glibc's malloc has kept and nobody uses."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
