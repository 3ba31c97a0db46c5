"""What a run computes with on this machine: threads, device, and the dtype of matrix products.

`dtype = auto` is decided by measuring, once: a run keeps what its run.json records, and all runs of
a job share one decision, so that its students differ in nothing but what their settings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mvbert.config import ModelConfig, RowConfig, Stage2Config, TrainConfig, student_shape
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import read_json_object, write_json
from mvbert.model.flops import Product, encoder_products, product_rates
from mvbert.training.device import (
    DTYPES,
    Choice,
    Device,
    choose_device,
    choose_dtype,
    keep_memory,
)
from mvbert.training.ranks import join_ranks
from mvbert.training.runs import dtype_of_run

JOB_FILE = "dtype.json"  # in the folder of a job


def set_up(
    config: TrainConfig, out: Path, products: Sequence[Product], job: Choice | None = None
) -> Device:
    """Sets threads and malloc of this process; chooses device and dtype of the run in `out`.

    All processes of a run call this alike, and rank 0 decides for all.

    Args:
        products: what `dtype = auto` measures, see mvbert.model.flops.encoder_products.
        job: what `dtype = auto` means on a CPU in the job that the run belongs to.
    """
    set_threads(config)
    device = choose_device(config.device, join_ranks().local_rank, join_ranks().local_count)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()

    def decide() -> Choice:
        if config.dtype == "auto":
            if (began := dtype_of_run(out)) is not None:
                return began
            if job is not None and device.type == "cpu":
                return job
        return choose_dtype(config.dtype, device, lambda: product_rates(products, gradients=True))

    return Device.of(device, *join_ranks().first(decide))


def pass_products(config: TrainConfig, row: RowConfig, teacher: ModelConfig) -> list[Product]:
    """The matrix products of the encoders in one pass over a micro batch of a process.

    Stage I: of the teacher. Stage II: of the student, and of the teacher if it is distilled.
    """
    shapes = [teacher]
    if isinstance(config, Stage2Config):
        student = student_shape(config.shape, teacher.vocab_size)  # its layers alone count
        shapes = [student, teacher] if config.distill else [student]
    pieces = pass_rows(config) * row.length
    return [product for shape in shapes for product in encoder_products(shape, pieces)]


def pass_rows(config: TrainConfig) -> int:
    """Rows of one pass of a process."""
    return config.micro_rows or max(1, config.rows // join_ranks().count)


def decide_for_job(
    out: Path, configs: Sequence[TrainConfig], products: Sequence[Product]
) -> Choice | None:
    """What `dtype = auto` means on the CPU for all runs of the job in `out`, kept in JOB_FILE.

    Args:
        configs: the settings of these runs.
        products: those of all of them.

    Returns:
        None if `auto` is in none of the settings, or they all compute on a GPU.

    Raises:
        InputError: JOB_FILE holds something else.
    """
    auto = [c for c in configs if c.dtype == "auto" and choose_device(c.device).type == "cpu"]
    if not auto:
        return None
    set_threads(auto[0])

    def decide() -> Choice:
        path = out / JOB_FILE
        if path.exists():
            kept = read_json_object(path)
            if kept.get("dtype") not in DTYPES or not isinstance(kept.get("reason"), str):
                raise InputError(
                    f"{path}: expected dtype (float32 or bfloat16) and reason; "
                    "remove the file to measure again"
                )
            return str(kept["dtype"]), str(kept["reason"])
        # A job that an earlier version began keeps what its runs have.
        begun = [dtype_of_run(run.parent, auto=True) for run in sorted(out.rglob("run.json"))]
        dtype, reason = next(filter(None, begun), None) or choose_dtype(
            "auto", torch.device("cpu"), lambda: product_rates(products, gradients=True)
        )
        write_json(path, {"dtype": dtype, "reason": reason})
        return dtype, reason

    dtype, reason = join_ranks().first(decide)
    return dtype, reason


def set_threads(config: TrainConfig) -> None:
    """Gives torch `config.threads` threads, or this process's share of the cores."""
    torch.set_num_threads(config.threads or max(1, cores(0) // join_ranks().local_count))
