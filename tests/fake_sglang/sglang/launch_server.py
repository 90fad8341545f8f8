"""SGLang's HTTP server on a machine without a GPU: /health and /generate of the stand-in engine beside this file.

FAKE_SGLANG_DATA names the conversations that it knows.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sglang import Engine


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-path")
    parser.add_argument("--port", type=int)
    parser.add_argument("--speculative-draft-model-path")
    args, _ = parser.parse_known_args()
    sys.argv[2] = os.environ["FAKE_SGLANG_DATA"]  # where the engine looks for it
    engine = Engine(**vars(args))
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply({})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = {"prompt": body["text"], "image_data": body.get("image_data")}
            with one_at_a_time:
                self.reply(asyncio.run(engine.async_generate(**asked, sampling_params=body["sampling_params"])))

        def reply(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
