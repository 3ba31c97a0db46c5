"""Masked language models: one vocabulary (the student), or two (the teacher in Stage I).

A BERT encoder, its pooler, which only the sentence loss of Stage II and fine-tuning train, and the
head, which runs on masked rows only; they are gathered once, in `MaskedLM.masked_hidden`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import ModelConfig
from mvbert.model.embeddings import Embeddings, StudentTable
from mvbert.model.encoder import ACTIVATIONS, BertEncoder, Taps, init_weights
from mvbert.text.batches import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the device: rows of T pieces and up to M masked pieces in each."""

    input_ids: Tensor  # [B, T] int32, joint ids
    token_type_ids: Tensor  # [B, T] int32
    masked_index: Tensor  # [B * M] int64, into B * T
    labels: (
        Tensor  # [B * M] int64, joint ids; functional.IGNORE_INDEX where the capacity is not used
    )

    @staticmethod
    def of(batch: Batch, device: torch.device, select: slice = slice(None)) -> DeviceBatch:
        """Carries rows `select` of a batch to the device."""
        carried = {name: torch.from_numpy(a[select]).to(device) for name, a in vars(batch).items()}
        return DeviceBatch.part(carried, slice(None))

    @staticmethod
    def part(rows: dict[str, Tensor], select: slice) -> DeviceBatch:
        """Rows `select` of tensors on the device, by the names and of the types in Batch."""
        ids, positions = rows["input_ids"][select], rows["masked_positions"][select].long()
        B, T = ids.shape
        index = positions + torch.arange(B, device=ids.device)[:, None] * T
        return DeviceBatch(
            ids,
            rows["token_type_ids"][select].int(),
            index.flatten(),
            rows["labels"][select].long().flatten(),
        )


class Head(nn.Module):
    """The transform before the softmax: dense, activation, LayerNorm; and the softmax's bias.

    Where it is not tied to the word table, also the softmax's matrix, `decoder` [V, H].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H = config.hidden_size
        self.dense = nn.Linear(H, H)
        self.norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tie_word_embeddings:
            self.decoder = nn.Parameter(torch.zeros(config.vocab_size, H))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N, H]."""
        return self.norm(self.activation(self.dense(hidden)))


class MaskedLM(nn.Module):
    """A BERT with a masked-language-model head, tied to its word table or not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = Head(config)

    def init_weights(self, seed: int) -> None:
        """BERT's initial weights, a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        init_weights(self, self.config.initializer_range, generator)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """input_ids, token_type_ids [B, T] -> last hidden states [B, T, H]; fills `taps`.

        attention_mask is bool [B, T], False on padding, or None (all positions count).
        """
        return self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask, taps)

    def pooled(self, first: Tensor) -> Tensor:
        """The pooler's output [N, H] for the states of first pieces, [CLS], [N, H]."""
        return torch.tanh(self.pooler(first))

    def masked_hidden(self, hidden: Tensor, masked_index: Tensor) -> Tensor:
        """Gathers the masked rows of hidden [B, T, H] and transforms them: [N, H]."""
        return self.head(hidden.flatten(0, 1).index_select(0, masked_index))

    @property
    def decoder(self) -> Tensor:
        """The softmax's matrix [V, H]: the word table, or the head's own where it is not tied."""
        tied = self.config.tie_word_embeddings
        return self.embeddings.word.weight if tied else self.head.decoder

    def losses(self, masked_hidden: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        """Cross-entropy of every masked row, [N] float32; 0 where the label is ignored.

        Training wants `reduction` "sum": gradients are then made from the logits that forward had.
        """
        # A row of text that fills its T pieces has as many labels as room for them.
        return functional.linear_cross_entropy(
            masked_hidden, self.decoder, labels, self.head.bias,
            reduction=reduction, mostly_labelled=True,
        )  # fmt: skip

    def logits(self, masked_hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V] (for reading words off, not for training)."""
        return nn.functional.linear(masked_hidden, self.decoder, self.head.bias)


class LabelHead(nn.Module):
    """The linear layer that fine-tuning puts on a BERT: scores of labels.

    Args:
        labels: number of labels.
        of_text: whether labels are per text (from the pooled first piece) or per piece.
        outputs: "logits", or a name per label, which then has a separate output.
        intents: the last so many labels, of a head of pieces, are the text's, scored at the first
            piece alone, as in joint intent classification and slot filling (Chen, Zhuo and Wang
            2019, arXiv 1902.10909).
    """

    def __init__(
        self, hidden_size: int, labels: int, of_text: bool, outputs: list[str], intents: int = 0
    ) -> None:
        super().__init__()
        self.scores = nn.Linear(hidden_size, labels)
        self.of_text, self.outputs, self.intents = of_text, outputs, intents

    def forward(self, model: MaskedLM, hidden: Tensor) -> dict[str, Tensor]:
        """hidden [B, T, H] -> [B, labels] of a text; of pieces [B, T, labels], or [B, T] each.

        With intents: "logits" [B, T, labels - intents] and "intent_logits" [B, intents].
        """
        if self.of_text:
            hidden = model.pooled(hidden[:, 0])
        scores = self.scores(hidden)
        if self.intents:
            tags = scores.shape[-1] - self.intents
            return {"logits": scores[..., :tags], "intent_logits": scores[:, 0, tags:]}
        parts = [scores] if len(self.outputs) == 1 else scores.unbind(-1)
        return dict(zip(self.outputs, parts, strict=True))


class MixedMaskedLM(MaskedLM):
    """A teacher that also reads and predicts student pieces (Stage I).

    Joint ids: below V_t a teacher piece, V_t + i student piece i. Two softmaxes, each over its own
    vocabulary; the student's is tied to the projected student table.
    """

    def __init__(self, config: ModelConfig, student_vocab_size: int, embedding_size: int) -> None:
        super().__init__(config)
        self.student = StudentTable(student_vocab_size, embedding_size, config.hidden_size)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | None = None,
        taps: Taps | None = None,
        *,
        student_rows: Tensor | None = None,
    ) -> Tensor:
        """As in MaskedLM; `student_rows` [V_s, H] if the projected table is at hand already."""
        rows = self.student.rows() if student_rows is None else student_rows
        hidden = self.embeddings(input_ids, token_type_ids, rows)
        return self.encoder(hidden, attention_mask, taps)

    def mixed_losses(
        self, masked_hidden: Tensor, labels: Tensor, student_rows: Tensor, reduction: str = "sum"
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the teacher's and of the student's pieces, each over its vocabulary."""
        return functional.mixed_linear_cross_entropy(
            masked_hidden, self.decoder, student_rows, labels,
            self.head.bias, self.student.bias, reduction=reduction,
        )  # fmt: skip

    def student_logits(self, masked_hidden: Tensor) -> Tensor:
        """Scores over the student's vocabulary, [N, V_s]."""
        return nn.functional.linear(masked_hidden, self.student.rows(), self.student.bias)


def masked_sums(model: MaskedLM, batch: DeviceBatch) -> dict[str, Tensor]:
    """Over a batch's masked pieces: the sum of losses, their number, the number correct."""
    hidden = model.encode(batch.input_ids, batch.token_type_ids)
    masked_hidden = model.masked_hidden(hidden, batch.masked_index)
    mlm = model.losses(masked_hidden, batch.labels, "sum")
    right = (model.logits(masked_hidden).argmax(-1) == batch.labels).sum()
    return {"mlm_sum": mlm.double(), "count": (batch.labels >= 0).sum(), "right": right}
