"""The processes of one run: which one this is, and what they tell each other.

Started by `torchrun --nproc-per-node N -m mvbert ...`, a run has N of them; the rows of a step are
dealt out among them by number. Rank 0 alone writes: the log, the checkpoints, what people read.
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

J = TypeVar("J")  # something that JSON holds

# How long a collective waits for a process that does not come before this one gives up. A process
# that dies is noticed at once: by the others' connections, and by torchrun, which stops them all.
TIMEOUT = timedelta(minutes=10)
# What rank 0 does alone (reading the text, writing a checkpoint) takes as long as it takes.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; of one process unless torchrun started it."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    local_count: int = 1
    patient: "dist.ProcessGroup | None" = None  # of all processes, for what may take long

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """Which of `rows` numbered rows are this process's: all shares together are all rows."""
        return range(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def first(self, work: Callable[[], J]) -> J:
        """Rank 0 works, all others wait for it and get its result, or fail as it did."""
        if self.patient is None:
            return work()
        failed, text = None, b""
        if self.lead:
            try:
                text = json.dumps({"value": work()}).encode()
            except InputError as error:
                failed, text = error, json.dumps({"error": str(error)}).encode()
        answer = json.loads(self._of_lead(text))
        if failed is not None:
            raise failed
        if "error" in answer:
            raise FailedElsewhere(answer["error"])
        return answer["value"]

    def _of_lead(self, text: bytes) -> bytes:
        """What rank 0 has passed; fails at once in all others when it dies instead."""
        size = torch.tensor(len(text))
        dist.broadcast(size, 0, self.patient)
        letters = torch.empty(int(size), dtype=torch.uint8)
        if self.lead:
            letters = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(letters, 0, self.patient)
        return letters.numpy().tobytes()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags hold in some process: the same answer in all of them."""
        if self.count == 1:
            return flags
        return tuple(
            count > 0 for count in self.sum_(torch.tensor(flags, dtype=torch.int)).tolist()
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients summed over all processes as backward makes them."""
        if self.count == 1:
            return module
        wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _sum_hook)
        return wrapped


# DDP looks at these annotations, so this module keeps them as objects.
def _sum_hook(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Sums where DDP would take the mean: losses are divided by global counts already."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


@functools.cache
def join_ranks() -> Ranks:
    """This process's place, by the variables that torchrun sets; joins the others once.

    CPU tensors travel by gloo, CUDA tensors by NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    store = _unused(store, rank, count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return Ranks(
        rank,
        count,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", count)),
        dist.new_group(backend="gloo", timeout=PATIENCE),
    )


def _unused(store: "dist.Store", rank: int, count: int) -> "dist.Store":  # type: ignore[name-defined]
    """A part of torchrun's store that only the processes of this start know of.

    The store outlives a restart, with addresses of processes that are gone, and machines may count
    the restarts differently. So rank 0 tells a new name to whoever asks, until all others use it.
    """
    name = uuid.uuid4().hex
    deadline = time.monotonic() + TIMEOUT.total_seconds()

    def nap() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {count} processes have come within {TIMEOUT}")
        time.sleep(0.05)

    if rank:
        store.set(f"asks/{rank}", name)
        while not store.check([f"told/{name}"]):
            nap()
        name = store.get(f"told/{name}").decode()
    part = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    part.set(f"here/{rank}", "")
    while missing := [r for r in range(count) if not part.check([f"here/{r}"])]:
        for asking in () if rank else missing:
            if store.check([f"asks/{asking}"]):  # perhaps one that is gone: then it asks anew
                store.set(f"told/{store.get(f'asks/{asking}').decode()}", name)
        nap()
    return part


def leave(code: int) -> None:
    """Ends a process that has joined others; does nothing in one that has not.

    Without tearing Python down: threads of torch.distributed that let go of Python objects only
    then would end a run that is done with SIGABRT.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
