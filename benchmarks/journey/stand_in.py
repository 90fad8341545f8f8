"""A chat server in SGLang's place, for --quick: it knows the embedded conversations, and answers as they do.

    python -m benchmarks.journey.stand_in --port PORT

Their answers are the embedded target's own, so what comes of them can be replayed and decoded. Pictures are told apart.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from benchmarks.journey.settings import TINY

Key = tuple[tuple[str, str], ...]


def piece(part: Mapping[str, Any]) -> str:
    """A part of a message as text; a picture as the digest of its bytes."""
    if "text" in part:
        return part["text"]
    url = part["image_url"]["url"]
    head, _, body = url.partition(",")
    data = base64.b64decode(body) if head.startswith("data:") else (TINY / url).read_bytes()
    return hashlib.sha256(data).hexdigest()


def key_of(messages: Sequence[Mapping[str, Any]]) -> Key:
    """What was said so far."""
    contents = [message["content"] for message in messages]
    texts = [text if isinstance(text, str) else "".join(map(piece, text)) for text in contents]
    return tuple((message["role"], text) for message, text in zip(messages, texts, strict=True))


def read_answers() -> dict[Key, str]:
    """Every assistant turn of the embedded conversations, by what was said before it."""
    found = {}
    for name in ("train", "eval"):
        for line in (TINY / f"{name}.jsonl").read_text().splitlines():
            messages = json.loads(line)["messages"]
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    found[key_of(messages[:i])] = message["content"]
    return found


def make_handler(known: Mapping[Key, str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "stand-in"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = known.get(key_of(body["messages"]))
            if text is None:
                return self.reply(400, {"error": "not one of the embedded conversations"})
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.reply(200, {"choices": [choice], "usage": {"completion_tokens": len(text.split())}})

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journey.stand_in", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    address = ("127.0.0.1", parser.parse_args().port)
    ThreadingHTTPServer(address, make_handler(read_answers())).serve_forever()


if __name__ == "__main__":
    main()
