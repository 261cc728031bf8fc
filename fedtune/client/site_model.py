"""The live model of a site: where its parameters come from, and where they rest.

run's folder      static tensors of `setup`
output_dir        fedtune_memory-*      what the method keeps at the client, by round
                  fedtune_reference-*   the run's first parameters, for DPO's reference
                  fedtune_adapter       the last adapter, where PEFT alone would not save all of it

A run that was stopped goes on in another folder, with the same output_dir. Only rank 0 has files.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flwr.app import RecordDict
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import Trainer

from fedtune.adapters import (
    Manifest,
    collect,
    collect_static,
    describe,
    export_adapter,
    load_static,
)
from fedtune.adapters import load as load_params
from fedtune.adapters.base_terms import base_terms
from fedtune.adapters.base_weights import read_base
from fedtune.adapters.fingerprint import Fingerprint
from fedtune.adapters.sharded import is_sharded
from fedtune.client import replies
from fedtune.client.client_round import completed, remembers
from fedtune.client.declared import declared
from fedtune.client.local import model_of
from fedtune.client.memory import ClientMemory, Kept
from fedtune.client.ranks import Ranks
from fedtune.client.replies import Sent
from fedtune.errors import RoundError
from fedtune.files import write_bytes
from fedtune.relay.folder import SitePlan
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.manifests import joined
from fedtune.transport.messages import EvaluateTask, RoundTask, arrays_of
from fedtune.transport.records import config_of

__all__ = ["SiteModel"]

log = logging.getLogger(__name__)

STATIC = "static.safetensors"
WHOLE = "fedtune_adapter"


class SiteModel:
    """The Trainer's model, as one run sees it; made before the Trainer wraps it.

    Its tensors may later be spread over processes.

    Args:
        steps: optimizer steps of a round.
    """

    def __init__(
        self, trainer: Trainer, plan: SitePlan, steps: int, ranks: Ranks, folder: Path
    ) -> None:
        self._trainer, self._plan, self._ranks = trainer, plan, ranks
        self.declared = declared(trainer, steps, ranks.count)
        self._static_file = folder / STATIC
        self.manifest: Manifest = ranks.together(lambda: describe(self.model))
        self._base = _base_of(self.model) if ranks.first else None
        static = self._saved(self._static_file)
        if static:  # a script that is started again is not set up again
            self.manifest = self.manifest.frozen(static)
            load_static(self.model, static, self.manifest)

    @property
    def model(self) -> nn.Module:
        """The live model."""
        return model_of(self._trainer)

    @property
    def collects(self) -> bool:
        """Whether this process has to collect the parameters: to send them, or with the others."""
        return self._ranks.first or is_sharded(self.model)

    def planned(self) -> RecordDict:
        """Who takes part, and with what."""
        return replies.planned(
            self._plan.client,
            evaluates=self._trainer.eval_dataset is not None,
            manifest=self.manifest,
            declared=self.declared,
            base=self._base,
        )

    def initial(self) -> RecordDict:
        """What the run may start from."""
        return replies.initial(collect(self.model), collect_static(self.model), self.manifest)

    def set_up(self, content: RecordDict) -> None:
        """Agree with the server; load the run's static tensors. Raises ManifestError."""
        self.manifest = replies.agree(replies.manifest_of(content), self.manifest)
        static = arrays_of(content)
        if static:
            load_static(self.model, static, self.manifest)
            if self._ranks.first:
                write_bytes(self._static_file, save(static))

    def show(self, content: RecordDict) -> None:
        """Load what is to be scored: the global parameters, with this client's own."""
        task, sent = EvaluateTask.of(content), Sent.of(content)
        self._put(Sent(completed(sent.params, self.recall(task), task.personal), sent.base))

    def last(self, content: RecordDict) -> Sent:
        """What the run ends with; what is not sent is the client's own, else stays as it is."""
        sent = Sent.of(content)
        number = int(str(config_of(content).get("resume_round", 0)))
        live = collect(self.model)
        absent = [name for name in self.manifest.entries if name not in sent.params]
        own = self._kept(number).personal if absent and number else {}
        params = {**{name: live[name] for name in absent}, **own, **sent.params}
        return Sent(params, sent.base if sent.params else base_terms(self.model))

    def end_with(self, last: Sent) -> None:
        """Leave this in the model."""
        self._put(last)

    def recall(self, task: RoundTask | EvaluateTask) -> Kept:
        """What this client kept from its last round that counted, on every rank."""
        return self._kept(task.resume_round if remembers(task) else 0)

    def remember(self, task: RoundTask, kept: Kept) -> None:
        """Keep this until the client's next round."""
        if self._ranks.first:
            self._memory.write(task.round, kept, (*task.keep_rounds, task.resume_round))

    def refer(self, round_number: int, content: RecordDict) -> None:
        """Give DPOTrainer the run's first global as adapter `ref`, which it compares with."""
        if "ref" not in getattr(self.model, "peft_config", {}):
            return
        file = self._output / f"fedtune_reference-{self._plan.run}.safetensors"
        if round_number == 0:
            params = arrays_of(content)
            if self._ranks.first:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(file, save(params))
        else:
            params = self._saved(file)
        if not params:
            raise RoundError(
                f"{self._plan.client}: expected the run's first parameters for the adapter `ref`, "
                f"received those of round {round_number}. With DPO all sites join before round 1, "
                "or give the trainer peft_config= instead of an adapter."
            )
        load_params(self.model, params, self.manifest, adapter_name="ref")

    def export_whole(self) -> Path | None:
        """Write adapter and additions to the base as one adapter, where there are such additions.

        PEFT's `save_pretrained` knows of the adapter alone.
        """
        terms = base_terms(self.model)
        if not terms:
            return None
        if self.collects:
            live = {**collect_static(self.model), **collect(self.model)}
        if self._ranks.first:
            adapter = {name: live[name] for name in self.manifest.entries}
            static = {name: live[name] for name in self.manifest.static}
            params, manifest = joined(adapter, self.manifest, Cumulative.of(terms, {}))
            export_adapter(self._output / WHOLE, params, static, manifest)
        return self._output / WHOLE

    def _put(self, what: Sent) -> None:
        load_params(self.model, what.params, self.manifest, base=what.base)

    def _kept(self, number: int) -> Kept:
        tensors = self._saved(self._memory.file(number)) if number else {}
        if number and not tensors:
            raise self._memory.lost(number)
        return Kept.of(tensors)

    @property
    def _memory(self) -> ClientMemory:
        return ClientMemory(self._output / f"fedtune_memory-{self._plan.run}-{self._plan.client}")

    @property
    def _output(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    def _saved(self, file: Path) -> dict[str, Tensor]:
        """Tensors kept in a file, which only rank 0 may have; empty for none."""
        data = self._ranks.share(file.read_bytes() if self._ranks.first and file.is_file() else b"")
        return load(data) if data else {}


def _base_of(model: nn.Module) -> Fingerprint:
    """Read once, before a Trainer spreads the model over processes."""
    started = time.perf_counter()
    base = read_base(model)
    seconds = time.perf_counter() - started
    log.info("%d frozen tensors read in %.1f s", len(base.tensors), seconds)
    return base
