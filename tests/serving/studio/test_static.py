"""The page's files: nothing from elsewhere, nothing inline, every word in both languages."""

import ast
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.serving.studio.static import page_files

SOURCE = Path(qgraft.__file__).parent
FILES = {name: content.decode() for name, content in page_files().items()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_everything_is_ours_and_nothing_is_inline():
    elements = Elements(FILES["index.html"]).found
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            if path := attributes.get(name):
                assert path.startswith("#") or path.removeprefix("/page/") in FILES, path
        assert tag != "style" and (tag != "script" or attributes.get("src"))
    for name, text in FILES.items():
        outside = set(re.findall(r"https?://[\w./-]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, (name, outside)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert "@import" not in text and "url(" not in text


def test_modules_import_files_and_names_that_are_there():
    for name, text in SCRIPTS.items():
        for names, file in re.findall(r'import (\{[^}]*\}|\* as \w+) from "\./([\w.]+)"', text):
            for each in re.findall(r"\w+", names) if names.startswith("{") else []:
                assert re.search(rf"export (const|async function\*?|function\*?|let) {each}\b", SCRIPTS[file]), (
                    name,
                    each,
                )


def test_every_word_is_there_in_both_languages():
    words = dict(re.findall(r'(\w+): \[("(?:[^"\\]|\\.)*", "(?:[^"\\]|\\.)*")\]', FILES["i18n.js"]))
    said = set(re.findall(r'data-i18n(?:-label|-hint)?="(\w+)"', FILES["index.html"]))
    for text in SCRIPTS.values():
        said |= set(re.findall(r'\b(?:t|label|hint): "(\w+)"', text))
        said |= set(re.findall(r'\b(?:t|badge|setText|field|labelled)\((?:\w+, )?"(\w+)"', text))
    assert len(said) > 100 and said - words.keys() == set()
    for key, pair in words.items():
        english, chinese = re.findall(r'"((?:[^"\\]|\\.)*)"', pair)
        assert set(re.findall(r"(?<!\{)\{\w+\}", english)) == set(re.findall(r"(?<!\{)\{\w+\}", chinese)), key
        assert re.search(r"[\u4e00-\u9fff]", chinese), key


def test_chinese_errors_are_of_messages_that_there_are():
    """A message that is put into other words here would come out in English."""
    table = dict(re.findall(r'^  "([^"]+)": "([^"]+)",$', FILES["errors.js"], re.MULTILINE))
    assert len(table) > 40 and len(table) == len(re.findall('": "', FILES["errors.js"]))
    said = {_with_holes(node) for path in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))}
    written = {re.sub(r"['`]?\{\w+\}['`]?", "{}", english) for english in table}
    assert written - {re.sub(r"['`]?\{\}['`]?", "{}", each) for each in said if each} == set()
    for english, chinese in table.items():
        names = re.findall(r"\{\w+\}", english)
        assert set(re.findall(r"\{\w+\}", chinese)) == set(names) and len(set(names)) == len(names), english
        assert re.search(r"[\u4e00-\u9fff]", chinese), english


def _with_holes(node: ast.AST) -> str | None:
    """A text of the code, {} for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_errors_come_out_in_chinese_with_their_values():
    asked = {
        "there is no run 'law'": "没有运行 'law'",
        "the prompt is 300 tokens, and the model's context is 128 with the answer\nhint: ask a shorter question, or begin a "
        "new conversation": "提示有 300 个词元，而模型的上下文连同回答共 128 个\n提示：请缩短问题，或开始新对话",
        "The model `$& {name}` does not exist.": "模型 `$& {name}` 不存在。",
        "r: got 'a\nb', expected a number": "r：得到 'a\nb'，应为 a number",
        "x is taken away": "x is taken away",
        "something else\nhint: odd": "something else\n提示：odd",
    }
    script = f"{FILES['errors.js']}\nconsole.log(JSON.stringify({json.dumps(list(asked))}.map(inChinese)))"
    told = subprocess.run(["node", "--input-type=module"], input=script, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == list(asked.values())


def test_the_page_needs_no_key_and_may_load_nothing_else(studio: Any):
    with studio.client(None) as nobody:
        response = nobody.get("/")
        assert response.status_code == 200 and "<title>qgraft</title>" in response.text
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        for name in FILES:
            assert nobody.get(f"/page/{name}").content.decode() == FILES[name]
        again = nobody.get("/page/app.js", headers={"If-None-Match": nobody.get("/page/app.js").headers["etag"]})
        assert again.status_code == 304
        for name in ("nothing.js", "../catalogue.py", "..%2fcatalogue.py", "%2e%2e/app.py"):
            assert nobody.get(f"/page/{name}").status_code in (401, 404), name
        assert nobody.get("/studio/about").status_code == 401
