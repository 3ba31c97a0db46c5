"""The fused parts as modules, usable in any model: MixedEmbedding, LinearCrossEntropy."""

import torch
from torch import Tensor, nn

from mvbert import functional

__all__ = ["LinearCrossEntropy", "MixedEmbedding"]


class MixedEmbedding(nn.Module):
    """Pieces of a teacher's and of a student's vocabulary at one width, with position and type.

    Joint ids: below `teacher_size` a row of `teacher`, above a row of `student`, projected to the
    teacher's width by `projection`.
    """

    def __init__(
        self,
        teacher_size: int,
        student_size: int,
        embedding_size: int,
        hidden_size: int,
        *,
        max_positions: int = 512,
        types: int = 2,
        eps: float = 1e-12,
        dropout: float = 0.1,
        frequent_ids: tuple[int, ...] = (),
    ) -> None:
        """
        Args:
            teacher_size: V_t.
            student_size: V_s.
            embedding_size: E, the student's own width.
            hidden_size: H.
            max_positions: P.
            types: S.
            eps: LayerNorm's epsilon.
            dropout: probability of zeroing an output value in training.
            frequent_ids: up to two joint ids that many pieces have ([MASK] of each vocabulary).
        """
        super().__init__()
        self.teacher = nn.Embedding(teacher_size, hidden_size)
        self.student = nn.Embedding(student_size, embedding_size)
        self.projection = nn.Linear(embedding_size, hidden_size)
        self.position = nn.Embedding(max_positions, hidden_size)
        self.token_type = nn.Embedding(types, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = dropout
        self.frequent_ids = frequent_ids

    def student_rows(self) -> Tensor:
        """The projected student table [V_s, H]: input rows, and the student softmax's weight."""
        return functional.project_table(
            self.student.weight, self.projection.weight, self.projection.bias
        )

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        student_rows: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T] joint ids, token_type_ids [B, T] -> [B, T, H].

        `student_rows` is what `student_rows()` gave, if the loss needs it too. Otherwise the table
        is projected here, or, for fewer pieces than it has rows, only the pieces.
        """
        V = self.teacher.num_embeddings
        if student_rows is None:
            if input_ids.numel() < self.student.num_embeddings:
                student_rows, input_ids = functional.project_rows(
                    input_ids, self.student.weight, self.projection.weight, self.projection.bias,
                    teacher_size=V,
                )  # fmt: skip
            else:
                student_rows = self.student_rows()
        return functional.mixed_embedding(
            input_ids, self.teacher.weight, student_rows, self.position.weight,
            self.token_type.weight, token_type_ids, self.norm.weight, self.norm.bias,
            eps=self.norm.eps, dropout_p=self.dropout, training=self.training,
            frequent_ids=self.frequent_ids,
        )  # fmt: skip


class LinearCrossEntropy(nn.Linear):
    """A linear layer to V classes and the cross-entropy of its logits, which are never held."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ignore_index: int = functional.IGNORE_INDEX,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_features: H.
            out_features: V.
            bias: whether there is a bias [V].
            ignore_index, reduction, label_smoothing: as `torch.nn.CrossEntropyLoss`.
            device, dtype: of the parameters.
        """
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [.., H], labels [..] -> loss; without labels the logits [.., V]."""
        if labels is None:
            return super().forward(hidden)
        loss = functional.linear_cross_entropy(
            hidden.reshape(-1, self.in_features), self.weight, labels.reshape(-1), self.bias,
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return loss.reshape(labels.shape) if self.reduction == "none" else loss
