"""The wire format: weights taken out of a serialized model and put back, whatever field they are in."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.graph.report import describe
from ffnfold.graph.wire import MARKER, SMALLEST, Buffer, Payload, Scanner, WireError, encode_varint, expand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

LONG = 600  # elements; as float32 more than SMALLEST bytes


def scan(data: bytes) -> tuple[onnx.ModelProto, list[Payload]]:
    payloads: list[Payload] = []

    def key(payload: Payload) -> str:
        payloads.append(payload)
        return str(len(payloads) - 1)

    return onnx.ModelProto.FromString(Scanner(Buffer(data), key).skeleton()), payloads


def restored(data: bytes) -> onnx.ModelProto:
    """``data`` scanned, parsed, serialized and expanded again."""
    skeleton, payloads = scan(data)

    def weight(key: str) -> tuple[bytes, int, int]:
        payload = payloads[int(key)]
        return data[payload.offset:payload.offset + payload.nbytes], payload.nbytes, payload.field

    pieces, size = expand(skeleton.SerializeToString(), weight)
    whole = b"".join(pieces)
    assert len(whole) == size
    return onnx.ModelProto.FromString(whole)


def model_with(*tensors: TensorProto, nodes=(), functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], functions=list(functions))


def floats(name: str = "w", count: int = LONG) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(1).standard_normal(count).astype(np.float32), name)


def listed(kind: int, name: str = "w", count: int = LONG) -> TensorProto:
    return helper.make_tensor(name, kind, [count], np.arange(count) % 50)


@pytest.mark.parametrize(("tensor", "field"), [
    (floats(), 9), (listed(TensorProto.FLOAT), 4), (listed(TensorProto.DOUBLE), 10)],
    ids=["raw_data", "float_data", "double_data"])
def test_numbers_are_taken_out_and_come_back(tensor, field):
    model = model_with(tensor)
    skeleton, payloads = scan(model.SerializeToString())
    assert [payload.field for payload in payloads] == [field]
    assert payloads[0].nbytes == LONG * (8 if field == 10 else 4)
    stub = skeleton.graph.initializer[0]
    assert (stub.name, list(stub.dims), stub.data_type) == ("w", [LONG], tensor.data_type)
    assert [stub.raw_data, len(stub.float_data), len(stub.double_data)] == [b"", 0, 0]
    assert [(entry.key, entry.value) for entry in stub.external_data] == [(MARKER, "0")]
    assert restored(model.SerializeToString()) == model


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT64, TensorProto.UINT64, TensorProto.FLOAT16,
                                  TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.BOOL])
def test_numbers_that_are_varints_stay_in_the_model(kind):
    model = model_with(listed(kind))
    skeleton, payloads = scan(model.SerializeToString())
    assert payloads == []
    assert skeleton == model
    assert restored(model.SerializeToString()) == model


def test_short_tensors_stay_in_the_model():
    short, long = floats("short", SMALLEST // 4 - 1), floats("long", SMALLEST // 4)
    skeleton, payloads = scan(model_with(short, long).SerializeToString())
    assert skeleton.graph.initializer[0] == short
    assert len(payloads) == 1


def test_floats_in_several_pieces_are_one_list():
    halves = [TensorProto(float_data=floats(count=LONG).float_data or np.arange(LONG)), TensorProto(float_data=np.ones(LONG))]
    head = TensorProto(name="w", dims=[2 * LONG], data_type=TensorProto.FLOAT).SerializeToString()
    tensor = head + b"".join(half.SerializeToString() for half in halves)
    data = _around(tensor)
    assert list(onnx.ModelProto.FromString(data).graph.initializer[0].float_data) == [*range(LONG), *[1] * LONG]
    assert restored(data) == onnx.ModelProto.FromString(data)


def test_of_two_raw_data_the_last_one_counts():
    pieces = [TensorProto(name="w", dims=[LONG], data_type=1).SerializeToString()]
    pieces += [TensorProto(raw_data=bytes([fill]) * LONG * 4).SerializeToString() for fill in (1, 2)]
    data = _around(b"".join(pieces))
    assert restored(data) == onnx.ModelProto.FromString(data)
    assert restored(data).graph.initializer[0].raw_data == b"\x02" * LONG * 4


def test_a_graph_in_two_pieces_is_one_graph():
    first, second = model_with(floats("a")), onnx.ModelProto()
    second.graph.initializer.append(floats("b"))
    data = first.SerializeToString() + second.SerializeToString()
    assert [tensor.name for tensor in restored(data).graph.initializer] == ["a", "b"]
    assert restored(data) == onnx.ModelProto.FromString(data)


def test_fields_that_are_not_known_survive():
    unknown = encode_varint(1000 << 3 | 2) + encode_varint(3) + b"abc"
    data = _around(floats().SerializeToString() + unknown) + unknown
    whole = restored(data).SerializeToString()
    assert whole.count(unknown) == 2
    assert whole == onnx.ModelProto.FromString(data).SerializeToString()


def test_weights_are_found_wherever_a_tensor_can_be():
    body = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=floats("in_constant")),
                              helper.make_node("Add", ["inner", "in_body"], ["out"])],
                             "body", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], [floats("in_body")])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    constant = helper.make_node("Constant", [], ["z"], value=floats("in_function"))
    function = helper.make_function("local", "f", [], ["z"], [constant], [helper.make_opsetid("", 17)])
    several = helper.make_node("Many", [], ["m"], domain="local")
    attribute = several.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.extend([floats("first"), floats("second")])
    model = model_with(floats("outer"), nodes=[*nodes, several], functions=[function])
    model.training_info.add().algorithm.initializer.append(floats("in_training"))
    skeleton, payloads = scan(model.SerializeToString())
    assert len(payloads) == 1 + 2 * 2 + 1 + 2 + 1
    assert len(skeleton.SerializeToString()) < 4000
    assert restored(model.SerializeToString()) == model


def test_a_text_that_reads_like_a_marker_is_left_alone():
    model = model_with(floats(), nodes=[helper.make_node("Identity", ["w"], ["y"], name=MARKER, doc_string=MARKER)])
    model.graph.doc_string = MARKER
    assert restored(model.SerializeToString()) == model


@pytest.mark.parametrize("data", [b"\x00", b"\x0a", b"\x0a\x05abc", b"\xff" * 20, b"\x0b", b"\x3a" + b"\xff" * 8 + b"\x01"])
def test_what_is_no_message_is_said_to_be_none(data):
    with pytest.raises(WireError):
        Scanner(Buffer(data), lambda payload: "0").skeleton()


def test_messages_nested_without_end_are_refused():
    inner = b""
    for _ in range(300):  # a graph in an attribute of a node in a graph …, each long enough to be looked into
        graph = _field(1, _field(5, _field(6, inner))) + _field(10, b" " * SMALLEST)
        inner = graph
    with pytest.raises(WireError, match="nested"):
        scan(_field(7, inner))


@given(st.lists(st.binary(max_size=SMALLEST * 2), max_size=5), st.data())
def test_any_tensor_of_any_bytes_comes_back(contents, data):
    tensors = []
    for number, content in enumerate(contents):
        tensor = TensorProto(name=f"t{number}", dims=[len(content)], data_type=TensorProto.UINT8, raw_data=content)
        tensor.doc_string = data.draw(st.text(max_size=20))
        tensors.append(tensor)
    model = model_with(*tensors)
    assert restored(model.SerializeToString()) == model


class Bytes(bytes):
    """Bytes that do not fill the screen when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def small_model() -> bytes:
    """A block with an If beside it: weights in the graph, in a Constant node and in a body."""
    s = transformer(1, 8, 32)
    s.nodes[-1].input[0] = "chosen"
    body = [helper.make_graph([helper.make_node("Constant", [], [f"k{n}"], value=floats(f"k{n}", 8 if n else 320)),
                               helper.make_node("ReduceMax", [f"k{n}"], [f"m{n}"], keepdims=0),
                               helper.make_node("Add", ["stream_0", f"m{n}"], [f"o{n}"])], "body", [],
                              [helper.make_tensor_value_info(f"o{n}", TensorProto.FLOAT, None)]) for n in (0, 1)]
    s.nodes.insert(-1, helper.make_node("If", [s.weight(np.asarray(True))], ["chosen"], then_branch=body[0], else_branch=body[1]))
    return Bytes(s.model().SerializeToString())


def readable(path) -> bool:
    """Whether the file is read as a model; anything but an InputError of one line goes through to the test."""
    try:
        Model.load(path).session_parts()
        describe(path)
    except InputError as error:
        said = str(error)
    else:
        return True
    assert len(said.splitlines()) == 1
    assert str(path) in said
    return False


def test_a_model_cut_off_anywhere_is_an_input_error_or_still_a_model(small_model, tmp_path):
    path = tmp_path / "cut.onnx"
    outcomes = []
    for end in range(len(small_model)):
        path.write_bytes(small_model[:end])
        outcomes.append(readable(path))
    assert sum(outcomes) < 20  # where a whole field ends nothing may be missed
    path.write_bytes(small_model)
    assert readable(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_are_an_input_error_or_still_a_model(small_model, tmp_path, data):
    damaged = bytearray(small_model)
    for _ in range(data.draw(st.integers(1, 4))):
        # most bytes are weights, where nothing can go wrong: take half of the places from the rest
        place = data.draw(st.one_of(st.integers(0, len(damaged) - 1), st.sampled_from(_structure(small_model))))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    readable(path)


def _structure(data: bytes) -> list[int]:
    """Places of bytes that are not weights."""
    payloads = scan(data)[1]
    return [n for n in range(len(data)) if not any(p.offset <= n < p.offset + p.nbytes for p in payloads)]


def _field(number: int, content: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(content)) + content


def _around(tensor: bytes) -> bytes:
    """A model around the bytes of an initializer."""
    return Sketch().model().SerializeToString() + _field(7, _field(5, tensor))
