"""The device of a run with its dtype: the choices there are, autocast, streams, memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mvbert.config import TrainConfig
from mvbert.errors import InputError

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # name -> what autocast casts to

Choice = tuple[str, str]  # the name of a dtype, and the reason for it

# How much faster bfloat16 products must be to be chosen: casts to and from it take time too.
MARGIN = 1.2


@dataclass(frozen=True)
class Device:
    """Where a run computes, the dtype of its matrix products, and why.

    Attributes:
        autocast: torch.bfloat16, or None for float32.
    """

    device: torch.device
    autocast: torch.dtype | None
    reason: str

    @staticmethod
    def of(device: torch.device, dtype: str, reason: str) -> Device:
        """Builds a Device from the result of `choose_dtype`."""
        return Device(device, DTYPES[dtype], reason)

    @property
    def dtype(self) -> str:
        """The name of the dtype, float32 or bfloat16."""
        return "float32" if self.autocast is None else "bfloat16"

    def __str__(self) -> str:
        weights = ", float32 weights" if self.autocast is not None else ""
        return f"{self.device}, {self.dtype} products{weights}: {self.reason}"

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products use the run's dtype."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """A context that uses a separate CUDA stream, which graph capture requires."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # weights were copied on that one
        return torch.cuda.stream(stream)


def choose_graph(config: TrainConfig, device: torch.device, processes: int) -> tuple[bool, str]:
    """Whether to capture each step as a CUDA graph, and the reason."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = "there is no GPU"
    elif processes > 1:
        obstacle = "gradients of several processes are summed outside of graphs"
    if config.cuda_graph == "on":
        if obstacle:
            raise InputError(f"cuda_graph is on, but {obstacle}; set it to auto")
        return True, "each step is one CUDA graph (cuda_graph is on)"
    if config.cuda_graph == "off":
        return False, "steps run eagerly (cuda_graph is off)"
    if obstacle:
        return False, f"steps run eagerly: {obstacle}"
    return True, "each step is one CUDA graph"


def choose_device(name: str, local_rank: int = 0, local_count: int = 1) -> torch.device:
    """Resolves `device` on this machine; auto is CUDA if available.

    With several processes on a machine, each takes the GPU of its local rank.
    """
    choice = name
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and local_count > 1:
        choice = f"cuda:{local_rank}"
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device needs an index
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"device {choice} does not exist: torch sees {count} CUDA devices")
    return device


def choose_dtype(
    dtype: str, device: torch.device, rates: Callable[[], dict[torch.dtype, float]]
) -> Choice:
    """Resolves `dtype` on this machine; returns it with the reason.

    Args:
        dtype: dtype of matrix products; auto is bfloat16 on GPUs that support it, and on a CPU if
            its products are faster by `MARGIN`.
        rates: measures FLOP/s by dtype on a CPU, see mvbert.model.flops.product_rates.
    """
    if dtype != "auto":
        return dtype, "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "supported by the GPU"
        return "float32", "the GPU does not support bfloat16"
    measured = rates()
    float32, bfloat16 = measured[torch.float32], measured[torch.bfloat16]
    choice = "bfloat16" if bfloat16 >= MARGIN * float32 else "float32"
    figures = f"float32 {float32 / 1e9:.3g}, bfloat16 {bfloat16 / 1e9:.3g} GFLOP/s a core"
    return choice, f"measured {figures}"


def keep_memory() -> None:
    """Makes glibc's malloc keep freed memory for later tensors.

    By default malloc returns large blocks to the system at once, so every training step takes tens
    of thousands of page faults: a fifth of a student's step, more than half of a step of
    transformers' BertForMaskedLM. Does nothing with another malloc. The process keeps its peak size
    until `give_memory_back`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Older glibc allows at most 32 MiB.
        if not mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
            mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_memory_back() -> None:
    """Returns unused memory that glibc's malloc kept to the system."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
