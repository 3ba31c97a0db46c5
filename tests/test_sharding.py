"""Fused models under DistributedDataParallel and FSDP2: two processes, gradients of the whole."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mvbert import fuse, layers

pytest.importorskip("transformers", reason="needs transformers")
import transformers

RANKS = 2


def make_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().train()


def bert_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 97, (4, 12), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 2:5] = torch.randint(0, 97, (4, 3), generator=generator)
    return {"input_ids": ids, "labels": labels}


class Own(nn.Module):
    """This project's modules alone: mixed embedding, then the loss over the student's pieces."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = layers.MixedEmbedding(61, 36, 8, 32, max_positions=40, dropout=0.0)
        self.loss = layers.LinearCrossEntropy(32, 97)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.embedding(input_ids), labels)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(kind: str, how: str, rank: int) -> None:
    """This process's half of the batch; gradients must be the plain model's of the whole batch."""
    make = make_bert if kind == "fused" else lambda: Own().double()
    plain, model = make(), make()
    batch = bert_batch()
    loss_of(plain, batch).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    if kind == "fused":
        fuse(model)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (RANKS,))
        if kind == "fused":
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}
    loss_of(model, half).backward()
    found = {
        n.removeprefix("module."): whole(p.grad)
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Both halves have as many labels, so the mean of their gradients is the whole's.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    print("right:", kind, how, flush=True)


def main(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        for kind in ("fused", "own"):
            for how in ("ddp", "fsdp2"):
                check(kind, how, rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            assert output.count("right:") == 4, output
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    # Without Python's end, which once in a while meets one of torch's threads still in Python and
    # then aborts ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)
