# ruff: noqa: E402 (what is imported below needs the extra)
"""The whole way in a browser: from a dropped CSV to a merged file, and answers; by keyboard, in both languages, on a phone.

In headless Chromium by Playwright, where both are there.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

import qgraft
from qgraft.adapters.choose import use_adapter
from qgraft.cli.serve import _parser, bound, make_page_app, make_service, make_work
from qgraft.serving.answering import answer

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SLOW = 300_000  # ms, on a machine that does other things
KEY = "sk-admin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def server(tiny_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a server with an admin's key."""
    root = tmp_path_factory.mktemp("page") / "work"
    words = ["--model", str(tiny_gguf("llama").path), "--folder", str(root), "--device", "cpu", "--admin_key", KEY]
    root.mkdir()
    options = _parser().parse_args([*words, "--adapters", str(root)])
    service = make_service(options)
    work = make_work(service, options)
    config = uvicorn.Config(make_page_app(service, work), host="127.0.0.1", port=0, log_level="error", access_log=False)
    running = uvicorn.Server(config)
    listener = bound(config)
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    service.engine.start()
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", root
    running.should_exit = True
    thread.join(60)
    work.close(60)
    service.engine.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: tuple[str, Path]) -> Iterator[Any]:
    """A page whose script must not fail, and that must load nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US", accept_downloads=True)
    found = context.new_page()
    found.set_default_timeout(SLOW)
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    found.on("request", lambda asked: None if asked.url.startswith(server[0]) else problems.append(asked.url))
    yield found
    context.close()
    assert problems == []


def test_from_a_csv_to_a_merged_file_and_an_answer(page: Any, server: tuple[str, Path], tmp_path: Path) -> None:
    address, root = server
    rows = [f"hello {n} world the mat,the cat sat and the user {n % 5} sat <b>mat</b>" for n in range(24)]
    (tmp_path / "my rows.csv").write_text("\n".join(["question,answer", *rows, "no answer,", ""]))
    page.goto(f"{address}/#key={KEY}")
    page.wait_for_selector("#chat .column")
    assert KEY not in page.url and page.evaluate("sessionStorage.getItem('qgraft-key')") == KEY
    page.click("#tab-train")
    page.set_input_files("#file", str(tmp_path / "my rows.csv"))
    page.wait_for_selector(".tokens .learned")
    told = page.inner_text("#train .told")
    assert "25 rows read, 24 kept" in told and "dropped 1: no answer" in told
    learned = "".join(page.locator("#train .rows li").first.locator(".learned:not(small)").all_inner_texts())
    assert learned == "the cat sat and the user 0 sat <b>mat</b><|im_end|>"
    page.get_by_label("Name of the run").fill("law")
    page.click("#start-training")
    page.wait_for_selector("#runs .run .badge:has-text('finished')")
    page.wait_for_selector("#runs .chart path.line")
    assert (root / "law" / "adapter_config.json").is_file() and (root / "datasets" / "my-rows.csv").is_file()
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#runs .columns .turn.model .text >> nth=1")

    page.click("#tab-adapters")
    page.wait_for_selector("#adapters .badge:has-text('sealed, whole')")
    page.click("#adapters button:has-text('Chat with it')")
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer (tokens)").fill("12")
    page.get_by_label("Your message").fill("hello 3 world the mat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat .turn.model small[data-i18n=speed] >> nth=1")
    said = page.locator("#chat .turn.model > .text").all_text_contents()

    page.click("#tab-merge")
    page.check("#merge .pick input[type=checkbox]")
    page.get_by_label("Fail below").fill("-100")
    page.click("#start-merge")
    page.wait_for_selector("#merge button:has-text('Download')")
    with page.expect_download() as download:
        page.click("#merge button:has-text('Download')")
    download.value.save_as(tmp_path / "got.gguf")
    merged = root / "merged" / "law.gguf"
    assert (tmp_path / "got.gguf").read_bytes() == merged.read_bytes()

    base = json.loads((root / ".qgraft" / "law.train.json").read_text())["model_name_or_path"]
    model, tokenizer = qgraft.load(base, device="cpu")
    qgraft.load_adapter(model, root / "law", "law")
    asked: dict[str, Any] = {"messages": [("user", "hello 3 world the mat")], "max_new_tokens": 12, "do_sample": False}
    alone = []
    for name in (None, "law"):
        use_adapter(model, name)
        alone.append(answer(model, tokenizer, **asked).text)
    assert said == alone  # what the page shows is what each answers alone, by transformers' generate()
    assert answer(*qgraft.load(str(tmp_path / "got.gguf"), device="cpu"), **asked).text


def test_by_keyboard_on_a_phone_in_both_languages(page: Any, server: tuple[str, Path]) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"{server[0]}/#key={KEY}")
    page.wait_for_selector("#chat .column")
    page.focus("#tab-chat")
    for name in ("train", "runs", "adapters", "merge"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#{name}:not([hidden])")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    unnamed = """[...document.querySelectorAll("button, input, select, textarea")].filter((each) => !each.labels?.length
        && !each.getAttribute("aria-label") && !each.textContent.trim()).map((each) => each.outerHTML)"""
    assert page.evaluate(unnamed) == []
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "zh" and page.inner_text("#tab-merge") == "合并"
    page.click("#theme")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.reload()
    page.wait_for_selector("#merge:not([hidden])")
    assert page.inner_text("#tab-merge") == "合并" and page.evaluate("document.documentElement.dataset.theme") == theme
    page.click("#language")


def test_errors_are_shown_and_answers_are_stopped(page: Any, server: tuple[str, Path]) -> None:
    page.goto(f"{server[0]}/#key={KEY}")
    page.wait_for_selector("#chat .column")
    page.route("**/v1/chat/completions", lambda route: None)  # it never comes
    page.get_by_label("Your message").fill("hello")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#chat .turn.model small:has-text('stopped')")
    page.unroute("**/v1/chat/completions")
    page.get_by_label("Your message").fill("hello " * 200)
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("#chat .turn.model [role=alert]")
    assert "128" in page.inner_text("#chat .turn.model [role=alert]")  # the model's context
    page.evaluate("sessionStorage.setItem('qgraft-key', 'wrong')")
    page.reload()
    page.wait_for_selector("#chat .column")
    page.click("#tab-train")
    page.get_by_role("button", name="Give a key").click()
    page.fill("#key-input", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#train .drop")


def test_deleting_asks_first_and_errors_are_chinese_on_a_chinese_page(page: Any, server: tuple[str, Path]) -> None:
    url, root = server
    for name in ("old", "gone"):
        (root / name).mkdir()
        (root / name / "run.json").write_text('{"finished": true}')
    page.goto(f"{url}/#key={KEY}")
    page.wait_for_selector("#chat .column")
    page.click("#language")
    page.click("#tab-runs")
    old, gone = (page.locator(f"#runs .runs > .card:has(strong:text-is('{name}'))") for name in ("old", "gone"))
    old.get_by_role("button", name="删除").click()
    assert "无法恢复" in page.inner_text("dialog[open]")
    page.locator("dialog[open]").get_by_role("button", name="取消").click()
    page.wait_for_selector("dialog[open]", state="detached")
    assert (root / "old" / "run.json").is_file()
    old.get_by_role("button", name="删除").click()
    page.locator("dialog[open]").get_by_role("button", name="删除").click()
    old.wait_for(state="detached")
    assert not (root / "old").exists()
    shutil.rmtree(root / "gone")
    gone.get_by_role("button", name="删除").click()
    page.locator("dialog[open]").get_by_role("button", name="删除").click()
    page.wait_for_selector("#said:has-text(\"没有运行 'gone'\")")


def test_a_prefix_is_trained_by_its_preset(page: Any, server: tuple[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "some.csv"
    rows.write_text("question,answer\n" + "".join(f"hello {n},the cat {n}\n" for n in range(8)))
    page.goto(f"{server[0]}/#key={KEY}")
    page.wait_for_selector("#chat .column")
    page.click("#tab-train")
    page.set_input_files("#file", str(rows))
    page.wait_for_selector("#train .rows")
    page.check("#train input[value=prefix]")
    page.get_by_text("Details").click()
    assert page.get_by_role("spinbutton", name="Rank").is_disabled()
    assert page.get_by_label("Tokens of the prefix").input_value() == "64"
    page.get_by_label("Tokens of the prefix").fill("4")
    page.get_by_label("At most so many steps").fill("1")
    page.get_by_label("Name of the run").fill("prefixed")
    page.click("#start-training")
    page.wait_for_selector("#runs .runs > .card:has(strong:text-is('prefixed')) .badge:has-text('finished')")
    options = json.loads((server[1] / "prefixed" / "run.json").read_text())["arguments"]
    assert (options["finetuning_type"], options["pre_seq_len"]) == ("p_tuning", 4)
    assert (server[1] / "prefixed" / "adapter_config.json").is_file()
