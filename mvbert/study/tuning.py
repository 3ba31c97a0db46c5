"""Fine-tunes the models of a study on its tasks and exports them: scores, bytes, latency.

out/tuned/ARM/SEED/TASK/  a job of `mvbert finetune`; without SEED of a model that has none
out/exports/ARM.json      bytes and milliseconds of an arm's ONNX files
out/models.jsonl          one line per arm and seed: its size and the scores of every task
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mvbert.files import Json, atomic_write, read_json_object, write_json
from mvbert.model import huggingface
from mvbert.progress import Progress
from mvbert.publish.export import FLOAT, HALF, INT8, run_export
from mvbert.publish.onnx_graph import load_onnx
from mvbert.study.settings import StudyConfig
from mvbert.tasks.finetune import DESCRIPTION, run_finetune
from mvbert.tasks.formats import read_task
from mvbert.tasks.metrics import check_installed


def check_tasks(config: StudyConfig) -> None:
    """Reads the data of every task, so that what is wrong is reported before anything is trained.

    Raises:
        InputError: the data of a task cannot be read.
        MissingExtra: a library of metrics or ONNX is not installed.
    """
    if config.measure.export:
        load_onnx()
    if config.measure.tasks:
        check_installed()
    for name in config.measure.tasks:
        read_task(*config.task(name))


class Tuning:
    """What a study measures of finished models.

    Args:
        model: the folder of an arm's model; its second argument is the seed, None of a model that
            the arm does not train.
    """

    def __init__(
        self, config: StudyConfig, out: Path, model: Callable[[str, int | None], Path]
    ) -> None:
        self._config, self._out = config, out
        self._model = cache(model)  # which looks at every part that the model is made of
        self._progress = Progress("study")
        self._lines: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._results: dict[Path, dict[str, Json]] = {}

    def measure(self, arm: str, seed: int | None) -> None:
        """Exports and fine-tunes an arm's model, as far as that is not done yet."""
        folder = self._model(arm, seed)
        shape = huggingface.read_model_config(folder)
        line: dict[str, Any] = {
            "arm": arm,
            "seed": seed,
            "model": self._config.kind(arm),
            "vocab": shape.vocab_size,
            "parameters": shape.encoder_parameters,
        }
        if self._config.measure.export:
            line |= self._export(arm, folder)
        line["tasks"] = {
            name: self._fine_tune(arm, seed, name) for name in self._config.measure.tasks
        }
        self._lines[arm, seed] = line
        text = "".join(json.dumps(line) + "\n" for line in self._lines.values())
        atomic_write(self._out / "models.jsonl", text)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of models.jsonl."""
        return [*self._lines.values()]

    def _fine_tune(self, arm: str, seed: int | None, name: str) -> dict[str, Json]:
        """The result of fine-tuning, on every split that has labels."""
        out = self._folder(arm, seed, name)
        if out in self._results:
            return self._results[out]
        task, data = self._config.task(name)
        settings = self._config.tuning(arm, name)
        if settings.teacher:
            teacher = settings.teacher
            of_seed = seed if self._config.trained(teacher) else None
            self._fine_tune(teacher, of_seed, name)
            settings = replace(settings, teacher=str(self._folder(teacher, of_seed, name)))
        self._progress.note(f"{arm}{'' if seed is None else f' {seed}'}: {name}")
        result = run_finetune(
            str(self._model(arm, seed)), task.name, data, out, settings,
            cased=self._config.stage1.cased,
        )  # fmt: skip
        described: Any = read_json_object(out / DESCRIPTION)["description"]
        self._results[out] = {
            "task": task.name,
            "setting": result.setting,
            "examples": described["examples"],
            "scores": {s: result.scores[s] for s in described["examples"] if s in result.scores},
        }
        return self._results[out]

    def _folder(self, arm: str, seed: int | None, task: str) -> Path:
        folder = self._out / "tuned" / arm
        return (folder if seed is None else folder / str(seed)) / task

    def _export(self, arm: str, model: Path) -> dict[str, Json]:
        """Bytes and latency of an arm's model: of one seed, as all seeds have one shape."""
        own = self._config.student(arm) if self._config.trained(arm) else arm
        path = self._out / "exports" / f"{own}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._out) as scratch:
                report = run_export(str(model), Path(scratch, "onnx"), int8=True, float16=True)
            write_json(path, report.files)
        files: Any = read_json_object(path)
        return {
            "float16_bytes": files[HALF]["bytes"],
            "int8_bytes": files[INT8]["bytes"],
            "float32_milliseconds": files[FLOAT]["milliseconds"],
            "int8_milliseconds": files[INT8]["milliseconds"],
        }
