"""One training step: forward, backward, clipping, AdamW, learning rate; ours against Hugging Face.

All train the same BERT from the same weights, with the same batch and length: rows are full, 15 %
of the pieces masked, and in memory already (bench_rows.py measures making them). Hugging Face's
BertForMaskedLM runs in the loop of its Trainer: labels at all positions, clip_grad_norm_, fused
AdamW, a learning-rate scheduler, the check of the loss for NaN. On a CPU the Trainer's default is
float32 (`HF`); `HF bf16` is bf16=True, which is what ours does; on a GPU all run under bfloat16
autocast. `mvbert mixed` adds what Stage I does: a second vocabulary of 4,928 pieces, projected,
with a separate softmax.

On a CPU, mvbert's loop makes malloc keep freed memory (mvbert.training.device.keep_memory). The
rows of transformers run with the default malloc, except `memory kept`, which has the same setting.
So each runs in a separate process; they take turns; a step before each measurement is not timed.

The gate: loss and gradient norm of the first step, from the same weights, on the same rows.
"""

import multiprocessing
from dataclasses import dataclass
from functools import partial

import clocks
import harness
import torch
from torch import nn

from mvbert import fuse
from mvbert.config import ModelConfig, TrainConfig
from mvbert.model.encoder import compile_layers
from mvbert.model.flops import encoder_flops, head_flops
from mvbert.model.huggingface import to_hugging_face
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, MixedMaskedLM
from mvbert.training.device import Device, give_memory_back, keep_memory
from mvbert.training.optim import Optimizer
from mvbert.training.ranks import Ranks
from mvbert.training.step import CudaGraph, Losses, Step

MASK_PROB = 0.15
STUDENT = 4928  # pieces of the second vocabulary of `mvbert mixed`


@dataclass(frozen=True)
class Case:
    """A BERT and a batch of B rows of T pieces."""

    name: str
    L: int
    H: int
    A: int
    V: int
    B: int
    T: int
    dropout: float

    @property
    def label(self) -> str:
        return f"{self.name}: {self.L}x{self.H}, V = {self.V}, {self.B} x {self.T}"

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(
            self.V, self.H, self.L, self.A, 4 * self.H,
            hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
        )  # fmt: skip


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cuda":
        all_cases = [
            Case("Stage II", 6, 256, 4, 4928, 256, 128, 0.0),
            Case("Stage II", 12, 256, 4, 4928, 256, 128, 0.0),
            Case("Stage I", 6, 384, 12, 30522, 256, 128, 0.1),
            Case("Stage I, BERT-base", 12, 768, 12, 30522, 128, 128, 0.1),
            Case("Stage I, BERT-large", 24, 1024, 16, 30522, 64, 128, 0.1),
        ]
        return all_cases[:1] if quick else all_cases
    return [
        Case("Stage II", 6, 256, 4, 4928, 32, 128, 0.0),
        Case("Stage I", 6, 384, 12, 30522, 32, 128, 0.1),
    ]


def inputs(case: Case, device: str, copy: int) -> dict[str, torch.Tensor]:
    """A batch under the names of mvbert.text.batches.Batch, and as Hugging Face takes it."""
    generator = torch.Generator().manual_seed(copy)
    # Pieces as uneven as words are.
    share = 1.0 / torch.arange(5, case.V + 5, dtype=torch.float64)
    ids = torch.multinomial(share, case.B * case.T, replacement=True, generator=generator)
    ids = ids.reshape(case.B, case.T)
    M = round(MASK_PROB * case.T)
    order = torch.rand(case.B, case.T, generator=generator).argsort(1)
    positions = order[:, :M].sort(1).values
    labels = ids.gather(1, positions)
    everywhere = torch.full_like(ids, -100).scatter(1, positions, labels)
    ids = ids.scatter(1, positions, 4)
    types = (torch.arange(case.T) > case.T // 2).expand(case.B, case.T)
    tensors = {
        "input_ids": ids.int(),
        "token_type_ids": types.to(torch.uint8),
        "masked_positions": positions.int(),
        "labels": labels.int(),
        "hf_input_ids": ids,
        "hf_token_type_ids": types.long(),
        "hf_labels": everywhere,
        "hf_attention_mask": torch.ones_like(ids),
    }
    return {name: tensor.contiguous().to(device) for name, tensor in tensors.items()}


def work(case: Case, device: str) -> harness.Work:
    """Model FLOPs (mvbert.model.flops); every weight, gradient and moment moved once."""
    pieces = case.B * case.T
    forward = encoder_flops(case.shape, case.T) + MASK_PROB * head_flops(case.shape, case.V)
    parameters = case.shape.encoder_parameters
    # Weights read twice, gradient written and read, weights and both moments read and written.
    return harness.Work(3 * pieces * forward, 4.0 * parameters * 10, pieces, "pieces")


def start(model: MaskedLM) -> MaskedLM:
    """The model at its initial weights, the same for all providers."""
    model.init_weights(0)
    model.pooler.requires_grad_(False)
    return model


def config(case: Case) -> TrainConfig:
    return TrainConfig(rows=case.B, lr=1e-4, steps=10**6, warmup=0.0, cuda_graph="auto")


def check(case: Case, x: dict, outputs) -> dict:
    """First loss and gradient norm against float32 without dropout."""
    loss, norm = (torch.as_tensor(float(value)) for value in outputs[:2])
    if len(outputs) > 2:  # another task with other labels: only a sanity check
        if not (0 < loss < 12 and norm > 0):
            raise harness.Wrong(f"loss {loss}, gradient norm {norm}")
        return {}

    def truth() -> list[torch.Tensor]:
        model = start(MaskedLM(case.shape)).train().to(x["input_ids"].device)
        for module in model.modules():
            for name in ("dropout", "hidden_dropout", "attention_dropout"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
        batch = DeviceBatch.part(x, slice(None))
        hidden = model.encode(batch.input_ids, batch.token_type_ids)
        true = model.losses(model.masked_hidden(hidden, batch.masked_index), batch.labels).mean()
        true.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [true.detach().cpu(), nn.utils.get_total_norm(gradients).cpu()]

    # Dropout itself moves the norm.
    bounds = {"loss": 0.005, "norm": 0.3 if case.dropout else 0.02}
    return harness.relative_errors(case, truth, (loss, norm), bounds)


BENCH = harness.Bench(
    "train_step", cases=cases, inputs=inputs, work=work, check=check, seconds=0.5,
    dtype=lambda case, device: "bfloat16",
)  # fmt: skip


# ---- a process each ------------------------------------------------------------------------------

STEPS = {}  # provider -> (case, device) -> its step


def add(name: str, make, *, needs=(), devices=("cpu", "cuda"), **options) -> None:
    """Adds a provider, which on a CPU runs in a separate process."""
    STEPS[name] = partial(make, **options)

    def provide(case: Case, device: str):
        return Separate(name, case) if device == "cpu" else STEPS[name](case, device)

    BENCH.add(name, provide, needs=needs, devices=devices)


class Separate:
    """A provider in a separate process, with the malloc settings and memory that its users get."""

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        arguments = (end, name, case, torch.get_num_threads())
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        end.close()
        self._first = self._answer()

    def _answer(self):
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            self.close()
            raise answer
        return answer

    def __call__(self, x):
        """Loss and gradient norm of its first step."""
        return self._first

    def sample(self, calls: int) -> clocks.Sample:
        self._pipe.send(calls)
        return clocks.Sample(*self._answer())

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def serve(pipe, name: str, case: Case, threads: int) -> None:
    """Runs and times steps until the pipe is closed."""
    torch.set_num_threads(threads)
    try:
        copies = [inputs(case, "cpu", number) for number in range(4)]
        run = STEPS[name](case, "cpu")
        loss, norm, *rest = run(copies[0])
        pipe.send((float(loss), float(norm), *rest))
        while calls := pipe.recv():
            run(copies[-1])  # not timed: other processes have run since
            sample = clocks.measure(run, copies, calls, "cpu")
            pipe.send((sample.wall, sample.own))
            give_memory_back()  # there are many of these processes
    except EOFError:
        pass
    except Exception as error:
        pipe.send(error)


# ---- ours ----------------------------------------------------------------------------------------


class Mlm:
    """Masked language modelling as Stage II does it."""

    def __init__(self, case: Case) -> None:
        self.model = start(self.make(case))
        self.module = nn.ModuleDict({"model": self.model})

    def make(self, case: Case) -> MaskedLM:
        return MaskedLM(case.shape)

    def begin(self, step: int) -> None:
        pass

    def losses(self, batch, masked):
        hidden = self.model.encode(batch.input_ids, batch.token_type_ids)
        loss = self.model.losses(
            self.model.masked_hidden(hidden, batch.masked_index), batch.labels, "sum"
        )
        return loss / masked, {"loss_sum": loss.detach(), "count": masked}


class MixedMlm(Mlm):
    """Masked language modelling over two vocabularies as Stage I does it."""

    def make(self, case: Case) -> MixedMaskedLM:
        return MixedMaskedLM(case.shape, STUDENT, 256)

    def losses(self, batch, masked):
        model = self.model
        rows = model.student.rows()
        hidden = model.encode(batch.input_ids, batch.token_type_ids, student_rows=rows)
        loss = sum(
            model.mixed_losses(model.masked_hidden(hidden, batch.masked_index), batch.labels, rows)
        )
        return loss / masked, {"loss_sum": loss.detach(), "count": masked}


class ReadyFeed:
    """A feed whose rows are made already."""

    def __init__(self) -> None:
        self.device: dict[str, torch.Tensor] = {}

    def fetch(self) -> None:
        pass


def ours(
    case: Case, device: str, kind: type[Mlm] = Mlm, compiled: bool = False, graph: bool = True
):
    """A step of mvbert's loop on ready rows, as one CUDA graph on a GPU."""
    placement = Device(torch.device(device), torch.bfloat16, "")
    graph = graph and device == "cuda"
    task = kind(case)
    if compiled:
        compile_layers(task.module)
    module = task.module.to(placement.device)
    settings = config(case)
    optimizer = Optimizer(module, settings, placement)
    step = Step(
        task,
        Losses(task),
        settings,
        placement,
        Ranks(),
        optimizer,
        {},
        CudaGraph() if graph else None,
    )
    feed, number = ReadyFeed(), 0
    if device == "cpu":
        keep_memory()

    def run(x):
        nonlocal number
        if graph:
            for name, tensor in x.items():
                if name.startswith("hf_"):
                    continue
                if name not in feed.device:
                    feed.device[name] = tensor.clone()
                feed.device[name].copy_(tensor)
        else:
            feed.device = x
        step(feed, number)
        number += 1
        if number > 1:
            return None
        sums, _, _ = step.take().wait()
        return sums["loss_sum"] / sums["count"], sums["grad_norm"]

    run.captured = graph
    return run


add("mvbert", ours)
add("mvbert compiled", ours, compiled=True)
add("mvbert eager", ours, graph=False, devices=["cuda"])


def mixed_step(case: Case, device: str):
    """Stage I's step; half of the pieces are the student's."""
    harness.only_if(not case.name.startswith("Stage II"))
    run = ours(case, device, MixedMlm)
    mixed = {}

    def mixed_run(x):
        key = id(x)
        if key not in mixed:  # half of the pieces are the student's, so are their labels
            y = dict(x)
            student = torch.rand(x["input_ids"].shape, device=device) < 0.5
            own = case.V + x["input_ids"] % STUDENT
            y["input_ids"] = torch.where(student, own, x["input_ids"])
            of_student = student.gather(1, x["masked_positions"].long())
            y["labels"] = torch.where(of_student, case.V + x["labels"] % STUDENT, x["labels"])
            mixed[key] = y
        result = run(mixed[key])
        return None if result is None else (*result, "mixed")

    mixed_run.captured = run.captured
    return mixed_run


add("mvbert mixed", mixed_step)


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face(
    case: Case, device: str, *,
    bf16: bool = True, compiled: bool = False, fused: bool = False, hold_memory: bool = False,
):  # fmt: skip
    """The step of transformers' Trainer on ready rows."""
    from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

    shape = BertConfig(
        vocab_size=case.V, hidden_size=case.H, num_hidden_layers=case.L,
        num_attention_heads=case.A, intermediate_size=4 * case.H,
        hidden_dropout_prob=case.dropout, attention_probs_dropout_prob=case.dropout,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = BertForMaskedLM(shape)
    state = {n: p.detach() for n, p in start(MaskedLM(case.shape)).named_parameters()}
    missing, _ = model.load_state_dict(to_hugging_face(state), strict=False)
    assert all("decoder" in name for name in missing), missing
    model.tie_weights()
    model = model.to(device).train()
    if fused:
        fuse(model)
    settings = config(case)
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=settings.lr, betas=(0.9, 0.98), eps=1e-6, fused=True,
    )  # fmt: skip
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps)
    forward = torch.compile(model) if compiled else model
    total = torch.zeros((), device=device)
    first = True
    if hold_memory:
        keep_memory()

    def run(x):
        nonlocal first, total
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = forward(
                input_ids=x["hf_input_ids"], attention_mask=x["hf_attention_mask"],
                token_type_ids=x["hf_token_type_ids"], labels=x["hf_labels"],
            ).loss  # fmt: skip
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        loss = loss.detach()
        # Trainer's logging_nan_inf_filter, on by default.
        total = total + (0.0 if torch.isnan(loss) or torch.isinf(loss) else loss)
        if not first:
            return None
        first = False
        return loss, norm

    return run


HF = {"needs": ["transformers"]}
add("HF", hugging_face, bf16=False, devices=["cpu"], **HF)
add("HF bf16", hugging_face, **HF)
add("HF bf16, torch.compile", hugging_face, compiled=True, **HF)
add("HF bf16, fuse()d", hugging_face, fused=True, **HF)
add("HF bf16, memory kept", hugging_face, hold_memory=True, devices=["cpu"], **HF)
add(
    "HF bf16, torch.compile, memory kept", hugging_face, compiled=True, hold_memory=True,
    devices=["cpu"], **HF,
)  # fmt: skip
