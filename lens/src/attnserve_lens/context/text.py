"""Contexts with a fact in them: ordinary sentences, one that matters among them, and a question.

The filler is written by a small grammar, so that there is as much of it as is wanted and no
sentence comes twice within a context: repeated text draws attention to itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Each trial takes one: what is hidden in the context, and what asks for it at the end.
FACTS = (
    ("The captain buried the treasure under the old lighthouse.",
     "Where did the captain bury the treasure?"),
    ("Doctor Alvarez keeps her violin in the greenhouse.",
     "Where does Doctor Alvarez keep her violin?"),
    ("The password of the archive is marmalade.",
     "What is the password of the archive?"),
    ("Professor Lindqvist was born in Reykjavik.",
     "In which city was Professor Lindqvist born?"),
    ("The blue train to Geneva leaves at midnight.",
     "When does the blue train to Geneva leave?"),
    ("The telescope was invented by a maker of spectacles.",
     "Who invented the telescope?"),
    ("The thief hid the diamond inside a loaf of bread.",
     "Where did the thief hide the diamond?"),
    ("Queen Isolde gave the dragon a silver bell.",
     "What did Queen Isolde give the dragon?"),
)  # fmt: skip

# fmt: off
_SUBJECTS = (
    "farmer", "neighbour", "teacher", "gardener", "baker", "student", "painter", "driver",
    "librarian", "carpenter", "tailor", "nurse", "miller", "clerk", "postman", "fisherman",
)
_VERBS = (
    "repaired", "carried", "painted", "cleaned", "borrowed", "sold", "noticed", "weighed",
    "measured", "covered", "moved", "described", "washed", "counted", "wrapped", "sorted",
)
_OBJECTS = (
    "ladder", "basket", "chair", "window", "blanket", "barrel", "kettle", "fence", "lamp",
    "carpet", "bucket", "table", "wheel", "curtain", "shovel", "bottle",
)
_PLACES = (
    "kitchen", "market", "valley", "station", "orchard", "harbour", "school", "barn", "village",
    "bridge", "meadow", "workshop", "garden", "square", "mill", "forest",
)
_TIMES = (
    "in the morning", "after lunch", "on Monday", "before the rain", "last week", "at noon",
    "in spring", "during the fair", "every evening", "on a cold day", "once", "again",
)
# fmt: on

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Context:
    """One context as token ids, and where its parts lie.

    Attributes:
        ids: the whole: the model's own tokens, filler, fact, filler, question.
        fact: positions of the fact, from and to (exclusive).
        question: positions of the question, likewise.
        filler: positions of all filler tokens.
        depth: where the fact begins within the filler, 0 (first) to 1 (last), as it came out.
    """

    ids: tuple[int, ...]
    fact: tuple[int, int]
    question: tuple[int, int]
    filler: tuple[int, ...]
    depth: float


@dataclass(frozen=True, slots=True)
class Pieces:
    """Token ids to build contexts of one trial from.

    Attributes:
        opening, closing: what the model adds around a text.
        fact, question: without those.
        filler: sentences, as many as the longest context takes.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    fact: tuple[int, ...]
    question: tuple[int, ...]
    filler: tuple[tuple[int, ...], ...]

    @property
    def shortest(self) -> int:
        """Tokens of a context whose filler is as long as the fact."""
        fixed = len(self.opening) + len(self.closing) + len(self.question)
        return fixed + 2 * len(self.fact)

    def context(self, seq_len: int, depth: float) -> Context:
        """The context of a length, with the fact at a depth.

        Args:
            seq_len: tokens in all, `shortest` at least.
            depth: 0 puts the fact first, 1 right before the question. It goes to the nearest end
                of a filler sentence.
        """
        fixed = len(self.opening) + len(self.fact) + len(self.question) + len(self.closing)
        room = seq_len - fixed
        flat = [token for sentence in self.filler for token in sentence][:room]
        ends = np.cumsum([0, *map(len, self.filler)])
        ends = np.append(ends[ends < room], room)
        before = int(ends[np.abs(ends - depth * room).argmin()])
        fact = len(self.opening) + before
        question = seq_len - len(self.closing) - len(self.question)
        ids = [*self.opening, *flat[:before], *self.fact, *flat[before:], *self.question]
        after = range(fact + len(self.fact), question)
        return Context(
            ids=(*ids, *self.closing),
            fact=(fact, fact + len(self.fact)),
            question=(question, question + len(self.question)),
            filler=(*range(len(self.opening), fact), *after),
            depth=before / room,
        )


def sentences(generator: np.random.Generator, count: int) -> list[str]:
    """So many different sentences of filler."""
    lists = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES, _TIMES)
    sizes = [len(words) for words in lists]
    total = int(np.prod(sizes))
    found = []
    for number in generator.choice(total, size=min(count, total), replace=False):
        words = [each[at] for each, at in zip(lists, np.unravel_index(number, sizes), strict=True)]
        subject, verb, thing, place, time = words
        found.append(f"The {subject} {verb} a {thing} near the {place} {time}.")
    return found


def text_pieces(
    encode: Encode, seq_len: int, trial: int, seed: int, filler: Sequence[str] = ()
) -> Pieces | None:
    """Pieces of text for one trial.

    Args:
        encode: texts to token ids, the model's own tokens included.
        seq_len: of the longest context.
        trial: which one: it picks the fact and the filler.
        seed: of the filler.
        filler: sentences to take instead of the grammar's, in an order of the trial's own.

    Returns:
        The pieces; None where the tokenizer makes the same ids of different words.
    """
    generator = np.random.default_rng((seed, trial))
    given = list(filler) or sentences(generator, seq_len // 4 + 8)
    if filler:
        given = [given[at] for at in generator.permutation(len(given))]
    statement, asked = FACTS[trial % len(FACTS)]
    first, second, *rest = encode(["lighthouse", "violin", statement, asked, *given])
    if first == second:
        return None
    opening = _common(first, second)
    closing = _common(first[::-1], second[::-1])

    def bare(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[opening : len(ids) - closing])

    return Pieces(
        opening=tuple(first[:opening]),
        closing=tuple(first[len(first) - closing :]),
        fact=bare(rest[0]),
        question=bare(rest[1]),
        filler=tuple(map(bare, rest[2:])),
    )


def random_pieces(vocab_size: int, seq_len: int, trial: int, seed: int) -> Pieces:
    """Random ids in the shape of a text, for models without a tokenizer.

    The question repeats half of the fact, as a question does, in an order of its own.
    """
    generator = np.random.default_rng((seed, trial))

    def draw(count: int) -> tuple[int, ...]:
        return tuple(int(each) for each in generator.integers(0, vocab_size, count))

    fact = draw(10)
    shared = tuple(int(each) for each in generator.permutation(fact)[:5])
    filler = tuple(draw(11) for _ in range(seq_len // 11 + 1))
    return Pieces((), (), fact, (*shared, *draw(3)), filler)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return same
