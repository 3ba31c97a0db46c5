"""The processes (ranks) of a run, and how they communicate.

`torchrun --nproc-per-node N -m mvbert ...` starts N ranks, which share the rows of each step. Only
rank 0 writes the log, the checkpoints and messages.
"""

import functools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from mvbert.errors import FailedElsewhere, InputError
from mvbert.progress import several_processes

J = TypeVar("J")  # a JSON value

# How long a collective waits for a rank that does not take part. A rank that dies is noticed at
# once: its connections close, and torchrun stops all others.
TIMEOUT = timedelta(minutes=10)
# For work that rank 0 does alone and that may take hours (reading text, writing a checkpoint).
LONG_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes; one process unless torchrun started it."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    local_count: int = 1
    slow_group: "dist.ProcessGroup | None" = None  # all ranks, with LONG_TIMEOUT

    @property
    def lead(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """This rank's part of `rows` rows; the parts of all ranks make up all rows."""
        return range(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def first(self, work: Callable[[], J]) -> J:
        """Calls `work` on rank 0 alone; all ranks return its result, or raise if it failed."""
        if self.slow_group is None:
            return work()
        failed, text = None, b""
        if self.lead:
            try:
                text = json.dumps({"value": work()}).encode()
            except InputError as error:
                failed, text = error, json.dumps({"error": str(error)}).encode()
        answer = json.loads(self._broadcast(text))
        if failed is not None:
            raise failed
        if "error" in answer:
            raise FailedElsewhere(answer["error"])
        return answer["value"]

    def _broadcast(self, text: bytes) -> bytes:
        """Sends rank 0's `text` to all ranks; fails at once on the others if rank 0 dies."""
        size = torch.tensor(len(text))
        dist.broadcast(size, 0, self.slow_group)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.lead:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(data, 0, self.slow_group)
        return data.numpy().tobytes()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Logical or of each flag over all ranks."""
        if self.count == 1:
            return flags
        return tuple(
            count > 0 for count in self.sum_(torch.tensor(flags, dtype=torch.int)).tolist()
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wraps a module so that backward sums its gradients over all ranks."""
        if self.count == 1:
            return module
        wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _sum_hook)
        return wrapped


# DDP inspects these annotations, so this module does not postpone their evaluation.
def _sum_hook(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Sums gradients where DDP would average: losses are already divided by global counts."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


@functools.cache
def join_ranks() -> Ranks:
    """Joins the ranks that torchrun started, once; `Ranks()` without torchrun.

    Uses gloo for CPU tensors and NCCL for CUDA tensors.
    """
    if not several_processes():
        return Ranks()
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    store = _fresh_store(store, rank, count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return Ranks(
        rank,
        count,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", count)),
        dist.new_group(backend="gloo", timeout=LONG_TIMEOUT),
    )


def _fresh_store(store: "dist.Store", rank: int, count: int) -> "dist.Store":  # type: ignore[name-defined]
    """A part of torchrun's store under a prefix that only the processes of this start use.

    The store survives a restart with addresses of dead processes, and machines may count restarts
    differently. So rank 0 answers requests for a new prefix until all other ranks use it.
    """
    name = uuid.uuid4().hex
    deadline = time.monotonic() + TIMEOUT.total_seconds()

    def nap() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {count} processes joined within {TIMEOUT}")
        time.sleep(0.05)

    if rank:
        store.set(f"request/{rank}", name)
        while not store.check([f"reply/{name}"]):
            nap()
        name = store.get(f"reply/{name}").decode()
    part = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    part.set(f"joined/{rank}", "")
    while missing := [r for r in range(count) if not part.check([f"joined/{r}"])]:
        for other in () if rank else missing:
            # The request may be a dead process's; the live one then sends its own.
            if store.check([f"request/{other}"]):
                store.set(f"reply/{store.get(f'request/{other}').decode()}", name)
        nap()
    return part


def leave_ranks(code: int) -> None:
    """Exits a process that has joined other ranks; does nothing in one that has not.

    Skips interpreter shutdown: threads of torch.distributed that release Python objects there would
    end a finished run with SIGABRT.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
