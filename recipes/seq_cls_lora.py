"""Federated classification: an adapter and a head on any AutoModelForSequenceClassification.

python recipes/seq_cls_lora.py --config recipes/demo_seq_cls_lora.yaml   # the tiny model
python recipes/seq_cls_lora.py --compare local
python recipes/seq_cls_lora.py --model_name_or_path DIR --train_file rows.jsonl

Rows: text (or sentence, or an instruction row) and label.

The head is new, so it is trained in full and travels with the adapter. To use the result:
AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=N), then
PeftModel.from_pretrained(model, "OUTPUT_DIR/adapter").
"""

import numpy as np
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import fedtune
from fedtune.adapters import attach_adapter, load_base
from fedtune.data import (
    as_classification_rows,
    check_held_out_labels,
    find_label_names,
    load_rows,
    text_inputs,
)


def label_names(args):
    """Names of the classes from all rows: a client may lack one, and the head must not differ."""
    return find_label_names(load_rows(args.data), args.data)


def build_model(args):
    """Base model with a head and an adapter, and the tokenizer; once per process."""
    names = dict(enumerate(label_names(args)))
    model, tokenizer = load_base(args.model, task="seq_cls", id2label=names)
    return attach_adapter(model, args.adapter, "seq_cls", args.training.seed), tokenizer


def build_trainer(args, model, tokenizer, train, evaluation):
    """A Trainer over one client's texts and labels; what the context cannot hold is cut."""
    names = [name for _, name in sorted(model.config.id2label.items())]

    def rows_of(silo):
        return as_classification_rows(silo, args.data, names)[0]

    if evaluation is not None:
        check_held_out_labels(evaluation, args.data, names)
    inputs = text_inputs(rows_of, args, model, tokenizer, train, evaluation)
    return Trainer(
        model=model,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
        **inputs,
    )


def scores(prediction):
    """Accuracy, and F1 as the plain mean over the classes that occur."""
    guesses, labels = prediction.predictions.argmax(-1), prediction.label_ids
    f1 = []
    for name in np.union1d(guesses, labels):
        hits = np.sum((guesses == name) & (labels == name))
        f1.append(2 * hits / (np.sum(guesses == name) + np.sum(labels == name)))
    return {"accuracy": float(np.mean(guesses == labels)), "macro_f1": float(np.mean(f1))}


if __name__ == "__main__":
    fedtune.launch(build_model, build_trainer, training_class=TrainingArguments)
