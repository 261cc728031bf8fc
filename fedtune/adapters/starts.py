"""Starts of LoRA (`init_lora_weights`) that are not the same at every site.

    pissa, olora       take the first adapter out of the base; PEFT does so again where it loads the
                       adapter. Its decomposition draws nothing, so equal bases stay equal.
    pissa_niter_N      draws at random what it takes out
    corda, lora_ga     take out what the site's own rows say, and PEFT cannot do so again
    loftq              leaves a quantized rest that is in no checkpoint
    eva                takes directions from the site's own rows, which the first global replaces;
                       with rho > 1 ranks as well

What a start leaves of the base is compared besides, as all of the base is (`fingerprint.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["refused_start", "rewrites_base"]

REWRITES = ("pissa", "olora", "corda", "loftq", "lora_ga")
SAME_EVERYWHERE = ("pissa", "olora")
WHY = {
    "pissa_niter": "which draws at random what it takes out of the base weights",
    "corda": "which takes out of the base weights what this site's own rows say",
    "lora_ga": "which takes out of the base weights what this site's own rows say",
    "loftq": "whose quantized rest of the base weights is in no checkpoint",
}
RHO = 2.0  # PEFT's default


def rewrites_base(config: Mapping[str, Any]) -> str:
    """The start, where it moves a part of the base weights into the adapter; else empty."""
    start = str(config.get("init_lora_weights") or "").lower()
    return start if start.startswith(REWRITES) else ""


def refused_start(config: Mapping[str, Any]) -> str:
    """Why sites with this PEFT config would not train the same model, in one line; else empty."""
    start = rewrites_base(config)
    if start and start not in SAME_EVERYWHERE:
        why = next(WHY[kind] for kind in WHY if start.startswith(kind))
        return (
            "init_lora_weights: expected a start that leaves the same base at every site, received "
            f"{start}, {why}. Use pissa or olora, whose decomposition is the same everywhere, or "
            "leave it out."
        )
    rho = (config.get("eva_config") or {}).get("rho", RHO)
    if config.get("init_lora_weights") == "eva" and rho != 1:
        return (
            "init_lora_weights eva: expected the same ranks at every site, received an eva_config "
            f"with rho {rho:g}, which deals ranks by this site's own rows. Set "
            "eva_config=EvaConfig(rho=1.0)."
        )
    return ""
