"""Every message survives the trip; what is not a message is one sentence."""

import dataclasses
import os
import socket
import struct
import threading

import msgspec
import pytest
from fake_worker import make_spec

from feature_bridge import wire
from feature_bridge.contracts import (
    MESSAGES,
    SCHEMA_VERSION,
    Check,
    Checked,
    CheckedSystem,
    Decode,
    Decoded,
    DecodedSample,
    Failure,
    Fill,
    Filled,
    FilledRow,
    IndexTable,
    Ping,
    Pong,
    Ready,
    Release,
    RingMemory,
    Row,
    SharedMatrix,
    SharedWeights,
    Shutdown,
    Skip,
    TargetInfo,
)

INFO = TargetInfo(path="p", backend="b 1", num_layers=3, hidden_size=8, vocab_size=9, capture="c", stand_ins=("x",))
TABLE = IndexTable(
    digest="0f",
    lengths=bytes(range(256)),
    supervised=b"",
    num_images=b"\x00\xff",
    num_videos=b"\x01\x00",
    sample_ids=("ä", "b"),
    skipped=(Skip(where="f.jsonl:3", reason="broken"),),
    counts={"lines": 2**40},
)
EXAMPLES = (
    Fill(request_id=1, split="train", rows=(Row(row_id=2, samples=(3, 4)), Row(row_id=5, samples=()))),
    Release(slot=0, generation=2**33),
    Decode(request_id=3, draft_path="d", samples=(1,), max_new_tokens=5),
    Shutdown(),
    Ready(schema_version=SCHEMA_VERSION, target=INFO, indexes={"train": TABLE}, num_slots=2, feature_width=16),
    RingMemory(num_bytes=4096, cuda_handle=b"\x00" * 64),
    RingMemory(num_bytes=4096),
    SharedWeights(
        embedding=SharedMatrix(dtype="bfloat16", shape=(11, 3), cuda_handle=b"\x01" * 64, offset=512),
        head=SharedMatrix(dtype="float32", shape=(11, 3), cuda_handle=b"\x02" * 64, offset=0),
        gpu_uuid="GPU-1",
    ),
    SharedWeights(reason="no"),
    Filled(
        request_id=1,
        slot=1,
        generation=3,
        rows=(FilledRow(row_id=2, num_tokens=7, samples=(3,), skipped=(Skip(where="4", reason="gone"),)),),
        seconds=0.25,
    ),
    Decoded(
        request_id=3,
        samples=(DecodedSample(sample=1, tokens=(1, 2), target_tokens=(1, 2), accept_lens=(0, 3)),),
        seconds=1.5,
    ),
    Check(request_id=4, draft_path="/d", inputs_path="/i", systems=("torch", "z-lab"), embedding_dtype="bfloat16"),
    Checked(
        request_id=4,
        systems=(
            CheckedSystem(
                name="torch",
                status="ran",
                note="2.13",
                outputs_path="/o",
                fields={"rope_theta": 1e7, "target_layer_ids": [1, 5]},
                weights={"fc.weight": "ab"},
            ),
            CheckedSystem(name="sglang", status="not installed"),
        ),
        seconds=0.5,
    ),
    Failure(request_id=None, message="no"),
    Ping(),
    Pong(),
)


@pytest.fixture(params=["sleeping", "spinning"])
def pair(request):
    left, right = map(wire.Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    left.spin = right.spin = request.param == "spinning"
    yield left, right
    left.close()
    right.close()


def test_every_message_arrives_as_it_was_sent(pair):
    assert {type(message) for message in EXAMPLES} == set(MESSAGES)
    for message in EXAMPLES:
        pair[0].send(message)
    for message in EXAMPLES:
        assert pair[1].receive(10) == message
    assert pair[1].receive(0) is None


def test_frames_in_pieces_and_frames_larger_than_the_sockets_buffer():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = wire.Connection(right)
    large = dataclasses.replace(EXAMPLES[4], indexes={"train": dataclasses.replace(TABLE, lengths=bytes(3_000_000))})
    payload = wire.encode(EXAMPLES[0])
    frame = struct.pack("<I", len(payload)) + payload
    for byte in frame[:-1]:
        left.send(bytes([byte]))
        assert connection.receive(0) is None
    sender = threading.Thread(target=lambda: (left.sendall(frame[-1:]), wire.Connection(left).send(large)))
    sender.start()
    assert connection.receive(10) == EXAMPLES[0]
    assert connection.receive(10) == large
    sender.join()
    left.close()
    with pytest.raises(EOFError):
        connection.receive(10)
    connection.close()


def test_a_file_descriptor_comes_with_its_message(pair):
    source = os.memfd_create("test")
    os.write(source, b"hello")
    pair[0].send(Shutdown())
    pair[0].send(RingMemory(num_bytes=5), [source])
    os.close(source)
    assert pair[1].receive(10) == Shutdown()
    assert pair[1].receive(10) == RingMemory(num_bytes=5)
    arrived = pair[1].take_fd()
    assert os.pread(arrived, 9, 0) == b"hello"
    assert not os.get_inheritable(arrived)
    os.close(arrived)
    with pytest.raises(wire.WireError, match="did not come"):
        pair[1].take_fd()


def pack(**fields) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"\xc1", "not msgpack"),
        (msgspec.msgpack.encode([1]), "no message type"),
        (pack(slot=1, generation=2), "no message type"),
        (pack(type="Explode"), "message type 'Explode' is unknown here"),
        (pack(type="BridgeSpec"), "message type 'BridgeSpec' is unknown here"),
        (pack(type="Release", slot="1", generation=2), r"Release does not fit the schema: .*int.*slot"),
        (pack(type="Release", slot=1.0, generation=2), "Release does not fit the schema"),
        (pack(type="Release", slot=1), r"Release does not fit the schema: .*generation"),
        (pack(type="Release", slot=1, generation=2, force=True), "Release has no field 'force'"),
        (pack(type="Fill", request_id=1, split="test", rows=[]), r"Fill does not fit the schema: .*split"),
        (pack(type="Fill", request_id=1, split="train", rows=[{"row_id": 1}]), r"samples.*rows"),
        (pack(type="Ready", schema_version=0, new_field=1), "Ready has schema version 0, this side speaks"),
    ],
)
def test_what_is_no_message_is_one_sentence(payload, sentence):
    with pytest.raises(wire.WireError, match=sentence) as caught:
        wire.decode(payload)
    assert "\n" not in str(caught.value)


def test_a_stream_that_is_not_ours(pair):
    pair[0]._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(wire.WireError, match="cannot be one of our messages"):
        pair[1].receive(10)


def test_the_spec_is_a_json_document():
    spec = make_spec()
    assert wire.parse_spec(wire.dump_spec(spec)) == spec
    document = msgspec.json.decode(wire.dump_spec(spec))
    for change, sentence in (
        ({"schema_version": 0}, "BridgeSpec has schema version 0, this side speaks"),
        ({"num_slot": 3}, "BridgeSpec has no field 'num_slot'"),
        ({"row_tokens": "21"}, r"BridgeSpec does not fit the schema: .*row_tokens"),
    ):
        with pytest.raises(wire.WireError, match=sentence):
            wire.parse_spec(msgspec.json.encode({**document, **change}))
    with pytest.raises(wire.WireError, match="not JSON"):
        wire.parse_spec(b"{")
    with pytest.raises(wire.WireError, match="not a JSON object"):
        wire.parse_spec(b"3")
