"""The page's files: nothing from elsewhere, nothing inline, every word in both languages."""

import re
from html.parser import HTMLParser
from typing import Any

from qgraft.serving.studio.static import page_files

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
