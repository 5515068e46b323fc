"""Partitioning of numbers: into groups of equal sums over ranks, and of bounded sums within a rank.

Pure arithmetic on lists, so that every rank computes the same result without communication.
"""

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], num_groups: int) -> list[list[int]]:
    """Return positions in `num_groups` groups whose sums of costs are nearly equal.

    The largest differencing method of Karmarkar and Karp: the two most uneven partial partitions
    are joined, the largest group of one with the smallest of the other, until one partition
    remains.  Groups may differ in size, and be empty.

    >>> balance([8, 7, 6, 5, 4], 2)
    [[1, 3, 4], [0, 2]]
    """
    divisions = [
        (-cost, i, [(cost, [i])] + [(0.0, [])] * (num_groups - 1)) for i, cost in enumerate(costs)
    ]
    heapq.heapify(divisions)
    while len(divisions) > 1:
        _, order, one = heapq.heappop(divisions)
        _, _, other = heapq.heappop(divisions)
        joined = [
            (cost + more, here + there)
            for (cost, here), (more, there) in zip(one, reversed(other), strict=True)
        ]
        joined.sort(key=lambda group: -group[0])
        heapq.heappush(divisions, (joined[-1][0] - joined[0][0], order, joined))
    if not divisions:
        return [[] for _ in range(num_groups)]
    return [sorted(group) for _, group in divisions[0][2]]


def fill(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return positions in few bins of at most `capacity` each: first fit, in decreasing order.

    An item larger than the capacity gets a separate bin.

    >>> fill([5, 9, 7, 3, 1], capacity=10)
    [[1, 4], [2, 3], [0]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[position]
        place = next((b for b, free in enumerate(room) if size <= free), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(position)
        room[place] -= size
    return bins
