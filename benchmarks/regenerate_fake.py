"""A chat server that costs almost nothing: `python -m benchmarks.regenerate_fake`, for `benchmarks.regenerate`.

It answers every request with the same text after a while, so what a client reaches with it is the client's own limit.
It speaks just enough HTTP/1.1, straight from the event loop: a framework would take more time than the client that is
measured. The port is printed; standard input is its lifetime, so it ends with whoever started it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

TOKENS = 320
TEXT = "an answer of several words, " * (TOKENS * 4 // 28)  # about four characters a token


def reply(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def completion() -> bytes:
    """With the fields of SGLang's own."""
    message = {"role": "assistant", "content": TEXT, "reasoning_content": None, "tool_calls": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "matched_stop": 2}
    usage = {"prompt_tokens": 60, "total_tokens": 60 + TOKENS, "completion_tokens": TOKENS}
    head = {"id": "0" * 32, "object": "chat.completion", "created": 1, "model": "fake"}
    return reply(json.dumps(head | {"choices": [choice], "usage": usage}).encode())


MODELS = reply(b'{"object": "list", "data": [{"id": "fake", "object": "model"}]}')
COMPLETION = completion()


class Connection(asyncio.Protocol):
    """One client's connection; its requests come one after another."""

    def __init__(self, delay_s: float):
        self._delay_s, self._received = delay_s, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < content_length(head):
            return
        self._received = b""
        if head.startswith(b"GET "):
            self._write(MODELS)
        else:
            asyncio.get_running_loop().call_later(self._delay_s, self._write, COMPLETION)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def content_length(head: bytes) -> int:
    name = b"\r\ncontent-length:"
    _, found, rest = head.lower().partition(name)
    return int(rest.split(b"\r\n", 1)[0]) if found else 0


async def serve(delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(delay_s), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regenerate_fake", description=__doc__.splitlines()[0])
    parser.add_argument("--delay", type=float, default=1.0, metavar="S", help="until an answer; default: %(default)s")
    asyncio.run(serve(parser.parse_args().delay))


if __name__ == "__main__":
    main()
