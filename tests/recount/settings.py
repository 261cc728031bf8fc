"""The table of settings."""

from __future__ import annotations

from tests.recount.runs import ALL, Setting

POOLED = "centralized,centralized_large_batch"

ONE = f"{POOLED},parity"


# One of each kind in less than a minute; the others are slow.
FAST = (
    *("plain", "rows dropped", "packed and padded", "several sets", "p-tuning of texts"),
    *("one client, short epochs", "classification", "by examples"),
)

SETTINGS = [
    Setting("plain", arms=ALL),
    Setting("one client", arms=f"{POOLED},parity", sizes=(1,), rounds=3),
    Setting("packed", flags="--packing true", max_length=64, packed=True, arms=POOLED),
    Setting(
        "packed and padded",
        flags="--packing true --pad_to_multiple_of 64",
        max_length=96,
        packed=True,
        arms="centralized",
    ),
    Setting(
        "accumulation with a remainder", accumulation=3, steps=0, epochs=1, batch=2, arms=POOLED
    ),
    Setting("rows dropped", max_length=24, steps=3, arms="centralized"),
    Setting("one client, rows dropped", max_length=24, sizes=(1,), arms="centralized"),
    Setting("rows cut", kind="text", max_length=16, arms=POOLED),
    Setting("unequal clients", sizes=(5, 1), steps=0, epochs=1, arms=f"{POOLED},local"),
    Setting("size partition", flags="--partition size", sizes=(1, 1, 1), train=30),
    Setting("half take part", sizes=(1, 1, 1, 1), train=32, fraction=0.5, rounds=3, arms=ALL),
    Setting("several epochs", steps=0, epochs=2, train=18, arms=POOLED),
    Setting("half an epoch", steps=0, epochs=0.5, train=26, rounds=4, arms="centralized"),
    Setting(
        "by length",
        flags="--train_sampling_strategy group_by_length",
        steps=2,
        rounds=3,
        arms=f"{POOLED},parity",
    ),
    Setting("drop last", drop_last=True, steps=0, epochs=1, train=22, arms=POOLED),
    Setting("several sets", recipe="several_sets", arms="centralized"),
    Setting("messages", kind="messages", arms="centralized"),
    Setting("conversational", kind="conversational", arms="centralized"),
    Setting("sharegpt", kind="sharegpt", arms="centralized"),
    Setting("classification", kind="labels", recipe="seq_cls_lora", train=36, arms="centralized"),
    Setting(
        "p-tuning",
        kind="sentiment",
        recipe="ptuning_sentiment",
        arms="centralized",
        flags="--peft_method p_tuning --num_virtual_tokens 4 --encoder_hidden_size 16",
    ),
    Setting(
        "p-tuning of texts",
        exact=False,
        kind="text",
        arms="centralized",
        flags="--peft_method p_tuning --num_virtual_tokens 4 --encoder_hidden_size 16",
    ),
    Setting(
        "prefix", flags="--peft_method prefix_tuning --num_virtual_tokens 4", arms="centralized"
    ),
    Setting(
        "prompt tuning of texts",
        kind="text",
        flags="--peft_method prompt_tuning --num_virtual_tokens 4",
    ),
    Setting("ia3", flags="--peft_method ia3"),
    Setting("full", flags="--peft_method none", full=True, arms="centralized"),
    Setting("by examples", weight_by="examples", sizes=(3, 1), steps=0, epochs=1),
    Setting("uniform", weight_by="uniform", sizes=(3, 1)),
    Setting("scaffold", flags="--strategy scaffold", mean=False, extras=1),
    Setting("fedadam", flags="--strategy fedadam", mean=False, arms="centralized"),
    Setting("int8", flags="--codec int8", codec=True, mean=True),
    Setting(
        "mixed ranks",
        recipe="mixed_ranks",
        flags="--client_ranks 2,4 --strategy flexlora",
        mean=False,
        wide=True,
    ),
    Setting("two seeds", seeds=(1, 2), arms=f"{POOLED},local"),
    Setting("resumed", stop_in=4, rounds=3, arms="centralized"),
    Setting("reset", flags="--client_state reset", carry=False, arms="centralized"),
    Setting("ffa", flags="--strategy ffa_lora", mean=False, only_last=True),
    Setting("rolora", flags="--strategy rolora", mean=False, only_last=True, wide=True),
    Setting("flora", flags="--strategy flora", mean=False, only_last=True, wide=True),
    Setting("one client, short epochs", sizes=(1,), train=22, steps=4, arms="centralized"),
    Setting(
        "one client, accumulation",
        sizes=(1,),
        train=22,
        accumulation=3,
        batch=2,
        rounds=4,
        arms=ONE,
    ),
    Setting("one client, drop last", sizes=(1,), train=22, drop_last=True, steps=4, arms=ONE),
    Setting(
        "one client, packed",
        sizes=(1,),
        flags="--packing true --pad_to_multiple_of 64",
        max_length=96,
        packed=True,
        rounds=3,
        arms=ONE,
    ),
    Setting(
        "one client, by length",
        sizes=(1,),
        flags="--train_sampling_strategy group_by_length",
        train=32,
        rounds=4,
        arms=ONE,
    ),
    Setting(
        "one client, dropout",
        sizes=(1,),
        flags="--lora_dropout 0.2",
        exact=False,
        rounds=3,
        arms=ONE,
    ),
    Setting(
        "one client, epochs, dropped", sizes=(1,), max_length=24, steps=0, epochs=1.5, arms=ONE
    ),
    Setting("label smoothing", smoothing=0.1, arms="local"),
    Setting("flower", engine="flower", arms="centralized"),
    Setting("flower, several sets", engine="flower", recipe="several_sets"),
    Setting(
        "flower, unequal epochs",
        engine="flower",
        sizes=(3, 1),
        steps=0,
        epochs=1,
        batch=2,
        accumulation=2,
        max_length=24,
        arms=POOLED,
    ),
    Setting(
        "flower, packed",
        engine="flower",
        flags="--packing true --pad_to_multiple_of 64",
        max_length=96,
        packed=True,
        weight_by="examples",
    ),
]
