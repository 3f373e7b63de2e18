"""
FSDP2, for models whose weights, gradients and optimizer state do not fit one GPU: `--shard fsdp`.
"""
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method


def split_over_processes(model, offload=False):
    """Split a DiT's parameters over all processes, block by block, in place; with offload they wait in the
    processor's memory."""
    policy = {}
    if offload:
        policy['offload_policy'] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in model.blocks:
        fully_shard(block, **policy)
    model = fully_shard(model, **policy)
    register_fsdp_forward_method(model, 'encode')      # of a split network: what a rollout calls first
    return model
