"""Several short rows in one sequence."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of the given lengths (tokens, each at most `capacity`) put together, none cut.

    Best fit, longest first; rows stay in their order within a pack, and packs are in the order of
    their first rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    packs: list[list[int]] = []
    # (room, number) of each pack that isn't full, by room.
    rooms: list[tuple[int, int]] = []
    for row in order:
        place = bisect.bisect_left(rooms, (lengths[row], -1))
        if place == len(rooms):
            room, number = capacity, len(packs)
            packs.append([])
        else:
            room, number = rooms.pop(place)
        packs[number].append(row)
        if room > lengths[row]:
            bisect.insort(rooms, (room - lengths[row], number))
    return sorted(sorted(rows) for rows in packs)
