"""Fine-tunes a BERT folder with transformers alone, on SST-2 or on Snips' intents or slots.

    python docs/experiments/get_data.py sst-2 snips
    python docs/experiments/finetune.py runs/student/model sst2 data:glue-sst-2.tar.xz -o tuned
    python docs/experiments/finetune.py runs/student/model slots data:snips.tar.xz
    mvbert export tuned -o web --int8

SST-2 as GLUE's archive has it; Snips as a folder of seq.in, seq.out and label for train, valid and
test (Goo et al. 2018, github.com/MiuLab/SlotGated-SLU). The last line of stdout is JSON: accuracy,
and for slots the F1 of whole spans. One learning rate for all, a linear schedule, the last epoch's
weights: nothing is chosen on what is reported.
"""

import argparse
import json
import tarfile
import time

import torch
import transformers

from mvbert.files import data_path

EPOCHS = {"sst2": 2, "intents": 5, "slots": 10}
TESTED = {"sst2": "dev", "intents": "test", "slots": "test"}


def examples(task: str, archive: str, part: str) -> list[tuple[list[str], list[str]]]:
    """(words, labels): one label a sentence, or one a word."""
    folder = {"sst2": "SST-2"}.get(task, "snips")
    with tarfile.open(data_path(archive)) as tar:

        def lines(name: str) -> list[str]:
            text = tar.extractfile(f"{folder}/{name}").read().decode("utf-8-sig")
            # Other line breaks of Unicode stand inside sentences.
            return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]

        if task == "sst2":
            rows = [line.rsplit("\t", 1) for line in lines(f"{part}.tsv")[1:]]
            return [(sentence.split(), [label]) for sentence, label in rows]
        words = [_parts(line) for line in lines(f"{part}/seq.in")]
        name = "label" if task == "intents" else "seq.out"
        labels = [_parts(line) for line in lines(f"{part}/{name}")]
    rows = list(zip(words, labels, strict=True))
    for i, (w, of) in enumerate(rows, 1):
        if len(of) != (1 if task == "intents" else len(w)):
            raise SystemExit(f"{archive}:{folder}/{part}/{name}:{i}: {len(of)} for {len(w)} words")
    return rows


def _parts(line: str) -> list[str]:
    """Words between spaces; other white space belongs to a word."""
    return [word for word in line.split(" ") if word]


def encoded(task, tokenizer, sentences, number) -> list[tuple[list[int], list[int]]]:
    """(ids, labels): of slots one label a piece, -100 but on the first piece of a word.

    A label that training never had is -1: it is not right whatever the model says.
    """
    rows = tokenizer([w for w, _ in sentences], is_split_into_words=True, truncation=True)
    out = []
    for i, (_, labels) in enumerate(sentences):
        numbers = [number.get(label, -1) for label in labels]
        if task == "slots":
            of = rows.word_ids(i)
            first = [w is not None and w != of[j - 1] for j, w in enumerate(of)]  # of[-1]: [SEP]
            numbers = [numbers[w] if new else -100 for w, new in zip(of, first, strict=True)]
        out.append((rows["input_ids"][i], numbers))
    return out


def words_with_labels(tokenizer, sentences) -> list[list[int]]:
    """The words of each sentence that have a piece in its row, in order.

    Words of deleted characters alone have none, nor those behind the row's end.
    """
    rows = tokenizer([w for w, _ in sentences], is_split_into_words=True, truncation=True)
    return [sorted({w for w in rows.word_ids(i) if w is not None}) for i in range(len(sentences))]


def batches(rows, size: int, order, pad: int):
    """Batches of rows of like length: which rows, the model's inputs, labels."""
    picked = sorted(order, key=lambda i: len(rows[i][0]))
    parts = [picked[i : i + size] for i in range(0, len(picked), size)]
    for i in torch.randperm(len(parts)).tolist():
        ids, labels = zip(*(rows[j] for j in parts[i]), strict=True)
        of_pieces = len(labels[0]) == len(ids[0])
        padded = torch.nn.utils.rnn.pad_sequence
        x = padded([torch.tensor(r) for r in ids], True, pad)
        y = padded([torch.tensor(r) for r in labels], True, -100)
        inputs = {"input_ids": x, "attention_mask": (x != pad).long()}
        yield parts[i], inputs, y if of_pieces else y[:, 0]


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(slot, first word, end) of BIO tags."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and not (tag.startswith("I-") and tag[2:] == tags[start][2:]):
            found.add((tags[start][2:], start, i))
            start = None
        if tag != "O" and start is None:
            start = i
    return found


@torch.no_grad()
def score(task: str, model, tokenizer, sentences, rows, names: list[str]) -> float:
    """Accuracy; of slots F1 over all words, those without a piece being O."""
    model.eval()
    right = asked = said = known = 0
    placed = words_with_labels(tokenizer, sentences) if task == "slots" else []
    for chosen, inputs, labels in batches(rows, 64, range(len(rows)), tokenizer.pad_token_id):
        choice = model(**inputs).logits.argmax(-1)
        if task != "slots":
            right, asked = right + int((choice == labels).sum()), asked + len(labels)
            continue
        for i, ours, truth in zip(chosen, choice, labels, strict=True):
            tags = ["O"] * len(sentences[i][1])
            for word, tag in zip(placed[i], ours[truth != -100].tolist(), strict=True):
                tags[word] = names[tag]
            a, b = spans(tags), spans(sentences[i][1])
            right, said, known = right + len(a & b), said + len(a), known + len(b)
    return right / asked if task != "slots" else 2 * right / max(said + known, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face BERT")
    parser.add_argument("task", choices=EPOCHS)
    parser.add_argument("archive", help="the task's .tar.xz; data:NAME is one from get_data.py")
    parser.add_argument("-o", "--out", help="folder for the fine-tuned model")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)

    train = examples(args.task, args.archive, "train")
    test = examples(args.task, args.archive, TESTED[args.task])
    names = sorted({label for _, labels in train for label in labels})
    number = {name: i for i, name in enumerate(names)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    kind = "Token" if args.task == "slots" else "Sequence"
    model = getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(
        args.model, id2label=dict(enumerate(names)), label2id=number
    )
    rows = encoded(args.task, tokenizer, train, number)
    asked = encoded(args.task, tokenizer, test, number)

    epochs, size = args.epochs or EPOCHS[args.task], 32
    steps = epochs * -(-len(rows) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for epoch in range(epochs):
        model.train()
        # Like lengths within a thousand sentences, so that batches differ between epochs.
        order = torch.randperm(len(rows)).tolist()
        for first in range(0, len(order), 1024):
            part = order[first : first + 1024]
            for _, inputs, labels in batches(rows, size, part, tokenizer.pad_token_id):
                with torch.autocast("cpu", torch.bfloat16):
                    scores = model(**inputs).logits
                loss = torch.nn.functional.cross_entropy(
                    scores.float().flatten(0, -2), labels.flatten()
                )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        found = score(args.task, model, tokenizer, test, asked, names)
        print(f"epoch {epoch + 1}: {found:.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    report = {**vars(args), "epochs": epochs, "score": round(found, 4)}
    print(json.dumps(report | {"seconds": round(time.perf_counter() - started)}))


if __name__ == "__main__":
    main()
