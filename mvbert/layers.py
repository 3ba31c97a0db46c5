"""The fused parts as modules, usable in any model."""

from typing import Any

import torch
from torch import Tensor, nn

from mvbert import functional

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyLoss", "MixedEmbedding"]


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


class LinearCrossEntropyLoss(nn.Module):
    """`functional.linear_cross_entropy` with its options, for a weight that is somebody else's."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = functional.IGNORE_INDEX,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        shift: int = 0,
        return_metrics: bool = False,
    ) -> None:
        """
        Args:
            class_weight: [V], a buffer of the module.
            all others: as `functional.linear_cross_entropy`.
        """
        super().__init__()
        functional.check_loss(reduction, label_smoothing, softcap, z_loss, shift)
        if class_weight is not None:
            functional.check_class_weight("LinearCrossEntropyLoss", class_weight)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.z_loss = z_loss
        self.shift = shift
        self.return_metrics = return_metrics

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Any:
        """hidden [.., H], weight [V, H], labels [..], bias [V] -> loss, or (loss, LossMetrics)."""
        return functional.linear_cross_entropy(
            hidden, weight, labels, bias, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
            class_weight=self.class_weight, softcap=self.softcap, z_loss=self.z_loss,
            shift=self.shift, num_items_in_batch=num_items_in_batch,
            return_metrics=self.return_metrics,  # type: ignore[call-overload]
        )  # fmt: skip


class LinearCrossEntropy(nn.Linear):
    """A linear layer to V classes and the cross-entropy of its logits, which are never held."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            in_features: H.
            out_features: V.
            bias: whether there is a bias [V].
            device, dtype: of the parameters.
            options: of `LinearCrossEntropyLoss`.
        """
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.loss = LinearCrossEntropyLoss(**options)
        if self.loss.class_weight is not None:
            functional.check_class_weight(
                "LinearCrossEntropy", self.loss.class_weight, self.out_features
            )

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Any:
        """hidden [.., H], labels [..] -> loss; without labels the logits [.., V], capped if so."""
        if labels is None:
            logits, cap = super().forward(hidden), self.loss.softcap
            return logits if cap is None else cap * torch.tanh(logits / cap)
        return self.loss(hidden, self.weight, labels, self.bias, num_items_in_batch)
