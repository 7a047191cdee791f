"""HTTP: bodies in, answers out, whole or as server-sent events, and one page to try the model on."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from performer_lm.ranges import Count, ranged
from performer_lm.serving.answers import chunk, error_body, first_chunks, last_chunks, whole_answer
from performer_lm.serving.jobs import NotServedError, Told
from performer_lm.serving.scheduler import Scheduler
from performer_lm.serving.wire import Asked, Reader, UnknownModelError

PAGE: Final = Path(__file__).parent / "page"
KINDS: Final = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}
HUNG_UP: Final = 499  # read by nobody


class Mail:
    """The news of one request, from the model's thread to the event loop: of a stream each, else the last."""

    def __init__(self) -> None:
        self.streams, self.open_rows = False, 0
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Told | NotServedError]()

    def tell(self, news: Told | NotServedError) -> None:
        """Take a token or an error; called in the model's thread."""
        is_last = False
        if isinstance(news, Told) and news.is_last:
            self.open_rows -= 1
            is_last = not self.open_rows
        if self._loop.is_closed():  # the server was broken off
            return
        if self.streams or is_last or isinstance(news, NotServedError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)

    async def read(self) -> Told:
        """Wait for the next token.

        Raises:
            NotServedError: where there will be no answer.
        """
        news = await self._queue.get()
        if isinstance(news, NotServedError):
            raise news
        return news


class Events(StreamingResponse):
    """Server-sent events, with a call of `at_end` after the last one, or when the client hangs up."""

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


@ranged
class Endpoints:
    """Answers to HTTP requests, by a scheduler."""

    def __init__(self, scheduler: Scheduler, reader: Reader, *, max_body_bytes: Count) -> None:
        self._scheduler, self._reader, self._max_body_bytes = scheduler, reader, max_body_bytes

    async def texts(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._take(request, is_chat=False)

    async def chats(self, request: Request) -> Response:
        """Answer messages."""
        return await self._take(request, is_chat=True)

    async def models(self, request: Request) -> Response:
        """Name the model."""
        del request
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model of a name."""
        if request.path_params["name"] != self._reader.name:
            return refuse(404, f"'{self._reader.name}' is served here and no other model", code="model_not_found")
        return JSONResponse(self._model())

    async def status(self, request: Request) -> Response:
        """Return the scheduler's status."""
        del request
        return JSONResponse({"model": self._reader.name, **self._scheduler.status()})

    def _model(self) -> dict[str, Any]:
        return {"id": self._reader.name, "object": "model", "created": 0, "owned_by": "performer-lm"}

    async def _take(self, request: Request, *, is_chat: bool) -> Response:
        mail = Mail()
        try:
            body = await asyncio.wait_for(self._read_body(request), self._reader.timeout)
            asked = await run_in_threadpool(self._reader.read, body, mail.tell, is_chat=is_chat)
            mail.streams, mail.open_rows = asked.streams, sum(len(job.choices) for job in asked.jobs)
            self._scheduler.submit(asked.jobs)
        except UnknownModelError as error:
            return refuse(404, str(error), code="model_not_found")
        except ValueError as error:
            return refuse(400, str(error))
        except TimeoutError:
            return refuse(408, f"the body did not come within {self._reader.timeout:g} s")
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        except NotServedError as error:
            return refuse(error.status, str(error))
        if asked.streams:
            return Events(self._stream(asked, mail), lambda: self._scheduler.cancel(asked.jobs))
        return await self._answer(request, asked, mail)

    async def _read_body(self, request: Request) -> bytes:
        """Return the body; one that is too long is read to its end, for many clients take no answer before."""
        body, length = bytearray(), 0
        async for part in request.stream():
            length += len(part)
            if length <= self._max_body_bytes:
                body += part
        if length > self._max_body_bytes:
            raise HTTPException(413, f"a body of {length} bytes: at most {self._max_body_bytes} are read here")
        return bytes(body)

    async def _answer(self, request: Request, asked: Asked, mail: Mail) -> Response:
        """Wait for the whole answer, or for the client to hang up."""
        done, left = asyncio.ensure_future(mail.read()), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=HUNG_UP)
            done.result()
            return JSONResponse(whole_answer(asked, self._reader.tokenizer))
        except NotServedError as error:
            return refuse(error.status, str(error))
        finally:
            done.cancel()
            left.cancel()
            self._scheduler.cancel(asked.jobs)

    async def _stream(self, asked: Asked, mail: Mail) -> AsyncIterator[bytes]:
        for first in first_chunks(asked):
            yield event(first)
        rows = len(asked.choices)
        try:
            while rows:
                told = await mail.read()
                rows -= told.is_last
                part = chunk(asked, self._reader.tokenizer, told)
                if part is not None:
                    yield event(part)
        except NotServedError as error:
            yield event(error_body(str(error), kind=KINDS[error.status]))
            return
        for last in last_chunks(asked):
            yield event(last)
        yield b"data: [DONE]\n\n"


def build_app(scheduler: Scheduler, reader: Reader, *, max_body_bytes: int) -> Starlette:
    """Return the application that serves a model."""
    own = Endpoints(scheduler, reader, max_body_bytes=max_body_bytes)
    routes = [
        Route("/", _file("index.html", "text/html")),
        Route("/page.js", _file("page.js", "text/javascript")),
        Route("/status", own.status),
        Route("/v1/models", own.models),
        Route("/v1/models/{name:path}", own.model),
        Route("/v1/completions", own.texts, methods=["POST"]),
        Route("/v1/chat/completions", own.chats, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse_http})


def refuse(status: int, message: str, *, code: str | None = None) -> Response:
    """Return an error in OpenAI's form."""
    body = error_body(message, kind=KINDS.get(status, "invalid_request_error"), code=code)
    return JSONResponse(body, status_code=status)


def event(content: Any) -> bytes:
    """Return JSON as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        return refuse(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}")
    return refuse(error.status_code, error.detail)


async def _hung_up(request: Request) -> None:
    """Wait until the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    def give(request: Request) -> Response:
        del request
        return FileResponse(PAGE / name, media_type=kind)

    return give
