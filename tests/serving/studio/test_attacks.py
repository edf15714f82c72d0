"""The page's endpoints under attack: names that lead out, requests of others, races, and files that are bombs."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from waiting import until

from qgraft.serving.studio import children

ADMIN, OTHER = "sk-admin", "sk-law"
CSV = "question,answer\n" + "".join(f"hello {n},the cat {n}\n" for n in range(12))
LEAD_OUT = [
    "..", ".", "../secret", "../../etc/passwd", "/etc/passwd", "//etc/passwd", "law/..", "law/../../secret", "./law",
    "law/.", "law//", "..\\secret", "..\\..\\secret", "law\\..\\..\\secret", "C:\\x", "\\\\host\\share", "law\x00",
    "law\x00.csv", "law\n", "law\r\nSet-Cookie: a=b", "law\t", " law", "law ", "~", "~root", "$HOME", "${HOME}", "`id`",
    "$(id)", "law;id", "law|id", "law&id", "link", "link/checkpoint-4", "file:///etc/passwd", "http://x/y", "a" * 300,
    "../" * 40 + "etc/passwd", "law/../law/../../secret", ".qgraft", ".qgraft/x", "....//secret", "..;/secret",
    "%2e%2e/secret", "..%2fsecret", "%2e%2e%2fsecret", "%252e%252e%252fsecret", "..%c0%afsecret", "..%ef%bc%8fsecret",
    "\u2025/secret", "\uff0e\uff0e/secret", "..\u2215secret", "..\uff0fsecret", "..\u29f8secret", "\u202e../secret",
    "law\u0000", "law\u2028", "law\ufeff", "\u200b..", "served.json", "datasets/../../secret", "merged/../../secret",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "'-alert(1)-'", "law<b>",
    "javascript:alert(1)", "&lt;b&gt;", "{{7*7}}", "law'; DROP TABLE runs; --", "-rf", "--help",
]  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    """Everything beside and below the folder."""
    return {str(path): path.read_bytes() for path in sorted(root.parent.rglob("*")) if path.is_file()}


def asked(name: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every POST that takes a name, with this one in each of its places."""
    for path in ("train/stop", "train/resume", "sample", "merge/stop", "downloads", "adapters/delete", "runs/delete"):
        yield path, {"name": name}
    yield "rows", {"dataset": name}
    yield "curves", {"names": [name]}
    yield "train", {"name": "new", "dataset": name, "preset": "quick"}
    yield "merge", {"name": "new", "adapters": [{"run": name, "weight": 1}]}
    yield "adapters/rename", {"name": name, "new_name": "new"}
    if name not in ("-rf", "--help", "link"):  # letters and dashes, which adapters may be called
        yield "adapters/rename", {"name": "law", "new_name": name}
        yield "merge", {"name": name, "adapters": [{"run": "law", "weight": 1}]}
        yield "train", {"name": name, "dataset": "x.csv", "preset": "quick"}
    for kind in ("train", "merge"):
        yield "log", {"kind": kind, "name": name}
    yield "log", {"kind": name, "name": "law"}


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Python where a child is started."""
    script = tmp_path / "sleeper"
    script.write_text("#!/bin/sh\ntrap 'exit 143' TERM\nwhile :; do sleep 0.02; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(script))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child may be started."""

    def start(*args: Any, **given: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(children.subprocess, "Popen", start)


def test_no_name_of_a_body_leads_out_or_starts_anything(studio: Any, never: None) -> None:
    assert len(LEAD_OUT) > 60
    with studio.client() as client:
        assert client.put("/studio/datasets/x.csv", content=CSV).status_code == 200
        before = files(studio.root)
        for name in LEAD_OUT:
            for path, body in asked(name):
                response = client.post(f"/studio/{path}", json=body)
                assert 400 <= response.status_code < 500, (path, body, response.text)
                assert len(response.content) < 2000 and "root:" not in response.text
        for name in (None, 5, True, [], {}, ["law"], {"a": 1}, "", "x" * 15000):
            for path, body in asked(name):
                response = client.post(f"/studio/{path}", json=body)
                assert 400 <= response.status_code < 500, (path, body, response.text)
                assert len(response.content) < 2000, path
        assert files(studio.root) == before
    (studio.root / "datasets" / "x.csv").unlink()


def test_no_name_of_a_path_leads_out(studio: Any) -> None:
    before = files(studio.root)
    with studio.client() as client:
        for name in LEAD_OUT:
            for form in (quote(name, safe=""), quote(quote(name, safe=""), safe=""), name.replace("/", "%2F")):
                if any(ord(letter) < 33 for letter in form):
                    continue
                for text in (form, f"{form}.csv"):
                    response = client.put(f"/studio/datasets/{text}", content=CSV)
                    if response.status_code == 200:  # a name like any other, in its place
                        kept = studio.root / "datasets" / response.json()["name"]
                        assert kept.read_text() == CSV and kept.parent == studio.root / "datasets"
                        kept.unlink()
                    for url in (f"/studio/download/{form}/x", f"/studio/download/x/{form}", f"/page/{text}"):
                        told = client.get(url)  # the client has taken ".." out of some of these
                        assert told.status_code in (404, 405) or told.text.startswith("<!doctype html>"), url
    assert files(studio.root) == before


def test_links_that_lead_out_are_not_followed(studio: Any, tmp_path: Path, never: None) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.csv").write_text(CSV)
    (outside / "x.gguf").write_text("secret")
    (outside / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    root = studio.root
    links = {"datasets/out.csv": "x.csv", "datasets/none.csv": "none.csv", "merged/out.gguf": "x.gguf", "outrun": "",
             "out.gguf": "x.gguf", "group/outrun": ""}  # fmt: skip
    for link, target in links.items():
        (root / link).symlink_to(outside / target)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    job = children.Job("train", "outrun", ["train"], 1, 0.0, 0.0, code=0)
    studio.work.children._jobs["train", "outrun"] = job
    try:
        with studio.client() as client:
            for name in ("out.csv", "none.csv"):
                assert client.put(f"/studio/datasets/{name}", content="changed").status_code == 403
                assert client.post("/studio/rows", json={"dataset": name}).status_code == 403
            assert "out.csv" not in {each["name"] for each in client.get("/studio/datasets").json()}
            assert client.get("/studio/merges").json()["files"] == []
            assert client.post("/studio/downloads", json={"name": "out.gguf"}).status_code == 403
            assert client.post("/studio/merge", json={"name": "out", "adapters": [{"run": "law"}]}).status_code == 403
            for name in ("outrun", "group/outrun"):
                for path in ("curves", "sample", "runs/delete", "train/resume", "adapters/delete"):
                    body = {"names": [name]} if path == "curves" else {"name": name}
                    assert client.post(f"/studio/{path}", json=body).status_code in (403, 404, 409), (path, name)
            assert not {"outrun", "group/outrun"} & {each["name"] for each in client.get("/studio/adapters").json()}
            assert "out" not in {each["name"] for each in client.get("/studio/adapters").json()}
    finally:
        del studio.work.children._jobs["train", "outrun"]
        for link in links:
            (root / link).unlink()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_other_sites_and_other_names_of_this_machine(studio: Any) -> None:
    """Forged origins, and a page whose name was pointed at this machine (DNS rebinding): it has no key."""
    before = files(studio.root)
    bodies = dict(asked("law"))
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8080.evil.example",
                   "http://127.0.0.1:8080@evil.example", "http://evil.example/127.0.0.1:8080", "http://localhost:8080",
                   "http://127.0.0.1:8080, http://evil.example", "file://", "http://[::1]:8080"):  # fmt: skip
        with studio.client(ADMIN, Origin=origin) as client:
            for path, body in bodies.items():
                assert client.post(f"/studio/{path}", json=body).status_code == 403, (origin, path)
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example:8080"):
        with studio.client(None, Host=host, Origin=f"http://{host}") as client:
            for path, body in bodies.items():
                assert client.post(f"/studio/{path}", json=body).status_code == 401, (host, path)
            for path in ("about", "adapters", "runs", "datasets", "merges"):
                assert client.get(f"/studio/{path}").status_code == 401
    with studio.client() as client:
        for path in ("/studio/train", "/v1/chat/completions"):  # no answer lets another site ask
            told = client.options(
                path, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
            )
            assert told.status_code in (403, 404, 405)
            assert not [name for name in told.headers if name.startswith("access-control")]
    assert files(studio.root) == before


def test_a_server_without_keys_answers_only_this_machines_own_names(
    studio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio.service.keys, "are_needed", False)
    for host, status in (("127.0.0.1:8080", 200), ("localhost", 200), ("[::1]:8080", 200), ("evil.example", 403),
                         ("evil.example:8080", 403), ("127.0.0.1.evil.example", 403), ("10.0.0.5", 403)):  # fmt: skip
        with studio.client(None) as client:
            assert client.get("/studio/about", headers={"Host": host}).status_code == status, host
            assert client.get("/studio/runs", headers={"Host": host}).status_code == 403, host  # needs an admin's key


def test_over_long_bodies_and_names(studio: Any) -> None:
    before = files(studio.root)
    with studio.client() as client:
        for path, _ in asked("law"):
            assert client.post(f"/studio/{path}", content=b'{"name": "' + b"x" * 30000 + b'"}').status_code == 413
            assert client.post(f"/studio/{path}", content=(b" " * 9000 for _ in range(4))).status_code == 413
            for content in (b"[" * 15000, b"{" * 9000, b'{"name": ' + b"1" * 9000 + b"}", b"\xff", b"null", b"[]", b""):
                assert client.post(f"/studio/{path}", content=content).status_code == 400, (path, content[:9])
        assert client.put(f"/studio/datasets/{'x' * 9000}.csv", content=CSV).status_code == 400
        assert client.post("/studio/curves", json={"names": ["law"] * 17}).status_code == 400
        many = [{"run": "law", "weight": 1}] * 9
        assert client.post("/studio/merge", json={"name": "new", "adapters": many}).status_code == 400
        for weight in (True, "1", None, [], 1e999):
            content = json.dumps({"name": "new", "adapters": [{"run": "law", "weight": weight}]})
            assert client.post("/studio/merge", content=content).status_code == 400, weight
    assert files(studio.root) == before


def at_once(count: int, ask: Callable[[int], Any]) -> list[int]:
    """The statuses of so many requests at once."""
    found: list[int] = []
    gate = threading.Barrier(count)

    def one(number: int) -> None:
        gate.wait()
        found.append(ask(number).status_code)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(found) == count
    return sorted(found)


def test_many_who_start_stop_and_delete_the_same_run(studio: Any, sleeper: None) -> None:
    body = {"name": "raced", "dataset": "x.csv", "preset": "quick"}
    jobs = studio.work.children
    with studio.client() as client:
        client.put("/studio/datasets/x.csv", content=CSV)
        for _ in range(3):
            assert at_once(8, lambda _: client.post("/studio/train", json=body)) == [200, *[409] * 7]
            assert len([job for job in jobs.jobs("train").values() if job.code is None]) == 1
            pid = jobs.running().pid
            assert set(at_once(4, lambda _: client.post("/studio/runs/delete", json={"name": "raced"}))) == {409}
            assert set(at_once(8, lambda _: client.post("/studio/train/stop", json={"name": "raced"}))) <= {200, 404}
            until(lambda: jobs.running() is None)
            ended = jobs.jobs("train")["raced"].code  # of its own accord, or before it could take the signal
            assert ended in (143, -signal.SIGTERM) and not os.path.exists(f"/proc/{pid}/exe")

            def either(number: int) -> Any:
                path = "/studio/train/resume" if number % 2 else "/studio/runs/delete"
                return client.post(path, json={"name": "raced"})

            statuses = at_once(8, either)
            assert set(statuses) <= {200, 404, 409} and statuses.count(200) in (1, 2), statuses
            running = jobs.running()  # either it goes on and is there, or it is gone
            assert (running is not None) == (studio.root / "raced").exists()
            if running is not None:
                client.post("/studio/train/stop", json={"name": "raced"})
                until(lambda: jobs.running() is None)
                assert client.post("/studio/runs/delete", json={"name": "raced"}).status_code == 200
            assert not (studio.root / "raced").exists() and "raced" not in jobs.jobs("train")
            assert not list((studio.root / ".qgraft").glob("*raced*"))
        contents = [f"question,answer\n{letter * 999},b\n" for letter in "abcdefgh"]
        assert set(at_once(8, lambda n: client.put("/studio/datasets/y.csv", content=contents[n]))) == {200}
        assert (studio.root / "datasets" / "y.csv").read_text() in contents  # one of them, whole
        assert not [path for path in (studio.root / "datasets").iterdir() if path.name.startswith(".")]
    for name in ("x.csv", "y.csv"):
        (studio.root / "datasets" / name).unlink()


def test_tickets_are_for_one_file_each_and_cannot_be_guessed(studio: Any) -> None:
    for name in "ab":
        (studio.root / "merged" / f"{name}.gguf").write_text(f"weights of {name}")
    with studio.client() as client, studio.client(None) as nobody:
        assert set(at_once(8, lambda n: client.post("/studio/downloads", json={"name": f"{'ab'[n % 2]}.gguf"}))) == {
            200
        }
        path = client.post("/studio/downloads", json={"name": "a.gguf"}).json()["path"]
        assert nobody.get(path).text == "weights of a"
        word = path.split("/")[3]
        assert (
            nobody.get(f"/studio/download/{word}/b.gguf").text == "weights of a"
        )  # what the word is for, and nothing else
        for guess in (word[:-1], word + "a", word.swapcase(), "", "..", "%2e%2e"):
            assert nobody.get(f"/studio/download/{guess}/a.gguf").status_code in (401, 404)
        (studio.root / "merged" / "a.gguf").unlink()
        assert nobody.get(path).status_code == 404
    (studio.root / "merged" / "b.gguf").unlink()


def test_the_base_and_the_pages_own_folders_cannot_be_renamed_or_deleted(studio: Any, monkeypatch: Any) -> None:
    source = Path(studio.work.place.model)
    (studio.root / "model.gguf").write_bytes(source.read_bytes())
    base = studio.service.engine.model.qgraft
    monkeypatch.setattr(base, "info", replace(base.info, source=str(studio.root / "model.gguf")))
    before = files(studio.root)
    with studio.client() as client:
        for path, body in (("delete", {"name": "model"}), ("rename", {"name": "model", "new_name": "other"})):
            response = client.post(f"/studio/adapters/{path}", json=body)
            assert response.status_code == 403 and "is the base" in response.text
        for new in ("datasets", "merged", "half", "group", "link", "model", "foreign"):
            assert client.post("/studio/adapters/rename", json={"name": "med", "new_name": new}).status_code in (
                400,
                409,
            ), new
    assert files(studio.root) == before
    (studio.root / "model.gguf").unlink()


BOMBS = {
    "one-cell.csv": "question,answer\n" + "x" * 2_000_000 + ",b\n",
    "quotes.csv": "question,answer\n" + '"' * 2_000_000,
    "commas.csv": "question,answer\n" + "," * 1_000_000,
    "columns.csv": ",".join(f"c{n}" for n in range(50_000)) + "\n1\n",
    "open.csv": 'question,answer\n"never closed' + "\n" * 500_000,
    "brackets.json": "[" * 1_000_000, "objects.json": '{"a":' * 300_000, "digits.json": "[" + "1" * 1_000_000 + "]",
    "lines.jsonl": "[]\n" * 200_000, "key-twice.jsonl": '{"question": "a", "question": "b"}\n' * 1000,
    "nulls.csv": "question,answer\n\x00\x00,\x00\n", "bytes.csv": "\udcff\udcfe",
    "tabs.tsv": "question\tanswer\n" + "\t" * 500_000,
    "formula.csv": 'question,answer\n"=cmd|\' /C calc\'!A0","@SUM(1)"\n',
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_are_bombs_are_read_or_refused_in_time(studio: Any, name: str) -> None:
    content = BOMBS[name].encode("utf-8", "surrogateescape")
    with studio.client() as client:
        assert client.put(f"/studio/datasets/{name}", content=content).status_code == 200
        began = time.process_time()
        response = client.post("/studio/rows", json={"dataset": name, "options": {"max_length": 64}})
        assert response.status_code in (200, 400), response.text
        assert time.process_time() - began < 20 and len(response.content) < 200_000
        if name == "formula.csv":
            assert "=cmd" in "".join(text for row in response.json()["rows"] for text, _ in row["pieces"])
    (studio.root / "datasets" / name).unlink()


MARKUP = '<img src=x onerror="alert(1)"></textarea><script>alert(2)</script>'


def test_what_others_wrote_comes_as_json_that_no_browser_takes_for_a_page(studio: Any) -> None:
    """Markup in rows, seals, runs and errors: it is told as it is, as JSON, never sniffed; page.js puts it in as text."""
    root = studio.root
    shutil.copytree(root / "law", root / "odd")
    seal = json.loads((root / "odd" / "qgraft.json").read_text())
    seal["arguments"] = {"system": MARKUP, "dataset": MARKUP}
    (root / "odd" / "qgraft.json").write_text(json.dumps(seal))
    (root / "odd" / "run.json").write_text(json.dumps({"notes": [MARKUP], "arguments": {"system": MARKUP}}))
    with studio.client() as client:
        client.put("/studio/datasets/x.csv", content=f'question,answer\n"{MARKUP.replace(chr(34), chr(34) * 2)}",b\n')
        answers = [client.get(f"/studio/{path}") for path in ("adapters", "runs", "datasets", "merges", "about")]
        answers += [client.post("/studio/rows", json={"dataset": "x.csv"}), client.get(f"/{quote(MARKUP)}"),
                    client.post("/studio/sample", json={"name": MARKUP}),
                    client.get(f"/v1/models/{quote(MARKUP)}")]  # fmt: skip
        for response in answers:
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-content-type-options"] == "nosniff"
        told = {each["name"]: each for each in client.get("/studio/adapters").json()}
        assert (
            MARKUP in (told["odd"].get("problem") or told["odd"]["trained"]["system"])
            or told["odd"]["seal"] == "changed"
        )
        runs = {each["name"]: each for each in client.get("/studio/runs").json()}
        assert runs["odd"]["notes"] == [MARKUP]
    shutil.rmtree(root / "odd")
    (root / "datasets" / "x.csv").unlink()
