"""Speculative decoding: a tree of guesses in one step, then a commit of those that were right.

Guesses cost nothing here: what followed the last token where it stood before (prompt lookup). They
make a tree, whose every node is the decoder's next input if the way to it was right. One step
computes all of them; the server lets each see its ancestors alone. `commit` then keeps the path
that the decoder itself would have taken: the tokens are those of decoding one by one.

    attnserve-export core --out models --name llama-core --num-heads 8 --num-kv-heads 2 \
        --head-dim 32 --mask causal
    attnserve-server --repository models
    python examples/speculative_decode.py --target 127.0.0.1:8001 --model llama-core

Ends with 1 if the tokens are not those of the same decoder with its attention here and no cache.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

# Before NumPy is loaded: its matrices are small, and the server needs the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from attnserve_client import AttentionClient, Session
from attnserve_proto.commands import Parser, values
from small_decoder import VOCABULARY, Array, Heads, SmallDecoder


@dataclass
class Tree:
    """Tokens to try, parents before their children; the first one is certain.

    Attributes:
        ids: of each node.
        parents: node before each; -1: the last token that the session holds.
        depths: nodes above each.
    """

    ids: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that is this token."""
        for index, (parent, one) in enumerate(zip(self.parents, self.ids, strict=True)):
            if parent == node and one == token:
                return index
        return None

    def add(self, path: Sequence[int]) -> None:
        """Add a path of guesses below the first node; what is there already is shared."""
        node = 0
        for token in path:
            found = self.child(node, token)
            if found is None:
                self.ids.append(token)
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1)
                found = len(self.ids) - 1
            node = found


def guess(ids: Sequence[int], branches: int, depth: int) -> Tree:
    """What followed the last token where it stood before, the latest places first."""
    tree = Tree([ids[-1]])
    places = [at for at in range(len(ids) - 2, -1, -1) if ids[at] == ids[-1]]
    for at in places[:branches]:
        tree.add(ids[at + 1 : at + 1 + depth])
    return tree


def step(
    model: SmallDecoder,
    session: Session,
    ids: Sequence[int],
    depths: Sequence[int],
    parents: Sequence[int] | None = None,
) -> Array:
    """Hidden states [T, E] of new tokens; `depths` is their distance from the session's end."""
    positions = session.length + np.asarray(depths)
    hidden = model.embed(ids)
    for layer in range(model.num_layers):
        query, key, value = model.project(layer, hidden, positions)
        result = session.attend(layer, query, key, value, parents=parents)
        assert result.output is not None
        hidden = model.finish(layer, hidden, result.output)
    return hidden


def generate(
    model: SmallDecoder,
    session: Session,
    prompt: Sequence[int],
    new_tokens: int,
    branches: int,
    depth: int,
) -> tuple[list[int], int]:
    """Greedy decoding; the tokens, and how many steps they took."""
    ids = [*prompt, *model.next_ids(step(model, session, prompt, range(len(prompt)))[-1:])]
    steps = 1
    while len(ids) < len(prompt) + new_tokens:
        tree = guess(ids, branches, depth)
        best = model.next_ids(step(model, session, tree.ids, tree.depths, tree.parents))
        # Down the tree, as long as what comes next was guessed.
        path = [0]
        while (found := tree.child(path[-1], best[path[-1]])) is not None:
            path.append(found)
        session.commit(path)
        ids += [best[node] for node in path]
        steps += 1
    return ids[len(prompt) : len(prompt) + new_tokens], steps


def main() -> int:
    """Run the example."""
    options = _parser().parse_args()
    phrase = np.random.default_rng(options.seed).integers(0, VOCABULARY, 12).tolist()
    prompt = phrase * 3
    with AttentionClient(options.target) as client:
        model = SmallDecoder(Heads.of(client, options.model), options.layers, options.seed)
        nodes = 1 + options.branches * options.depth
        most = len(prompt) + options.new_tokens + options.depth + nodes
        with client.session(options.model, num_layers=options.layers, max_tokens=most) as session:
            tokens, steps = generate(
                model, session, prompt, options.new_tokens, options.branches, options.depth
            )
        scale = client.get_model(options.model).scale
    print(f"{len(tokens)} tokens in {steps} steps: {len(tokens) / steps:.2f} tokens a step")
    same = tokens == model.greedy(prompt, options.new_tokens, scale)
    print(f"the same tokens as with attention here and no cache: {'yes' if same else 'NO'}")
    return 0 if same else 1


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, most = parser.add_argument, 100_000
    add("--target", type=values.target, default="127.0.0.1:8001", help="the server")
    add("--model", type=values.name, default="llama-core", help="a causal core")
    add("--layers", type=values.integer(1, 1024), default=2, help="of the decoder")
    add("--new-tokens", type=values.integer(1, most), default=128, help="to generate")
    add("--branches", type=values.integer(1, 64), default=3, help="of the tree, at most")
    add("--depth", type=values.integer(1, 64), default=6, help="of the tree, at most")
    add("--seed", type=values.integer(0), default=0, help="of weights and prompt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
