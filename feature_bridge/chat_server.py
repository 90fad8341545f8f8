"""A client for a server with OpenAI's chat completions, which tries again until it gets an answer. Needs httpx."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP status that may pass
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


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


class Server:
    """An OpenAI-compatible server. Use as an async context manager."""

    def __init__(self, url: str, sampling: Sampling, *, retries: int, timeout_s: float, api_key: str | None):
        import httpx

        self._httpx, self._sampling, self._retries = httpx, sampling, retries
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        """The first model that it serves."""
        response = await self._request("GET", "/models", None)
        return self._read(response, lambda answer: answer["data"][0]["id"], "a list of models")

    async def ask(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The first choice of a chat completion; {"error": ..} for a request that the server will never take."""
        sampling = self._sampling
        body = {"model": sampling.model, "messages": messages, "temperature": sampling.temperature}
        body |= {"top_p": sampling.top_p, "max_tokens": sampling.max_tokens, **sampling.extra}
        response = await self._request("POST", "/chat/completions", body)
        if response.status_code != 200:
            return {"error": f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"}
        return self._read(response, lambda answer: dict(answer["choices"][0]), "a chat completion")

    def _read(self, response: Any, part: Callable[[Any], Any], wanted: str) -> Any:
        """A part of an answer's JSON. Raises ServerError: the answer is not what is wanted."""
        try:
            return part(response.json())
        except (ValueError, LookupError, TypeError) as error:
            shown = f"HTTP {response.status_code}: {' '.join(response.text.split())[:100]}"
            raise ServerError(f"{response.url} did not answer with {wanted} ({shown}); check --server") from error

    async def _request(self, method: str, path: str, body: Any) -> Any:
        """Tries again, each time after a longer wait.

        Raises ServerError: the retries are used up, or the address or the key is wrong.
        """
        for attempt in range(self._retries + 1):
            try:
                response = await self._client.request(method, self._url + path, json=body)
                if response.status_code in (401, 403, 404):
                    raise ServerError(
                        f"{self._url}{path} answers HTTP {response.status_code}: check --server and the key"
                    )
                if response.status_code not in RETRIED:
                    return response
                problem = f"HTTP {response.status_code}"
            except self._httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
            if attempt < self._retries:
                await asyncio.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0))
        raise ServerError(
            f"{self._url} did not answer in {self._retries + 1} attempts ({problem}); "
            "the same command goes on from the last answer"
        )
