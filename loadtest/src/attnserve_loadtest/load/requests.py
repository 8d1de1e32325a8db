"""What a caller asks for: an answer, or a session that generates token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Single:
    """One request with one answer: `Attend`, or `AttendTokens` of a token model.

    Attributes:
        seq_len: queries and keys alike, or tokens.
    """

    seq_len: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A KV session: a prompt, then tokens one by one, perhaps with a rest of its user half-way.

    Attributes:
        prompt: tokens that it begins with.
        tokens: generated.
        think: seconds that its user rests once half of the tokens are there; in no latency.
        blocks: of a trace: what stands for each block of its prompt, so that requests whose first
            blocks are equal begin alike.
        block_tokens: tokens of each.
    """

    prompt: int
    tokens: int
    think: float = 0.0
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


Request = Single | Generation


@dataclass(frozen=True, slots=True)
class Span:
    """Integers from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, random: np.random.Generator) -> int:
        """One of them, each as likely."""
        return int(random.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class Mix:
    """From what requests are drawn.

    Attributes:
        seq_lens: lengths of requests with one answer.
        weights: how often each comes, one for each; they need not add up to anything.
        sessions: share of sessions among the requests, 0..1.
        prompt, tokens: of a session, drawn evenly.
        think: mean seconds of a session's rest, exponential; 0: none.
    """

    seq_lens: tuple[int, ...] = (1,)
    weights: tuple[float, ...] = (1.0,)
    sessions: float = 0.0
    prompt: Span = Span(32, 512)
    tokens: Span = Span(16, 128)
    think: float = 0.0

    def draw(self, count: int, random: np.random.Generator) -> list[Request]:
        """That many requests."""
        weights = np.array(self.weights) / sum(self.weights)
        lengths = random.choice(self.seq_lens, count, p=weights)
        is_session = random.random(count) < self.sessions
        return [
            self._session(random) if session else Single(int(seq_len))
            for seq_len, session in zip(lengths, is_session, strict=True)
        ]

    def lengths(self) -> Sequence[int]:
        """Of the requests with one answer; none if there are only sessions."""
        return self.seq_lens if self.sessions < 1 else ()

    def _session(self, random: np.random.Generator) -> Generation:
        think = float(random.exponential(self.think)) if self.think else 0.0
        return Generation(self.prompt.draw(random), self.tokens.draw(random), think)
