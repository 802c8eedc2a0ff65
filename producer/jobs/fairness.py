"""Whose job goes next: a fair order over lanes, counted in work and not in rows.

The farm's work is shared in three levels: between priorities by ``Priority.share``, between the tenants of a priority
by their weight, between the batches of a tenant by theirs. Each node of this tree has a clock: the work that it was
given, over its weight. Of those who wait, the one with the least on its clock goes next (start-time fair queueing:
Goyal, Vin and Cheng, 1996; here in levels). So a lower priority always gets its part, and nobody waits for ever.

Knows no SQL and no time. It lives in the leader's memory alone: a new leader starts all clocks at nought.

Invariants:

- nobody saves up: who comes back after it had nothing to do starts at its siblings' clock;
- nobody sheds its debt by going away for a moment: a clock is kept until its siblings have passed it;
- what is kept is bounded by the lanes that wait, and the few that are in debt.
"""

from collections.abc import Collection, Hashable, Iterable
from heapq import heapify, heapreplace
from itertools import count
from math import inf
from typing import Any

from producer.jobs.contract import Lane, Next, Priority

LEAST_WEIGHT, MOST_WEIGHT = 1e-3, 1e3
"""A weight beyond these counts as these: nought would stop the farm, infinity would stop it for everybody else."""


class Node:
    """A priority, or a tenant in it: waits for its part of what the node above it gets. The root is above itself."""

    __slots__ = ("above", "children", "clock", "key", "order", "seen", "served_at", "since", "weight")

    def __init__(self, above: "Node | None", key: Hashable, order: int) -> None:
        self.above = above or self
        self.key = key  # among its siblings
        self.order = order  # decides between equal clocks
        self.weight = 1.0
        self.clock = 0.0  # work that it was given, over its weight
        self.served_at = 0.0  # the clock of the child that was served last, when its turn came
        self.seen = 0  # the last look at which it waited
        self.since = 0  # and the one from which on it has
        self.children: dict[Hashable, Any] = {}


class Leaf(Node):
    """A lane."""

    __slots__ = ("lane_id", "last_work")

    def __init__(self, above: Node, lane_id: int, order: int) -> None:
        super().__init__(above, lane_id, order)
        self.lane_id = lane_id
        self.last_work: float | None = None  # of its last job: the next one's is not known before it is taken


class FairOrder:
    """The clocks of all who wait. ``pick`` looks ahead; ``charge`` moves the clocks by what was really taken."""

    def __init__(self) -> None:
        self._orders = count()
        self._root = Node(None, None, next(self._orders))
        self._leaves: dict[int, Leaf] = {}
        self._looks = 1
        self._last_work = 1.0
        for priority in Priority:  # of equal clocks the more urgent goes first
            self._child(self._root, priority).weight = priority.share

    def pick(self, lanes: Collection[Lane], room: int, reach: int = 0) -> list[int]:
        """Of which lane each of the next ``room`` jobs should be, in the order of their turns.

        ``lanes`` are all that may hold a job. That they hold enough is a guess, and so is the work of their next jobs.
        Where they may not, those who have the next ``reach`` turns are named behind, if they were not, once each.
        """
        if not lanes:
            return []
        self._look(lanes)
        turns = Turns(self._root, self._last_work)
        picked = [turns.next().lane_id for _ in range(room)]
        named = set(picked)
        for _ in range(reach):
            if len(named) == len(lanes):
                break
            if (lane_id := turns.next().lane_id) not in named:
                named.add(lane_id)
                picked.append(lane_id)
        return picked

    def charge(self, messages: Iterable[Next]) -> None:
        """These jobs were taken, from lanes that the last ``pick`` was given."""
        for message in messages:
            leaf = self._leaves[message.lane_id]
            leaf.last_work = self._last_work = message.work
            _serve(leaf, message.work)

    def _look(self, lanes: Iterable[Lane]) -> None:
        """See who waits, who is new or back, and who is gone."""
        self._looks += 1
        changed = {self._root, *self._root.children.values()}
        for lane in lanes:
            leaf = self._leaves.get(lane.id) or self._joined(lane)
            leaf.weight, leaf.above.weight = lane.batch_weight, lane.tenant_weight
            node: Node = leaf
            while node.seen != self._looks:
                if node.seen != self._looks - 1:
                    node.since = self._looks
                    changed.add(node.above)
                node.seen = self._looks
                node = node.above
        changed.update(leaf.above for leaf in self._leaves.values() if leaf.seen != self._looks)
        for node in changed:
            self._settle(node)

    def _joined(self, lane: Lane) -> Leaf:
        tenant = self._child(self._root.children[lane.priority], lane.tenant)
        leaf = Leaf(tenant, lane.id, next(self._orders))
        tenant.children[lane.id] = self._leaves[lane.id] = leaf
        return leaf

    def _child(self, above: Node, key: Hashable) -> Node:
        if key not in above.children:
            above.children[key] = Node(above, key, next(self._orders))
        child: Node = above.children[key]
        return child

    def _settle(self, node: Node) -> None:
        """Who is new or back starts where its siblings are; who is gone is dropped once they have passed it."""
        waiting = [child for child in node.children.values() if child.seen == self._looks]
        start = min((child.clock for child in waiting if child.since < self._looks), default=node.served_at)
        for child in waiting:
            if child.since == self._looks:
                child.clock = max(child.clock, start)
        if len(waiting) < len(node.children):
            self._drop([child for child in node.children.values() if child.seen != self._looks], start)

    def _drop(self, gone: Iterable[Node], start: float) -> None:
        """Those that ``start`` has passed, and all that is below any of them; the priorities themselves stay."""
        for node in gone:
            if node.clock <= start and node.above is not self._root:
                self._drop(list(node.children.values()), inf)
                del node.above.children[node.key]
                if isinstance(node, Leaf):
                    del self._leaves[node.lane_id]


class Turns:
    """The order in which those below a node would be served, as far as is known now. Moves no clock."""

    def __init__(self, node: Node, last_work: float) -> None:
        self._last_work = last_work
        self._below: dict[Node, Turns] = {}
        self._waiting = [
            (child.clock, child.order, child) for child in node.children.values() if child.seen == node.seen
        ]
        heapify(self._waiting)

    def next(self) -> Leaf:
        """The lane whose turn is next. Its job counts as its last one did, the first of a lane as anybody's last."""
        clock, order, child = self._waiting[0]
        leaf: Leaf = child if isinstance(child, Leaf) else self._turns_below(child).next()
        work = self._last_work if leaf.last_work is None else leaf.last_work
        heapreplace(self._waiting, (clock + work / _bounded(child.weight), order, child))
        return leaf

    def _turns_below(self, child: Node) -> "Turns":
        if child not in self._below:
            self._below[child] = Turns(child, self._last_work)
        return self._below[child]


def _serve(node: Node, work: float) -> None:
    while node.above is not node:
        node.above.served_at = max(node.above.served_at, node.clock)
        node.clock += work / _bounded(node.weight)
        node = node.above


def _bounded(weight: float) -> float:
    return min(MOST_WEIGHT, max(LEAST_WEIGHT, weight))
