"""The schedule of the paper: copies in a shuffle buffer, with a bound on how long one stays."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtricks.echo import _checks
from jaxtricks.echo._streams import Output, Stream

_DRAWS = 1024  # random numbers made at a time
_AGE = 4  # an element is drawn at the latest when so many times the pool's size have been read after it


class PoolStream(Stream):
    """Random draws from a pool of copies.

    While the pool fills, what is read goes out at once and leaves its other copies there: the first
    outputs wait for nothing and are all different. Then each draw is made up for by reading.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        """Make a stream; seed: of the draws, the rest as Stream has it."""
        self._seed = seed
        super().__init__(*args, **kwargs)

    @property
    def min_distance(self) -> int:
        """Nothing is promised."""
        return 1

    def _clear(self) -> None:
        self._drawn = 0
        self._filling = True
        self._waiting: list[tuple[int, int]] = []  # (ordinal, copy), in no order
        self._left: collections.Counter[int] = collections.Counter()
        self._live: dict[int, Any] = {}
        self._numbers: list[float] = []

    def _decide(self) -> list[Output]:
        if self._filling:
            pulled = self._pull()
            if pulled is not None:
                i, _, element = pulled
                self._keep(*pulled, begin=1)
                self._filling = len(self._waiting) < self.distance
                return [(i, 0, element)]
            self._filling = False
        while len(self._waiting) < self.distance and (pulled := self._pull()) is not None:
            self._keep(*pulled, begin=0)
        if not self._waiting:
            raise StopIteration
        return [self._draw()]

    def _keep(self, i: int, copies: int, element: Any, begin: int) -> None:
        if copies > begin:
            self._live[i] = element
            self._left[i] = copies - begin
            self._waiting += [(i, k) for k in range(begin, copies)]
        if self._first not in self._live:
            self._forget()

    def _draw(self) -> Output:
        waiting = self._waiting
        if not self._numbers:
            self._numbers = self._draw_numbers()
        self._drawn += 1
        at = int(self._numbers.pop() * len(waiting))
        if self._read - self._first > _AGE * self.distance:
            at = min(range(len(waiting)), key=waiting.__getitem__)
        i, k = waiting[at]
        waiting[at] = waiting[-1]
        waiting.pop()
        element = self._live[i]
        self._left[i] -= 1
        if not self._left[i]:
            del self._left[i], self._live[i]
            if i == self._first:
                self._forget()
        return i, k, element

    def _forget(self) -> None:
        first = self._first
        while first < self._read - 1 and first not in self._live:
            first += 1
        self._forget_until(first)

    def _draw_numbers(self) -> list[float]:
        """The numbers of this block of draws that are left, last first."""
        block, at = divmod(self._drawn, _DRAWS)
        # A step of the counter makes four numbers: blocks must lie further apart than that.
        bits = np.random.Philox(key=self._seed, counter=block * _DRAWS)
        return np.random.Generator(bits).random(_DRAWS)[at:][::-1].tolist()

    def _position(self) -> dict[str, Any]:
        most = self._copies.most
        codes = [i * most + k for i, k in self._waiting]
        room = self._choose(0) + most
        return {
            "read": self._read,
            "drawn": self._drawn,
            "filling": self._filling,
            "waiting": codes + [-1] * (room - len(codes)),
            "distance": self.distance,
        }

    def _check_position(self, state: Mapping[str, Any], first: int) -> None:
        most, room = self._copies.most, self._choose(0) + self._copies.most
        length = self._elements if self._elements >= 0 else _checks.MOST_READ
        read = _checks.field(state, "read", least=first, most=length)
        _checks.field(state, "drawn")
        if not isinstance(state["filling"], bool):
            raise _checks.damaged("filling", state["filling"])
        codes = _checks.numbers(state, "waiting", lambda code: -1 <= code < read * most)
        waiting = [code for code in codes if code >= 0]
        oldest = min([*(code // most for code in waiting), max(read - 1, 0)])
        if len(codes) != room or len(set(waiting)) != len(waiting) or oldest != first:
            raise _checks.damaged("waiting", state["waiting"])

    def _replay_to(self, position: Mapping[str, Any]) -> list[Output]:
        most = self._copies.most
        self.distance, self._filling = position["distance"], position["filling"]
        self._waiting = [divmod(code, most) for code in position["waiting"] if code >= 0]
        left = collections.Counter(i for i, _ in self._waiting)
        while self._read < position["read"]:
            pulled = self._pull()
            if pulled is None:
                raise StopIteration
            i, copies, element = pulled
            if left[i] > copies:
                raise _checks.damaged("waiting", position["waiting"])
            if left[i]:
                self._live[i], self._left[i] = element, left[i]
        self._drawn = position["drawn"]
        return []
