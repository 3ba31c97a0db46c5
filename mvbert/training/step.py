"""One optimiser step, from rows on the device to updated weights, without device synchronisation.

On a GPU the step can be captured once as a CUDA graph and replayed: at small widths a GPU finishes
a kernel before Python has launched the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mvbert.config import TrainConfig
from mvbert.files import Json
from mvbert.model.masked_lm import DeviceBatch
from mvbert.text.philox import philox4x32
from mvbert.training.device import Device
from mvbert.training.feed import Feed
from mvbert.training.optim import Optimizer, learning_rate, trained_parameters
from mvbert.training.ranks import Ranks
from mvbert.training.task import Task

WARM_UP = 3  # steps before the capture, which compile kernels and allocate memory and moments


class CudaGraph:
    """Work on a CUDA stream, recorded once and replayed."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        """Records the kernels that `work` launches on the current stream, without running them."""
        current = torch.cuda.current_stream()
        # The default stream cannot capture; with None torch uses a stream it keeps for captures.
        stream = None if current == torch.cuda.default_stream() else current
        # The threads of the feed may call CUDA during the capture.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self._graph.replay()


class Sums:
    """Named sums in one float64 vector on the device."""

    def __init__(self, device: torch.device, values: dict[str, float] | None = None) -> None:
        values = values or {}
        self.names = tuple(values)
        self.vector = torch.tensor(list(values.values()), dtype=torch.float64, device=device)

    def add(self, parts: dict[str, Tensor]) -> None:
        """Adds `parts` to the sums; names must be the same in every call."""
        more = torch.stack([parts[name].detach().double() for name in sorted(parts)])
        if self.names != tuple(sorted(parts)):
            assert not self.names, (self.names, sorted(parts))
            self.names, self.vector = tuple(sorted(parts)), torch.zeros_like(more)
        self.vector += more

    def dict(self, vector: Tensor) -> dict[str, float]:
        """The values of `vector` by name; waits for the device."""
        return dict(zip(self.names, vector.tolist(), strict=True))


class PendingSums:
    """Sums being copied from the device.

    Attributes:
        ready: whether they need no waiting (on a CPU).
    """

    def __init__(self, vector: Tensor, names: tuple[str, ...]) -> None:
        self.ready = not vector.is_cuda
        self._names, self._host = names, vector
        if not self.ready:
            self._host = torch.empty_like(vector, device="cpu", pin_memory=True)
            self._host.copy_(vector, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[dict[str, float], int, int]:
        """Sums by name, the current number of skipped updates in a row, the last skipped step."""
        if not self.ready:
            self._event.synchronize()
        *sums, in_a_row, last = self._host.tolist()
        return dict(zip(self._names, sums, strict=True)), int(in_a_row), int(last)


class Losses(nn.Module):
    """A task's losses as a module, for DistributedDataParallel to wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self._losses = task.losses

    def forward(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(batch, masked)


class Step:
    """Forward, backward and update, eager or as a CUDA graph.

    Args:
        losses: `ranks.wrap(Losses(task))`.
        state: the result of `state()` when the run was saved, or {}.
        graph: captures and replays the step; None runs it eagerly.
    """

    def __init__(
        self,
        task: Task,
        losses: nn.Module,
        config: TrainConfig,
        device: Device,
        ranks: Ranks,
        optimizer: Optimizer,
        state: dict[str, Json],
        graph: CudaGraph | None,
    ) -> None:
        self._task, self._config, self._device, self._ranks = task, config, device, ranks
        self._optimizer, self._graph = optimizer, graph
        self._parameters = [p for _, p in trained_parameters(task.module)]
        self._losses = losses
        window: dict[str, float] = state.get("window", {}) if ranks.lead else {}  # type: ignore[assignment]
        self._sums = Sums(device.device, window)
        self._calls = 0
        # The current number of skipped updates in a row, and the last skipped step.
        skipped = [state.get("skipped_in_a_row", 0), state.get("skipped_last", -1)]
        self._skipped = torch.tensor(skipped, dtype=torch.float64, device=device.device)
        self._number = torch.zeros((), dtype=torch.float64, device=device.device)

    def __call__(self, feed: Feed, step: int) -> None:
        """Runs step `step` (from 0); on a GPU, returns when it has been launched."""
        feed.fetch()
        self._number.fill_(step)
        self._optimizer.set_learning_rate(learning_rate(step, self._config))
        if self._graph is None or self._calls < WARM_UP:
            torch.manual_seed(dropout_seed(self._config.seed, step, self._ranks.rank))
            self._update(feed.device)
        else:
            if self._calls == WARM_UP:
                self._optimizer.set_capturable(True)
                self._graph.capture(lambda: self._update(feed.device))
                self._optimizer.set_capturable(False)
            # A replay draws dropout from the generator's current state.
            torch.manual_seed(dropout_seed(self._config.seed, step, self._ranks.rank))
            self._graph.replay()
        self._calls += 1

    def _update(self, rows: dict[str, Tensor]) -> None:
        self._task.module.train()
        masked = self._ranks.sum_((rows["labels"] >= 0).sum())
        share = len(rows["labels"])
        micro = self._config.micro_rows or share
        parts: dict[str, Tensor] = {}
        for first in range(0, share, micro):
            batch = DeviceBatch.part(rows, slice(first, first + micro))
            with self._synced(first + micro >= share):
                with self._device.cast():
                    loss, more = self._losses(batch, masked)
                loss.backward()
            parts = {name: parts[name] + more[name] if parts else more[name] for name in more}
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._config.grad_clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._config.grad_clip, norm)
        good = torch.isfinite(norm)
        self._optimizer.step(skip=~good)
        for p in self._parameters:
            p.grad = None
        # A skipped step only counts as skipped; values that all ranks share count once.
        one = torch.full_like(norm, float(self._ranks.lead))
        parts |= {"grad_norm": norm * one, "updates": one}
        self._sums.add(
            {name: value.where(good, 0.0) for name, value in parts.items()}
            | {"steps": one, "skipped": one * ~good}
        )
        in_a_row, last = self._skipped
        self._skipped.copy_(
            torch.stack([(in_a_row + 1).where(~good, 0.0), self._number.where(~good, last)])
        )

    def _synced(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Limits the gradient all-reduce to the last micro batch of a step."""
        if last or self._ranks.count == 1:
            return contextlib.nullcontext()
        assert isinstance(self._losses, nn.parallel.DistributedDataParallel)
        return self._losses.no_sync()  # type: ignore[no-any-return]

    def take(self) -> PendingSums:
        """Starts copying the sums from the device and resets them to 0."""
        pending = PendingSums(torch.cat([self._summed(), self._skipped]), self._sums.names)
        self._sums.vector.zero_()
        return pending

    def state(self) -> dict[str, Json]:
        """State for a checkpoint, so that the log of a resumed run continues unchanged."""
        in_a_row, last = self._skipped.tolist()
        return {
            "window": self._sums.dict(self._summed()),
            "skipped_in_a_row": int(in_a_row),
            "skipped_last": int(last),
        }

    def _summed(self) -> Tensor:
        return self._ranks.sum_(self._sums.vector.clone())


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A 32-bit hash of (seed, step, rank); torch's CPU generator uses no more bits of a seed."""
    return philox4x32((step, rank, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]
