"""A study: compares students (arms) that differ from common settings only where stated.

    corpus -> vocabularies -> Stage I, once per distinct setting -> Stage II, per arm and seed

Every arm sees the same number of pieces; arms with the same vocabulary see the same rows, as
checksums in the results show. Each part writes a folder and is not repeated, so the same command
resumes an interrupted study.

    out/corpus/  vocabs/SIZE/  stage1/KEY/  runs/ARM/SEED/   the parts
    out/results.jsonl     one line per arm, seed and held-out evaluation
    out/table.md          means over seeds at the last step, and differences from the baseline
    out/curves.svg, .png  bits per word against pieces seen
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvbert.config import JobConfig, MeasureConfig, Stage1Config, Stage2Config
from mvbert.errors import InputError
from mvbert.files import Json, atomic_write, read_json, write_json
from mvbert.model import huggingface
from mvbert.progress import Progress
from mvbert.study.measures import MeasuredWords, bits_per_word, choose_words, make_questions
from mvbert.study.probe import Sentences, linear_probe, read_sst2
from mvbert.study.study_report import write_report
from mvbert.text.batches import Rows
from mvbert.text.prepare import VOCAB_FILE, make_corpus, make_vocab
from mvbert.text.stage_rows import student_rows
from mvbert.text.vocab import Vocab
from mvbert.toml import from_dict, to_dict
from mvbert.training.device import Device, choose_device
from mvbert.training.machine import decide_for_job, pass_products
from mvbert.training.ranks import join_ranks
from mvbert.training.run_stage import checked_corpus, run_stage1, run_stage2
from mvbert.training.runs import describe_run, dtype_of_run, lock, make_folder, read_log

_TABLES = ("vocab", "row", "stage1", "stage2")  # what an arm may change


@dataclass(frozen=True)
class StudyConfig(JobConfig):
    """A study: common settings, as for `mvbert distill`, and the arms that differ from them."""

    out: str = "runs/study"
    """Study folder."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of rows, masks, dropout and initial weights; every arm runs once with each."""
    stage1_seeds: bool = False
    """Also run Stage I with each seed, instead of once with stage1.seed."""
    baseline: str = ""
    """The arm to compare others with (empty: the first)."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> tables vocab, row, stage1, stage2 with the fields that differ."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise InputError("a study needs arms: [arms.NAME.stage2] and so on")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise InputError(f"seeds must be different numbers, got {list(self.seeds)}")
        if self.baseline and self.baseline not in self.arms:
            raise InputError(f"the baseline {self.baseline!r} is not one of the arms")
        settings = {}
        for name, tables in self.arms.items():
            if not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
                raise InputError(
                    f"arm names may have letters, digits, +, - and _ only, got {name!r}"
                )
            for table, values in tables.items():
                if table not in _TABLES or not isinstance(values, dict):
                    raise InputError(
                        f"arms.{name} may have tables {', '.join(_TABLES)}, got {table!r}"
                    )
            settings[name] = self.setting(name)
            try:
                settings[name].check_start("student", settings[name].stage2)
            except InputError as error:
                raise InputError(f"arms.{name}: {error}") from None
        first, *others = settings
        expected = _common_values(settings[first])
        for name in others:
            for key, value in _common_values(settings[name]).items():
                if value != expected[key]:
                    raise InputError(
                        f"arms must have the same {key}, but {first} has {expected[key]} and "
                        f"{name} has {value}"
                    )

    def setting(self, name: str, seed: int | None = None) -> JobConfig:
        """The settings of arm `name`, with its seed replaced by `seed` if given."""
        tables: dict[str, Any] = {}
        for table in _TABLES:
            common = getattr(self, table)
            values = to_dict(common) | self.arms[name].get(table, {})
            tables[table] = from_dict(type(common), values, f"arms.{name}.{table}")
        for table in ("stage1", "stage2"):
            tables[table] = tables[table].counted(tables["row"].length)
        if seed is not None:
            tables["stage2"] = replace(tables["stage2"], seed=seed)
            if self.stage1_seeds:
                tables["stage1"] = replace(tables["stage1"], seed=seed)
        return JobConfig(self.teacher, self.corpus, **tables)

    def scaled(self, share: float) -> StudyConfig:
        """This study with the steps of both stages multiplied by `share`."""
        if not share > 0:
            raise InputError(f"scale must be above 0, got {share}")

        def shorter(values: dict[str, Any]) -> dict[str, Any]:
            steps = {
                key: max(1, round(values[key] * share))
                for key in ("steps", "eval_every", "save_every", "pieces")
                if values.get(key)
            }
            return {**values, **steps}

        arms = {
            name: {
                table: shorter(values) if table in ("stage1", "stage2") else values
                for table, values in tables.items()
            }
            for name, tables in self.arms.items()
        }
        return replace(
            self,
            arms=arms,
            stage1=from_dict(Stage1Config, shorter(to_dict(self.stage1)), "stage1"),
            stage2=from_dict(Stage2Config, shorter(to_dict(self.stage2)), "stage2"),
        )


def _pieces(setting: JobConfig, step: int) -> int:
    """Number of pieces that Stage II has seen at `step`."""
    return step * setting.stage2.rows * setting.row.length


def _common_values(setting: JobConfig) -> dict[str, int]:
    """Values that must be the same in all arms of a study."""
    stage2 = setting.stage2
    return {
        "pieces": _pieces(setting, stage2.steps),
        "stage2.eval_every": stage2.eval_every,
        "stage2.eval_rows": stage2.eval_rows,
    }


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
    started = time.perf_counter()
    progress = Progress("study")
    out = Path(config.out)
    make_folder(out)
    with lock(out):
        described = to_dict(config)
        for later in ("out", "arms", "seeds", "baseline"):  # arms and seeds may be added
            del described[later]
        described |= {"stage1": config.stage1.described(), "stage2": config.stage2.described()}
        describe_run(out / "study.json", described)
        work = _Work(config, out, progress)
        for seed in config.seeds:
            for name in config.arms:
                work.arm(name, seed)
                _write_results(config, out)
        records = _write_results(config, out)
        report = write_report(out, records, config.baseline or next(iter(config.arms)))
    return {
        "output": str(out),
        "runs": len(config.seeds) * len(config.arms),
        "results": len(records),
        "arms": report,
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
        self._sst2: tuple[Sentences, Sentences] | None = None
        if config.measure.sst2:
            self._sst2 = read_sst2(Path(config.measure.sst2))
        shape = huggingface.read_model_config(self._teacher)
        runs = [
            (stage, setting.row)
            for setting in map(config.setting, config.arms)
            for stage in (setting.stage1, setting.stage2)
        ]
        products = [p for stage, row in runs for p in pass_products(stage, row, shape)]
        self._dtype = decide_for_job(out, [stage for stage, _ in runs], products)

    def arm(self, name: str, seed: int) -> None:
        """Trains and measures one student, unless it is complete."""
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

    def _stage1(self, setting: JobConfig) -> Path:
        """Runs Stage I for this setting; arms with the same settings share it."""
        size = setting.vocab.size
        vocab_dir = self._out / "vocabs" / _key(size, to_dict(setting.vocab))
        make_vocab(
            setting.vocab, vocab_dir, self._corpus.folder, self._teacher, self._progress,
            setting.stage1.cased,
        )  # fmt: skip
        inputs = (to_dict(setting.vocab), to_dict(setting.row), setting.stage1.described())
        folder = self._out / "stage1" / _key(size, *inputs)
        run_stage1(
            setting.stage1, setting.row, self._corpus, self._teacher, vocab_dir / VOCAB_FILE,
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
                "pieces": _pieces(setting, step),
                "words": round(_pieces(setting, step) / lengths),
                "loss": heldout[step]["loss"],
                "accuracy": heldout[step]["accuracy"],
                **self._bits_per_word(folder, step, vocab, words, device),
            }
            records.append(record)
        records[-1] |= self._probe(folder, vocab, setting, device)  # type: ignore[operator]
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

    def _probe(
        self, folder: Path, vocab: Vocab, setting: JobConfig, device: Device
    ) -> dict[str, Json]:
        if self._sst2 is None:
            return {}
        model, _ = huggingface.load_masked_lm(folder / "model", complete=True)
        accuracy = linear_probe(
            model.to(device.device), vocab, *self._sst2, device,
            length=setting.row.length, count=self._config.measure.sentences,
            seed=setting.stage2.seed,
        )  # fmt: skip
        self._progress.note(f"{folder.parent.name}: SST-2 linear probe: accuracy {accuracy:.1%}")
        return {"sst2": accuracy}


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
        for name in config.arms:
            points = run_folder(out, name, seed) / "points.json"
            if points.is_file():
                records += read_json(points)  # type: ignore[arg-type]
    atomic_write(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    return records
