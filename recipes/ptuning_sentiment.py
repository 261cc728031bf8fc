"""Federated p-tuning for sentiment: the prompt encoder travels, the base model stays frozen.

python recipes/ptuning_sentiment.py --config recipes/demo_ptuning_sentiment.yaml   # the tiny model
python recipes/ptuning_sentiment.py --compare local
python recipes/ptuning_sentiment.py --model_name_or_path DIR --train_file rows.jsonl

Rows: text (or sentence, or an instruction row) and label.

The model answers "Text: ... Sentiment:" with the label, and the loss covers that answer only.
"""

import torch
from trl import SFTTrainer

import fedtune
from fedtune.adapters import attach_adapter, load_base
from fedtune.data import (
    as_label_prompt_rows,
    check_held_out_labels,
    find_label_names,
    load_rows,
    sft_inputs,
)


def label_names(args):
    """The labels of all rows; what is no column of labels is refused before anything is built."""
    return find_label_names(load_rows(args.data), args.data)


def build_model(args):
    """Base model with its prompt encoder, and the tokenizer; once per process."""
    label_names(args)
    model, tokenizer = load_base(args.model, task="causal_lm")
    return attach_adapter(model, args.adapter, "causal_lm", args.training.seed), tokenizer


def build_trainer(args, model, tokenizer, train, evaluation):
    """A trl SFTTrainer over one client's texts and labels."""

    def rows_of(silo):
        return as_label_prompt_rows(silo, args.data)

    if evaluation is not None:
        check_held_out_labels(evaluation, args.data, label_names(args))
    inputs = sft_inputs(rows_of, args, model, tokenizer, train, evaluation)
    return AnswerTrainer(
        model=model, processing_class=tokenizer, compute_metrics=label_accuracy, **inputs
    )


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose evaluation predicts the likeliest token at every position."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, predicted tokens and labels of a batch."""
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only=True)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits[:, -labels.shape[1] :]  # without the virtual tokens
        return loss, logits.argmax(-1), labels


def label_accuracy(prediction):
    """Share of rows whose whole answer the model would write by itself, greedily."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"label_accuracy": float(((guesses == labels) | (labels == -100)).all(axis=1).mean())}


if __name__ == "__main__":
    fedtune.launch(build_model, build_trainer)
