"""An endpoint that OpenAI's clients talk to, and a page in the browser that talks to the same endpoint.

`transformers serve` (5.23) has no place for what we need: it opens the files and fetches the addresses that a request names, loads any model that one names,
answers pages of other sites, takes no adapter's folder and no layout but the hub's, and reads every conversation from its beginning.
"""

import asyncio
import json
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from interlace.data import page
from interlace.errors import InputError
from interlace.inference.conversations import Conversations, Said
from interlace.inference.dialogue import ContextFull, Usage
from interlace.inference.doors import Guard, is_loopback
from interlace.inference.endpoint import MOST_MEDIA, Answer, Asked, Refusal, model_list, read_request
from interlace.inference.sampling import Sampling

_PAGE = Path(__file__).with_name("web.html")
_MOST_WAITING = 4  # times the largest request: what may wait in memory
_AT_ONCE = 4  # answers that grow at once; the others wait
_GRACE_SECONDS = 2  # for answers under way when the server is stopped


@dataclass(frozen=True, slots=True)
class Service:
    """What is served, and to whom.

    model: the name that requests give. sampling, system: where a request says nothing. with_page: `/` is the page. api_key: "" for none. names: of this
    machine.
    """

    model: str
    sampling: Sampling
    system: str = ""
    with_page: bool = False
    api_key: str = ""
    max_upload_mb: int = 64
    names: frozenset[str] = frozenset()


def name_of(model_path: str) -> str:
    """What requests call a model: a folder's own name, which tells nothing of where it lies; a hub id as it is."""
    path = Path(model_path)
    return path.resolve().name if path.is_dir() else model_path


def run_server(conversations: Conversations, service: Service, door: socket.socket) -> None:
    """Answers until SIGINT or SIGTERM.

    Args:
        door: a socket that listens.
    """
    host, port = door.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not is_loopback(host) and not service.api_key:
        print("warning: whoever reaches this machine can use the model; set INTERLACE_API_KEY, or leave --host out", file=sys.stderr)
    if service.with_page:
        print(f"page: {address}/")
    print(f"OpenAI's chat completions: {address}/v1, model {service.model}; Ctrl-C ends", flush=True)
    endpoint = Endpoint(conversations, service)
    config = uvicorn.Config(
        endpoint.app,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # the server has its own while it runs, and sends itself the signal again behind it
        signal.signal(number, signal.SIG_IGN)
    server = uvicorn.Server(config)
    endpoint.is_stopping = lambda: server.should_exit
    server.run([door])


class Endpoint:
    """The ASGI application of a service, `app`."""

    def __init__(self, conversations: Conversations, service: Service):
        self.conversations, self.service = conversations, service
        self.created, self.most_bytes = int(time.time()), service.max_upload_mb * 1_000_000
        self._thread = ThreadPoolExecutor(1, "model")  # all that the model does; the answers' tokens by turns
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0  # bytes
        self.is_stopping: Callable[[], bool] = lambda: False  # answers end then, where they stand
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        if service.with_page:
            self.page = page.filled(_PAGE, self._settings())
            routes.append(Route("/", self._show_page))
        errors: dict[Any, Any] = {Refusal: _refused, HTTPException: _not_found, ClientDisconnect: _gone, Exception: _failed}
        starlette = Starlette(routes=routes, exception_handlers=errors)
        self.app = Guard(starlette, service.names, service.api_key, frozenset({"/"} if service.with_page else ()))

    def _settings(self) -> dict[str, Any]:
        """What the page knows."""
        sampling = asdict(self.service.sampling)
        sampling["max_tokens"] = sampling.pop("max_new_tokens")
        limits = {"bytes": self.most_bytes, "media": MOST_MEDIA}
        return {"model": self.service.model, "sampling": sampling, "limits": limits, "needs_key": bool(self.service.api_key)}

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(model_list(self.service.model, self.created))

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.model:
            raise Refusal(404, f"the model is not served here; this is {self.service.model!r}", "model", "model_not_found")
        return JSONResponse(model_list(self.service.model, self.created)["data"][0])

    async def _complete(self, request: Request) -> Response:
        with ExitStack() as waiting:
            asked = read_request(_json(await self._body(request, waiting)), self.service.model, self.service.sampling, self.service.system)
            answer, pieces = Answer(f"chatcmpl-{uuid.uuid4().hex}", self.service.model), self._pieces(request, asked, waiting.pop_all())
        if not asked.stream:
            async with aclosing(pieces):
                said = [piece async for piece in pieces]
            return _Json(answer.whole("".join(piece.text for piece in said), said[-1].reason or "stop", _usage(said[-1].usage)))
        first = await anext(pieces)  # what is wrong with the request is told with its status
        events = _events(answer, first, pieces, asked.tells_usage)
        return StreamingResponse(events, media_type="text/event-stream", background=BackgroundTask(pieces.aclose))

    async def _body(self, request: Request, waiting: ExitStack) -> bytes:
        """The whole request, which takes up room until `waiting` is closed."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "expected Content-Type: application/json")
        length = request.headers.get("content-length", "")
        room = min(int(length) if length.isdecimal() else self.most_bytes, self.most_bytes)
        is_busy = self._waiting + room > _MOST_WAITING * self.most_bytes
        if not is_busy:
            self._waiting += room
            waiting.callback(self._leave, room)
        data, size = bytearray(), 0
        async for chunk in request.stream():  # to its end, also what is refused: a client that still writes would not read the answer
            size += len(chunk)
            if size <= room and not is_busy:
                data += chunk
            elif size > 16 * self.most_bytes:
                break
        if is_busy:
            raise Refusal(503, "too many requests wait for the model; try again later", code="server_busy")
        if size > room:
            raise Refusal(413, f"the request is larger than {self.service.max_upload_mb} MB (--max-upload-mb), images and videos of the conversation included")
        return bytes(data)

    def _leave(self, room: int) -> None:
        self._waiting -= room

    async def _pieces(self, request: Request, asked: Asked, waiting: ExitStack) -> AsyncGenerator[Said, None]:
        """The answer, until whoever asks has gone."""
        loop = asyncio.get_running_loop()
        try:
            async with self._room:
                steps = self.conversations.answer(asked)
                try:
                    while not await request.is_disconnected():
                        said = await loop.run_in_executor(self._thread, next, steps, None)
                        if said is None:
                            return
                        yield said
                        if self.is_stopping():
                            raise Refusal(503, "the server is being stopped")
                    raise ClientDisconnect
                finally:
                    self._thread.submit(steps.close)  # behind the step that may be running
        except ContextFull as full:
            text = f"this model takes {full.most} tokens; the messages have {full.length} and the answer may have {asked.sampling.max_new_tokens} (max_tokens)"
            raise Refusal(400, f"{text}: ask with fewer images or messages, or for fewer tokens", "messages", "context_length_exceeded") from None
        except InputError as error:
            raise Refusal(400, str(error), "messages") from None
        finally:
            waiting.close()


async def _events(answer: Answer, first: Said, pieces: AsyncIterator[Said], tells_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, one for each piece that shows something."""
    said, delta = first, {"role": "assistant", "content": first.text}
    yield _event(answer.chunk(delta))
    try:
        async for said in pieces:
            if said.text:
                yield _event(answer.chunk({"content": said.text}))
    except Refusal as refusal:
        yield _event(refusal.body)
        return
    except ClientDisconnect:
        return
    yield _event(answer.chunk({}, said.reason))
    if tells_usage:
        yield _event(answer.last_chunk(_usage(said.usage)))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


class _Json(JSONResponse):
    """In ASCII: half a character that a model or a client wrote breaks no answer."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def _json(body: bytes) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is no JSON: {error}") from None


def _usage(usage: Usage) -> dict[str, Any]:
    total = usage.prompt + usage.answer
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.answer, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": usage.kept}}


async def _refused(request: Request, refusal: Refusal) -> Response:
    headers = {"Retry-After": "2"} if refusal.status == 503 else {}
    return _Json(refusal.body, refusal.status, headers)


async def _not_found(request: Request, error: HTTPException) -> Response:
    return _Json(Refusal(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}").body, error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return _Json(Refusal(500, "the server failed at this request; its terminal says why").body, 500)
