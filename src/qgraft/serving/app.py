"""The HTTP server: OpenAI's endpoints, vLLM's and llama-server's for adapters, health and metrics.

    body -> protocol.py -> service.py -> engine, in its thread -> events -> a queue of asyncio's -> JSON, or a stream

Preparing a prompt, and loading an adapter for it, is done in a worker thread; the engine tells its events into the event
loop. Who goes away frees its place: a stream that is closed, and a client that does not wait for the whole answer. The log
says who asked for what and how long it took, never what was said.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qgraft import __version__
from qgraft.serving import answers, lora_protocol
from qgraft.serving.guard import Guard, error_response
from qgraft.serving.keys import Permission
from qgraft.serving.metrics import metrics_text
from qgraft.serving.protocol import ApiError, Ask, read_chat, read_completion
from qgraft.serving.service import Service, as_api_error, errors_as_answers
from qgraft.serving.streams import Answering, chat_stream, completion_stream

log = logging.getLogger("qgraft.access")
SLOWEST = 60.0  # seconds in which a client takes nothing of its stream


def make_app(service: Service) -> FastAPI:
    """The application; the engine is started with it, and ends with it."""
    app = FastAPI(title="qgraft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, service=service, log=log)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(404, _no_such_path)
    app.add_exception_handler(405, _no_such_path)
    app.add_exception_handler(500, _broken)
    _add_answers(app, service)
    _add_models(app, service)
    _add_adapters(app, service)
    _add_tools(app, service)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return error_response(ApiError(status, f"{request.method} {request.url.path} is not served here", code="not_found"))


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours; the server logs it, and says no more."""
    return error_response(ApiError(500, "the server has failed", kind="server_error"))


async def body_of(request: Request) -> Any:
    """The JSON that was sent. Raises ApiError."""
    try:
        text = (await request.body()).decode("utf-8")
        found = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair, which is no character
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except ClientDisconnect as error:
        raise ApiError(499, "the client has gone", kind="closed") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    return found


def permission_of(request: Request) -> Permission:
    """What the key of the request is good for; Guard has looked at it."""
    permission = request.scope["qgraft_permission"]
    assert isinstance(permission, Permission)
    return permission


def require_admin(request: Request) -> None:
    """Raise ApiError for a request without an admin's key."""
    if not permission_of(request).admin:
        raise ApiError(403, "this needs an admin's key", kind="permission_error")


# -- answers --


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, read_chat(await body_of(request)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, read_completion(await body_of(request)))


async def _answer(service: Service, request: Request, ask: Ask) -> Response:
    prepared = await run_in_threadpool(service.prepare, ask, permission_of(request))
    request.scope["qgraft_asked"] = ask.model
    answering = Answering(service, prepared, asyncio.get_running_loop(), ask.one_call)
    await run_in_threadpool(answering.begin)
    if ask.stream:
        events = chat_stream(answering, ask) if ask.messages is not None else completion_stream(answering, ask)
        return _Stream(answering, events)
    try:
        await _whole(answering, request, service.limits.seconds)
    finally:
        answering.leave()
    return JSONResponse(_whole_body(service, ask, answering))


class _Stream(EventSourceResponse):
    """A stream of events; whoever ends it, and whenever, the engine's place is free."""

    def __init__(self, answering: Answering, events: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(events, ping=15, sep="\n", send_timeout=SLOWEST)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a client took nothing for %g seconds: its stream is closed", SLOWEST)
        finally:
            self._answering.leave()


async def _whole(answering: Answering, request: Request, seconds: float) -> None:
    """Wait for all of the answers. Raises ApiError where one fails, it takes too long, or nobody waits any more."""
    complete = asyncio.ensure_future(answering.complete())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({complete, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (complete, gone):
            task.cancel()
    if not done:
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds", kind="timeout", code="timeout")
    if complete not in done:
        raise ApiError(499, "the client has gone", kind="closed")
    complete.result()
    for reading in answering.readings:
        finish = reading.choice.finish
        if finish is not None and finish.error is not None:
            raise as_api_error(finish.error)
        if finish is not None and finish.reason == "cancelled":
            raise ApiError(503, "the server is being stopped", kind="server_error")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _whole_body(service: Service, ask: Ask, answering: Answering) -> dict[str, Any]:
    choices = [reading.choice for reading in answering.readings]
    with_logprobs = ask.sampling.logprobs is not None
    if ask.messages is not None:
        return answers.chat_body(
            answering.identity("chatcmpl"), answering.created, ask.model, choices, service.spell, with_logprobs
        )
    if ask.echo:
        per = ask.count
        for choice in choices:
            choice.text = answering.prompt_text(choice.index // per) + choice.text
    return answers.completion_body(
        answering.identity("cmpl"), answering.created, ask.model, choices, service.spell, with_logprobs,
        answering.prepared.prompts,
    )  # fmt: skip


# -- models and adapters --


def _add_models(app: FastAPI, service: Service) -> None:
    async def listed(request: Request) -> dict[str, Any]:
        permission = permission_of(request)
        adapters = await run_in_threadpool(service.catalogue.available)
        allowed = {name: path for name, path in adapters.items() if permission.allows(name)}
        return lora_protocol.models_body(service.base, allowed, service.started, service.engine.context)

    @app.get("/v1/models")
    @app.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        return await listed(request)

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        for each in (await listed(request))["data"]:
            if each["id"] == name:
                found: dict[str, Any] = each
                return found
        raise ApiError(404, f"The model `{name[:200]}` does not exist.", kind="NotFoundError", code="model_not_found",
                       param="model")  # fmt: skip


def _add_adapters(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        require_admin(request)
        body = lora_protocol.read_load(await body_of(request))
        await run_in_threadpool(_as_answers, catalogue.load, body)
        return PlainTextResponse(lora_protocol.loaded_text(body.name))

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        require_admin(request)
        name = lora_protocol.read_unload(await body_of(request))
        await run_in_threadpool(_as_answers, catalogue.unload, name)
        return PlainTextResponse(lora_protocol.unloaded_text(name))

    @app.get("/lora-adapters")
    async def adapters(request: Request) -> list[dict[str, Any]]:
        names, permission = catalogue.names(), permission_of(request)
        paths = {name: entry.path for name, entry in catalogue.entries.items()}
        told = lora_protocol.adapters_body(names, paths, catalogue.scales)
        return [each for each in told if permission.allows(each["name"])]

    @app.post("/lora-adapters")
    async def scales(request: Request) -> dict[str, Any]:
        require_admin(request)
        found = lora_protocol.read_scales(await body_of(request), catalogue.names())
        await run_in_threadpool(_as_answers, catalogue.need, list(found))
        catalogue.scales = found
        return {"success": True}


def _as_answers(function: Callable[..., Any], *args: Any) -> Any:
    with errors_as_answers():
        return function(*args)


# -- the rest --


def _add_tools(app: FastAPI, service: Service) -> None:
    engine, tokenizer = service.engine, service.tokenizer

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if engine.is_alive else JSONResponse({"status": "stopping"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(metrics_text(service), media_type="text/plain; version=0.0.4")

    @app.get("/props")
    async def props() -> dict[str, Any]:
        return {
            "model_path": service.base, "total_slots": engine.max_batch, "build_info": f"qgraft {__version__}",
            "chat_template": service.prompter.template.text, "default_generation_settings": {"n_ctx": engine.context},
            "shares_passes": engine.why_not_shared or True,
        }  # fmt: skip

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        content, special = lora_protocol.read_tokenize(await body_of(request))
        ids = await run_in_threadpool(
            lambda: tokenizer(content, add_special_tokens=special, verbose=False)["input_ids"]
        )
        return {"tokens": list(ids)}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        size = engine.model.get_input_embeddings().weight.shape[0]
        tokens = lora_protocol.read_detokenize(await body_of(request), size)
        return {"content": await run_in_threadpool(tokenizer.decode, tokens)}
