"""Run folder: settings, log, lock, stop requests.

run.json      settings, versions, device
log.jsonl     one object per logged step and per evaluation
checkpoints/  step-XXXXXXXX, see mvbert.training.checkpoint
model/        the result: the last checkpoint without its training state
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from mvbert.config import DISTILL_LOSSES
from mvbert.errors import InputError
from mvbert.files import Json, atomic_write, read_json_object, write_error, write_json


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


# Settings that not every version has, each with the value at which it has no effect (None: none at
# any value if its companion setting has none): a run without the setting is the same run.
NEUTRAL: dict[str, Json] = {
    "row.late_length": 0,
    "row.late_share": None,
    "train.optimizer": "adamw",
    "train.cooldown": 1.0,
    "train.student_prob_end": -1.0,
    "train.ramp_start": None,
    "train.logits_at": "masked",
    "train.logits_top_k": 0,
    "train.hidden_map": "linear",
    "train.mlm_weight_end": -1.0,
    "train.logits_weight_end": -1.0,
    "train.hidden_weight_end": -1.0,
    "train.relations_weight_end": -1.0,
    "train.cased": False,
    "teacher_shape.tie_word_embeddings": True,
}


def _without_neutral(description: dict[str, Any]) -> dict[str, Any]:
    """Removes settings without effect that other versions lack from a description.

    Its tables are those of run.json (row, train, teacher_shape) or distill.json (row, stage1,
    stage2). The weight of a distillation loss that a run does not have is such a setting.
    """
    result = {k: {**v} if isinstance(v, dict) else v for k, v in description.items()}
    for setting, neutral in NEUTRAL.items():
        table, name = setting.split(".")
        tables = ("train", "stage1", "stage2") if table == "train" else (table,)
        for values in map(result.get, tables):
            if isinstance(values, dict) and name in values and neutral in (None, values[name]):
                del values[name]
    for values in (result.get("train"), result.get("stage2")):
        if isinstance(values, dict) and "distill" in values:
            for loss in {*DISTILL_LOSSES} - {*values["distill"]}:
                values.pop(f"{loss}_weight", None)
    return result


def describe_run(path: Path, description: dict[str, Json], **facts: Json) -> int | None:
    """Writes a run's description at its first start; later refuses another run in the folder.

    Args:
        path: the file, run.json or distill.json.
        description: settings and checksums of inputs, which must be the same to resume.
        facts: written next to the description, not compared.

    Returns:
        The result of check_run; if the run has more steps now, `path` is updated.
    """
    if not path.exists():
        write_json(path, {"description": description, **facts})
        return None
    steps = check_run(path, description)
    if steps is not None:
        write_json(path, {**read_json_object(path), "description": description})
    return steps


def check_run(path: Path, description: dict[str, Json]) -> int | None:
    """Refuses a run that differs from the one in `path` in anything but more steps.

    Returns:
        The earlier number of steps if it is higher now; None if nothing differs.
    """
    recorded = read_json_object(path).get("description")
    current: Any = _without_neutral(json.loads(json.dumps(description)))
    if isinstance(recorded, dict):
        recorded = _without_neutral(recorded)
    if recorded == current:
        return None
    if isinstance(recorded, dict):
        old_steps, new_steps = (
            x["train"].get("steps") if "train" in x else None for x in (recorded, current)
        )
        if (
            isinstance(old_steps, int)
            and isinstance(new_steps, int)
            and old_steps < new_steps
            and {**recorded, "train": {**recorded["train"], "steps": new_steps}} == current
        ):
            return old_steps
    raise other_settings(path.parent, "run", recorded, current)


def recorded_job(path: Path, description: dict[str, Json]) -> dict[str, Json]:
    """What a job with this description has recorded in `path`; {} at its first start.

    Raises:
        InputError: the folder of `path` holds another job, or something else.
    """
    if not path.exists():
        if any(not p.name.startswith(".") for p in path.parent.iterdir()):
            raise InputError(
                f"{path.parent} is not empty and has no {path.name} of a job to resume; give "
                "another --out"
            )
        return {}
    job = read_json_object(path)
    recorded, current = job.get("description"), json.loads(json.dumps(description))
    if recorded != current:
        raise other_settings(path.parent, "job", recorded, current)
    return job


def other_settings(out: Path, kind: str, recorded: Any, current: dict[str, Any]) -> InputError:
    """The refusal of a folder that holds a run or a job with other settings; names them."""
    names = _differences(recorded, current) if isinstance(recorded, dict) else ["description"]
    return InputError(
        f"{out} holds a {kind} with other settings ({', '.join(names[:4])}); "
        "give another --out, or remove that folder"
    )


def describe_resume(path: Path, step: int, environment: dict[str, Json]) -> None:
    """Records in run.json that the run resumes from `step`, and changes of the environment."""
    run = read_json_object(path)
    first: Any = run.get("environment")
    resumed: Any = run.setdefault("resumed", [])
    changes = {name: value for name, value in environment.items() if first.get(name) != value}
    resumed.append({"step": step, **changes})
    write_json(path, run)


def dtype_of_run(out: Path, auto: bool = False) -> tuple[str, str] | None:
    """The dtype recorded for the run in `out`, and the reason for it.

    Args:
        auto: consider only runs with `dtype = auto`.

    Returns:
        None if no run has started there.
    """
    path = out / "run.json"
    if not path.is_file():
        return None
    run: Any = read_json_object(path)
    try:
        facts = run["environment"]
        # Up to version 0.1 one string held both: "float32: asked for".
        dtype, _, reason = str(facts["dtype"]).partition(": ")
        dtype = dtype.partition(" ")[0]
        if auto and run["description"]["train"]["dtype"] != "auto":
            return None
    except (KeyError, TypeError):
        raise InputError(f"{path} does not record the dtype of the run; was it edited?") from None
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"{path}: dtype must be float32 or bfloat16, got {facts['dtype']!r}")
    return dtype, str(facts.get("dtype_reason", reason))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ between two nested objects, with both values."""
    names: list[str] = []
    for key in sorted({*a, *b}):
        if a.get(key) == b.get(key):
            continue
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            names += _differences(a[key], b[key], f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}: {a.get(key)!r} there, {b.get(key)!r} now")
    return names


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Locks a run folder, so that only one process at a time trains in it."""
    try:
        file = open(out / ".lock", "w")  # noqa: SIM115 (the with-block below closes it)
    except OSError as error:
        raise write_error(out / ".lock", error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out} is in use by another mvbert process") from None
        yield


class Stop:
    """Set when SIGINT or SIGTERM requests the run to stop."""

    requested = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a request that the loop handles after the current step."""
    stop = Stop()
    # torchrun forwards a Ctrl-C that the terminal has already sent to the whole process group.
    repeated_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def request_stop(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT and not repeated_by_torchrun:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        stop.requested = True

    try:
        old = {n: signal.signal(n, request_stop) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def read_log(out: Path) -> list[dict[str, Any]]:
    """All records of a run's log, oldest first, without a last line that a kill truncated.

    Raises:
        InputError: the log is missing, or a line is not a record.
    """
    path = out / "log.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist; is {out} a run folder?")
    records = []
    *lines, rest = _lines(path)
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number <= len(lines) or not rest.startswith("{"):
            raise InputError(
                f"{path} is corrupt at line {number}, which is not a record of a step; "
                "restore the file, or delete that line"
            )
    return records


def _lines(path: Path) -> list[str]:
    """The lines of a log, then the text after the last newline: empty, or a truncated line."""
    try:
        return path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _record(line: str) -> dict[str, Any] | None:
    """Parses a line of the log; None if it is not a record."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    valid = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if valid and isinstance(record.get("heldout", {}), dict) else None


class Log:
    """Writes log.jsonl, and TensorBoard events if tensorboard is installed.

    On resume, drops records after the checkpoint's step.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = []
        if keep_until >= 0 and path.exists():
            # A line truncated by a kill or a full disk comes after the checkpoint.
            records = ((line, _record(line)) for line in _lines(path))
            lines = [line for line, record in records if record and record["step"] <= keep_until]
        atomic_write(path, "".join(line + "\n" for line in lines))
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._board = _tensorboard(path.parent / "tensorboard", keep_until + 1)

    def write(self, record: dict[str, Json]) -> None:
        with self._write_errors():
            self._file.write(json.dumps(record, allow_nan=True) + "\n")
            self._file.flush()
            if self._board is not None:
                heldout = record.get("heldout")
                prefix, values = ("heldout", heldout) if heldout else ("train", record)
                assert isinstance(values, dict)
                for name, value in values.items():
                    if name not in ("step", "pieces") and value is not None:
                        self._board.add_scalar(f"{prefix}/{name}", value, record["step"])

    def flush(self) -> None:
        """Syncs the log to disk, as a checkpoint requires."""
        with self._write_errors():
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # TensorBoard raises errors of its thread in a later call
            raise write_error(self._path, error) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # checkpoints have flushed what they need
                self._board.close()


def _tensorboard(folder: Path, purge_step: int) -> Any:
    """A TensorBoard writer that discards events from `purge_step` on; None if not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)
