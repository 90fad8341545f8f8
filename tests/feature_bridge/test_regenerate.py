"""Regenerating answers against a server on loopback: what is asked, retried, refused, and what a kill leaves."""

import argparse
import asyncio
import base64
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from PIL import Image

from feature_bridge import chat_server, regenerate
from feature_bridge.conversations import parse
from feature_bridge.media_parts import PartWriter
from feature_bridge.sources import JsonlSource
from jaxdraft.regenerate import command


def answer_to(messages):
    """Deterministic; long enough to be told apart."""
    return "answer " + hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]


class FakeServer:
    """Answers chat completions; `fault(number of this request for these messages, messages)` may give a status."""

    def __init__(self):
        self.requests, self.delay, self.fault, self.finish = [], 0.0, lambda number, messages: None, "stop"
        self.seen = Counter()
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                assert self.path == "/v1/models"
                self.reply(200, {"data": [{"id": "the-model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                key = json.dumps(body["messages"])
                with lock:
                    outer.seen[key] += 1
                    outer.requests.append(body)
                    number = outer.seen[key]
                time.sleep(outer.delay)
                status = outer.fault(number, body["messages"])
                if status is not None:
                    return self.reply(status, {"error": "no"})
                message = {"role": "assistant", "content": answer_to(body["messages"])}
                self.reply(200, {"choices": [{"message": message, "finish_reason": outer.finish}]})

            def reply(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chat_server, "FIRST_WAIT_S", 0.01)
    server = FakeServer()
    yield server
    server.close()


def user(text):
    return {"role": "user", "content": text}


def old(text="old"):
    return {"role": "assistant", "content": text}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(server, data, output, *options):
    return regenerate.main(["--data", str(data), "--output", str(output), "--server", server.url, *options])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_turn_is_the_targets_own(server, tmp_path):
    data = write(
        tmp_path / "data.jsonl",
        [
            {
                "id": "a",
                "kind": "x",
                "messages": [{"role": "system", "content": "s"}, user("1"), old(), user("2"), old()],
            },
            {"id": "b", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "old"}]},
        ],
    )
    assert run(server, data, tmp_path / "out.jsonl", "--extra", '{"seed": 3}', "--max-tokens", "77") == 0
    first, second = read(tmp_path / "out.jsonl")
    system = {"role": "system", "content": "s"}
    one = old(answer_to([system, user("1")]))
    two = old(answer_to([system, user("1"), one, user("2")]))  # the new answer is in the history
    assert first == {"id": "a", "kind": "x", "messages": [system, user("1"), one, user("2"), two]}
    assert second == {"id": "b", "messages": [user("hi"), old(answer_to([user("hi")]))]}
    for body in server.requests:
        assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("the-model", 0.0, 77, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_columns_that_json_does_not_know_stay(server, tmp_path):
    rows = [{"at": datetime.datetime(2024, 1, 2), "raw": b"\x00\xff", "messages": [user("q"), old()]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    assert run(server, tmp_path / "data", tmp_path / "out.jsonl") == 0
    (record,) = read(tmp_path / "out.jsonl")
    assert (record["at"], record["raw"]) == ("2024-01-02T00:00:00", "AP8=")


def test_a_system_prompt_beside_the_conversation_is_asked_with(server, tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "old"}]
    data = write(tmp_path / "data.jsonl", [{"system": "Be a pirate.", "conversations": turns}])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    asked = [{"role": "system", "content": "Be a pirate."}, user("hi")]
    assert read(tmp_path / "out.jsonl") == [{"messages": [*asked, old(answer_to(asked))]}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_kept(name):
    answer = regenerate.read_choice(0, 0, {"finish_reason": "stop", "message": {"content": "4.", name: "2+2"}})
    assert (answer.content, answer.reasoning) == ("4.", "2+2")


def test_turns_that_nobody_asked_for_stay(server, tmp_path):
    """An assistant turn at the beginning is no answer to anything; one that is not to be learnt stays that."""
    hello, two = old("hello"), old() | {"weight": 0}
    data = write(tmp_path / "data.jsonl", [{"messages": [hello, user("1"), old(), user("2"), two, user("3"), old()]}])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    ((_, *turns),) = [record["messages"] for record in read(tmp_path / "out.jsonl")]
    one = old(answer_to([hello, user("1")]))
    second = old(answer_to([hello, user("1"), one, user("2")]))
    third = old(answer_to([hello, user("1"), one, user("2"), second, user("3")]))
    assert turns == [user("1"), one, user("2"), second | {"weight": 0}, user("3"), third]
    assert len(server.requests) == 3


def test_pictures_travel_as_data_urls(server, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (4, 3), colour).save(tmp_path / "pictures" / name)
    parts = [
        {"type": "image_url", "image_url": {"url": "pictures/a.png"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "pictures/b.jpg"}},
    ]
    data = write(tmp_path / "data.jsonl", [{"messages": [user(parts), old()]}])
    (tmp_path / "elsewhere").mkdir()
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert run(server, data, tmp_path / "elsewhere" / "out.jsonl") == 0
    urls = [part["image_url"]["url"] for part in server.requests[0]["messages"][0]["content"] if "image_url" in part]
    for url, kind, name in zip(urls, ("png", "jpeg"), ("a.png", "b.jpg"), strict=True):
        header, body = url.split(",")
        assert header == f"data:image/{kind};base64"
        assert base64.b64decode(body) == (tmp_path / "pictures" / name).read_bytes()
    (here,), (there,) = read(tmp_path / "out.jsonl"), read(tmp_path / "elsewhere" / "out.jsonl")
    assert here["messages"][0] == user(parts)  # as it was: the output lies beside the data
    for record, folder in ((here, tmp_path), (there, tmp_path / "elsewhere")):
        images = parse(record, "x", folder).images
        assert images == tuple(str(tmp_path / "pictures" / name) for name in ("a.png", "b.jpg"))


def test_a_picture_of_a_format_without_a_mime_type_travels(server, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.dds")
    picture = {"type": "image", "image": "a.dds"}
    data = write(tmp_path / "data.jsonl", [{"messages": [user([picture]), old()]}])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert server.requests[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/dds;base64,")


def test_videos_travel_as_data_urls_and_listed_frames_do_not(server, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"a video")
    Image.new("RGB", (4, 3)).save(tmp_path / "f.png")
    file = {"type": "video_url", "video_url": {"url": "v.mp4"}, "fps": 4.0}
    listed = {"type": "video", "video": ["f.png", "f.png"], "fps": 2.0}
    beside = {"messages": [user("What?"), old()], "videos": ["v.mp4"]}
    data = write(tmp_path / "data.jsonl", [{"messages": [user([part]), old()]} for part in (file, listed)] + [beside])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    url = "data:video/mp4;base64," + base64.b64encode(b"a video").decode()
    sent = {"type": "video_url", "video_url": {"url": url}}
    asked = sorted((body["messages"][0]["content"] for body in server.requests), key=len)
    assert asked == [[sent], [sent, {"type": "text", "text": "What?"}]]
    first, second = read(tmp_path / "out.jsonl")
    assert first["messages"][0] == user([file])
    assert parse(second, "x", tmp_path).videos[0].source == str(tmp_path / "v.mp4")
    (skipped,) = read(tmp_path / "out.jsonl.skipped")
    assert "list of frames cannot be sent to a server" in skipped["reason"]
    again = PartWriter(parse({"messages": [user([listed]), old()]}, "x", tmp_path), tmp_path)
    assert again.content([{"type": "video"}]) == [listed]


def test_what_passes_is_tried_again(server, tmp_path):
    server.fault = lambda number, messages: {1: 503, 2: 429}.get(number)
    data = write(tmp_path / "data.jsonl", [{"messages": [user(str(i)), old()]} for i in range(5)])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert set(server.seen.values()) == {3}
    assert len(read(tmp_path / "out.jsonl")) == 5


def test_what_does_not_pass_is_left_out_by_name(server, tmp_path, capsys):
    server.fault = lambda number, messages: 400 if "bad" in messages[-1]["content"] else None
    records = [
        {"messages": [user("bad"), old()]},
        {"messages": [user("good"), old(), user("bad later"), old()]},
        {"messages": "broken"},
        {"messages": [user("fine"), old()]},
    ]
    data = write(tmp_path / "data.jsonl", records)
    assert run(server, data, tmp_path / "out.jsonl") == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == {"conversations": 2, "answers": 2, "skipped": 2, "shortened": 1}
    assert [r["messages"][0]["content"] for r in read(tmp_path / "out.jsonl")] == ["good", "fine"]
    assert [len(r["messages"]) for r in read(tmp_path / "out.jsonl")] == [2, 2]  # up to the last answer
    skipped = read(tmp_path / "out.jsonl.skipped")
    assert [s["where"] for s in skipped] == ["data.jsonl:1", "data.jsonl:3"]
    assert "HTTP 400" in skipped[0]["reason"]
    assert set(server.seen.values()) == {1}  # a refusal is not tried again


def test_an_answer_that_was_cut_off_is_left_out(server, tmp_path):
    server.finish = "length"
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl") == []
    assert "raise --max-tokens" in read(tmp_path / "out.jsonl.skipped")[0]["reason"]


def test_a_server_that_is_gone_ends_the_run_and_keeps_the_answers(server, tmp_path, capsys):
    server.fault = lambda number, messages: 500 if messages[-1]["content"] == "7" else None
    data = write(tmp_path / "data.jsonl", [{"messages": [user(str(i)), old()]} for i in range(10)])
    assert run(server, data, tmp_path / "out.jsonl", "--retries", "1", "--concurrency", "1") == 2
    assert "did not answer in 2 attempts (HTTP 500)" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    server.fault = lambda number, messages: None
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert [r["messages"][0]["content"] for r in read(tmp_path / "out.jsonl")] == [str(i) for i in range(10)]
    assert {json.loads(key)[0]["content"]: count for key, count in server.seen.items()} == {
        str(i): 3 if i == 7 else 1 for i in range(10)
    }


@pytest.mark.parametrize("answered", [1, 9, 30])
def test_a_kill_loses_and_repeats_nothing(tmp_path, answered):
    server = FakeServer()
    server.delay = 0.02
    records = [{"messages": [user(f"{i}.0"), old(), user("more"), old()]} for i in range(20)]
    data = write(tmp_path / "data.jsonl", records)
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    command = [sys.executable, "-m", "jaxdraft.regenerate", "--data", str(data), "--output", str(output)]
    command += ["--server", server.url, "--concurrency", "3"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + answered:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    assert len(kept) >= answered
    with journal.open("ab") as file:
        file.write(b'{"row": 3, "tur')  # what a kill in the middle of a write leaves
    time.sleep(0.1)  # what was under way arrives
    before = Counter(server.seen)
    assert sum(before.values()) <= len(kept) + 3  # the answers under way are lost with the process, and no others

    assert subprocess.run(command, check=False).returncode == 0
    repeated = {key for key, count in server.seen.items() if count > 1}
    assert len(repeated) <= 3
    assert len(server.seen) == 40
    for answer in kept:
        prompt = records[answer["row"]]["messages"][: 1 + 2 * answer["turn"]]
        prompt = [
            m | {"content": answer_to(prompt[:i])} if m["role"] == "assistant" else m for i, m in enumerate(prompt)
        ]
        assert server.seen[json.dumps(prompt)] == 1
    for i, record in enumerate(read(output)):
        first = old(answer_to([user(f"{i}.0")]))
        second = old(answer_to([user(f"{i}.0"), first, user("more")]))
        assert record["messages"] == [user(f"{i}.0"), first, user("more"), second]
    assert len(read(output)) == 20
    server.close()


def test_refuses_another_journal_and_an_output_that_is_there(server, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    identity = {"data": JsonlSource(str(data), "--data").digest, "model": "the-model", "temperature": 0.5}
    (tmp_path / "out.jsonl.journal").write_text(json.dumps(identity) + "\n")
    assert run(server, data, tmp_path / "out.jsonl") == 2
    assert "was begun with temperature=0.5 and not 0.0" in capsys.readouterr().err
    (tmp_path / "other.jsonl").touch()
    assert run(server, data, tmp_path / "other.jsonl") == 2
    assert "is there already" in capsys.readouterr().err


def test_two_runs_do_not_share_a_journal(tmp_path):
    another = pytest.raises(ValueError, match="is being written by another run")
    with regenerate.Journal(tmp_path / "j", {"data": "x"}), another:
        regenerate.Journal(tmp_path / "j", {"data": "x"})
    with regenerate.Journal(tmp_path / "j", {"data": "x"}) as journal:
        assert journal.answers == {}


def test_a_wrong_address_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat_server, "FIRST_WAIT_S", 0.01)
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    command = ["--data", str(data), "--output", str(tmp_path / "o"), "--server", "http://127.0.0.1:9", "--retries", "1"]
    assert regenerate.main(command) == 2
    assert "error: http://127.0.0.1:9/v1 did not answer in 2 attempts (ConnectError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "localhost:30000"], "error: --server localhost:30000 is not a URL; give http://HOST:PORT"),
        (["--server", "http://localhost:300000"], "error: --server http://localhost:300000 is not a URL"),
        (["--temperature", "nan"], "error: --concurrency and --max-tokens"),
        (["--timeout", "0"], "error: --top-p is above 0"),
        (["--retries", "x"], "error: argument --retries: invalid int value: 'x'; --help"),
        (["--output", "{tmp}/data.jsonl/o"], "error: --output {tmp}/data.jsonl/o cannot be written ("),
    ],
)
def test_a_wrong_option_is_one_sentence(options, said, server, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    try:
        code = run(server, data, tmp_path / "o", *options)
    except SystemExit as error:
        code = error.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize("answer", [{"object": "error"}, {"data": [], "choices": []}, ["<html>"], "<html>"])
@pytest.mark.parametrize("path", ["/models", "/chat/completions"])
def test_a_server_of_another_kind_is_one_sentence(path, answer, server, tmp_path, capsys, monkeypatch):
    sent = chat_server.Server._request

    async def request(self, method, asked, body):
        response = await sent(self, method, asked, body)
        if asked == path:
            response._content = json.dumps(answer).encode() if answer != "<html>" else b"<html>"
        return response

    monkeypatch.setattr(chat_server.Server, "_request", request)
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    assert run(server, data, tmp_path / "o") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {server.url}/v1{path} did not answer with a ")
    assert line.endswith("; check --server")


def test_ctrl_c_says_how_to_go_on(server, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])

    async def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(regenerate.Server, "ask", interrupted)
    assert run(server, data, tmp_path / "o") == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from the last answer\n"
    monkeypatch.undo()
    assert run(server, data, tmp_path / "o") == 0


def test_another_interpreter_does_the_work(tmp_path):
    for argv in (["--data", "d", "--python", "/p", "--top-p", "1"], ["--data", "d", "--python=/p", "--top-p", "1"]):
        python, *_, init, data, d, option, value = command(argv)
        assert (python, data, d, option, value) == ("/p", "--data", "d", "--top-p", "1")
        assert init == regenerate.__file__.replace("regenerate.py", "__init__.py")
    # From any directory, and without this package among what the interpreter finds by itself.
    line = command(["--data", str(tmp_path / "none"), "--output", "o", "--server", "http://x"])
    done = subprocess.run([line[0], "-I", *line[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --data={str(tmp_path / 'none')!r} cannot be read")
    with pytest.raises(argparse.ArgumentError, match="--python: expected one argument"):
        command(["--python"])
