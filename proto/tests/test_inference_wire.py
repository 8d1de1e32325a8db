"""The protocol's messages: the encoding without copies, and the numbers that clients expect."""

import contextlib

import pytest
from attnserve_proto import inference_wire
from attnserve_proto.inference import open_inference_pb2 as pb
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

words = st.text(max_size=20)
blobs = st.lists(st.binary(max_size=400), max_size=5)
tensors = st.lists(st.tuples(words, st.lists(st.integers(0, 2**40), max_size=4)), max_size=4)


@given(words, words, tensors, blobs, st.dictionaries(words, st.integers(-(2**63), 2**63 - 1)))
def test_split_takes_apart_what_a_client_serialised(
    model: str, request_id: str, inputs: list, raw: list[bytes], parameters: dict[str, int]
) -> None:
    sent = service_pb2.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=raw)
    for name, shape in inputs:
        sent.inputs.add(name=name, datatype="FP32", shape=shape)
    for name, value in parameters.items():
        sent.parameters[name].int64_param = value
    request, views = inference_wire.split(sent.SerializeToString())
    assert [bytes(view) for view in views] == raw
    assert not request.raw_input_contents
    request.raw_input_contents.extend(raw)
    assert service_pb2.ModelInferRequest.FromString(request.SerializeToString()) == sent


def test_raw_contents_between_other_fields_are_found() -> None:
    first = pb.ModelInferRequest(raw_input_contents=[b"ab"]).SerializeToString()
    name = pb.ModelInferRequest(model_name="m").SerializeToString()
    request, views = inference_wire.split(first + name + first)
    assert request == pb.ModelInferRequest(model_name="m")
    assert [bytes(view) for view in views] == [b"ab", b"ab"]


def test_raw_contents_of_another_wire_type_are_unknown_fields() -> None:
    request, views = inference_wire.split(b"\x38\x05" + b"\x0a\x01m")
    assert request.model_name == "m"
    assert views == []


@given(words, tensors, blobs)
def test_join_gives_what_a_client_parses(model: str, outputs: list, raw: list[bytes]) -> None:
    response = pb.ModelInferResponse(model_name=model)
    expected = service_pb2.ModelInferResponse(model_name=model, raw_output_contents=raw)
    for name, shape in outputs:
        response.outputs.add(name=name, shape=shape)
        expected.outputs.add(name=name, shape=shape)
    joined = inference_wire.join(response, raw)
    assert service_pb2.ModelInferResponse.FromString(joined) == expected
    streamed = service_pb2.ModelStreamInferResponse.FromString(
        inference_wire.join_stream(response, raw)
    )
    assert streamed == service_pb2.ModelStreamInferResponse(infer_response=expected)


@given(st.binary(max_size=60))
def test_garbage_is_a_decode_error_or_a_message_never_anything_else(garbage: bytes) -> None:
    with contextlib.suppress(DecodeError):
        inference_wire.split(garbage)


def test_a_length_beyond_the_message_is_refused() -> None:
    with pytest.raises(DecodeError, match="cut off"):
        inference_wire.split(b"\x3a\x7fabc")


def test_every_field_and_method_is_the_clients() -> None:
    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name}
    theirs |= model_config_pb2.DESCRIPTOR.message_types_by_name
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        assert_fields_known(message, theirs[name])
    for name, enum in pb.DESCRIPTOR.enum_types_by_name.items():
        known = model_config_pb2.DESCRIPTOR.enum_types_by_name[name]
        assert [(v.name, v.number) for v in enum.values] == [
            (v.name, v.number) for v in known.values
        ]
    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        known = service.methods_by_name[method.name]
        assert method.input_type.full_name == known.input_type.full_name
        assert method.output_type.full_name == known.output_type.full_name
        assert method.client_streaming == known.client_streaming


def assert_fields_known(ours: Descriptor, theirs: Descriptor) -> None:
    assert ours.full_name == theirs.full_name
    for field in ours.fields:
        assert description(field) == description(theirs.fields_by_number[field.number])
    for nested in ours.nested_types:
        assert_fields_known(nested, theirs.nested_types_by_name[nested.name])


def description(field: FieldDescriptor) -> tuple[object, ...]:
    of = field.message_type or field.enum_type
    oneof = field.containing_oneof.name if field.containing_oneof else None
    return field.name, field.type, field.is_repeated, of and of.full_name, oneof
