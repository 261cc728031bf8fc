"""Parameters that are spread over the processes of one training (FSDP2 keeps them as DTensors).

Every process of the mesh has to call these together, in the same order of tensors.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["copy_into", "is_sharded", "is_spread", "local_part", "whole"]


def is_spread() -> bool:
    """Whether the training has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it gathered from its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or the part of it that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_into(live: Tensor, value: Tensor) -> None:
    """Copy `value`, which every process holds whole, into the live tensor or its local part."""
    with torch.no_grad():
        if isinstance(live, DTensor):
            # No source rank: each process cuts its part out of its own copy, nothing is sent.
            value = distribute_tensor(
                value.to(live.device), live.device_mesh, live.placements, src_data_rank=None
            )
        live.copy_(value)
