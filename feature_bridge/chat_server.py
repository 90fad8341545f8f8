"""A client for servers with OpenAI's chat completions, which tries again until it gets an answer. Needs aiohttp.

aiohttp, because httpx looks through all of a pool's connections for every request: with 512 requests under way that
took a hundred times the processor time of an answer (benchmarks/RESULTS.md, "Regenerate's client").
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP status that may pass
OVERLOADED = (429, 502, 503, 504)  # of them, those that are the server's and not one request's
FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_RETRY_AFTER_S = 0.5, 30.0, 600.0
START_RETRIES = 2  # of a connection to a server that has never answered: most likely it is not there
CONNECT_S, START_S = 10.0, 30.0  # for a connection, and for the first word of a server
KEPT_S = 4.0  # that an idle connection is kept: uvicorn closes it after 5
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked of the server for every answer; part of the journal's identity."""

    model: str
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the request


class ServerError(Exception):
    """The server cannot be used: one sentence."""


@dataclass(frozen=True)
class _Reply:
    url: str
    status: int
    body: bytes

    def shown(self, limit: int) -> str:
        return f"HTTP {self.status}: {' '.join(self.body.decode(errors='replace').split())[:limit]}"

    def part(self, read: Callable[[Any], Any], wanted: str) -> Any:
        """A part of the JSON. Raises ServerError: the answer is not what is wanted."""
        try:
            return read(json.loads(self.body))
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{self.url} did not answer with {wanted} ({self.shown(100)}); check --server") from error


class _MayPassError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, problem: str, *, status: int = 0, retry_after_s: float = 0.0):
        super().__init__(problem)
        self.status, self.retry_after_s = status, retry_after_s  # status 0: there was no answer


class _Server:
    """An address, and how it does. After a failure it rests, and then has one request until it has answered that."""

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.outstanding = 0
        self.proxy = _proxy_of(self.url)
        self._failures, self._rests_until = 0, 0.0

    def load(self) -> tuple[bool, int]:
        """For choosing: the smallest is the one to ask next."""
        resting = time.monotonic() < self._rests_until or self.outstanding > 0
        return self._failures > 0 and resting, self.outstanding

    def failed(self, retry_after_s: float) -> None:
        now = time.monotonic()
        if now >= self._rests_until:  # else a request that was under way when it failed already
            self._failures += 1
            self._rests_until = now + max(retry_after_s, _wait_s(self._failures - 1))

    def answered(self) -> None:
        self._failures, self._rests_until = 0, 0.0


class Servers:
    """OpenAI-compatible servers of one model. A request goes to the one with the fewest under way.

    Use as an async context manager.
    """

    def __init__(self, urls: Sequence[str], *, retries: int, timeout_s: float, api_key: str | None = None):
        try:
            import aiohttp
        except ImportError:
            raise ServerError("there is no aiohttp here; `pip install aiohttp`, or give --python") from None
        self._aiohttp, self._retries, self._timeout_s = aiohttp, retries, timeout_s
        self._servers = [_Server(url) for url in urls]
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.num_tokens = 0  # of all answers

    async def __aenter__(self) -> Servers:
        aiohttp = self._aiohttp
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def model(self, named: str | None = None) -> str:
        """The name of the model that all of them serve, after seeing that each of them is there.

        Args:
          named: by the user, and then a server may have no list of its models.

        Raises:
          ServerError: one is not there, or they serve different models.
        """
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._first_model(server, named)) for server in self._servers]
        found = [task.result() for task in asked]
        first = found[0]
        for server, model in zip(self._servers, found, strict=True):
            if model != first and None not in (model, first):
                raise ServerError(
                    f"{self._servers[0].url} serves {first!r} and {server.url} {model!r}; give servers of one model"
                )
        return named or first

    async def _first_model(self, server: _Server, named: str | None) -> str | None:
        reply = await self._request([server], "GET", "/models", begun=False, refused=(404,) if named is None else ())
        try:
            return reply.part(lambda answer: str(answer["data"][0]["id"]), "a list of models")
        except ServerError:
            if named is None:
                raise
            return None

    async def ask(self, sampling: Sampling, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The first choice of a chat completion; {"error": ..} for a request that the server will never take.

        Raises ServerError: the retries are used up on every server, or an address or the key is wrong.
        """
        body = {"model": sampling.model, "messages": messages, "temperature": sampling.temperature}
        body |= {"top_p": sampling.top_p, "max_tokens": sampling.max_tokens, **sampling.extra}
        reply = await self._request(self._servers, "POST", "/chat/completions", json.dumps(body).encode())
        if reply.status != 200:
            return {"error": reply.shown(300)}
        choice, usage = reply.part(lambda one: (dict(one["choices"][0]), one.get("usage")), "a chat completion")
        self.num_tokens += (usage.get("completion_tokens") or 0) if isinstance(usage, dict) else 0
        return choice

    async def _request(
        self,
        servers: Sequence[_Server],
        method: str,
        path: str,
        body: bytes = b"",
        *,
        begun: bool = True,
        refused: tuple[int, ...] = (404,),
    ) -> _Reply:
        """Tries every server, then all of them again after a longer and longer wait.

        Args:
          begun: whether a server has answered before; if not, one that cannot be reached is not waited for.
          refused: HTTP status, besides those of a wrong key, that show a wrong address.
        """
        attempt = 0
        while True:
            left, waits = list(servers), []
            while left:
                left.remove(server := min(left, key=_Server.load))
                try:
                    reply = await self._send(server, method, path, body, self._timeout_s if begun else START_S)
                except _MayPassError as error:
                    problem = error
                    waits.append(error.retry_after_s)
                    continue
                if reply.status in (401, 403, *refused):
                    raise ServerError(f"{reply.url} answers HTTP {reply.status}: check --server and the key")
                return reply
            if not begun and not problem.status and attempt >= min(self._retries, START_RETRIES):
                raise ServerError(f"{server.url} does not answer ({problem}); check --server, or start it first")
            if attempt >= self._retries:
                names = " and ".join(server.url for server in servers)
                raise ServerError(
                    f"{names} did not answer in {attempt + 1} attempts ({problem}); "
                    "the same command goes on from the last answer"
                )
            await asyncio.sleep(max(_wait_s(attempt), min(waits)))  # the first of them that is to be asked again
            attempt += 1

    async def _send(self, server: _Server, method: str, path: str, body: bytes, timeout_s: float) -> _Reply:
        """One attempt at one server. Raises _MayPassError."""
        server.outstanding += 1
        data = io.BytesIO(body) if len(body) > _LARGE_BYTES else body  # large ones are sent piece by piece
        url = server.url + path
        try:
            timeout = self._aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
            options = {"proxy": server.proxy, "allow_redirects": False, "timeout": timeout}
            async with self._session.request(method, url, data=data, **options) as response:
                reply = _Reply(url, response.status, await response.read())
            after_s = _seconds(response.headers.get("Retry-After"))
        except (self._aiohttp.ClientError, TimeoutError) as error:
            server.failed(0.0)
            words = str(error) or f"no answer in {timeout_s:g} s"
            raise _MayPassError(f"{type(error).__name__} {words}") from error
        finally:
            server.outstanding -= 1
        if reply.status in OVERLOADED:
            server.failed(after_s)
        if reply.status in RETRIED:
            raise _MayPassError(f"HTTP {reply.status}", status=reply.status, retry_after_s=after_s)
        if path == "/chat/completions" and reply.status == 200 and _aborted(reply.body):
            raise _MayPassError("the answer was aborted", status=reply.status)
        server.answered()
        return reply


def _aborted(body: bytes) -> bool:
    """Whether SGLang gave the answer up, for example because it is being ended: it says so with HTTP 200."""
    if b'"abort"' not in body:
        return False
    try:
        return json.loads(body)["choices"][0]["finish_reason"] == "abort"
    except (ValueError, LookupError, TypeError):
        return False


def _wait_s(attempt: int) -> float:
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0)


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header. Its other form, a date, is passed over: the wait grows anyway."""
    text = (retry_after or "").strip()
    return min(float(text), LONGEST_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 0.0


def _proxy_of(url: str) -> str | None:
    """The environment's proxy for an address. aiohttp's own way reads ~/.netrc for every request."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
