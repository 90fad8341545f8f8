"""Framing: how the messages of `contracts` travel over a stream socket.

A frame is a 4-byte little-endian length and a msgpack map {"type": class name, field: value, ...}. Values are checked
against the dataclass's annotations on arrival, strictly: no conversion from string to number, no unknown field. File
descriptors ride on a frame's first byte. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from feature_bridge.contracts import MESSAGES, SCHEMA_VERSION, BridgeSpec

_LENGTH = struct.Struct("<I")
_MAX_FRAME = 1 << 29  # far above any index; a longer one is not our protocol
_MAX_FDS = 4
_READ_BYTES = 1 << 16  # a larger buffer is mapped and unmapped by malloc, which costs more than most messages
_CLASSES = {cls.__name__: cls for cls in MESSAGES}
_FIELDS = {cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in (*MESSAGES, BridgeSpec)}


class WireError(ValueError):
    """What arrived is not a message of this schema."""


# --- bytes <-> dataclasses --------------------------------------------------------------------------------------------


def encode(message: Any) -> bytes:
    """A message of `contracts.MESSAGES` as one msgpack map."""
    name = type(message).__name__
    assert _CLASSES.get(name) is type(message), f"{name} is not a message"
    fields = {field: getattr(message, field) for field in _FIELDS[type(message)]}
    return msgspec.msgpack.encode({"type": name, **fields})


def decode(payload: bytes) -> Any:
    """The inverse of `encode`.

    Raises:
      WireError: in one sentence, for an unknown type, another schema version, or a field that does not fit.
    """
    try:
        fields = msgspec.msgpack.decode(payload)
    except msgspec.DecodeError as error:
        raise WireError(f"a frame from the other side is not msgpack ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise WireError("a frame from the other side has no message type")
    name = fields.pop("type")
    if name not in _CLASSES:
        raise WireError(f"message type {name!r} is unknown here: trainer and bridge are of different versions")
    return _convert(fields, _CLASSES[name])


def dump_spec(spec: BridgeSpec) -> bytes:
    """The spec as a JSON document."""
    return msgspec.json.encode(spec)


def parse_spec(document: bytes) -> BridgeSpec:
    """The inverse of `dump_spec`.

    Raises:
      WireError: in one sentence.
    """
    try:
        fields = msgspec.json.decode(document)
    except msgspec.DecodeError as error:
        raise WireError(f"the bridge's spec is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise WireError("the bridge's spec is not a JSON object")
    return _convert(fields, BridgeSpec)


def _convert(fields: dict[str, Any], cls: type) -> Any:
    known = _FIELDS[cls]
    # The version first: a message of another version may not fit the dataclass for that very reason.
    if "schema_version" in known and fields.get("schema_version") != SCHEMA_VERSION:
        raise WireError(
            f"{cls.__name__} has schema version {fields.get('schema_version')!r}, this side speaks {SCHEMA_VERSION}: "
            "install the same version of feature_bridge in the trainer's and the bridge's environment"
        )
    if unknown := sorted(fields.keys() - set(known)):
        raise WireError(f"{cls.__name__} has no field {unknown[0]!r}: trainer and bridge are of different versions")
    try:
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError as error:
        raise WireError(f"{cls.__name__} does not fit the schema: {error}") from error


# --- a connection -----------------------------------------------------------------------------------------------------


class Connection:
    """Messages over a connected stream socket. `send` may be called from any thread, `receive` from one.

    Attributes:
      spin: `receive` asks again and again instead of sleeping. Waking up takes a tenth of a millisecond, and a GPU that
        has nothing to do costs more than a core.
    """

    def __init__(self, sock: socket.socket):
        self.spin = False
        sock.setblocking(True)
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray()
        self._send_lock = threading.Lock()
        self._fds: list[int] = []

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends one message, with file descriptors beside it.

        Raises:
          OSError: the other side is gone.
        """
        payload = encode(message)
        frame = memoryview(_LENGTH.pack(len(payload)) + payload)
        with self._send_lock:
            sent = socket.send_fds(self._socket, [frame], fds) if fds else 0
            self._socket.sendall(frame[sent:])

    def receive(self, timeout: float | None = None) -> Any | None:
        """The next message; None when `timeout` seconds (None: no limit) pass without a byte.

        Raises:
          EOFError: the other side is gone.
          WireError: see `decode`.
        """
        while (payload := self._next_frame()) is None:
            if not self._readable(timeout):
                return None
            self._read()
        return decode(payload)

    def _readable(self, timeout: float | None) -> bool:
        if not self.spin or timeout is None:
            return bool(self._poll.poll(None if timeout is None else max(0.0, timeout) * 1000))
        deadline = time.monotonic() + timeout
        while not self._poll.poll(0):
            if time.monotonic() >= deadline:
                return False
            os.sched_yield()
        return True

    def take_fd(self) -> int:
        """The file descriptor that came first; the caller closes it."""
        if not self._fds:
            raise WireError("a file descriptor was announced and did not come")
        return self._fds.pop(0)

    def close(self) -> None:
        self._socket.close()

    def _next_frame(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > _MAX_FRAME:
            raise WireError(f"a frame of {length} bytes was announced, which cannot be one of our messages")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return payload

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_FDS)
        except OSError as error:
            raise EOFError("the connection broke") from error
        for fd in fds:
            os.set_inheritable(fd, False)
        self._fds += fds
        if not data:
            raise EOFError("the connection ended")
        self._buffer += data
