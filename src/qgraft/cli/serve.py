"""qgraft serve: answer many people at once, each with their own adapters, over OpenAI's API."""

import argparse
import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qgraft.cli.options import Parser, free_name, number_in, print_note, print_notes, true_or_false, without_tokenizer
from qgraft.errors import AdapterError, InstallationError, OptionError
from qgraft.ranges import ABOVE_0, COUNT, Range

_PORT = Range(0, 65535, whole=True)
_QUEUE = Range(0, 2**31 - 1, whole=True)


def run(words: Sequence[str]) -> int:
    """Parse, load, and serve until a signal comes."""
    return serve(_parser().parse_args(words))


def serve(options: argparse.Namespace, ready: Callable[[str], None] = lambda address: None) -> int:
    """Load, and serve until a signal comes; `ready` is called with the address once the port is taken."""
    _check_host(options)
    _require_extra()

    from qgraft.serving.engine import Engine
    from qgraft.serving.service import Service

    if options.folder is not None and options.adapters is None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        options.adapters = options.folder
    service = make_service(options)
    engine: Engine = service.engine
    assert isinstance(service, Service)
    work = make_work(service, options)
    engine.start()
    try:
        return _listen(service, work, options, ready)
    finally:
        if work is not None:
            work.close(options.grace)
        engine.stop()


def make_work(service: Any, options: argparse.Namespace) -> Any:
    """What the page works in; None without a folder."""
    from qgraft.serving.studio.work import Work
    from qgraft.serving.studio.workplace import Workplace

    if options.folder is None:
        return None
    return Work(service, Workplace(Path(options.folder), options.model, options.quantize))


def make_page_app(service: Any, work: Any) -> Any:
    """The whole application: the API and the page."""
    from qgraft.serving.app import make_app
    from qgraft.serving.studio.routes import add_studio
    from qgraft.serving.studio.static import add_page

    app = make_app(service)
    add_page(app)
    add_studio(app, service, work)
    return app


def _parser() -> Parser:
    parser = Parser(
        "serve",
        "Answer many people at once over HTTP: OpenAI's chat completions and completions, each request with its own "
        "adapters. A request says which by its model: an adapter's name, a mix like law=0.7+med=0.3, or the base's name. "
        "A page to chat, and with --folder to train and merge, is at /.",
    )
    parser.add_model()
    add_serving(parser)
    return parser


def add_serving(parser: Parser) -> None:
    """What `serve` and `ui` share, beside the model."""
    parser.add_argument(
        "--folder", help="what the page trains and merges in: runs, datasets, merged files; also the --adapters"
    )
    parser.add_argument(
        "--adapters", metavar="FOLDER", help="a folder of adapters, each found by its name when asked for"
    )
    parser.add_argument("--name", help="what the base is called (default: the name of its file)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=number_in(_PORT), default=8080, help="port to listen on (default 8080)")
    parser.add_argument(
        "--api_key", action="append", default=[], help="a key that requests need; also the variable QGRAFT_API_KEY"
    )
    parser.add_argument(
        "--admin_key", default=os.environ.get("QGRAFT_ADMIN_KEY") or None,
        help="a key for loading and unloading adapters; also the variable QGRAFT_ADMIN_KEY",
    )  # fmt: skip
    parser.add_argument("--keys", metavar="FILE", help="a JSON file of keys, some of them for some adapters only")
    parser.add_argument(
        "--allowed_origins", action="append", default=[], metavar="ORIGIN",
        help="a site whose pages may ask from a browser, https://chat.example.org, or * for all; repeatable",
    )  # fmt: skip
    count = number_in(COUNT)
    parser.add_argument("--max_adapters", type=count, default=64, help="adapters held in memory (default 64)")
    parser.add_argument("--max_batch", type=count, default=16, help="requests answered at once (default 16)")
    parser.add_argument("--max_queue", type=number_in(_QUEUE), default=64, help="requests that wait (default 64)")
    parser.add_argument(
        "--cache_tokens", type=count, help="tokens whose keys and values are held (default: by the model)"
    )
    parser.add_argument("--pass_tokens", type=count, default=256, help="tokens in one pass (default 256)")
    parser.add_argument("--template", help="chat template: auto, plain, chatml, a training variant, or a .jinja file")
    parser.add_argument("--system", help="system prompt where a chat has none")
    parser.add_argument("--enable_thinking", type=true_or_false, help="what a reasoning model's template is told")
    parser.add_argument(
        "--sampling_defaults", choices=("model", "openai"), default="model",
        help="where a request says nothing, draw as the model's files say, or as OpenAI's API (default model)",
    )  # fmt: skip
    parser.add_argument("--max_body", type=count, default=4 * 2**20, help="largest request in bytes (default 4 MiB)")
    seconds = number_in(ABOVE_0)
    parser.add_argument(
        "--timeout", type=seconds, default=600.0, help="longest time for an answer in seconds (default 600)"
    )
    parser.add_argument(
        "--grace", type=seconds, default=30.0, help="seconds that a stop waits for answers that are being written"
    )


def make_service(options: argparse.Namespace) -> Any:
    """The service that the options describe; its engine is not started."""
    from qgraft.adapters.base import adapter_names, base_of
    from qgraft.adapters.choose import use_adapter
    from qgraft.checkpoints.load import load, refuse_encoder_decoder
    from qgraft.model_parts import require_writer
    from qgraft.serving.catalogue import Catalogue
    from qgraft.serving.engine import Engine
    from qgraft.serving.keys import Keys
    from qgraft.serving.origins import Origins
    from qgraft.serving.prompting import Prompter, Prompting
    from qgraft.serving.service import Limits, Service

    named = [_name_and_path(each) for each in options.adapter]
    permissions, origins = _permissions(options), Origins(options.allowed_origins)
    if options.adapters is not None and not Path(options.adapters).is_dir():
        raise AdapterError(f"--adapters {options.adapters}: no such folder")
    refuse_encoder_decoder(options.model, "serve")
    model, tokenizer = load(options.model, quantize=options.quantize, dtype=options.dtype, device=options.device)
    require_writer(model, "qgraft serve")
    if tokenizer is None:
        raise without_tokenizer(options.model, model, "this command")
    print_notes(model)
    own = adapter_names(model)
    if own:
        use_adapter(model, None)
    prompting = Prompting(options.template, options.system, options.enable_thinking)
    engine = Engine(
        model, tokenizer, template=Prompter(tokenizer, prompting).template, max_batch=options.max_batch,
        max_queue=options.max_queue, cache_tokens=options.cache_tokens, pass_tokens=options.pass_tokens,
    )  # fmt: skip
    if engine.why_not_shared is not None:
        print_note(f"requests do not share passes: {engine.why_not_shared}")
    base = options.name or Path(options.model).name.removesuffix(".gguf")
    folder = None if options.adapters is None else Path(options.adapters)
    catalogue = Catalogue(engine, base, folder, options.max_adapters, force=options.force)
    for name in own:
        catalogue.adopt(name, options.model)
    for given, path in named:
        free = given or free_name(Path(path).resolve().name, catalogue.names())
        print_note(str(catalogue.pin(free, path)))
    limits = Limits(options.max_body, options.timeout)
    info = base_of(model).info
    drawn = info.sampling if info is not None and options.sampling_defaults == "model" else {}
    if drawn:
        said = ", ".join(f"{name}={value:g}" for name, value in drawn.items())
        print_note(f"where a request says nothing, tokens are drawn as the model's files say: {said}")
    return Service(
        engine, catalogue, keys=Keys(permissions), prompting=prompting, limits=limits, origins=origins, drawn=drawn
    )


def _name_and_path(text: str) -> tuple[str | None, str]:
    """(name, path) of --adapter law=out1 or out1. Raises AdapterError for a path that is not there."""
    name, equals, path = text.partition("=")
    if Path(text).exists() or not equals:
        name, path = "", text
    if not Path(path).exists():
        raise AdapterError(f"--adapter {path}: no such file or folder")
    return name or None, path


def _permissions(options: argparse.Namespace) -> dict[str, Any]:
    from qgraft.serving.keys import Permission, check_key, read_keys

    found = read_keys(Path(options.keys)) if options.keys else {}
    given = options.api_key or ([os.environ["QGRAFT_API_KEY"]] if os.environ.get("QGRAFT_API_KEY") else [])
    found |= {check_key(key, "--api_key"): Permission(f"key {number}") for number, key in enumerate(given, start=1)}
    if options.admin_key is not None:
        found[check_key(options.admin_key, "--admin_key")] = Permission("admin", admin=True)
    return found


def _check_host(options: argparse.Namespace) -> None:
    """Raise OptionError where everybody in the network could ask, and for what is no key."""
    from qgraft.serving.keys import Keys

    needed = Keys(_permissions(options)).are_needed  # which those of admins alone are not
    try:
        local = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        local = False
    if not local and not needed:
        raise OptionError(
            f"--host {options.host} lets other machines ask, and no key is needed", hint="give --api_key or --keys"
        )


def _require_extra() -> None:
    try:
        import llguidance  # noqa: F401

        from qgraft.serving import app  # noqa: F401
    except ImportError as error:
        if (error.name or "qgraft").partition(".")[0] == "qgraft":
            raise
        raise InstallationError(f"qgraft serve needs {error.name}", hint="pip install 'qgraft[serve]'") from error


def _server(server: type[Any], engine: Any, grace: float, listening: Callable[[], None]) -> type[Any]:
    """uvicorn's server, which says when it listens, and has answers finished or ended before it closes their connections."""

    class Server(server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                listening()

        async def shutdown(self, sockets: Any = None) -> None:
            ended = asyncio.get_running_loop().run_in_executor(None, engine.stop, grace)
            await super().shutdown(sockets)
            await ended

    return Server


def bound(config: Any) -> socket.socket:
    """uvicorn's socket, with TCP named as its protocol: asyncio sets TCP_NODELAY on connections of no others, and without it
    what is written in two pieces, as every answer is, comes 40 ms late."""
    made = config.bind_socket()
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, made.detach())


def _listen(service: Any, work: Any, options: argparse.Namespace, ready: Callable[[str], None]) -> int:
    import uvicorn
    from sse_starlette.sse import AppStatus

    from qgraft.serving.connections import OPTIONS, BoundedProtocol

    logging.getLogger("qgraft").setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("qgraft.access").addHandler(handler)
    AppStatus.disable_automatic_graceful_drain()  # streams are finished before the server ends
    config = uvicorn.Config(
        make_page_app(service, work), host=options.host, port=options.port, log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=round(options.grace) + 10, http=BoundedProtocol, **OPTIONS,
    )  # fmt: skip
    listener = bound(config)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def listening() -> None:
        print_note(f"{service.base}: {address}/v1")
        print_note(f"a page to look at: {address}/")
        ready(address)

    _server(uvicorn.Server, service.engine, options.grace, listening)(config).run([listener])
    return 0
