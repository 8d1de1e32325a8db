"""Attention apart from all other layers: two microbatches in flight.

A decoder's projections and feed-forward layers run here, in NumPy; its attention and its cache are
in the service, and only the new tokens' query, key and value travel. While one half of the
sequences waits for its attention, the other half computes: neither side stands idle.

    attnserve-export core --out models --name llama-core --num-heads 8 --num-kv-heads 2 \
        --head-dim 32 --mask causal
    attnserve-server --repository models
    python examples/disaggregated_decode.py --target 127.0.0.1:8001 --model llama-core

Ends with 1 if the tokens are not those of the same decoder with its attention here and no cache.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

# Before NumPy is loaded: its matrices are small, and the server needs the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from attnserve_client import AttentionClient, Session
from attnserve_proto.commands import Parser, values
from small_decoder import VOCABULARY, Heads, SmallDecoder


def generate(
    client: AttentionClient,
    model: SmallDecoder,
    sessions: Sequence[Session],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> list[list[int]]:
    """Greedy decoding of a microbatch: its prompts in one step, then a token of each in a step."""
    generated: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    with client.batch(sessions) as batch:
        for _ in range(new_tokens):
            lengths = [len(ids) for ids in pending]
            positions = np.concatenate(
                [
                    session.length + np.arange(length)
                    for session, length in zip(sessions, lengths, strict=True)
                ]
            )
            hidden = model.embed([one for ids in pending for one in ids])
            for layer in range(model.num_layers):
                query, key, value = model.project(layer, hidden, positions)
                result = batch.attend(layer, query, key, value, new_tokens=lengths)
                assert result.output is not None
                hidden = model.finish(layer, hidden, result.output)
            last = [end - 1 for end in accumulate(lengths)]
            pending = [[one] for one in model.next_ids(hidden[last])]
            for ids, new in zip(generated, pending, strict=True):
                ids += new
    return generated


def main() -> int:
    """Run the example."""
    options = _parser().parse_args()
    generator = np.random.default_rng(options.seed)
    prompts = [
        generator.integers(0, VOCABULARY, int(length)).tolist()
        for length in generator.integers(4, 48, options.sequences)
    ]
    halves = [prompts[0::2], prompts[1::2]]
    with AttentionClient(options.target) as client:
        model = SmallDecoder(Heads.of(client, options.model), options.layers, options.seed)
        most = max(len(prompt) for prompt in prompts) + options.new_tokens
        opened = [
            client.sessions(len(half), options.model, num_layers=options.layers, max_tokens=most)
            for half in halves
        ]
        started = time.perf_counter()
        # Each microbatch has a thread: NumPy and the wait for an answer let the other one run.
        with ThreadPoolExecutor(2) as threads:
            work = [
                threads.submit(generate, client, model, sessions, half, options.new_tokens)
                for sessions, half in zip(opened, halves, strict=True)
            ]
            first, second = (each.result() for each in work)
        took = time.perf_counter() - started
        for session in (*opened[0], *opened[1]):
            session.close()
        scale = client.get_model(options.model).scale
    tokens = options.sequences * options.new_tokens
    print(f"{tokens} tokens of {options.sequences} sequences, {options.layers} layers: ", end="")
    print(f"{tokens / took:.0f} tokens/s")
    same = all(
        ids == model.greedy(prompt, options.new_tokens, scale)
        for half, generated in zip(halves, (first, second), strict=True)
        for prompt, ids in zip(half, generated, strict=True)
    )
    print(f"the same tokens as with attention here and no cache: {'yes' if same else 'NO'}")
    return 0 if same else 1


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, most = parser.add_argument, 100_000
    add("--target", type=values.target, default="127.0.0.1:8001", help="the server")
    add("--model", type=values.name, default="llama-core", help="a causal core")
    add("--layers", type=values.integer(1, 1024), default=4, help="of the decoder")
    add("--sequences", type=values.integer(2, 1024), default=8, help="at least 2")
    add("--new-tokens", type=values.integer(1, most), default=32, help="of each sequence")
    add("--seed", type=values.integer(0), default=0, help="of weights and prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
