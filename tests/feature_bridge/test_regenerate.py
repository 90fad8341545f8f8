"""Regenerating answers against a server on loopback: what is asked, retried, refused, and what a kill leaves."""

import argparse
import asyncio
import base64
import datetime
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from feature_bridge import answers, chat_server, regenerate
from feature_bridge.conversations import parse
from feature_bridge.media_parts import PartWriter
from feature_bridge.sources import JsonlSource
from jaxdraft.regenerate import command


def answer_to(messages):
    """Deterministic; long enough to be told apart."""
    return "answer " + hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]


class FakeServer:
    """Answers chat completions; `fault(number of this request for these messages, messages)` may give a status."""

    def __init__(self, port=0):
        self.requests, self.delay, self.fault, self.finish = [], 0.0, lambda number, messages: None, "stop"
        # bodies: path -> what is answered there, whatever is asked
        self.model, self.bodies, self.headers = "the-model", {}, {}
        self.seen, self.keys = Counter(), set()
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                if self.path != "/v1/models":
                    return self.reply(404, {"error": "no"})
                self.reply(200, {"data": [{"id": outer.model}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self.reply(404, {"error": "no"})
                key = json.dumps(body["messages"])
                with lock:
                    outer.keys.add(self.headers["Authorization"])
                    outer.seen[key] += 1
                    outer.requests.append(body)
                    number = outer.seen[key]
                time.sleep(outer.delay)
                status = outer.fault(number, body["messages"])
                if status in ("drops", "drops half way"):
                    if status == "drops half way":
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    self.close_connection = True
                    return None
                if status is not None:
                    return self.reply(status, {"error": "no"})
                message = {"role": "assistant", "content": answer_to(body["messages"])}
                finish = outer.finish if isinstance(outer.finish, str) else outer.finish(number, body["messages"])
                self.reply(200, {"choices": [{"message": message, "finish_reason": finish}]})

            def reply(self, status, body):
                data = outer.bodies.get(self.path.removeprefix("/v1"), json.dumps(body).encode())
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
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
    answer = answers.read_choice(0, 0, {"finish_reason": "stop", "message": {"content": "4.", name: "2+2"}})
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
    server.fault = lambda number, messages: {1: 503, 2: 429, 3: "drops", 4: "drops half way"}.get(number)
    server.finish = lambda number, messages: "abort" if number == 5 else "stop"  # as a server that is being ended says
    data = write(tmp_path / "data.jsonl", [{"messages": [user(str(i)), old()]} for i in range(5)])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert set(server.seen.values()) == {6}
    assert len(read(tmp_path / "out.jsonl")) == 5


def test_an_answer_that_takes_too_long_is_asked_again(server, tmp_path):
    over = threading.Event()

    def fault(number, messages):
        if number > 1:
            return None
        over.wait(60)
        return "drops"

    server.fault = fault
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1")]}])
    assert run(server, data, tmp_path / "out.jsonl", "--timeout", "1") == 0
    over.set()
    assert server.seen[json.dumps([user("1")])] > 1


@pytest.mark.filterwarnings("error::ResourceWarning")  # aiohttp's, where the event loop would stand still
def test_a_large_request_is_sent_piece_by_piece_and_again(server, tmp_path):
    server.fault = lambda number, messages: 503 if number == 1 else None
    data = write(tmp_path / "data.jsonl", [{"messages": [user("0123456789" * 300_000)]}])
    assert run(server, data, tmp_path / "out.jsonl") == 0
    assert [body["messages"][0]["content"] for body in server.requests] == 2 * ["0123456789" * 300_000]


def test_a_server_says_when_to_ask_again(server, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(chat_server, "asyncio", SimpleNamespace(sleep=sleep, TaskGroup=asyncio.TaskGroup))
    server.headers = {"Retry-After": "77"}
    server.fault = lambda number, messages: 429 if number == 1 else None

    async def ask():
        async with chat_server.Servers([server.url], retries=3, timeout_s=60) as servers:
            return await servers.ask(chat_server.Sampling(model="m"), [user("1")])

    assert asyncio.run(ask())["finish_reason"] == "stop"
    assert waits == [77]


@pytest.mark.parametrize("status", [503, "drops"])
def test_a_server_that_ends_leaves_its_conversations_to_the_others(status, server, tmp_path):
    """It is asked now and then whether it is back; the journal does not care who answered."""
    other, third = FakeServer(), FakeServer()
    servers = (server, other, third)
    server.delay = other.delay = third.delay = 0.01
    data = write(tmp_path / "data.jsonl", [{"messages": [user(str(i)), old()]} for i in range(60)])
    options = ["--server", f"{other.url},{third.url}", "--concurrency", "6", "--retries", "0"]
    other.fault = lambda number, messages: status if len(other.requests) > 5 else None
    assert run(server, data, tmp_path / "out.jsonl", *options) == 0
    assert [r["messages"][0]["content"] for r in read(tmp_path / "out.jsonl")] == [str(i) for i in range(60)]
    assert min(len(one.requests) for one in servers) > 5  # each had its share
    seen = sum((one.seen for one in servers), Counter())
    assert len(seen) == 60
    assert sum(seen.values()) > 60  # what it failed was asked of another one

    for one in servers:
        one.fault = lambda number, messages: 500 if messages[-1]["content"] == "30" else None
    assert run(server, data, tmp_path / "again.jsonl", *options) == 2  # none of them answers that one
    assert not (tmp_path / "again.jsonl").exists()
    for one in servers:
        one.fault, one.requests = lambda number, messages: None, []
    assert run(third, data, tmp_path / "again.jsonl") == 0  # with another list of servers
    assert len(third.requests) < 60
    assert read(tmp_path / "again.jsonl") == read(tmp_path / "out.jsonl")
    other.close()
    third.close()


def test_a_server_that_dies_is_waited_for(server, tmp_path, monkeypatch):
    """Longer than one that was never there; and then the answers are where they were."""
    waits, back = [], []

    def fault(number, messages):
        if messages[-1]["content"] != "1":
            return None
        server.close()
        return "drops"

    async def sleep(seconds):
        waits.append(seconds)
        if len(waits) == chat_server.START_RETRIES + 3:
            back.append(FakeServer(int(server.url.rpartition(":")[2])))

    monkeypatch.setattr(chat_server, "asyncio", SimpleNamespace(sleep=sleep, TaskGroup=asyncio.TaskGroup))
    server.fault = fault
    data = write(tmp_path / "data.jsonl", [{"messages": [user(str(i))]} for i in range(3)])
    assert run(server, data, tmp_path / "out.jsonl", "--concurrency", "1") == 0
    assert [r["messages"][0]["content"] for r in read(tmp_path / "out.jsonl")] == ["0", "1", "2"]
    assert back[0].seen[json.dumps([user("1")])] == 1
    back[0].close()


def test_a_failed_server_gets_one_request_until_it_has_answered(monkeypatch):
    one, two = chat_server._Server("http://one"), chat_server._Server("http://two")
    now = 100.0
    monkeypatch.setattr(chat_server, "time", SimpleNamespace(monotonic=lambda: now))
    two.outstanding = 7
    choose = lambda: min((one, two), key=chat_server._Server.load)
    assert choose() is one
    one.failed(0.0)
    one.failed(0.0)  # one that was under way: the same failure
    assert choose() is two
    now += chat_server.FIRST_WAIT_S
    assert choose() is one
    one.outstanding = 1
    assert choose() is two
    one.answered()
    assert choose() is one
    one.outstanding = 0
    one.failed(5.0)  # Retry-After
    now += 4
    assert choose() is two


def test_servers_of_different_models_are_refused(server, tmp_path, capsys):
    other = FakeServer()
    other.model = "another"
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    for named in ([], ["--model", "the-model"]):
        assert run(server, data, tmp_path / "o", "--server", other.url, *named) == 2
        assert only_line(capsys) == (
            f"error: {server.url}/v1 serves 'the-model' and {other.url}/v1 'another'; give servers of one model"
        )
    assert not (tmp_path / "o.journal").exists()
    other.close()


def test_the_key_travels(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    assert run(server, data, tmp_path / "o") == 0
    assert server.keys == {"Bearer secret"}


def test_more_requests_than_open_files_are_refused(monkeypatch):
    limits = [(1024, 4096)]
    fake = SimpleNamespace(
        RLIMIT_NOFILE=7,
        RLIM_INFINITY=-1,
        getrlimit=lambda which: limits[-1],
        setrlimit=lambda which, limit: limits.append(limit),
    )
    monkeypatch.setattr(regenerate, "resource", fake)
    regenerate.allow_open_files(1000)
    assert limits == [(1024, 4096)]
    regenerate.allow_open_files(2048)
    assert limits[-1] == (2048, 4096)
    with pytest.raises(ValueError, match="needs 5,000 open files and 4,096 are allowed"):
        regenerate.allow_open_files(5000)


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
    assert counts == {
        "conversations": 2, "answers": 2, "prompts": 0, "skipped": 2, "cut_off": 0, "shortened": 1
    }  # fmt: skip
    assert [r["messages"][0]["content"] for r in read(tmp_path / "out.jsonl")] == ["good", "fine"]
    assert [len(r["messages"]) for r in read(tmp_path / "out.jsonl")] == [2, 2]  # up to the last answer
    skipped = read(tmp_path / "out.jsonl.skipped")
    assert [s["where"] for s in skipped] == ["data.jsonl:1", "data.jsonl:3"]
    assert "HTTP 400" in skipped[0]["reason"]
    assert set(server.seen.values()) == {1}  # a refusal is not tried again


def test_an_answer_that_was_cut_off_is_left_out_and_counted(server, tmp_path, capsys):
    server.finish = lambda number, messages: "length" if messages[-1]["content"] == "long" else "stop"
    records = [
        {"messages": [user("long"), old()]},
        {"messages": [user("1"), old()]},
        {"messages": [user("2"), old(), user("long"), old()]},
    ]
    data = write(tmp_path / "data.jsonl", records)
    assert run(server, data, tmp_path / "out.jsonl") == 0
    said = capsys.readouterr()
    counts = {"conversations": 2, "answers": 2, "prompts": 0, "skipped": 1, "cut_off": 2, "shortened": 1}
    assert json.loads(said.out) == counts
    assert "3 of 3 conversations" in said.err
    assert "50% cut off, 0 under way" in said.err  # 2 of the 4 answers that came
    assert [record["messages"][0]["content"] for record in read(tmp_path / "out.jsonl")] == ["1", "2"]
    (skipped,) = read(tmp_path / "out.jsonl.skipped")
    assert skipped["reason"] == "the answer was cut off (length); raise --max-tokens"


def test_a_run_without_one_answer_is_an_error(server, tmp_path, capsys):
    """And so is data without a conversation. The reason is the first one, and the journal is kept."""
    server.finish = "length"
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}, {"messages": "broken"}])
    assert run(server, data, tmp_path / "out.jsonl") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: not one answer was obtained (data.jsonl:1: the answer was cut off (length); raise --m"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.jsonl", "out.jsonl.journal", "out.jsonl.skipped"
    ]  # fmt: skip
    assert run(server, write(tmp_path / "empty.jsonl", []), tmp_path / "other.jsonl") == 2
    assert "(the data has no conversation)" in capsys.readouterr().err


def test_prompts_alone_are_answered(server, tmp_path, capsys):
    """A question at the end gets an answer, in both forms; the questions before it get theirs."""
    several = [user("1"), old(), user("2")]
    records = [
        {"messages": [user("hi")], "id": 7},
        {"conversations": [{"from": "human", "value": "ho"}]},
        {"messages": several},
        {"messages": [user("3"), old()]},
        {"messages": [{"role": "system", "content": "s"}]},
    ]
    data = write(tmp_path / "data.jsonl", records)
    assert run(server, data, tmp_path / "out.jsonl") == 0
    counts = {"conversations": 4, "answers": 5, "prompts": 3, "skipped": 1, "cut_off": 0, "shortened": 0}
    assert json.loads(capsys.readouterr().out) == counts
    one = old(answer_to([user("1")]))
    assert read(tmp_path / "out.jsonl") == [
        {"id": 7, "messages": [user("hi"), old(answer_to([user("hi")]))]},
        {"messages": [user("ho"), old(answer_to([user("ho")]))]},
        {"messages": [user("1"), one, user("2"), old(answer_to([user("1"), one, user("2")]))]},
        {"messages": [user("3"), old(answer_to([user("3")]))]},
    ]
    (skipped,) = read(tmp_path / "out.jsonl.skipped")
    assert skipped == {"where": "data.jsonl:5", "reason": "no assistant turn"}


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
    with answers.Journal(tmp_path / "j", {"data": "x"}), another:
        answers.Journal(tmp_path / "j", {"data": "x"})
    with answers.Journal(tmp_path / "j", {"data": "x"}) as journal:
        assert journal.answers == {}


@pytest.mark.parametrize("named", [(), ("--model", "m")])
def test_a_server_that_was_never_there_is_one_sentence(named, server, tmp_path, capsys):
    """Without the retries that a server gets which has answered before, and though another one is there."""
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    assert run(server, data, tmp_path / "o", "--server", gone(), "--retries", "1000", *named) == 2
    assert re.match(
        r"error: http://127.0.0.1:\d+/v1 does not answer \(ClientConnector.*start it first$", only_line(capsys)
    )
    assert server.requests == []
    assert run(server, tmp_path / "none", tmp_path / "o", "--server", gone()) == 2
    assert "cannot be read (No such file" in only_line(capsys)
    server.url += "/elsewhere"
    assert run(server, data, tmp_path / "o", "--retries", "0") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: {server.url}/v1\S+ answers HTTP 404: check --server and the key$", line)


def gone():
    """An address at which nobody listens."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{once.getsockname()[1]}"


def only_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "localhost:30000"], "error: --server localhost:30000 is not a URL; give http://HOST:PORT"),
        (["--server", "http://x,y"], "error: --server y is not a URL"),
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
def test_a_server_of_another_kind_is_one_sentence(path, answer, server, tmp_path, capsys):
    server.bodies[path] = b"<html>" if answer == "<html>" else json.dumps(answer).encode()
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])
    assert run(server, data, tmp_path / "o") == 2
    line = only_line(capsys)
    assert line.startswith(f"error: {server.url}/v1{path} did not answer with a ")
    assert line.endswith("; check --server")


def test_ctrl_c_says_how_to_go_on(server, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "data.jsonl", [{"messages": [user("1"), old()]}])

    async def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(regenerate.Servers, "ask", interrupted)
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
