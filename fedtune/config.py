"""Every setting of a run: one dataclass per topic. A field is a flag, a YAML key and an attribute.

HuggingFace's own settings (`TrainingArguments`, `SFTConfig`) are not repeated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from fedtune.lists import split_ints, split_names, split_numbers

__all__ = [
    "AdapterArguments",
    "Arguments",
    "DataArguments",
    "FederationArguments",
    "ModelArguments",
    "RunArguments",
    "TransportArguments",
]

ARMS = ("centralized", "centralized_large_batch", "local", "fixed_global", "parity")
TRACKERS = ("tensorboard", "mlflow", "wandb")

T = TypeVar("T")


def setting(default: T, help: str, **metadata: Any) -> T:
    """A dataclass field with its `--help` text."""
    value: T = field(default=default, metadata={"help": help, **metadata})
    return value


@dataclass
class ModelArguments:
    """Base model."""

    model_name_or_path: str | None = setting(
        None, "Model directory or hub id. Default: the tiny model inside the package."
    )
    load_in_4bit: bool = setting(False, "QLoRA: quantize the base model to 4 bit (bitsandbytes).")
    load_in_8bit: bool = setting(False, "Quantize the base model to 8 bit (bitsandbytes).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "4-bit data type.")


@dataclass
class AdapterArguments:
    """What is trained, and so what travels."""

    peft_method: Literal[
        "lora", "dora", "p_tuning", "prompt_tuning", "prefix_tuning", "ia3", "none"
    ] = setting("lora", "Adapter kind; `none` trains and sends the full model.")
    lora_r: int = setting(
        8, "LoRA rank r. With --client_ranks it sets no rank, only the scaling alpha / r."
    )
    lora_alpha: float = setting(16, "LoRA alpha; the update is scaled by alpha / r.")
    lora_dropout: float = setting(0.0, "LoRA dropout.")
    lora_target_modules: str | None = setting(
        None, "Comma-separated module names, or `all-linear`. Default: PEFT's choice for the model."
    )
    use_rslora: bool = setting(False, "Rank-stabilized LoRA: scale by alpha / sqrt(r).")
    client_ranks: str | None = setting(
        None,
        "LoRA rank of each client, in order, comma-separated: 4,8,16. --lora_alpha and --lora_r "
        "then only set the scaling, which is the same for all.",
    )
    modules_to_save: str | None = setting(
        None, "Comma-separated modules that are trained in full and travel with the adapter."
    )
    num_virtual_tokens: int = setting(20, "Virtual tokens of p-tuning, prompt and prefix tuning.")
    encoder_hidden_size: int = setting(
        128, "Hidden size of the p-tuning encoder and the prefix projection."
    )
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = setting("MLP", "p-tuning encoder.")
    prefix_projection: bool = setting(False, "Project the prefix embeddings (prefix tuning).")
    init_adapter: str | None = setting(None, "Start from the adapter in this directory.")

    @property
    def ranks(self) -> list[int] | None:
        """Ranks named by `--client_ranks`; raises ConfigError."""
        return (
            None if self.client_ranks is None else split_ints(self.client_ranks, "--client_ranks")
        )

    def at_rank(self, rank: int) -> AdapterArguments:
        """The same adapter at another rank: alpha goes with it, so that the scaling stays."""
        factor = rank / self.lora_r
        alpha = self.lora_alpha * (math.sqrt(factor) if self.use_rslora else factor)
        return replace(self, lora_r=rank, lora_alpha=alpha)


@dataclass
class DataArguments:
    """Rows, prompts and who owns them."""

    dataset_name: str | None = setting(None, "Hub id of a data set (split `train`).")
    train_file: str | None = setting(
        None, "jsonl, json, csv, tsv or parquet file. Default: the corpus inside the package."
    )
    eval_file: str | None = setting(
        None, "Held-out file; without one, --eval_fraction is held out before partitioning."
    )
    eval_fraction: float = setting(0.1, "Share of the rows held out when there is no eval file.")
    max_rows: int | None = setting(None, "Use only the first N rows.")
    strict_length: bool = setting(
        False,
        "Refuse rows longer than --max_length or the model's context. Default: cut, counted, said.",
    )
    deduplicate: bool = setting(
        False,
        "Take duplicates out of training: rows equal to a held-out row, and repeats of a row.",
    )
    text_column: str | None = setting(None, "Text column. Default: found by name.")
    label_column: str | None = setting(None, "Label column. Default: found by name.")
    partition: Literal["iid", "dirichlet", "column", "size"] = setting(
        "iid", "How rows are dealt to the clients of a simulation."
    )
    partition_alpha: float = setting(0.5, "dirichlet: concentration; small is skewed.")
    partition_column: str | None = setting(
        None, "dirichlet: column whose mix is skewed (the label); column: natural owner of a row."
    )
    min_rows: int | None = setting(
        None, "Fewest rows a client may get. Default: one batch. dirichlet and size fill up to it."
    )


@dataclass
class FederationArguments:
    """Rounds, clients and the method."""

    engine: Literal["inline", "ray", "flower"] = setting(
        "inline",
        "inline: this process, one client after the other; ray: Flower's simulation; flower: a "
        "SuperLink, and a SuperNode and a trainer process per client, on this machine.",
    )
    num_clients: int = setting(3, "Clients of a simulation.")
    num_rounds: int = setting(3, "Rounds.")
    steps_per_round: int | None = setting(None, "Optimizer steps of a client per round.")
    epochs_per_round: float | None = setting(
        None, "Passes of a client over its rows per round. Default: 1, unless steps are given."
    )
    fraction_train: float = setting(1.0, "Share of the clients sampled in a round.")
    min_replies: str | None = setting(
        None, "Good updates a round needs: a number, or a fraction of those asked. Default: all."
    )
    max_client_weight: float = setting(
        0.5,
        "Largest share of a round's weights that one client may have, where three or more are "
        "asked; what is above is cut, and said. 1: no bound.",
    )
    max_update_norm: float | None = setting(
        None,
        "Largest norm of a client's update, its difference to what it was sent. Default: only 10 x "
        "the median of the last rounds bounds it.",
    )
    update_check: Literal["refuse", "clip"] = setting(
        "refuse",
        "An update whose norm is above its bound; refuse: is left out; clip: is scaled down to it.",
    )
    round_timeout_s: float = setting(3600.0, "Seconds until missing updates are given up.")
    max_failed_rounds: int = setting(
        2, "How many times one round may fail before the run ends with an error."
    )
    workflow: str = setting(
        "central",
        "What a round is. central: the server asks clients, and aggregates what comes back. Others "
        "come with packages of their own (entry points of the group fedtune.workflows).",
    )
    strategy: str = setting(
        "fedavg",
        "Method, or methods joined by `+`, one of each axis: fedprox, scaffold; fedbuff, fednova, "
        "krum, multikrum, median, trimmed_mean, fedit, ffa_lora, rolora, fedsa_lora, flora, "
        "fedex_lora, flexlora, hetlora, raflora; diloco, fedadagrad, fedadam, fedavgm, fedyogi. "
        "flwr:NAME: a strategy of Flower. Several, separated by commas, are run one by one and "
        "compared. See docs/methods.md.",
    )
    strategy_args: str | None = setting(
        None,
        "Settings of the method, such as mu=0.1,lr=0.01 or fedadam.lr=0.01. Of several strategies, "
        "each takes those that it has.",
    )
    weight_by: Literal["tokens", "examples", "uniform"] = setting(
        "tokens", "Weight of a client in the mean: what it trained on in the round."
    )
    client_state: Literal["carry", "reset"] = setting(
        "carry", "carry: optimizer, RNG and data position continue over rounds; reset: fresh."
    )
    client_delays: str | None = setting(
        None,
        "inline: simulated seconds that each client takes for a round, comma-separated. They "
        "decide in which order updates arrive; nothing waits.",
    )
    cpus_per_client: float = setting(1.0, "ray: CPUs that one client occupies.")
    gpus_per_client: float = setting(0.0, "ray: GPUs that one client occupies (may be < 1).")
    save_every_rounds: int = setting(1, "Write the server state every N rounds.")

    @property
    def delays(self) -> list[float] | None:
        """Numbers named by `--client_delays`; raises ConfigError."""
        text = self.client_delays
        return None if text is None else split_numbers(text, "--client_delays")

    @property
    def budget(self) -> tuple[int, float]:
        """Optimizer steps of a client per round, and passes over its rows; one of them is 0."""
        if self.steps_per_round is not None:
            return self.steps_per_round, 0.0
        return 0, 1.0 if self.epochs_per_round is None else self.epochs_per_round


@dataclass
class TransportArguments:
    """How parameters are written for the wire."""

    codec: Literal["none", "bf16", "fp16", "int8", "nf4", "fp4"] = setting(
        "none",
        "Quantized transport. Bytes a value, of fp32's 4: bf16 and fp16 2, int8 1.02, nf4 and fp4 "
        "0.52.",
    )
    codec_on: Literal["delta", "weights"] = setting(
        "delta",
        "delta: the difference to what the receiver has is coded; weights: the values themselves, "
        "which is coarser by as much as they are larger, for comparison.",
    )
    codec_direction: Literal["both", "up", "down"] = setting(
        "both", "up: only what clients send is coded; down: only what they receive."
    )
    error_feedback: bool | None = setting(
        None,
        "What the codec lost of a client's update goes with its next one. Default: with nf4 and "
        "fp4, where the method lets it.",
    )
    codec_args: str | None = setting(
        None,
        "Which tensors are coded, such as include=*lora_A*,exclude=*norm*,min_size=256. Globs over "
        "names may be repeated, without include all are candidates; min_size: fewest values of a "
        "tensor (256). What has one dimension or holds integers always travels as it is.",
    )


@dataclass
class RunArguments:
    """This run: repetitions, comparison, output."""

    config: str | None = setting(None, "YAML file with defaults; flags win.")
    seeds: str | None = setting(None, "Comma-separated seeds, one whole run each. Default: 42.")
    compare: str | None = setting(
        None, f"Arms to compare with, comma-separated: {', '.join(ARMS)}; or `all`, or `none`."
    )
    resume: bool = setting(False, "Continue the run in --output_dir from its last durable round.")
    overwrite: bool = setting(False, "Delete an earlier run in --output_dir first.")
    dry_run: bool = setting(False, "Print rows, steps, bytes and memory; train nothing.")
    track: str | None = setting(
        None, f"Log per-round server scalars to: {', '.join(TRACKERS)} (comma-separated)."
    )


@dataclass
class Arguments:
    """All groups of a run, as the recipe's functions receive them."""

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    federation: FederationArguments
    transport: TransportArguments
    run: RunArguments
    training: Any  # TrainingArguments or SFTConfig
    command: tuple[
        str, ...
    ] = ()  # this program and its flags, for clients in processes of their own
    hints: tuple[str, ...] = ()  # what is said of the settings where nothing is wrong with them

    @property
    def seeds(self) -> list[int]:
        """Seeds of this run, in order; `--seeds` or `--seed`."""
        if self.run.seeds is None:
            return [int(self.training.seed)]
        return split_ints(self.run.seeds, "--seeds")

    @property
    def strategies(self) -> list[str]:
        """Methods of `--strategy`, one whole run each."""
        return split_names(self.federation.strategy)

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms named by `--compare`, in the order of `ARMS`."""
        named = split_names(self.run.compare)
        return ARMS if named == ["all"] else tuple(arm for arm in ARMS if arm in named)


def sampled_clients(fraction_train: float, num_clients: int) -> int:
    """How many clients a round asks: the fraction rounded to the nearest, at least one."""
    return max(1, math.floor(fraction_train * num_clients + 0.5))
