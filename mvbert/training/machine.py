"""Decides threads, device and dtype of a run once, by settings, measurement or its run.json.

`dtype = auto` is decided by one measurement: a run keeps the dtype in its run.json, and all runs of
a job share one decision, so that its students differ only in their settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mvbert.config import ModelConfig, RowConfig, Stage2Config, TrainConfig, student_shape
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import read_json_object, write_json
from mvbert.model.flops import Product, encoder_products, product_rates
from mvbert.training.device import DTYPES, Choice, Device, choose_device, choose_dtype, keep_memory
from mvbert.training.ranks import join_ranks
from mvbert.training.runs import dtype_of_run

JOB_FILE = "dtype.json"  # in the job's folder


def set_up(
    config: TrainConfig, out: Path, products: Sequence[Product], job: Choice | None = None
) -> Device:
    """Sets threads and malloc of this process; chooses device and dtype of the run in `out`.

    Every rank must call it; rank 0 decides for all.

    Args:
        products: matrix products that `dtype = auto` measures, see
            mvbert.model.flops.encoder_products.
        job: the job's decision for `dtype = auto` on a CPU, see `decide_for_job`.
    """
    set_threads(config)
    device = choose_device(config.device, join_ranks().local_rank, join_ranks().local_count)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()

    def decide() -> Choice:
        if config.dtype == "auto":
            if (recorded := dtype_of_run(out)) is not None:
                return recorded
            if job is not None and device.type == "cpu":
                return job
        return choose_dtype(config.dtype, device, lambda: product_rates(products, gradients=True))

    return Device.of(device, *join_ranks().first(decide))


def set_up_alone(
    device: str,
    dtype: str,
    threads: int,
    products: Sequence[Product],
    *,
    gradients: bool,
    recorded: Choice | None = None,
) -> Device:
    """Sets threads and malloc of a process that trains or evaluates without others; its device.

    Args:
        device: auto, cpu or cuda[:N].
        dtype: float32, bfloat16 or auto.
        threads: CPU threads (0: all available cores).
        products: matrix products that `dtype = auto` measures on a CPU.
        gradients: measure their backward products too.
        recorded: what `dtype = auto` was when the work began, which it keeps.

    Raises:
        InputError: there is no such device.
    """
    torch.set_num_threads(cores(threads))
    target = choose_device(device)
    if target.type == "cpu":
        keep_memory()
    if dtype == "auto" and recorded is not None:
        return Device.of(target, *recorded)
    return Device.of(
        target, *choose_dtype(dtype, target, lambda: product_rates(products, gradients=gradients))
    )


def recorded_choice(facts: Mapping[str, Any]) -> Choice | None:
    """The dtype that an `environment` records, and the reason; None if it records none."""
    dtype = str(facts.get("dtype"))
    return (dtype, str(facts.get("dtype_reason", ""))) if dtype in DTYPES else None


def pass_products(config: TrainConfig, row: RowConfig, teacher: ModelConfig) -> list[Product]:
    """Matrix products of the encoders in one forward pass of a process.

    Stage I: the teacher's. Stage II: the student's, and with distillation also the teacher's.
    """
    shapes = [teacher]
    if isinstance(config, Stage2Config):
        student = student_shape(config.shape, teacher.vocab_size)  # only its layers matter here
        shapes = [student, teacher] if config.distill else [student]
    pieces = pass_rows(config) * row.length
    return [product for shape in shapes for product in encoder_products(shape, pieces)]


def pass_rows(config: TrainConfig) -> int:
    """Rows per forward pass of a process."""
    return config.micro_rows or max(1, config.rows // join_ranks().count)


def decide_for_job(
    out: Path, configs: Sequence[TrainConfig], products: Sequence[Product]
) -> Choice | None:
    """Decides `dtype = auto` on the CPU for all runs of the job in `out`; saves it in JOB_FILE.

    Args:
        configs: the settings of the runs.
        products: the matrix products of all runs.

    Returns:
        The dtype and the reason; None if no run has `auto` on a CPU.

    Raises:
        InputError: JOB_FILE is invalid.
    """
    auto = [c for c in configs if c.dtype == "auto" and choose_device(c.device).type == "cpu"]
    if not auto:
        return None
    set_threads(auto[0])

    def decide() -> Choice:
        path = out / JOB_FILE
        if path.exists():
            saved = read_json_object(path)
            if saved.get("dtype") not in DTYPES or not isinstance(saved.get("reason"), str):
                raise InputError(
                    f"{path}: expected dtype (float32 or bfloat16) and reason; "
                    "remove the file to measure again"
                )
            return str(saved["dtype"]), str(saved["reason"])
        # A job started by an earlier version keeps the dtype of its runs.
        recorded = [dtype_of_run(run.parent, auto=True) for run in sorted(out.rglob("run.json"))]
        dtype, reason = next(filter(None, recorded), None) or choose_dtype(
            "auto", torch.device("cpu"), lambda: product_rates(products, gradients=True)
        )
        write_json(path, {"dtype": dtype, "reason": reason})
        return dtype, reason

    dtype, reason = join_ranks().first(decide)
    return dtype, reason


def set_threads(config: TrainConfig) -> None:
    """Sets torch's threads to `config.threads`, or to this process's share of the cores."""
    torch.set_num_threads(config.threads or max(1, cores(0) // join_ranks().local_count))
