"""When requests are due: drawn beforehand, so that a slow server cannot put them off."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from attnserve_proto.commands import values
from numpy.typing import NDArray

Kind = Literal["poisson", "constant", "bursts"]

_ALLOWED = "poisson, constant or bursts:N, N requests at once, an integer, 2..100000"
_MOST_IN_A_BURST = 100_000


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A process of arrivals; its rate is given where it is drawn.

    Attributes:
        kind: `poisson`, as of independent callers; `constant`, equally spaced; `bursts`, Poisson
            bursts of `size` requests that are due at the same moment.
        size: requests of a burst; 1 of the others.
    """

    kind: Kind = "poisson"
    size: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.kind == "bursts" else self.kind

    def due_times(self, rate: float, seconds: float, seed: int = 0) -> NDArray[np.float64]:
        """When requests are due.

        Args:
            rate: requests a second, bursts or not.
            seconds: for so long.
            seed: of what is random.

        Returns:
            [N] float64, ascending, seconds from the start.
        """
        if self.kind == "constant":
            return np.arange(0, seconds * rate) / rate
        generator = np.random.default_rng([seed, 0x61727269])
        moments, last = [np.empty(0)], 0.0
        while last < seconds:
            gaps = generator.exponential(self.size / rate, 1000)
            moments.append(last + np.cumsum(gaps))
            last = float(moments[-1][-1])
        times = np.concatenate(moments)
        return np.repeat(times[times < seconds], self.size)


POISSON = Arrivals()
CONSTANT = Arrivals("constant")


def read_arrivals(given: str) -> Arrivals:
    """Read `poisson`, `constant` or `bursts:N`, for argparse.

    Raises:
        ArgumentTypeError: it is none of them.
    """
    kind, colon, size = given.partition(":")
    if kind in ("poisson", "constant") and not colon:
        return Arrivals(kind)  # type: ignore[arg-type]
    if kind != "bursts" or not size.isascii() or not size.isdigit() or len(size) > 6:
        values.refuse(given, _ALLOWED)
    if not 2 <= int(size) <= _MOST_IN_A_BURST:
        values.refuse(given, _ALLOWED)
    return Arrivals("bursts", int(size))
