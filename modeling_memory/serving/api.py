"""OpenAI's protocol over an [`Engine`]: `/v1/models`, `/v1/completions` and `/v1/chat/completions`, streamed or whole.

`transformers serve` (5.23) cannot do it: it looks the architecture up among the library's own classes, with
`trust_remote_code` too, has no registry for others, and its requests have no field for a context.

Fields beside OpenAI's: `context` (a text, or several), `store_ids`, `search` and `nearest`. Fields that would change
the answer and are not known are refused, as OpenAI's server does.
"""

import json
import secrets
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from .engine import Engine, RefusedError, Writing


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    user: str | None = None
    context: str | list[str] | None = None
    store_ids: str | list[str] | None = None
    search: str | None = Field(None, min_length=1)
    nearest: int | None = Field(None, ge=1)


class Completion(Asked):
    """A request of `/v1/completions`, and the form of its answer."""

    PREFIX: ClassVar[str] = "cmpl"
    OBJECT: ClassVar[str] = "text_completion"
    CHUNK: ClassVar[str] = "text_completion"

    prompt: str | list[str]

    def text(self) -> str:
        """The prompt."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise RefusedError(400, f"`prompt` holds {len(prompts)} prompts; send one a request.", "invalid_value")
        return prompts[0]

    def whole(self, text: str) -> dict[str, Any]:
        """An answer in a choice."""
        return {"text": text}

    def piece(self, text: str, is_first: bool) -> dict[str, Any]:
        """A piece of an answer in a choice."""
        return {"text": text}


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


class Chat(Asked):
    """A request of `/v1/chat/completions`, and the form of its answer."""

    PREFIX: ClassVar[str] = "chatcmpl"
    OBJECT: ClassVar[str] = "chat.completion"
    CHUNK: ClassVar[str] = "chat.completion.chunk"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def text(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [message.model_dump() for message in self.messages]

    def whole(self, text: str) -> dict[str, Any]:
        """An answer in a choice."""
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str, is_first: bool) -> dict[str, Any]:
        """A piece of an answer in a choice."""
        return {"delta": {**({"role": "assistant"} if is_first else {}), "content": text}}


def build_app(engine: Engine, name: str, api_key: str | None = None) -> FastAPI:
    """Build the application.

    Args:
        engine ([`Engine`]): What answers.
        name (`str`): The model's name in requests and answers.
        api_key (`str`, *optional*): What clients must send.
    """
    app = FastAPI(title="modeling-memory", docs_url=None, redoc_url=None)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "modeling-memory"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, Chat)

    async def answer(request: Request, kind: type[Completion] | type[Chat]) -> Response:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not secrets.compare_digest(sent.encode(), api_key.encode()):
            raise RefusedError(401, "The API key is not the server's.", "invalid_api_key")
        asked = kind.model_validate_json(await _read(request, engine.limits.body_bytes))
        if asked.model not in (None, name):
            raise RefusedError(404, f"The model {asked.model!r} is not here; this is {name!r}.", "model_not_found")
        text = asked.text()
        engine.enter()
        return await _answer(request, asked, await run_in_threadpool(_begin, engine, asked, text), name)

    for error in (Exception, RefusedError, ValidationError, ValueError, HTTPException):
        app.add_exception_handler(error, _explain)
    return app


async def _read(request: Request, most: int) -> bytes:
    """Read the body of a request, no more of it than is allowed."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RefusedError(
                413, f"The request is longer than {most} bytes, the most that is read.", "request_too_large"
            )
    return body


async def _answer(request: Request, asked: Any, writing: Writing, name: str) -> Response:
    made = {"id": f"{asked.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.stream:
        events = _events(writing, {**made, "object": asked.CHUNK}, asked)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    written = ""
    async for part in iterate_in_threadpool(writing):
        written += part
        if await request.is_disconnected():  # nobody waits: the place is free for others
            writing.stop()
    choice = {"index": 0, "finish_reason": writing.finish_reason, "logprobs": None, **asked.whole(written)}
    return JSONResponse({**made, "object": asked.OBJECT, "choices": [choice], "usage": _usage(writing)})


def _begin(engine: Engine, asked: Any, text: Any) -> Writing:
    """Gather memories and begin to write; whatever fails gives the place back."""
    try:
        most = engine.limits.new_tokens
        wanted = asked.max_tokens or getattr(asked, "max_completion_tokens", None) or min(256, most)
        if wanted > most:
            raise RefusedError(400, f"{wanted} tokens were asked for; this server writes {most}.", "invalid_value")
        contexts, ids = (
            [given] if isinstance(given, str) else given or [] for given in (asked.context, asked.store_ids)
        )
        memories = engine.memories(contexts, ids, asked.search, asked.nearest)
    except BaseException:
        engine.leave()
        raise
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    sampling = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed}
    return engine.write(text, memories, max_new_tokens=wanted, stops=[one for one in stops if one], **sampling)


def _usage(writing: Writing) -> dict[str, Any]:
    given = writing.num_prompt_tokens
    return {
        "prompt_tokens": given,
        "completion_tokens": writing.num_tokens,
        "total_tokens": given + writing.num_tokens,
        "prompt_tokens_details": {"memories": writing.num_memories},
    }


async def _events(writing: Writing, made: dict[str, Any], asked: Any) -> AsyncIterator[str]:
    """Server-sent events of an answer; a reader that goes away ends the writing."""

    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        is_first = True
        async for part in iterate_in_threadpool(writing):
            yield event({**made, "choices": [{"index": 0, "finish_reason": None, **asked.piece(part, is_first)}]})
            is_first = False
        last = {**asked.piece("", is_first), "index": 0, "finish_reason": writing.finish_reason}
        yield event({**made, "choices": [last]})
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield event({**made, "choices": [], "usage": _usage(writing)})
    except Exception as error:  # the status is sent already
        yield event(json.loads(bytes(_form(error).body)))
    finally:
        writing.stop()
    yield "data: [DONE]\n\n"


async def _explain(request: Request, error: Exception) -> JSONResponse:
    return _form(error)


def _form(error: Exception) -> JSONResponse:
    """Tell an error in OpenAI's form."""
    status, code, param, message = 500, "internal_error", None, "The server failed; its log says where."
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        status, code, message = 400, "invalid_value", f"{param or 'The body'}: {first['msg']}"
    elif isinstance(error, RefusedError):
        status, code, message = error.status, error.code, str(error)
    elif isinstance(error, HTTPException):
        status, code, message = error.status_code, "not_found", f"{error.detail}; known: /v1/models, " \
            "/v1/completions, /v1/chat/completions"  # fmt: skip
    elif isinstance(error, ValueError):  # a prompt or context that does not fit; the message says what to do
        status, code, message = 400, "invalid_value", str(error)
    else:
        traceback.print_exception(error)
    kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}.get(
        status, "invalid_request_error"
    )
    told = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(told, status, {"retry-after": "1"} if status == 429 else None)
