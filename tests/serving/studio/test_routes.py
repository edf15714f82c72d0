"""The page's endpoints: who may, from where, with which names; what is left on disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from qgraft.locks import folder_locked
from qgraft.serving.fields import ApiError
from qgraft.serving.studio import children, work

ADMIN, OTHER = "sk-admin", "sk-law"
CSV = "question,answer\n" + "".join(f"hello {n},the cat {n}\n" for n in range(12))
ODD_NAMES = ["..", "../x.csv", "..%2fx.csv", "%2e%2e%2fx.csv", "x", "x.gguf", ".x.csv", "a/b.csv", "a,b.csv", "x.csv%00",
             "served.json%2f..%2fx.csv", "con%0a.csv"]  # fmt: skip
BODIES = {  # of what may be posted, as far as it comes to names
    "/studio/rows": {"dataset": "x.csv"}, "/studio/train": {"name": "new", "dataset": "x.csv", "preset": "quick"},
    "/studio/train/stop": {"name": "law"}, "/studio/train/resume": {"name": "law"}, "/studio/sample": {"name": "law"},
    "/studio/curves": {"names": ["law"]}, "/studio/log": {"kind": "train", "name": "law"},
    "/studio/merge": {"name": "new", "adapters": [{"run": "law", "weight": 1}]}, "/studio/merge/stop": {"name": "law"},
    "/studio/downloads": {"name": "x.gguf"}, "/studio/adapters/rename": {"name": "law", "new_name": "lex"},
    "/studio/adapters/delete": {"name": "law"}, "/studio/runs/delete": {"name": "law"},
}  # fmt: skip


def files(root: Path) -> set[str]:
    return {str(path) for path in root.parent.rglob("*")}


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Python where a child is started."""
    script = tmp_path / "sleeper"
    script.write_text("#!/bin/sh\ntrap 'exit 143' TERM\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(script))


def test_what_writes_or_starts_needs_an_admin(studio: Any) -> None:
    posts = {route.path for route in studio.app.routes if "POST" in getattr(route, "methods", ())}
    assert {path for path in posts if path.startswith("/studio/")} == BODIES.keys()
    before = files(studio.root)
    for key, status in ((OTHER, 403), ("wrong", 401), (None, 401)):
        with studio.client(key) as client:
            for path, body in BODIES.items():
                assert client.post(path, json=body).status_code == status, path
            assert client.put("/studio/datasets/x.csv", content=CSV).status_code == status
            for path in ("/studio/runs", "/studio/datasets", "/studio/merges"):
                assert client.get(path).status_code == status
    assert files(studio.root) == before
    with studio.client(OTHER) as client:
        assert client.get("/studio/about").json()["admin"] is False
        assert [each["name"] for each in client.get("/studio/adapters").json()] == ["law"]


def test_pages_of_other_sites_are_refused(studio: Any) -> None:
    elsewhere = ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9"},
                 {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"})  # fmt: skip
    before = files(studio.root)
    for headers in elsewhere:
        with studio.client(ADMIN, **headers) as client:
            for path, body in BODIES.items():
                assert client.post(path, json=body).status_code == 403, (headers, path)
            assert client.put("/studio/datasets/x.csv", content=CSV).status_code == 403
    with studio.client() as client:  # what a form can send without being asked
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert client.post("/studio/train", content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert files(studio.root) == before
    own = {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"}
    with studio.client(ADMIN, **own) as client:
        assert client.post("/studio/curves", json={"names": ["law"]}).status_code == 200


def test_files_of_rows_are_kept_whole_or_not_at_all(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = studio.root / "datasets"
    with studio.client() as client:
        before = files(studio.root)
        for name in ODD_NAMES:
            assert client.put(f"/studio/datasets/{name}", content=CSV).status_code >= 400, name
        limits = studio.service.limits
        monkeypatch.setattr(type(limits), "of", lambda self, method: (1000, 30.0) if method == "PUT" else (20000, 30.0))
        assert client.put("/studio/datasets/big.csv", content=b"x" * 2000).status_code == 413
        pieces = (b"x" * 600 for _ in range(3))  # no length says how much it will be
        assert client.put("/studio/datasets/big.csv", content=pieces).status_code == 413
        assert files(studio.root) == before
        assert client.put("/studio/datasets/问答.csv", content=CSV).json() == {"name": "问答.csv", "bytes": len(CSV)}
        assert (folder / "问答.csv").read_text() == CSV
        assert [each["name"] for each in client.get("/studio/datasets").json()] == ["问答.csv"]
        shown = client.post("/studio/rows", json={"dataset": "问答.csv", "options": {"max_length": 64}}).json()
        assert shown["read"] == shown["kept"] == len(shown["rows"]) == 12
        assert client.post("/studio/rows", json={"dataset": "none.csv"}).status_code == 404
        wrong = client.post("/studio/rows", json={"dataset": "问答.csv", "options": {"prompt_column": "nobody"}})
        assert wrong.status_code == 400 and "nobody" in wrong.json()["error"]["message"]
    (folder / "问答.csv").unlink()


def test_a_run_is_started_stopped_and_goes_on(studio: Any, sleeper: None) -> None:
    body = {"name": "new", "dataset": "x.csv", "preset": "quick", "options": {"r": 4, "system": "the cat"}}
    with studio.client() as client:
        client.put("/studio/datasets/x.csv", content=CSV)
        for wrong in (
            {"name": "law"},
            {"name": "../x"},
            {"preset": "none"},
            {"options": {"output_dir": "/"}},
            {"dataset": 1},
        ):
            assert client.post("/studio/train", json={**body, **wrong}).status_code in (400, 404, 409), wrong
        assert studio.work.children.jobs("train") == {}
        assert client.post("/studio/train", json=body).json()["name"] == "new"
        made = json.loads((studio.root / ".qgraft" / "new.train.json").read_text())
        assert made["dataset"] == str(studio.root / "datasets" / "x.csv") and made["output_dir"] == str(
            studio.root / "new"
        )
        assert (made["r"], made["system"], made["num_train_epochs"]) == (4, "the cat", 1.0)
        job = studio.work.children.running()
        assert job.words == ["train", str(studio.root / ".qgraft" / "new.train.json")]
        assert client.put("/studio/datasets/x.csv", content="other").status_code == 409
        other = client.post("/studio/train", json={**body, "name": "second"})
        assert other.status_code == 409 and not (studio.root / "second").exists()
        told = {run["name"]: run for run in client.get("/studio/runs").json()}
        assert told["new"]["state"] == "training" and told["new"]["steps"] == 0  # it has written nothing yet
        assert client.post("/studio/curves", json={"names": ["new"]}).json()["new"]["loss"] == []
        assert client.post("/studio/sample", json={"name": "new"}).status_code == 409
        (studio.root / "new" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        told = {run["name"]: run for run in client.get("/studio/runs").json()}
        assert told["new"]["state"] == "training" and told["law"]["state"] == "finished"
        assert client.post("/studio/curves", json={"names": ["new"]}).json()["new"]["loss"] == [[1, 3.0]]
        assert client.post("/studio/train/stop", json={"name": "new"}).status_code == 200
        until(lambda: studio.work.children.running() is None)
        assert client.post("/studio/train/stop", json={"name": "new"}).status_code == 404
        again = client.post("/studio/train/resume", json={"name": "new"})
        assert again.status_code == 200 and json.loads((studio.root / ".qgraft" / "new.train.json").read_text()) == made
        client.post("/studio/train/stop", json={"name": "new"})
        until(lambda: studio.work.children.running() is None)
        assert client.post("/studio/train/resume", json={"name": "law"}).status_code == 409  # not started here
        assert client.post("/studio/log", json={"kind": "train", "name": "new"}).json() == {"log": ""}
    shutil.rmtree(studio.root / "new")


def test_a_run_that_fails_before_it_writes_anything_says_why(
    studio: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "failing"
    script.write_text("#!/bin/sh\necho 'error: no rows'\nrmdir \"$PWD/early\"\nexit 2\n")
    script.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(script))
    with studio.client() as client:
        client.put("/studio/datasets/x.csv", content=CSV)
        client.post("/studio/train", json={"name": "early", "dataset": "x.csv", "preset": "quick"})
        until(lambda: studio.work.children.running() is None)
        told = {run["name"]: run for run in client.get("/studio/runs").json()}["early"]
        assert (told["state"], told["error"], told["can_go_on"]) == ("failed", "error: no rows", True)
        assert not (studio.root / "early").exists()
        assert client.post("/studio/train/resume", json={"name": "early"}).status_code == 200
        until(lambda: studio.work.children.running() is None)


def test_a_merge_is_started_with_its_weights(studio: Any, sleeper: None) -> None:
    body = {"name": "both", "adapters": [{"run": "law", "weight": 0.7}, {"run": "group/tax"}], "min_retained": 0.5}
    wrong: list[dict[str, Any]] = [
        {"adapters": []}, {"adapters": [{"run": "../secret"}]}, {"adapters": [{"run": "half"}]}, {"method": "--output"},
        {"name": "../both"}, {"min_retained": 2}, {"adapters": [{"run": "law", "weight": "1"}]}, {"adapters": "law"},
    ]  # fmt: skip
    with studio.client() as client:
        for each in wrong:
            assert client.post("/studio/merge", json={**body, **each}).status_code in (400, 404, 409), each
        assert client.post("/studio/merge", json=body).json()["name"] == "both.gguf"
        words = studio.work.children.running().words
        assert words[words.index("--output") + 1] == str(studio.root / "merged" / "both.gguf")
        assert [words[at + 1] for at, word in enumerate(words) if word == "--weight"] == ["0.7", "1.0"]
        assert [words[at + 1] for at, word in enumerate(words) if word == "--adapter"] == [
            str(studio.root / "law"), str(studio.root / "group" / "tax"),
        ]  # fmt: skip
        assert client.get("/studio/merges").json()["jobs"][0]["running"] is True
        client.post("/studio/merge/stop", json={"name": "both"})
        until(lambda: studio.work.children.running() is None)
        assert client.get("/studio/merges").json()["jobs"][0]["stopped"] is True


def test_merged_files_are_downloaded_by_a_ticket(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 100
    path = studio.root / "merged" / "done.gguf"
    path.write_bytes(content)
    report = {"retained_gain": 0.97, "warning": None, "adapters": {"law": 1.0}, "method": "auto", "seconds": 3.0, "notes": [],
              "distilled_steps": 0, "kept": {"base": 3.0, "adapter": 1.0, "merged": 1.06}}  # fmt: skip
    path.with_name("done.merge.json").write_text(json.dumps(report))
    with studio.client() as client, studio.client(None) as browser:
        found = client.get("/studio/merges").json()["files"]
        assert found[0]["retained_gain"] == 0.97 and found[0]["bytes"] == len(content)
        for name in ("../law/run.json", "none.gguf", "done.merge.json", "done"):
            assert client.post("/studio/downloads", json={"name": name}).status_code in (400, 404)
        address = client.post("/studio/downloads", json={"name": "done.gguf"}).json()["path"]
        response = browser.get(address)
        assert response.content == content and "attachment" in response.headers["content-disposition"]
        assert browser.get(address, headers={"Range": "bytes=10-19"}).content == content[10:20]
        assert browser.get("/studio/download/guess/done.gguf").status_code == 404
        monkeypatch.setattr(work, "TICKET_SECONDS", -1)
        expired = client.post("/studio/downloads", json={"name": "done.gguf"}).json()["path"]
        assert browser.get(expired).status_code == 404
        path.with_name("done.merge.json").write_text("{")
        assert client.get("/studio/merges").json()["files"][0]["retained_gain"] is None
    path.unlink()


def test_adapters_tell_what_they_are(studio: Any) -> None:
    with studio.client() as client:
        told = {each["name"]: each for each in client.get("/studio/adapters").json()}
        assert set(told) == {"law", "med", "foreign"}  # no link that leads out, no run without an adapter, no group
        assert told["law"]["seal"] == "whole" and told["foreign"]["seal"] == "other base"
        assert (told["law"]["kind"], told["law"]["r"], told["law"]["path"]) == ("LoRA", 4, "law")
        weights = studio.root / "med" / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        told = {each["name"]: each for each in client.get("/studio/adapters").json()}
        assert told["med"]["seal"] == "changed" and "adapter_model.safetensors" in told["med"]["problem"]
        weights.write_bytes(whole)
        (studio.root / "med" / "qgraft.json").rename(studio.root / "seal")
        assert {each["name"]: each["seal"] for each in client.get("/studio/adapters").json()}["med"] == "none"
        (studio.root / "seal").rename(studio.root / "med" / "qgraft.json")


def test_an_adapter_gets_another_name(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(name: object, new: object) -> int:
        return int(client.post("/studio/adapters/rename", json={"name": name, "new_name": new}).status_code)

    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
    with studio.client() as client:
        said = client.post("/v1/chat/completions", json={**ask, "model": "law"}).json()["choices"]
        for name, new in (
            ("none", "x"),
            ("law", "med"),
            ("law", "base"),
            ("law", "../x"),
            ("law", ""),
            ("law", "a b"),
            (1, 2),
        ):
            assert rename(name, new) in (400, 404, 409), (name, new)
        with monkeypatch.context() as patched:
            patched.setattr(studio.service.engine, "uses", lambda name: True)
            assert rename("law", "lex") == 409
        until(lambda: not studio.service.engine.uses("law"))  # an answer is there a moment before its place is free
        assert rename("law", "lex") == 200
        assert (studio.root / "lex" / "run.json").is_file() and not (studio.root / "law").exists()
        assert client.post("/v1/chat/completions", json={**ask, "model": "lex"}).json()["choices"] == said
        assert client.post("/v1/chat/completions", json={**ask, "model": "law"}).status_code == 404
        until(lambda: not studio.service.engine.uses("lex"))
        assert rename("lex", "law") == 200
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "law"}).status_code == 200
        assert rename("law", "lex") == 409 and (studio.root / "law").is_dir()  # it would be gone for the other name
        assert rename("kept", "held") == 200 and (studio.root / "law").is_dir()
        assert "held" in studio.service.catalogue.names() and "kept" not in studio.service.catalogue.available()
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "held"}).status_code == 200
        with folder_locked(studio.root / "law"):  # a run writes there
            assert rename("law", "lex") == 409


def test_a_run_is_deleted_with_what_was_loaded_from_it(studio: Any, sleeper: None) -> None:
    root, children, catalogue = studio.root, studio.work.children, studio.service.catalogue
    with studio.client() as client:

        def delete(name: object, kind: str = "runs") -> Any:
            return client.post(f"/studio/{kind}/delete", json={"name": name})

        shutil.copytree(root / "law", root / "old")
        before = files(root)
        for name in ("none", "..", "../secret", "link", ".", "", "datasets", "merged", ".qgraft", "law/..", "/etc", 1):
            assert delete(name).status_code in (400, 403, 404), name
        with folder_locked(root / "old"):  # a run writes there
            assert delete("old").status_code == 409
        client.put("/studio/datasets/x.csv", content=CSV)
        client.post("/studio/train", json={"name": "going", "dataset": "x.csv", "preset": "quick"})
        assert "is being trained" in delete("going").json()["error"]["message"]
        client.post("/studio/train/stop", json={"name": "going"})
        until(lambda: children.running() is None)
        client.post("/studio/merge", json={"name": "m", "adapters": [{"run": "old", "weight": 1}]})
        assert "is being merged" in delete("old").json()["error"]["message"]
        client.post("/studio/merge/stop", json={"name": "m"})
        until(lambda: children.running() is None)
        assert before <= files(root)
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "also", "lora_path": "old"}).status_code == 200
        assert delete("old").json() == {"deleted": "old"} and not (root / "old").exists()
        assert "also" not in catalogue.available() and "also" not in catalogue.names()
        assert delete("going").json() == {"deleted": "going"}
        assert "going" not in children.jobs("train") and not list((root / ".qgraft").glob("*going*"))
        (root / "datasets" / "x.csv").unlink()
        assert files(root) >= {str(root / "law" / "qgraft.json"), str(root.parent / "secret" / "qgraft.json")}


def test_an_adapter_is_deleted_but_not_while_it_answers(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, service = studio.root, studio.service
    with studio.client() as client:

        def delete(name: object) -> Any:
            return client.post("/studio/adapters/delete", json={"name": name})

        shutil.copytree(root / "law", root / "old")
        before = files(root)
        for name in ("none", "../secret", "link", "base", "datasets", ""):
            assert delete(name).status_code in (400, 403, 404), name
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "also", "lora_path": "old"}).status_code == 200
        assert delete("also").status_code == delete("old").status_code == 409  # one folder, two names
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "also"}).status_code == 200
        service.catalogue.need(["old"])
        with monkeypatch.context() as patched:
            patched.setattr(service.engine, "uses", lambda name: name == "old")
            assert delete("old").status_code == 409
        with monkeypatch.context() as patched:
            entry = replace(service.catalogue.entries["old"], pinned=True)
            patched.setitem(service.catalogue.entries, "old", entry)
            assert delete("old").status_code == 403
        assert before <= files(root)
        assert delete("old").json() == {"deleted": "old"}
        assert not (root / "old").exists() and "old" not in service.catalogue.available()


def test_runs_answer_with_what_they_have_saved(studio: Any) -> None:
    catalogue = studio.service.catalogue
    with studio.client() as client:
        assert client.post("/studio/sample", json={"name": "law"}).json()["model"] == "law"
        half = client.post("/studio/sample", json={"name": "half"}).json()
        assert (half["model"], half["step"]) == ("half-at-4", 4) and "half-at-4" in catalogue.names()
        shutil.copytree(studio.root / "half" / "checkpoint-4", studio.root / "half" / "checkpoint-8")
        later = client.post("/studio/sample", json={"name": "half"}).json()
        assert later["model"] == "half-at-8" and "half-at-4" not in catalogue.names()
        shutil.rmtree(studio.root / "half" / "checkpoint-8")
        assert client.post("/studio/sample", json={"name": "group/tax"}).json()["model"] == "group-tax-saved"
        for name in ("foreign", "none", "../secret"):
            assert client.post("/studio/sample", json={"name": name}).status_code in (400, 404)
        for name in ("half-at-8", "group-tax-saved"):
            catalogue.unload(name)


def test_questions_are_read_from_the_folder_alone(studio: Any) -> None:
    run = studio.root / "law" / "run.json"
    before = run.read_text()
    (studio.root / "datasets" / "asked.csv").write_text(CSV)
    outside = studio.root.parent / "outside.csv"
    outside.write_text(CSV.replace("hello", "secret"))
    for name, expected in (("datasets/asked.csv", ["hello 0", "hello 1", "hello 2"]), ("../outside.csv", [])):
        run.write_text(json.dumps({"finished": True, "arguments": {"dataset": str(studio.root / name)}}))
        assert studio.work.sample("law")["questions"] == expected
    (studio.root / "datasets" / "asked.csv").unlink()
    (studio.root / "datasets" / "asked.csv").symlink_to(outside)
    run.write_text(
        json.dumps({"finished": True, "arguments": {"dataset": str(studio.root / "datasets" / "asked.csv")}})
    )
    assert studio.work.sample("law")["questions"] == []
    (studio.root / "datasets" / "asked.csv").unlink()
    run.write_text(before)


def test_a_server_without_a_folder_says_so(studio: Any) -> None:
    from fastapi.testclient import TestClient

    from qgraft.cli.serve import make_page_app

    bare = TestClient(make_page_app(studio.service, None), base_url="http://127.0.0.1:8080",
                      headers={"Authorization": f"Bearer {ADMIN}"})  # fmt: skip
    assert bare.get("/studio/about").json()["folder"] is None
    response = bare.get("/studio/runs")
    assert response.status_code == 404 and "--folder" in response.json()["error"]["message"]
    with pytest.raises(ApiError, match="expired"):
        studio.work.ticketed("guess")
