"""The HTTP server: OpenAI's endpoints, vLLM's and llama-server's for adapters, health and metrics.

    body -> protocol.py -> service.py -> engine, in its thread -> events -> a queue of asyncio's -> JSON, or a stream

The log says who asked for what and how long it took, never what was said.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from qgraft import __version__
from qgraft.serving import answers, lora_protocol
from qgraft.serving.agents import add_agents
from qgraft.serving.exchange import Stream, begin, body_of, complete, permission_of, require_admin, told
from qgraft.serving.fields import ApiError
from qgraft.serving.guard import Guard, error_response
from qgraft.serving.metrics import metrics_text
from qgraft.serving.protocol import Ask, read_chat, read_completion
from qgraft.serving.service import Service
from qgraft.serving.streams import Answering, chat_stream, completion_stream

log = logging.getLogger("qgraft.access")


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
    _add_embeddings(app)
    add_agents(app, service)
    _add_models(app, service)
    _add_adapters(app, service)
    _add_tools(app, service)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _no_such_path(request: Request, error: Exception) -> Response:
    status, path = getattr(error, "status_code", 404), request.url.path
    return error_response(ApiError(status, f"{request.method} {path} is not served here", code="not_found"), path)


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours; the server logs it, and says no more."""
    return error_response(ApiError(500, "the server has failed", kind="server_error"), request.url.path)


# -- answers --


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, service.settled(read_chat(await body_of(request))))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, service.settled(read_completion(await body_of(request))))


async def _answer(service: Service, request: Request, ask: Ask) -> Response:
    answering = await begin(service, request, ask)
    if ask.stream:
        return Stream(
            answering, chat_stream(answering, ask) if ask.messages is not None else completion_stream(answering, ask)
        )
    await complete(answering, request)
    return JSONResponse(_whole_body(service, ask, answering))


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


def _add_embeddings(app: FastAPI) -> None:
    """What clients ask for, and a model that was trained to write has not: each is told so, instead of a wrong path."""

    @app.post("/v1/embeddings")
    @app.post("/embeddings")
    async def embeddings() -> None:
        why = "the model was trained to write, and its states do not say how near texts are"
        raise ApiError(400, f"embeddings are not served: {why}", code="unsupported_endpoint")


# -- models and adapters --


def _add_models(app: FastAPI, service: Service) -> None:
    async def listed(request: Request) -> dict[str, Any]:
        permission = permission_of(request)
        adapters = await run_in_threadpool(service.catalogue.available)
        allowed = {
            name: path if permission.admin else name for name, path in adapters.items() if permission.allows(name)
        }
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
        await told(catalogue.load, body)
        return PlainTextResponse(lora_protocol.loaded_text(body.name))

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        require_admin(request)
        name = lora_protocol.read_unload(await body_of(request))
        await told(catalogue.unload, name)
        return PlainTextResponse(lora_protocol.unloaded_text(name))

    @app.get("/lora-adapters")
    async def adapters(request: Request) -> list[dict[str, Any]]:
        numbered, permission = catalogue.numbered(), permission_of(request)
        paths = {name: entry.path for name, entry in catalogue.entries.items()} if permission.admin else {}
        told = lora_protocol.adapters_body(numbered, paths, catalogue.scales)
        return [each for each in told if permission.allows(each["name"])]

    @app.post("/lora-adapters")
    async def scales(request: Request) -> dict[str, Any]:
        require_admin(request)
        found = lora_protocol.read_scales(await body_of(request), catalogue.numbered())
        await told(catalogue.need, list(found))
        catalogue.scales = found
        return {"success": True}


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
        settings = {"n_ctx": engine.context, "params": vars(service.unasked)}
        return {
            "model_path": service.base, "total_slots": engine.max_batch, "build_info": f"qgraft {__version__}",
            "chat_template": service.prompter.template.text, "default_generation_settings": settings,
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
