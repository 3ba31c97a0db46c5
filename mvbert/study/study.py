"""A study: compares students (arms) that differ from common settings only where stated.

    corpus -> vocabularies -> Stage I, once per distinct setting -> Stage II, per arm and seed

Every arm sees the same number of pieces; arms with the same vocabulary see the same rows, as
checksums in the results show. Each part writes a folder and is not repeated, so the same command
resumes an interrupted study.

    out/corpus/  vocabs/SIZE/  stage1/KEY/  runs/ARM/SEED/   the parts
    out/results.jsonl     one line per arm, seed and held-out evaluation
    out/table.md          means over seeds at the last step, and differences from the baseline
    out/curves.svg, .png  bits per word against pieces seen

Finished models are then fine-tuned and exported (mvbert.study.tuning), beside models that no arm
trains: the teacher, the teacher trimmed to the student's vocabulary, the Stage I teacher.

    out/trimmed/KEY/  readers/KEY/  tuned/ARM/SEED/TASK/     the parts
    out/models.jsonl      one line per arm and seed: size, latency, scores of every task
    out/tasks.md          the same as a table, with published results
    out/scores-*.svg      scores against bytes and against latency
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mvbert.config import JobConfig, Stage2Config
from mvbert.errors import InputError
from mvbert.files import Json, atomic_folder, atomic_write, read_json, write_json
from mvbert.model import huggingface
from mvbert.model.card import model_card
from mvbert.progress import Progress
from mvbert.study.measures import MeasuredWords, bits_per_word, choose_words, make_questions
from mvbert.study.run_trim import run_trim
from mvbert.study.settings import StudyConfig, pieces_at
from mvbert.study.study_report import write_report
from mvbert.study.task_report import write_task_report
from mvbert.study.tuning import Tuning, check_tasks
from mvbert.text.batches import Rows
from mvbert.text.prepare import VOCAB_FILE, make_corpus, make_vocab
from mvbert.text.stage_rows import student_rows
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict
from mvbert.training.device import Device, choose_device
from mvbert.training.distillation import reader
from mvbert.training.machine import decide_for_job, pass_products
from mvbert.training.ranks import join_ranks
from mvbert.training.run_stage import checked_corpus, run_stage1, run_stage2
from mvbert.training.runs import describe_run, dtype_of_run, lock, make_folder, read_log
from mvbert.training.stages import load_stage1


def run_study(config: StudyConfig) -> dict[str, Json]:
    """Runs and measures all arms that are not complete yet; writes results, table and curves.

    Returns:
        The folder, the number of runs and of results, and each arm's means at the last step.

    Raises:
        InputError: bad input, `config.out` holds another study, or there are several processes.
        Interrupted: stopped by a signal; a checkpoint was saved first.
    """
    if join_ranks().count > 1:
        raise InputError("a study runs in one process; start it without torchrun")
    config.corpus.check_text()
    check_tasks(config)
    started = time.perf_counter()
    progress = Progress("study")
    out = Path(config.out)
    make_folder(out)
    with lock(out):
        described = to_dict(config)
        # Arms, seeds and tasks may be added: what they need is described in their own folders.
        for key in ("out", "arms", "seeds", "baseline", "chosen", "published"):
            del described[key]
        for key in ("export", "finetune", "tasks"):
            del described["measure"][key]
        described |= {"stage1": config.stage1.described(), "stage2": config.stage2.described()}
        describe_run(out / "study.json", described)
        names = config.chosen or tuple(config.arms)
        work = _Work(config, out, progress)
        tuning = Tuning(config, out, work.model)
        for seed in config.seeds:
            for name in names:
                work.arm(name, seed)
                _write_results(config, out)
        records = _write_results(config, out)
        first = next(filter(config.trained, names), "")
        report = write_report(out, records, config.baseline or first)
        tasks: dict[str, Json] = {}
        if config.measure.tasks or config.measure.export:
            for name in names:
                for own_seed in config.seeds if config.trained(name) else (None,):
                    tuning.measure(name, own_seed)
                    tasks = write_task_report(out, tuning.lines, config)
    return {
        "output": str(out),
        "runs": len({(r["arm"], r["seed"]) for r in records}),
        "results": len(records),
        "arms": report,
        **({"tasks": tasks} if tasks else {}),
        "seconds": round(time.perf_counter() - started, 1),
    }


class _Work:
    """Runs the parts of a study, each once."""

    def __init__(self, config: StudyConfig, out: Path, progress: Progress) -> None:
        self._config, self._out, self._progress = config, out, progress
        self._started = time.monotonic()
        self._teacher = huggingface.find_model(config.teacher, "teacher")
        vocab = Vocab.load(self._teacher, lowercase=False if config.stage1.cased else None)
        self._corpus = checked_corpus(make_corpus(config.corpus, out, vocab, progress))
        shape = huggingface.read_model_config(self._teacher)
        runs = [
            (stage, setting.row)
            for setting in map(config.setting, filter(config.trained, config.arms))
            for stage in (setting.stage1, setting.stage2)
        ]
        products = [p for stage, row in runs for p in pass_products(stage, row, shape)]
        self._dtype = decide_for_job(out, [stage for stage, _ in runs], products)

    def arm(self, name: str, seed: int) -> None:
        """Trains and measures an arm's student, unless it is complete or there is none."""
        if not self._config.trained(name):
            return
        name = self._config.student(name)
        setting = self._config.setting(name, seed)
        folder = run_folder(self._out, name, seed)
        points = _points_every(setting.stage2)
        # A checkpoint per evaluation, to be measured; interruptions add further ones.
        stage2 = replace(setting.stage2, save_every=setting.stage2.eval_every, keep_last=10**6)
        stage1_dir = self._stage1(setting)
        run_stage2(
            stage2, setting.row, self._corpus, stage1_dir / "model", folder, f"{name} {seed}",
            deadline=stage2.deadline(self._started), dtype=self._dtype,
        )  # fmt: skip
        if (folder / "points.json").is_file():
            return
        records = self._measure(name, seed, setting, folder, points)
        write_json(folder / "points.json", records)
        checkpoints = sorted((folder / "checkpoints").glob("step-*"))
        for old in checkpoints[:-1]:  # model/ holds the last one's weights
            shutil.rmtree(old)

    def model(self, name: str, seed: int | None) -> Path:
        """The folder of an arm's model, which is trained or made unless it is there."""
        kind = self._config.kind(name)
        if kind == "teacher":
            return self._teacher
        if seed is not None:
            self.arm(name, seed)
            return run_folder(self._out, self._config.student(name), seed) / "model"
        setting = self._config.setting(name)
        if kind == "trimmed":
            vocab = self._vocab(setting)
            folder = self._out / "trimmed" / vocab.parent.name
            if not folder.exists():
                run_trim(str(self._teacher), folder, vocab=vocab, cased=setting.stage1.cased)
            return folder
        stage1 = self._stage1(setting)
        folder = self._out / "readers" / stage1.name
        if not folder.exists():
            mixed, student_vocab = load_stage1(stage1 / "model")
            model = reader(mixed)
            with atomic_folder(folder) as partial:
                card = model_card("reader", model.config)
                huggingface.write_model(partial, model, student_vocab, card)
        return folder

    def _vocab(self, setting: JobConfig) -> Path:
        """Learns the student's vocabulary for this setting."""
        folder = self._out / "vocabs" / _key(setting.vocab.size, to_dict(setting.vocab))
        make_vocab(
            setting.vocab, folder, self._corpus.folder, self._teacher, self._progress,
            setting.stage1.cased,
        )  # fmt: skip
        return folder / VOCAB_FILE

    def _stage1(self, setting: JobConfig) -> Path:
        """Runs Stage I for this setting; arms with the same settings share it."""
        vocab = self._vocab(setting)
        size = setting.vocab.size
        inputs = (to_dict(setting.vocab), to_dict(setting.row), setting.stage1.described())
        folder = self._out / "stage1" / _key(size, *inputs)
        run_stage1(
            setting.stage1, setting.row, self._corpus, self._teacher, vocab,
            folder, deadline=setting.stage1.deadline(self._started), dtype=self._dtype,
        )  # fmt: skip
        return folder

    def _measure(
        self, name: str, seed: int, setting: JobConfig, folder: Path, points: list[int]
    ) -> list[Json]:
        """The records of one run, one per held-out evaluation."""
        recorded = dtype_of_run(folder)
        assert recorded is not None  # the run is complete
        device = Device.of(choose_device(setting.stage2.device), *recorded)
        logged = read_log(folder)
        heldout = {r["step"]: r["heldout"] for r in logged if "heldout" in r}
        trained = [r for r in logged if "heldout" not in r]
        vocab = Vocab.load(folder / "model")
        cut = self._corpus.segment(vocab)
        words = None
        if self._config.measure.words:
            places = choose_words(self._corpus.heldout, self._config.measure.words)
            words = make_questions(
                self._corpus.heldout, cut, places, self._config.measure.context, setting.row.length
            )
        rows = student_rows(self._corpus.train, cut, setting.row, setting.stage2.seed)
        lengths = rows.describe()["pieces_per_word"]["student"]
        shared: dict[str, Json] = {
            "arm": name,
            "seed": seed,
            "vocab": vocab.size,
            "rows": _rows_id(rows, setting.stage2),
            "student_parameters": huggingface.read_model_config(
                folder / "model"
            ).encoder_parameters,
            **{key: trained[-1].get(key) for key in ("student_mflop", "teacher_mflop")},
        }
        records: list[Json] = []
        for step in points:
            record = {
                **shared,
                "step": step,
                "pieces": pieces_at(setting, step),
                "words": round(pieces_at(setting, step) / lengths),
                "loss": heldout[step]["loss"],
                "accuracy": heldout[step]["accuracy"],
                **self._bits_per_word(folder, step, vocab, words, device),
            }
            records.append(record)
        return records

    def _bits_per_word(
        self, folder: Path, step: int, vocab: Vocab, words: MeasuredWords | None, device: Device
    ) -> dict[str, Json]:
        if words is None:
            return {}
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        model, _ = huggingface.load_masked_lm(checkpoint, complete=True)
        bits = bits_per_word(model.to(device.device), vocab.pad, words, device)
        self._progress.note(
            f"{folder.parent.name} step {step}: {bits['bits_per_word']:.3f} bits per word"
        )
        return {**bits, **words.facts()}


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / arm / str(seed)


def _points_every(stage2: Stage2Config) -> list[int]:
    """Steps at which the student is evaluated."""
    return sorted({*range(0, stage2.steps, stage2.eval_every), stage2.steps})


def _key(size: int, *settings: dict[str, Any]) -> str:
    """A short folder name for these settings."""
    text = json.dumps(settings, sort_keys=True)
    return f"{size}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _rows_id(rows: Rows, stage2: Stage2Config) -> str:
    """Checksum of the first and the last step's rows, which comparable runs share."""
    digest = hashlib.sha256()
    for step in (0, stage2.steps - 1):
        batch = rows.read(step * stage2.rows, stage2.rows, student_prob=1.0, threads=1)
        for array in (batch.input_ids, batch.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def _write_results(config: StudyConfig, out: Path) -> list[dict[str, Any]]:
    """Writes all records so far to results.jsonl, in the order of seeds and arms."""
    records: list[dict[str, Any]] = []
    for seed in config.seeds:
        for name in filter(config.trained, config.chosen or config.arms):
            points = run_folder(out, config.student(name), seed) / "points.json"
            if points.is_file():
                entries: Any = read_json(points)
                records += [{**record, "arm": name} for record in entries]
    atomic_write(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    return records
