"""Wedged runs of a transformer and of a session's layer: their callers are told as others are."""

import json
import shutil
from pathlib import Path

import grpc
import numpy as np
import one_graph
import onnx
import pytest
import serving
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from decode_streams import Refused, Stream, layer_of

pytestmark = pytest.mark.needs_library
OPTIONS = ["--max-run-seconds", "0.5", "--wedged-exit-seconds", "2", "--concurrency", "1"]


def wedge(path: Path, given: str, above: int, output: str) -> None:
    """Let a graph compute for many minutes, in one node, if an input has a number above some.

    Args:
        path: of the graph; its manifest, beside it, comes to know the new one.
        given: the input.
        above: the number.
        output: what comes late then, of three dimensions.
    """
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["quick" if name == output else name for name in node.output]
    added = onnx.parser.parse_graph(f"""
        added (float[a, b, c] quick, float[n] {given}) => (float[a, b, c] {output}) {{
            numbers = Cast <to = 1> ({given})
            most = ReduceMax <keepdims = 0> (numbers)
            bound = Constant <value_float = {above}.0> ()
            slow = Greater (most, bound)
            {output} = If (slow) <
                then_branch = late () => (float[a, b, c] taken) {{
                    {one_graph.late_mean("Expand (most, size)")}
                    taken = Add (quick, mean) }},
                else_branch = soon () => (float[a, b, c] kept) {{ kept = Identity (quick) }}> }}""")
    model.graph.node.extend(added.node)
    onnx.save(model, path)
    manifest = json.loads((path.parent / "model.json").read_text())
    manifest["files"][path.name] = one_graph.entry_of(path)
    (path.parent / "model.json").write_text(json.dumps(manifest))


def test_a_step_of_a_session(tmp_path: Path) -> None:
    wedge(serving.write_causal(tmp_path) / "causal/1/model.paged.onnx", "query", 100, "output")
    rows = np.ones((2, serving.HEADS, serving.DIM), np.float32)
    with serving.process(tmp_path, *OPTIONS) as server, Stream(server.address) as stream:
        ids = stream.open(num_layers=1)
        stream.begin(1, ids, [2])
        # The first of its kind: what is known to be short runs on the thread of its connection.
        with pytest.raises(Refused, match=r"^UNAVAILABLE: .*does not end"):
            stream.ask(attend_layer=layer_of(1, 0, (200 * rows, rows, rows)))
        assert server.popen.wait(30) == 70


def test_a_run_of_a_transformer(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "bert", tmp_path / "bert")
    for name in ("model.onnx", "model.native.onnx"):
        wedge(tmp_path / "bert/1" / name, "input_ids", 30, "last_hidden_state")
    with (
        serving.process(tmp_path, *OPTIONS) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        attend = pb_grpc.AttentionServiceStub(channel).AttendTokens

        def request(number: int) -> pb.AttendTokensRequest:
            tokens = pb.TokenBatch(sequences=[pb.TokenSequence(ids=[2, number, 3])])
            return pb.AttendTokensRequest(model="bert", tokens=tokens)

        attend(request(30))
        with pytest.raises(grpc.RpcError) as told:
            attend(request(31))
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "does not end" in told.value.details()
        assert server.popen.wait(30) == 70
