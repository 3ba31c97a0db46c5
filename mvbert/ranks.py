"""The processes of one run: which one this is, and what they tell each other.

Started by `torchrun --nproc-per-node N -m mvbert ...`, a run has N of them; the rows of a step are
dealt out among them by number. Rank 0 alone writes: the log, the checkpoints, what people read.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
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
    store: "dist.Store | None" = None  # type: ignore[name-defined]
    _calls: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """Which of `rows` numbered rows are this process's: all shares together are all rows."""
        return range(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def first(self, work: Callable[[], J]) -> J:
        """Rank 0 works, all others wait for it and get its result, or fail as it did."""
        if self.store is None:
            return work()
        key = f"first/{next(self._calls)}"
        if not self.lead:
            self.store.wait([key], PATIENCE)
            answer = json.loads(self.store.get(key))
            if "error" in answer:
                raise FailedElsewhere(answer["error"])
            return answer["value"]
        try:
            value = work()
        except InputError as error:
            self.store.set(key, json.dumps({"error": str(error)}))
            raise
        self.store.set(key, json.dumps({"value": value}))
        return value

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in some process: the same answer in all of them."""
        if self.count == 1:
            return flag
        return bool(self.sum_(torch.tensor(int(flag))))

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
def ranks() -> Ranks:
    """This process's place, by the variables that torchrun sets; joins the others once.

    CPU tensors travel by gloo, CUDA tensors by NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, with addresses and answers of the processes before it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return Ranks(
        rank,
        count,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", count)),
        dist.PrefixStore("mvbert", store),  # type: ignore[attr-defined]
    )


def leave() -> None:
    """Ends the connections to the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
