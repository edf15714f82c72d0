"""The page's own endpoints. All of them but the first two need an admin's key; what they do is in work.py.

A page of another site may send requests to this machine, but no JSON, no PUT and no key: the browser asks first, and this
server never answers that it may. Beside that, a request that names another origin than the server's own is refused.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from qgraft import __version__
from qgraft.serving.exchange import body_of, permission_of, require_admin, told
from qgraft.serving.fields import ApiError, object_of, text_of, wrong
from qgraft.serving.service import Service
from qgraft.serving.studio import adapters, recipes
from qgraft.serving.studio.static import HEADERS
from qgraft.serving.studio.work import METHODS, Work

LONGEST = 200  # characters of a name


def add_studio(app: FastAPI, service: Service, work: Work | None) -> None:
    """The endpoints below /studio/.

    Args:
        work: None where the server has no folder to work in: what needs one is refused.
    """
    _add_looking(app, service, work)
    _add_training(app, work)
    _add_merging(app, work)


async def admitted(request: Request, work: Work | None) -> tuple[Work, Any]:
    """The folder's work and the body of a request, if it may. Raises ApiError."""
    same_origin(request)
    require_admin(request)
    if work is None:
        raise ApiError(
            404, "this server works in no folder", kind="NotFoundError", hint="start it with --folder, or `qgraft ui`"
        )
    if request.method != "POST":
        return work, {}
    return work, object_of(await body_of(request))


def same_origin(request: Request) -> None:
    """Raise ApiError for a request that a page of another site makes."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    elsewhere = origin is not None and origin.partition("://")[2].lower() != host.lower()
    if elsewhere or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "requests of other sites are refused", kind="permission_error")


def name_of(body: Mapping[str, Any], key: str) -> str:
    """A name that a body has to have. Raises ApiError."""
    name = text_of(body, key)
    if len(name) > LONGEST:
        raise wrong(key, name, f"a name of at most {LONGEST} characters")
    return name


def _add_looking(app: FastAPI, service: Service, work: Work | None) -> None:
    @app.get("/studio/about")
    async def about(request: Request) -> dict[str, Any]:
        return {
            "version": __version__, "base": service.base, "admin": permission_of(request).admin,
            "folder": None if work is None else work.place.root.name, "context": service.engine.context,
            "presets": recipes.PRESETS, "methods": METHODS, "upload": service.limits.upload,
            "can_load": service.catalogue.folder is not None,
        }  # fmt: skip

    @app.get("/studio/adapters")
    async def listed(request: Request) -> list[dict[str, Any]]:
        return await told(adapters.listed, service, permission_of(request))

    @app.post("/studio/adapters/rename")
    async def rename(request: Request) -> dict[str, Any]:
        same_origin(request)
        require_admin(request)
        body = object_of(await body_of(request))
        name, new = name_of(body, "name"), name_of(body, "new_name")
        await (told(adapters.rename, service, name, new) if work is None else told(work.rename, name, new))
        return {"name": new}

    @app.post("/studio/adapters/delete")
    async def delete_adapter(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        await told(there.delete_adapter, name_of(body, "name"))
        return {"deleted": body["name"]}

    @app.post("/studio/runs/delete")
    async def delete_run(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        await told(there.delete_run, name_of(body, "name"))
        return {"deleted": body["name"]}

    @app.get("/studio/runs")
    async def all_runs(request: Request) -> list[dict[str, Any]]:
        return await told((await admitted(request, work))[0].runs)

    @app.post("/studio/curves")
    async def curves(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        names = body.get("names")
        if not isinstance(names, list) or len(names) > 16 or not all(isinstance(name, str) for name in names):
            raise wrong("names", names, "a list of at most 16 names of runs")
        return {name: await told(there.curves, name) for name in names}

    @app.post("/studio/log")
    async def log(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        kind, name = name_of(body, "kind"), name_of(body, "name")
        if kind not in ("train", "merge") or name not in there.children.jobs(kind):
            raise ApiError(404, "there is no such job", kind="NotFoundError")
        return {"log": await told(there.children.tail, kind, name)}


def _add_training(app: FastAPI, work: Work | None) -> None:
    @app.get("/studio/datasets")
    async def datasets(request: Request) -> list[dict[str, Any]]:
        return await told((await admitted(request, work))[0].datasets)

    @app.put("/studio/datasets/{name}")
    async def keep(request: Request, name: str) -> dict[str, Any]:
        there, _ = await admitted(request, work)
        there.place.dataset(name)
        content = await request.body()
        return await told(there.keep, name, content)

    @app.post("/studio/rows")
    async def rows(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.preview, body)

    @app.post("/studio/train")
    async def train(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.train, body)

    @app.post("/studio/train/stop")
    async def stop(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        await told(there.children.stop, "train", name_of(body, "name"))
        return {"stopping": body["name"]}

    @app.post("/studio/train/resume")
    async def resume(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.go_on, name_of(body, "name"))

    @app.post("/studio/sample")
    async def sample(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.sample, name_of(body, "name"))


def _add_merging(app: FastAPI, work: Work | None) -> None:
    @app.get("/studio/merges")
    async def merges(request: Request) -> dict[str, Any]:
        return await told((await admitted(request, work))[0].merges)

    @app.post("/studio/merge")
    async def merge(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.merge, body)

    @app.post("/studio/merge/stop")
    async def stop(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        await told(there.children.stop, "merge", name_of(body, "name"))
        return {"stopping": body["name"]}

    @app.post("/studio/downloads")
    async def ticket(request: Request) -> dict[str, Any]:
        there, body = await admitted(request, work)
        return await told(there.ticket, name_of(body, "name"))

    @app.get("/studio/download/{word}/{name}")
    async def download(word: str, name: str) -> Response:
        if work is None:
            raise ApiError(404, "this server works in no folder", kind="NotFoundError")
        path = work.ticketed(word)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream", headers=HEADERS)
