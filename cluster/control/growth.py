"""Whether the expert actors may hold what a growth adds. Pure."""

from __future__ import annotations

from actors.errors import InvalidInput
from actors.values import Placement


def check_room(placement: Placement, num_experts: int, max_groups: int) -> None:
    """New groups lie where the groups lie that they are made of, as evenly as these. `max_groups` as in
    `ExpertsConfig`: 0 sets no bound. `InvalidInput` if the actors cannot hold all groups with as many copies.
    """
    held = sum(len(holders) for holders in placement.holders)
    wanted = -(-held * num_experts // placement.num_experts)
    room = max_groups * len(placement.actors)
    if max_groups and wanted > room:
        raise InvalidInput(
            f"would be {wanted} expert groups with their copies, and {len(placement.actors)} actors may hold {room}",
            field="num_experts",
            value=num_experts,
            remedy="raise experts.max_groups, or add expert actors first",
        )
