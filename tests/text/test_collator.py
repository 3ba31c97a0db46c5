"""The masking collator: the definition's rows, transformers' distribution, nobody's workers."""

import pickle
import random
import re
import warnings

import numpy as np
import pytest

from mvbert import MaskingCollator, WordPieceTokenizer
from mvbert import _core as mvbert_core
from mvbert.errors import InputError
from mvbert.text.masking import budget, mask_row
from mvbert.text.vocab import SPECIAL_PIECES, Vocab

PIECES = (*SPECIAL_PIECES, *"abcdefghij", *(f"##{c}" for c in "abcdefghij"))
TEXTS = ["a bcd ef ghij a b c d", "abcdefghij", "a", "", "[MASK] é a b [UNK]", "j i hgfe d " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer(Vocab(PIECES), 512)


def rows_of(tokenizer):
    return [tokenizer(text, TEXTS[0]) for text in TEXTS]


@pytest.mark.parametrize("whole_word", [True, False], ids=["words", "pieces"])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_the_definitions(tokenizer, whole_word, threads):
    for seed, epoch, share in [(0, 0, 0.15), (2**64 - 1, 3, 0.5), (5, 2**40, 1.0), (1, 1, 0.0)]:
        collator = MaskingCollator(
            tokenizer, mlm_probability=share, whole_word_mask=whole_word, seed=seed,
            threads=threads, mask_replace_prob=0.5, random_replace_prob=0.3, return_tensors="np",
        )  # fmt: skip
        collator.set_epoch(epoch)
        features = rows_of(tokenizer) * 30
        batch = collator(features)
        options = {
            key: collator._options[key]
            for key in ("mask", "by_word", "piece_threshold", "mask_threshold", "other_threshold")
        }
        kinds = collator._options["kinds"].tolist()
        for i, row in enumerate(features[:6]):
            ids = row["input_ids"]
            masked, labels = mask_row(
                ids, kinds, budget=budget(len(ids), share), seed=seed, epoch=epoch, **options
            )
            rest = batch["input_ids"].shape[1] - len(ids)
            assert batch["input_ids"][i].tolist() == masked + [0] * rest
            assert batch["labels"][i].tolist() == labels + [-100] * rest
            assert batch["token_type_ids"][i].tolist() == row["token_type_ids"] + [0] * rest
        assert (batch["input_ids"][6:12] == batch["input_ids"][:6]).all()
        assert (batch["labels"] == -100).all() == (share == 0)


def test_what_comes_in(tokenizer):
    torch = pytest.importorskip("torch")
    collator = MaskingCollator(tokenizer)
    collator.set_epoch(0)
    features = rows_of(tokenizer)
    expected = collator(features)
    assert expected["labels"].dtype == torch.int64
    before = tokenizer(TEXTS, [TEXTS[0]] * len(TEXTS), padding=True, return_tensors="pt")
    kept = before["input_ids"].clone()
    for given in (
        before,
        dict(before),
        [{**row, "special_tokens_mask": row["attention_mask"], "labels": [1]} for row in features],
        [{k: np.array(v) for k, v in row.items()} for row in features],
    ):
        got = collator(given)
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert torch.equal(got["labels"], expected["labels"])
        assert "special_tokens_mask" not in got
    assert torch.equal(before["input_ids"], kept)
    ids = collator([row["input_ids"] for row in features])
    assert torch.equal(ids["labels"], expected["labels"])
    padded = MaskingCollator(tokenizer, pad_to_multiple_of=64)(features)
    assert padded["input_ids"].shape[1] % 64 == 0
    assert collator({"input_ids": np.zeros((0, 0), int)})["labels"].shape == (0, 0)
    assert torch.equal(pickle.loads(pickle.dumps(collator))(features)["labels"], expected["labels"])


def random_rows(rng, names, bare=False):
    """Rows of a data set: some empty, some padded before, some ids beyond 30 and 32 bits."""
    rows = []
    for _ in range(rng.randint(1, 9)):
        size = rng.choice([0, 1, 2, 7, 63, 64, 65, 130])
        ids = [rng.choice([0, 1, -1, 5, 256, 257, 2**30 - 1, 2**30, 2**62, -(2**63), 2**63 - 1])
               for _ in range(size)]  # fmt: skip
        ones = rng.choice([size, rng.randint(0, size)])
        columns = {
            "input_ids": ids,
            "attention_mask": [1] * ones + [0] * (size - ones),
            "token_type_ids": rng.choice([[0] * size, [rng.randint(0, 300) for _ in range(size)]]),
            "special_tokens_mask": [rng.randint(0, 1) for _ in range(size)],
            "labels": [-100] * rng.randint(0, 3),
            "offset_mapping": [(0, 1)] * size,
        }
        rows.append(ids if bare else {name: columns[name] for name in names})
    rows[0] = rows[0] or [1]
    return rng.choice([list, tuple])(rows)


@pytest.mark.parametrize("whose", ["ours", "transformers"])
def test_lists_are_read_as_by_the_definition(whose):
    """In C++ as by `_checked`: names and their order, values, types, lengths."""
    tokenizer = WordPieceTokenizer(Vocab(PIECES), 512)
    if whose == "transformers":
        pytest.importorskip("transformers")
        tokenizer = tokenizer.as_hf()
    rng = random.Random(0)
    others = ["attention_mask", "token_type_ids", "special_tokens_mask", "labels"]
    served = 0
    for trial in range(100):
        names = [name for name in [*others, "offset_mapping"] if rng.random() < 0.5]
        names.insert(rng.randint(0, len(names)), "input_ids")
        rows = random_rows(rng, names, bare=trial % 5 == 0)
        if whose == "ours":
            tokenizer.model_input_names = ["input_ids", *others[: trial % 2]]
        multiple = rng.choice([None, 1, 8, 100])
        collator = MaskingCollator(tokenizer, pad_to_multiple_of=multiple, return_tensors="np")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                batch, lengths = collator._checked(rows)
            except (InputError, TypeError):  # rows without one id
                assert not any(len(row if trial % 5 == 0 else row["input_ids"]) for row in rows)
                assert collator._read(rows) is None
                continue
        found = collator._read(rows)
        if found is None:
            assert not batch["input_ids"].size
            continue
        served += 1
        assert list(found[0]) == list(batch)
        for name, values in batch.items():
            assert found[0][name].dtype == np.int64 == values.dtype
            assert found[0][name].tolist() == values.tolist(), name
        assert found[1].tolist() == lengths.tolist()
    assert served > 60


@pytest.mark.parametrize("whose", ["ours", "transformers"])
def test_what_the_fast_reader_leaves_to_the_definition(tokenizer, whose):
    if whose == "transformers":
        transformers = pytest.importorskip("transformers")
        tokenizer = tokenizer.as_hf()
    collator = MaskingCollator(tokenizer, return_tensors="np")
    row = {"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 0]}
    assert collator._read([row]) is not None

    class Ids(list):
        pass

    for other in (
        None, {}, row, iter([row]), [], [[]], [{}], [{"input_ids": []}], [None], [5], ["abc"],
        [{**row, "weights": [1.0, 2.0, 3.0]}],
        [row, {"input_ids": [2, 3]}],
        [row, {**row, "labels": [1]}],
        [{"labels": [1]}],
        [[2, 3], row],
        [row, [2, 3]],
        [{**row, 7: 1}],
        [{**row, "attention_mask": [1, 1]}],
        [{**row, "attention_mask": [1, 0, 1]}],
        [{**row, "attention_mask": [0, 1, 1]}],
        [{**row, "attention_mask": [2, 1, 0]}],
        [{**row, "attention_mask": [True, 1, 1]}],
        [{**row, "attention_mask": [1.0, 1, 1]}],
        [{**row, "token_type_ids": [0, "0", 0]}],
        [{**row, "token_type_ids": None}],
        [{**row, "special_tokens_mask": [0, None, 0]}],
        [{**row, "input_ids": [2, 2**63, 3]}],
        [{**row, "input_ids": [2, -(2**63) - 1, 3]}],
        [{**row, "input_ids": [2, np.int64(5), 3]}],
        [{**row, "input_ids": [2, [5], 3]}],
        [{**row, "input_ids": (2, 5, 3)}],
        [{**row, "input_ids": Ids([2, 5, 3])}],
        [{**row, "input_ids": np.array([2, 5, 3])}],
    ):  # fmt: skip
        assert collator._read(other) is None, other
    if whose == "transformers":

        class Padded(transformers.BertTokenizerFast):
            def pad(self, *args, **kwargs):
                return super().pad(*args, **kwargs)

        tokenizer.padding_side = "left"
        assert collator._read([row]) is None
        tokenizer.padding_side = "right"
        assert collator._read([row]) is not None
        tokenizer.model_input_names = ["input_ids"]
        assert collator._read([row]) is None
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.__class__ = Padded
        assert collator._read([row]) is None


def test_lengths_of_a_mask(tokenizer):
    """In C++ as numpy finds them; what is no mask has none."""
    for mask in (np.zeros((0, 0), int), np.zeros((3, 0), int), np.eye(4, dtype=int)[::-1],
                 np.tri(5, 4, -1, dtype=int), np.tri(70, 69, dtype=int)):  # fmt: skip
        mask = np.ascontiguousarray(mask)
        regular = (np.sort(mask, 1)[:, ::-1] == mask).all()
        found = mvbert_core.lengths_of_mask(mask)
        assert (found is None) == (not regular)
        assert found is None or found.tolist() == mask.sum(1).tolist()
    for wrong in ([[2, 0]], [[1, -1, 1]], [[0, 1]], [[-1, 0]], [[2**63 - 1, 2]]):
        assert mvbert_core.lengths_of_mask(np.array(wrong)) is None


@pytest.mark.parametrize("whole_word", [True, False])
def test_the_arguments_are_those_of_transformers(tokenizer, whole_word):
    """In the order of 4.57 and 5, and under the names of before."""
    row = [tokenizer("a bcd ef ghij " * 8)]
    found = [
        MaskingCollator(tokenizer, True, whole_word, 0.5, 1.0, 0.0, 64, seed=3),
        MaskingCollator(
            tokenizer=tokenizer, mlm=True, whole_word_mask=whole_word, mlm_probability=0.5,
            mask_replace_prob=1.0, random_replace_prob=0.0, pad_to_multiple_of=64,
            return_tensors="np", seed=3,
        ),
        MaskingCollator(
            tokenizer, whole_word=whole_word, mlm_probability=0.5, mask_replace_prob=1.0,
            random_replace_prob=0.0, pad_to_multiple_of=64, return_tensors="np", seed=3,
        ),
    ]  # fmt: skip
    for collator in found:
        collator.set_epoch(0)
    first, *others = [collator(row)["input_ids"].tolist() for collator in found]
    assert len(first[0]) % 64 == 0
    assert others == [first, first]
    transformers = pytest.importorskip("transformers")
    import inspect

    theirs = inspect.signature(transformers.DataCollatorForLanguageModeling).parameters
    ours = inspect.signature(MaskingCollator).parameters
    if "whole_word_mask" not in theirs:
        pytest.skip("needs transformers 4.57 or 5")
    names = [name for name in theirs if name != "tf_experimental_compile"]
    assert list(ours)[: len(names)] == names
    assert all(ours[name].default == theirs[name].default for name in names[1:])


def test_without_an_epoch_every_call_draws_anew(tokenizer):
    row = [tokenizer("a bcd ef ghij " * 8)]
    for seed in (None, 1):
        collator = MaskingCollator(tokenizer, seed=seed, return_tensors="np")
        drawn = [collator(row)["labels"].tobytes() for _ in range(6)]
        assert len(set(drawn)) == 6
        again = MaskingCollator(tokenizer, seed=seed, return_tensors="np")
        assert [again(row)["labels"].tobytes() for _ in range(6)] == drawn
        collator.set_epoch(0)
        assert len({collator(row)["labels"].tobytes() for _ in range(3)}) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("workers", "lives_on"), [(0, False), (1, False), (2, False), (1, True), (2, True)]
)
def test_without_an_epoch_every_pass_draws_anew(tokenizer, workers, lives_on):
    """In DataLoader workers, too, which are copies of a collator that was used before."""
    torch = pytest.importorskip("torch")
    row = dict(tokenizer("a bcd ef ghij " * 8))
    torch.manual_seed(0)
    collator = MaskingCollator(tokenizer, seed=1)
    collator([row])
    loader = torch.utils.data.DataLoader(
        [row] * 4, batch_size=1, collate_fn=collator, num_workers=workers,
        persistent_workers=lives_on,
    )  # fmt: skip
    masks = [batch["labels"].numpy().tobytes() for _ in range(3) for batch in loader]
    assert len(set(masks)) == 12


def test_epochs_and_seeds_draw_anew(tokenizer):
    found = set()
    for seed in (0, 1):
        collator = MaskingCollator(tokenizer, seed=seed, return_tensors="np")
        for epoch in (0, 1):
            collator.set_epoch(epoch)
            found.add(collator(rows_of(tokenizer))["labels"].tobytes())
    assert len(found) == 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_and_order_change_nothing(tokenizer):
    torch = pytest.importorskip("torch")
    features = [dict(row) for row in rows_of(tokenizer) * 4]
    by_row = {}
    for workers, shuffle in [(0, False), (2, False), (1, True)]:
        collator = MaskingCollator(tokenizer, pad_to_multiple_of=256)
        loader = torch.utils.data.DataLoader(
            features, batch_size=4, collate_fn=collator, num_workers=workers, shuffle=shuffle,
            persistent_workers=workers > 0,
        )  # fmt: skip
        for epoch in (0, 1):
            collator.set_epoch(epoch)
            for batch in loader:
                labels, mask = batch["labels"], batch["labels"] != -100
                original = torch.where(mask, labels, batch["input_ids"])
                for ids, label, masked in zip(original, labels, batch["input_ids"], strict=True):
                    key = epoch, ids.numpy().tobytes()
                    value = label.numpy().tobytes(), masked.numpy().tobytes()
                    assert by_row.setdefault(key, value) == value


def far(count, trials, probability):
    """How many standard errors a count is from what is expected."""
    return abs(count - trials * probability) / max(
        (trials * probability * (1 - probability)) ** 0.5, 1e-9
    )


@pytest.mark.parametrize("whole_word", [True, False], ids=["words", "pieces"])
def test_the_distribution_is_that_of_transformers(tokenizer, whole_word):
    """Per position, how often it is masked; what masked pieces become."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if whole_word and not hasattr(transformers, "DataCollatorForWholeWordMask"):
        pytest.skip("transformers 5 has no DataCollatorForWholeWordMask")
    row = tokenizer("a bcd ef ghij a b c d abcdefg h i j [UNK] a")
    trials = 3000
    cls = (
        transformers.DataCollatorForWholeWordMask
        if whole_word
        else transformers.DataCollatorForLanguageModeling
    )
    torch.manual_seed(0)
    random.seed(0)
    features = [{"input_ids": row["input_ids"]} for _ in range(trials)]
    with warnings.catch_warnings():  # it is deprecated, and asks for transformers' tokenizer
        warnings.simplefilter("ignore")
        theirs = cls(tokenizer.as_hf(), mlm_probability=0.3)
        their = theirs([dict(feature) for feature in features])
    collator = MaskingCollator(tokenizer, mlm_probability=0.3, whole_word_mask=whole_word)
    ours = []
    for epoch in range(trials):
        collator.set_epoch(epoch)
        ours.append(collator(features[:1]))
    labels = torch.cat([batch["labels"] for batch in ours])
    inputs = torch.cat([batch["input_ids"] for batch in ours])
    mine, other = (labels != -100).float().mean(0), (their["labels"] != -100).float().mean(0)
    # Two shares of `trials`: 5 standard errors of their difference.
    bound = 5 * (2 * 0.25 / trials) ** 0.5
    assert (mine - other).abs().max() < bound
    assert abs(mine.mean() - other.mean()) < bound
    masked = labels != -100
    count = int(masked.sum())
    became = (inputs == tokenizer.mask_token_id) & masked
    stayed = (inputs == labels) & masked
    random_share = 0.1 / len(tokenizer)  # a random piece may be [MASK], or the same
    assert far(int(became.sum()), count, 0.8 + random_share) < 5
    assert far(int(stayed.sum()), count, 0.1 + random_share) < 5
    for piece in (0, 5, 24):
        hits = int(((inputs == piece) & masked & ~stayed).sum())
        own = int((masked & (labels == piece)).sum())
        assert far(hits, count - own, random_share) < 5


def test_what_is_refused(tokenizer):
    for options, message in [
        ({"mlm_probability": 1.5}, r"mlm_probability is 1\.5, expected a number of \[0, 1\]"),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.2}, r"mask_replace_prob \+ random"),
        ({"mlm_probability": True}, "mlm_probability is True, expected a number"),
        ({"mask_replace_prob": "0.1"}, r"mask_replace_prob is '0\.1', expected a number"),
        ({"random_replace_prob": None}, "random_replace_prob is None, expected a number"),
        ({"whole_word": 1}, "whole_word is 1"),
        ({"whole_word_mask": 1}, "whole_word_mask is 1"),
        ({"whole_word_mask": 0.15}, r"the third argument, is 0\.15.* give mlm_probability by name"),
        ({"mlm": False}, "mlm is False, which is not supported"),
        ({"mlm": 1}, "mlm is 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, expected an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'"),
        ({"return_tensors": None}, "return_tensors is None"),
        ({"threads": -2}, "threads must be 0"),
    ]:
        with pytest.raises(InputError, match=message):
            MaskingCollator(tokenizer, **options)
    with pytest.raises(InputError, match=r"has no \[MASK\]"):
        MaskingCollator(WordPieceTokenizer(Vocab(PIECES[:4])))
    for other in (None, "bert", WordPieceTokenizer):
        with pytest.raises(InputError, match=r"tokenizer is .*, expected a WordPieceTokenizer or"):
            MaskingCollator(other)
    collator = MaskingCollator(tokenizer, return_tensors="np")
    with pytest.raises(InputError, match="epoch is -1"):
        collator.set_epoch(-1)
    for features, message in [
        ([], r"got \[\] \(list\), expected a list of rows"),
        (5, r"got 5 \(int\)"),
        ({"labels": [1]}, "the batch has labels, expected input_ids"),
        ([{"input_ids": [1]}, {"labels": [1]}], "row 1 is .*, expected input_ids"),
        ({"input_ids": [[1], [1, 2]]}, "input_ids has rows of different lengths"),
        ({"input_ids": [1, 2]}, "input_ids has 1 dimensions"),
        ({"input_ids": [[2, 99, 3]]}, "row 0 has the id 99, outside the vocabulary of 25 pieces"),
        ({"input_ids": [[0, 2, 3]], "attention_mask": [[0, 1, 1]]}, "padded on the left"),
        (
            {"input_ids": [[2, 5, 6, 3]] * 2, "attention_mask": [[1, 1, 1, 1], [1, 0, 1, 1]]},
            r"attention_mask of row 1 is \[1, 0, 1, 1\] \(list\), expected ones",
        ),
        (
            {"input_ids": [[2, 5, 3]], "attention_mask": [[5, 5, 5]]},
            r"attention_mask of row 0 is \[5, 5, 5\] \(list\), expected ones",
        ),
        (
            {"input_ids": [[2, 5, 3]], "attention_mask": [[1, 1]]},
            r"attention_mask is \[1, 2\] of int64, expected numbers \[1, 3\] as input_ids",
        ),
        ({"input_ids": [[2, 5, 3]], "attention_mask": [1, 1, 1]}, r"attention_mask is \[3\] of"),
        ({"input_ids": [[2.0, 5.5, 3.0]]}, "input_ids has float64 values, expected rows of int"),
        (
            [{"input_ids": [2, 5, 3], "attention_mask": [1, 1]}],
            "row 0 has 3 input_ids and attention_mask of 2",
        ),
        (
            [{"input_ids": [2, 3]}, {"input_ids": [2, 99, 3]}],
            "row 1 has the id 99, outside the vocabulary of 25 pieces",
        ),
        ([[2, 3], [2, -1, 3]], "row 1 has the id -1, outside the vocabulary of 25 pieces"),
        (
            [{"input_ids": [2, 5, 3], "attention_mask": [1, 0, 1]}],
            r"attention_mask of row 0 is \[1, 0, 1\] \(list\), expected ones",
        ),
        ([{"input_ids": [2, "5", 3]}], "input_ids has "),
        ([{"input_ids": [2, 5.5, 3]}], "input_ids has float64 values, expected rows of integers"),
        ([1, 2], r"row 0 is 1 \(int\), expected input_ids, or the list of them"),
        (["abc"], r"row 0 is 'abc' \(str\), expected input_ids"),
        ("abc", r"got 'abc' \(str\), expected a list of rows"),
        ([{"input_ids": 5}], r"row 0 is \{'input_ids': 5\} \(dict\), expected input_ids"),
    ]:
        with pytest.raises(InputError, match=message):
            collator(features)


def test_words_of_byte_level_pieces_are_not_known():
    """RoBERTa's pieces have no ##; single pieces are masked, special ones never."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "\u0120b", "c"]
    model = tokenizers.models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    ends = {"cls_token": "<s>", "sep_token": "</s>"}
    ids = [0, 6, 7, 5, 6, 2]
    for options in (named, named | ends):
        roberta = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model), **options
        )
        name = type(roberta).__name__  # transformers 5's is TokenizersBackend
        with pytest.raises(InputError, match=rf"no piece of {name} begins with ##"):
            MaskingCollator(roberta, whole_word_mask=True)
        collator = MaskingCollator(roberta, mlm_probability=1.0, return_tensors="np")
        labels = collator({"input_ids": [ids]})["labels"][0].tolist()
        assert labels == ([-100, *ids[1:5], -100] if options != named else ids)


def test_the_trainer_takes_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    collator = MaskingCollator(tokenizer)
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    epochs = []
    original = collator.set_epoch
    collator.set_epoch = lambda epoch: (epochs.append(epoch), original(epoch))
    transformers.Trainer(
        transformers.BertForMaskedLM(config), arguments, data_collator=collator,
        train_dataset=[dict(row) for row in rows_of(tokenizer)] * 2,
        processing_class=tokenizer, callbacks=[collator.callback()],
    ).train()  # fmt: skip
    assert epochs == [0, 1, 2]


def test_the_page_is_true(root, shared_file, tmp_path, monkeypatch):
    """Runs the examples of docs/collator.md."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    (tmp_path / "vocab.txt").write_bytes(shared_file("vocab.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "collator.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    names = {}
    for example in examples:
        exec(compile(example, "docs/collator.md", "exec"), names)
