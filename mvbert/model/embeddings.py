"""Word, position and token-type rows, summed and normalised: the first layer of a BERT."""

import torch
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import ModelConfig
from mvbert.text.wordpiece import longest_matches


class Embeddings(nn.Module):
    """Embeddings of one vocabulary, and optionally of a second one that is already projected.

    Joint ids: an id below V is a row of this table, V + i is row i of `student_rows`.

    Attributes:
        frequent_ids: up to two very frequent joint ids, see `functional.mixed_embedding`.
    """

    frequent_ids: tuple[int, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, H)
        self.position = nn.Embedding(config.max_position_embeddings, H)
        self.token_type = nn.Embedding(config.type_vocab_size, H)
        self.norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, student_rows: Tensor | None = None
    ) -> Tensor:
        """input_ids, token_type_ids [B, T]; student_rows [V_s, H] or None -> hidden [B, T, H]."""
        return functional.mixed_embedding(
            input_ids,
            self.word.weight,
            student_rows,
            self.position.weight,
            self.token_type.weight,
            token_type_ids,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            dropout_p=self.dropout,
            training=self.training,
            frequent_ids=self.frequent_ids,
        )


class StudentTable(nn.Module):
    """The student's E-wide table and the affine map into the teacher's width H.

    The projected table is the input rows of student pieces and, tied, the weight of the student's
    softmax; `bias` is that softmax's bias.
    """

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab_size, embedding_size))
        self.projection = nn.Linear(embedding_size, hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def rows(self) -> Tensor:
        """The projected table [V_s, H], once per step.

        In the tables' own precision even under autocast: input rows and softmax both add into its
        gradient, and small as the product is, rounding it would cost more than it saves.
        """
        with torch.autocast(self.table.device.type, enabled=False):
            return functional.project_table(
                self.table, self.projection.weight, self.projection.bias
            )


@torch.no_grad()
def sinusoidal_start(position: Tensor, spread: float) -> None:
    """Starts a position table [T, H] at sines and cosines with root mean square `spread`.

    The table then encodes nearness of positions from the start: a small BERT leaves the plateau of
    unigram frequencies after far fewer pieces (docs/log.md). The table trains like any other.
    Frequencies as in Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    T, H = position.shape
    half = (H + 1) // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)[:, :H]
    position.copy_(waves * (spread * 2**0.5))


@torch.no_grad()
def warm_start(student: StudentTable, teacher_rows: Tensor) -> float:
    """Initialises the student table from the teacher's rows, projected to E dimensions.

    Principal component analysis of `teacher_rows` [V_s, H] (row i: the teacher's embedding of
    student piece i): the top E directions give table and projection weight, the mean its bias.

    Returns:
        The share of the rows' variance that the E directions keep.
    """
    E = student.table.shape[1]
    rows = teacher_rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    # H x H is small (at most 1024 x 1024), so the covariance is cheaper than an SVD of the rows.
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    top = directions[:, -E:].flip(1)  # [H, min(E, H)]
    width = top.shape[1]
    student.table.zero_()
    student.projection.weight.zero_()
    student.table[:, :width] = (centred @ top).to(student.table.dtype)
    student.projection.weight[:, :width] = top.to(student.projection.weight.dtype)
    student.projection.bias.copy_(mean)
    if width < E:
        # Were both zero, neither would ever get a gradient.
        generator = torch.Generator().manual_seed(0)
        student.table[:, width:].normal_(0.0, float(student.table.std()), generator=generator)
    return float(variances[-width:].sum() / variances.sum().clamp_min(1e-300))


@torch.no_grad()
def spelled_rows(
    student_pieces: tuple[str, ...], teacher_ids: dict[str, int], teacher_table: Tensor, unk: int
) -> tuple[Tensor, int]:
    """The teacher's embedding of every student piece: its row, or the mean over its spelling.

    A student piece that the teacher lacks is spelled, greedily from the left, with teacher pieces
    (`##` ones from the second on, or all if the piece itself continues a word). A piece that cannot
    be spelled takes the row of [UNK].

    Returns:
        Rows [V_s, H] and the number of pieces that both vocabularies have.
    """
    rows = torch.empty(len(student_pieces), teacher_table.shape[1], dtype=teacher_table.dtype)
    shared = 0
    for i, piece in enumerate(student_pieces):
        if piece in teacher_ids:
            shared += 1
            rows[i] = teacher_table[teacher_ids[piece]]
            continue
        prefix = "##" if piece.startswith("##") else ""
        spelling = longest_matches(piece.removeprefix(prefix), teacher_ids, prefix)
        ids = [teacher_ids[part] for part in spelling] or [unk]
        rows[i] = teacher_table[torch.tensor(ids)].mean(0)
    return rows, shared
