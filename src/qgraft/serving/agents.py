"""The endpoints that coding agents ask: Anthropic's /v1/messages and OpenAI's /v1/responses."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from qgraft.serving import messages_protocol, responses_protocol
from qgraft.serving.agent_streams import message_stream, response_stream
from qgraft.serving.exchange import Stream, begin, body_of, complete, permission_of
from qgraft.serving.service import Service


def add_agents(app: FastAPI, service: Service) -> None:
    """Put them on the application."""

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        ask = service.settled(messages_protocol.read_messages(await body_of(request)))
        answering = await begin(service, request, ask)
        if ask.stream:
            return Stream(answering, message_stream(answering, ask))
        await complete(answering, request)
        (reading,) = answering.readings
        return JSONResponse(messages_protocol.message_body(answering.identity("msg"), ask.model, reading.choice))

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> dict[str, Any]:
        ask = messages_protocol.read_messages(await body_of(request), counting=True)
        prepared = await run_in_threadpool(service.prepare, ask, permission_of(request))
        return {"input_tokens": len(prepared.requests[0].prompt)}

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        ask = service.settled(responses_protocol.read_response(await body_of(request)))
        answering = await begin(service, request, ask)
        if ask.stream:
            return Stream(answering, response_stream(answering, ask))
        await complete(answering, request)
        choice = answering.readings[0].choice
        assert choice.finish is not None
        body, status = responses_protocol.ResponseBody(ask), responses_protocol.status_of(choice.finish)
        return JSONResponse(body.told(status, responses_protocol.items(choice), choice.finish))
