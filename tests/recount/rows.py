"""Rows of known content, and what a tokenizer makes of them by the rules of trl, written again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from fedtune.assets import CORPUS_FILE, MODEL_DIR
from tests.recount.recorder import IGNORED, Row


class Encoded(NamedTuple):
    """Token ids of a row and its labels, one a token, or one class for the row."""

    ids: Row
    labels: Row


class Corpus(NamedTuple):
    """Files of a run, and their rows as they were written."""

    train_file: Path
    eval_file: Path
    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]


def write_corpus(
    directory: Path, kind: str, *, train: int, evaluation: int, sizes: Sequence[int] = (1, 1)
) -> Corpus:
    """Distinct rows, dealt to `silo-0`, ... in the proportions of `sizes`."""
    owners = [f"silo-{k}" for k, size in enumerate(sizes) for _ in range(size)]
    rows = []
    for index, pair in enumerate(_pairs(train + evaluation)):
        rows.append({**_shaped(kind, index, *pair), "silo": owners[index % len(owners)]})
    files = directory / "train.jsonl", directory / "eval.jsonl"
    parts = rows[:train], rows[train:]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return Corpus(*files, *parts)


def _pairs(count: int) -> list[tuple[str, str, str]]:
    """Question, answer and label; no two with the same text."""
    found: dict[str, tuple[str, str, str]] = {}
    for line in CORPUS_FILE.read_text().splitlines():
        row = json.loads(line)
        question = row["input"] or row["instruction"]
        found.setdefault(question, (question, row["output"], row["label"]))
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"fewer than {count} distinct rows")


def _shaped(kind: str, index: int, question: str, answer: str, label: str) -> dict[str, Any]:
    # Lengths differ a lot, so that means over batches and over tokens do too.
    answer = answer if index % 3 else answer.split(".")[0]
    turns = [("user", question), ("assistant", answer)]
    if index % 4 == 0:
        turns += [("user", "And then?"), ("assistant", "Ask again.")]
    if kind == "text":
        return {"text": f"{question} {answer}"}
    if kind == "messages":
        return {"messages": [{"role": role, "content": said} for role, said in turns]}
    if kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[role], "value": said} for role, said in turns]}
    if kind == "conversational":
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    if kind in ("labels", "sentiment"):
        return {"text": question, "label": label}
    return {"prompt": f"{question}\n", "completion": answer}


class Encoder:
    """Rows of one kind to token ids and labels."""

    def __init__(self, kind: str, max_length: int | None, classes: Sequence[str] = ()) -> None:
        self.kind, self.max_length, self.classes = kind, max_length, classes
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def all(self, rows: Iterable[dict[str, Any]]) -> list[Encoded]:
        """Rows that have something to learn from; the others are dropped."""
        coded = [self.one(row) for row in rows]
        return [row for row in coded if self.kind == "labels" or targets(row)]

    def one(self, row: dict[str, Any]) -> Encoded:
        tokenizer, eos = self.tokenizer, self.tokenizer.eos_token
        if self.kind == "labels":
            return Encoded(tuple(tokenizer(row["text"]).input_ids), (self._class(row["label"]),))
        if self.kind in ("messages", "sharegpt", "conversational"):
            return self._cut(*self._chat(_messages(row)))
        if self.kind == "text":
            ids = tokenizer(row["text"] + eos).input_ids
            return self._cut(ids, ids)
        prompt, answer = row.get("prompt"), row.get("completion")
        if self.kind == "sentiment":
            prompt, answer = f"Text: {row['text']}\nSentiment:", f" {row['label']}"
        ids, asked = tokenizer(prompt + answer + eos).input_ids, tokenizer(prompt).input_ids
        assert ids[: len(asked)] == asked
        return self._cut(ids, [IGNORED] * len(asked) + ids[len(asked) :])

    def _class(self, label: str) -> int:
        return list(self.classes).index(label)

    def _cut(self, ids: Sequence[int], labels: Sequence[int]) -> Encoded:
        return Encoded(tuple(ids[: self.max_length]), tuple(labels[: self.max_length]))

    def _chat(self, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Labels are what an assistant writes: from the cue that it is its turn to its end."""
        ids, labels = self._template(turns), []
        labels = [IGNORED] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                start = len(self._template(turns[:number], add_generation_prompt=True))
                closed = self.tokenizer(f"{turn['content']}{self.tokenizer.eos_token}").input_ids
                labels[start : start + len(closed)] = ids[start : start + len(closed)]
        return ids, labels

    def _template(self, turns: list[dict[str, str]], **kw: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(turns, return_dict=True, **kw)["input_ids"])


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "conversations" in row:
        names = {"human": "user", "gpt": "assistant"}
        return [
            {"role": names[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
        ]
    return row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def targets(row: Encoded, *, first: bool = False) -> int:
    """Labels that are predicted; `first`: position 0 too, as behind virtual tokens."""
    return sum(label != IGNORED for label in row.labels[0 if first else 1 :])
