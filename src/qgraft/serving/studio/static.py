"""The page: files of the package, handed out as they are, with headers that let it load and send nothing elsewhere.

All of them are read when the server starts, so a request picks from a table and opens no path. The policy allows scripts and
styles of this server only, none within the page's text; answers of models are put into it as text, never as HTML.
"""

import hashlib
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import Response

from qgraft.serving.fields import ApiError

TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip


def page_files() -> dict[str, bytes]:
    """The files of the page by their names."""
    folder = resources.files("qgraft.serving") / "page"
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name.rpartition(".")[2] in TYPES}


def add_page(app: FastAPI) -> None:
    """Serve the page at /, and what it is made of below /page/."""
    files = page_files()
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in files.items()}

    @app.get("/")
    async def page(request: Request) -> Response:
        return await file(request, "index.html")

    @app.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"GET /page/{name[:100]} is not served here", code="not_found")
        headers = {**HEADERS, "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=TYPES[name.rpartition(".")[2]])
