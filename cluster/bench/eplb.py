"""The peer of the placement planner: the public EPLB algorithm, written anew from its published description.

https://github.com/deepseek-ai/EPLB: groups are packed to nodes, each node makes its redundant experts, and these are
packed to its devices. Kept as published: float32 torch tensors, Python loops over layers and items, the greedy choices.

    X layers (or layers x nodes)   E experts   P physical experts (copies)   N nodes
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_packing(weight_XE: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Items to packs of equal item count, heaviest first into the lightest pack that has room.

    Returns each item's pack and its rank in the pack, both [X, E].
    """
    num_rows, num_items = weight_XE.shape
    assert num_items % num_packs == 0
    per_pack = num_items // num_packs
    if per_pack == 1:
        return torch.arange(num_items).expand(weight_XE.shape), torch.zeros_like(weight_XE, dtype=torch.int64)
    order_XE = weight_XE.sort(-1, descending=True).indices
    pack_XE = torch.full_like(weight_XE, -1, dtype=torch.int64)
    rank_XE = torch.full_like(pack_XE, -1)
    for row in range(num_rows):
        pack_weight: list[Tensor | float] = [0.0] * num_packs
        pack_items = [0] * num_packs
        for item in order_XE[row]:
            open_packs = (pack for pack in range(num_packs) if pack_items[pack] < per_pack)
            pack = min(open_packs, key=pack_weight.__getitem__)
            pack_XE[row, item] = pack
            rank_XE[row, item] = pack_items[pack]
            pack_weight[pack] += weight_XE[row, item]
            pack_items[pack] += 1
    return pack_XE, rank_XE


def replicate_experts(weight_XE: Tensor, num_physical: int) -> tuple[Tensor, Tensor]:
    """One copy after the other to the expert with the most load a copy.

    Returns the expert of each copy [X, P] and the copies of each expert [X, E].
    """
    num_rows, num_experts = weight_XE.shape
    assert num_physical >= num_experts
    expert_XP = torch.arange(num_physical).repeat(num_rows, 1)
    count_XE = torch.ones(num_rows, num_experts, dtype=torch.int64)
    rows = torch.arange(num_rows)
    for copy in range(num_experts, num_physical):
        hottest_X = (weight_XE / count_XE).max(dim=-1).indices
        expert_XP[:, copy] = hottest_X
        count_XE[rows, hottest_X] += 1
    return expert_XP, count_XE


def rebalance_experts_hierarchical(
    weight_XE: Tensor, num_physical: int, num_groups: int, num_nodes: int, num_devices: int
) -> Tensor:
    """Expert in each physical place [X, P]; device d has places [d * P / num_devices, (d + 1) * P / num_devices)."""
    num_layers, num_experts = weight_XE.shape
    group_size, groups_per_node = num_experts // num_groups, num_groups // num_nodes
    assert num_experts % num_groups == num_groups % num_nodes == 0
    assert num_devices % num_nodes == num_physical % num_devices == 0

    # Groups to nodes; `expert_XM` lists the experts node by node.
    node_XG, rank_XG = balanced_packing(weight_XE.unflatten(-1, (num_groups, group_size)).sum(-1), num_nodes)
    first_XG = (node_XG * groups_per_node + rank_XG) * group_size
    expert_XM = _inverse((first_XG.unsqueeze(-1) + torch.arange(group_size)).flatten(-2))

    # Redundant experts of each node: rows are (layer, node) from here on.
    per_node = num_experts // num_nodes
    weight_XM = weight_XE.gather(-1, expert_XM).view(-1, per_node)
    local_XP, count_XM = replicate_experts(weight_XM, num_physical // num_nodes)

    # Copies to the devices of their node.
    copy_weight_XP = (weight_XM / count_XM).gather(-1, local_XP)
    device_XP, slot_XP = balanced_packing(copy_weight_XP, num_devices // num_nodes)
    local_XP = local_XP.gather(-1, _inverse(device_XP * (num_physical // num_devices) + slot_XP))
    start_N1 = torch.arange(0, num_experts, per_node).unsqueeze(-1)
    return expert_XM.gather(-1, (local_XP.view(num_layers, num_nodes, -1) + start_N1).flatten(-2))


def rebalance_experts(
    weight_XE: Tensor, num_physical: int, num_groups: int, num_nodes: int, num_devices: int
) -> Tensor:
    """Hierarchical where the groups divide over the nodes, else global: one group on one node."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    return rebalance_experts_hierarchical(weight_XE.float(), num_physical, num_groups, num_nodes, num_devices)


def _inverse(permutation_XE: Tensor) -> Tensor:
    positions = torch.arange(permutation_XE.size(1)).expand(permutation_XE.shape)
    return torch.empty_like(permutation_XE).scatter_(1, permutation_XE, positions)
