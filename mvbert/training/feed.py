"""Prefetches the rows of the next steps in a background thread and copies them to the device."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mvbert.config import TrainConfig
from mvbert.text.batches import Batch
from mvbert.training.ranks import Ranks
from mvbert.training.task import Task

SLOTS = 3  # batches in host memory: one being copied to the device, two being made


class Feed:
    """This rank's share of the rows of each step.

    Rows are a function of the seed and the step. For a GPU they are written to pinned memory and
    copied asynchronously: 5 bytes per piece and 8 per masked piece.
    """

    def __init__(
        self, task: Task, config: TrainConfig, ranks: Ranks, device: torch.device, step: int
    ) -> None:
        self._task, self._config, self._cuda = task, config, device.type == "cuda"
        self._share = ranks.share(config.rows)
        # When training on the CPU, the model needs the cores.
        self._threads = max(1, torch.get_num_threads() // 2) if self._cuda else 1
        shape = (len(self._share), task.rows.T, task.rows.capacity)
        self._slots = [
            {name: torch.from_numpy(array) for name, array in vars(Batch.empty(*shape)).items()}
            for _ in range(SLOTS)
        ]
        if self._cuda:
            self._slots = [{n: t.pin_memory() for n, t in slot.items()} for slot in self._slots]
        # The same memory as numpy arrays, for `Rows.read`.
        self._buffers = [Batch(**{n: t.numpy() for n, t in slot.items()}) for slot in self._slots]
        self._fetched: list[torch.cuda.Event | None] = [None] * SLOTS
        self.device = {n: torch.empty_like(t, device=device) for n, t in self._slots[0].items()}
        self._wait = 0.0
        self._step = step
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1)
        for number in range(step, step + SLOTS - 1):
            self._submit(number)

    def fetch(self) -> None:
        """Copies the rows of the next step to `device`, tensors by the names in Batch."""
        start = time.perf_counter()
        self._pending.popleft().result()
        self._wait += time.perf_counter() - start
        slot = self._step % SLOTS
        for name, tensor in self.device.items():
            tensor.copy_(self._slots[slot][name], non_blocking=True)
        if self._cuda:
            event = self._fetched[slot] = torch.cuda.Event()
            event.record()
        self._submit(self._step + SLOTS - 1)
        self._step += 1

    def take_wait(self) -> float:
        """Seconds that `fetch` has waited for rows since the last call."""
        wait, self._wait = self._wait, 0.0
        return wait

    def _submit(self, step: int) -> None:
        if step < self._config.steps:
            self._pending.append(self._pool.submit(self._make, step))

    def _make(self, step: int) -> None:
        slot = step % SLOTS
        if (event := self._fetched[slot]) is not None:
            event.synchronize()  # the device may still be reading this slot
        self._task.rows.read(
            step * self._config.rows + self._share.start,
            len(self._share),
            student_prob=self._task.student_prob,
            threads=self._threads,
            out=self._buffers[slot],
        )

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
