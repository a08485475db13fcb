"""Names that are programs, on every page: shown letter by letter, run by no browser, and no page asks for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tessella.atlas import page as atlas_page
from tessella.atlas.content import Group
from tessella.modules.backbone import BackboneConfig
from tessella.report.compare import compare
from tessella.report.evaluation import write_pages
from tessella.text import printable
from tests.atlas.contents import generated
from tests.browser import CHROMIUM, Browser
from tests.report.test_evaluation import record
from tests.report.test_run_report import Elements, clusters, images, page_of, run_folder, write_log

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CALL = "document.documentElement.setAttribute('ran','yes')"  # what a dump of the page would show


def attacks(server: str = "http://127.0.0.1:9") -> list[str]:
    """Texts that become an element, an attribute, a style, a program or a request where a page forgets to escape."""
    return [
        f"<img src=x onerror={CALL}>",
        f"<script>{CALL}</script>",
        f'"><script>{CALL}</script>',
        f"'><svg onload={CALL}>",
        f"</title></style></textarea><script>{CALL}</script>",
        f'" onmouseover="{CALL}" autofocus onfocus="{CALL}" x="',
        f"<iframe srcdoc='<script>parent.{CALL}</script>'></iframe>",
        f"javascript:{CALL}",
        f"<a href=javascript:{CALL}>x</a>",
        f"<meta http-equiv=refresh content='0;url={server}/refresh'>",
        f"<img src={server}/image>",
        f"<link rel=stylesheet href={server}/style>",
        f"<style>@import url({server}/import)</style>",
        f"</style><link rel=prefetch href={server}/prefetch>",
        f"<object data={server}/object></object>",
        f"<base href={server}/><form action={server}/form><input name=a></form>",
        "{{ 7 * 191 }}{% for x in y %}",
        "&lt;script&gt;",
        "<!-- <b>bold</b>",
        "]]><b>bold</b>",
        "\u202etxt.exe\u2066 \x1b[31m \x00 \ud800 \u2028",
    ]


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what was asked of it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def pages(folder: Path, names: list[str]) -> dict[str, str]:
    """Every kind of page, with an attack in each place that takes a text."""
    every = " ".join(names)
    shown = {str(number): name for number, name in enumerate(names)} | {name: name for name in names}
    run = run_folder(
        folder / "run",
        recipe=every,
        data=every,
        init_from=every,
        backbone=BackboneConfig(every),
    )
    (run / "environment.json").write_text(json.dumps(shown))
    (run / "unreadable.txt").write_text("".join(f"{n}\t{n}\n" for n in names), errors="replace")
    alarms = [{"kind": "alarm", "step": 1, "name": name, "text": name} for name in names]
    write_log(run, [{"kind": "step", "step": 1, "loss": 1.0, **dict.fromkeys(names, 2.0)}, *alarms])
    attacked = record(
        every, backbone=every, changed=shown, settings=shown, network={"name": every}, device=every, libraries=shown
    )
    attacked["scores"] |= {"notes": names, "per_class": dict.fromkeys(names, 0.5)} | dict.fromkeys(names, 0.5)
    attacked["baseline"] = {"name": every, "scores": {"top1": 0.1}}
    attacked["train"]["name"] = attacked["test"]["name"] = every
    for path in (run, folder / "other"):
        path.mkdir(exist_ok=True)
        (path / "evaluation.json").write_text(json.dumps([attacked]))
    keys = sorted(f"{name}.jpg".replace("\ud800", "\udc80") for name in names)
    found = {"run": page_of(run, images=images(len(keys), names=keys), clusters=clusters([0, 1, 2] * (len(keys) // 3)))}
    write_pages(run)
    found["evaluation"] = (run / "evaluation.html").read_text(encoding="utf-8")
    compare([run, folder / "other"], folder / "compare.html")
    found["compare"] = (folder / "compare.html").read_text(encoding="utf-8")
    return found


def test_attacks_become_no_element_no_attribute_and_no_style(tmp_path):
    for name, page in pages(tmp_path, attacks()).items():
        elements = Elements(page)
        tags = {tag for tag, _ in elements.tags}
        assert not tags & {"script", "iframe", "object", "embed", "base", "form", "input", "a:x", "textarea"}, name
        policies = [a for tag, a in elements.tags if tag == "meta" and "http-equiv" in a]
        assert [a["http-equiv"] for a in policies] == ["Content-Security-Policy"] and policies[0]["content"] == POLICY
        assert page.index("Content-Security-Policy") < 300  # before anything that it is to hold for
        for tag, attributes in elements.tags:
            assert not [key for key in attributes if key.startswith("on")], (name, attributes)
            for key in ("src", "href", "data", "action", "srcset", "xlink:href"):
                assert (attributes.get(key) or "#").startswith(("data:image/", "#")), (name, tag)
            assert "javascript:" not in (attributes.get("href") or "")
        assert "{{ 7 * 191 }}" in elements.text and "1337" not in elements.text
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\u2028]", page)


def in_browser(page: Path, profile: Path) -> str:
    """The page as chromium sees it after it has run what it runs; no network but this machine's."""
    assert CHROMIUM
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = [f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    done = subprocess.run(
        [CHROMIUM, *words.split(), *more], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_a_real_browser_runs_nothing_and_asks_for_nothing(tmp_path, asked):
    server, requests = asked
    for name, page in pages(tmp_path, attacks(server)).items():
        file = tmp_path / f"{name} page.html"
        file.write_text(page, encoding="utf-8")
        seen = in_browser(file, tmp_path / "profile")
        assert "Written by Tessella" in seen and 'ran="yes"' not in seen, name
        assert "<script" not in seen and "<iframe" not in seen
    assert requests == []

    # The attacks are armed: the same texts, not escaped, do run and do ask ...
    naked = tmp_path / "naked.html"
    texts = "\n".join(text for text in attacks(server)[:12] if "refresh" not in text and "</textarea>" not in text)
    naked.write_text(f"<!doctype html><html><head></head><body>{texts}</body></html>", errors="replace")
    assert 'ran="yes"' in in_browser(naked, tmp_path / "profile") and requests
    requests.clear()
    # ... and the policy alone would stop them, should an escape ever be missing.
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    naked.write_text(f"<!doctype html><html><head>{policy}</head><body>{texts}</body></html>", errors="replace")
    assert 'ran="yes"' not in in_browser(naked, tmp_path / "profile") and requests == []


# --- the page of an atlas, which has a program of its own ---


def atlas(folder: Path, names: list[str]) -> Path:
    """The page of an atlas with an attack in each place that takes a text."""
    every = " ".join(names)
    n = 40
    content = generated(
        n,
        title=every,
        banner=names,
        stages=[(name, name) for name in names],
        facts=dict(zip(names, names, strict=True)),
        keys=[names[row % len(names)] for row in range(n)],
        href=[names[row % len(names)] for row in range(n)],
        labels=[names[row % len(names)] for row in range(n)],
        inbox=[Group(name, [row, row + 1], name) for row, name in enumerate(names)],
        unreadable=[(name, name) for name in names],
        events=[{"action": "name", "clusters": [str(a + 1)], "name": name} for a, name in enumerate(names[:3])]
        + [{"action": "name", "clusters": [name], "name": name} for name in names],
    )
    return atlas_page.write_page(content, folder)


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_atlas_runs_its_own_program_and_no_other(tmp_path, monkeypatch):
    for limit in (30_000, 10):  # one file; with scripts of pictures
        monkeypatch.setattr(atlas_page, "_ONE_FILE", limit)
        page = atlas(tmp_path, attacks()).read_text(encoding="utf-8")
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
        programs = [text for attributes, text in scripts if not attributes]
        kinds = {attributes for attributes, _ in scripts} - {""}
        assert len(programs) == 1 and not [
            kind for kind in kinds if not re.match(r' type="(text/plain|application/json)"', kind)
        ]
        (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
        policies = [a["content"] for tag, a in Elements(page).tags if tag == "meta" and "http-equiv" in a]
        own = f"script-src {sha256(programs[0])}"
        common = f"style-src {sha256(style)}; img-src data: blob:; base-uri 'none'; form-action 'none'"
        if limit == 30_000:
            assert policies == [f"default-src 'none'; {own}; {common}"]
        else:
            assert policies == [f"default-src 'none'; {own} 'strict-dynamic'; {common}", f"{own} 'self' file:"]
        assert page.index("Content-Security-Policy") < 300
        for tag, attributes in Elements(page).tags:
            assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
            assert "src" not in attributes and tag not in ("iframe", "object", "embed", "base", "form"), tag
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\u2028\ud800]", page)
        assert "<!--" not in page and "1337" not in page


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_hostile_names_are_letters_wherever_the_atlas_shows_them(tmp_path, asked):
    server, requests = asked
    names = attacks(server)
    page = atlas(tmp_path, [*names, "x" * 4000])
    with Browser(tmp_path / "profile") as browser:
        browser.look(1400, 900)
        browser.open(page)
        browser.press("2")
        for row, name in enumerate(names):
            browser.run(f"document.getElementById('tile-{row}').click()")
            assert browser.run("document.querySelector('#details h2').textContent") == printable(name)
            link = browser.run("document.querySelector('#details p a')?.protocol ?? ''")
            assert link in ("", "file:", "http:", "https:")
        browser.press("3", "/")
        browser.type("script")
        assert "script>" in browser.run("document.getElementById('view-inbox').textContent")
        assert "script>" in browser.run("document.getElementById('tree').textContent")
        browser.press("Escape")
        browser.click("#node-1")
        browser.press("n")
        assert "script>" in browser.run("document.getElementById('bar').textContent")  # names to choose from
        browser.press("Escape", "1")
        browser.run("document.querySelector('details').open = true")
        seen = browser.run("document.documentElement.outerHTML")
        assert browser.run("document.documentElement.getAttribute('ran')") is None
        made = "iframe, object, base, form, meta[http-equiv=refresh], [onload], [onerror]"
        assert browser.run(f"document.querySelectorAll('{made}').length") == 0
        assert not re.search(
            "[\u202a-\u202e\u2066-\u2069\x00\x1b\u2028]", re.sub(r"<script.*?</script>", "", seen, flags=re.DOTALL)
        )
        assert browser.errors() == [] and browser.requests() == [page.as_uri()]
    assert requests == []


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_policy_of_the_atlas_alone_stops_what_an_escape_forgot(tmp_path, asked, monkeypatch):
    server, requests = asked
    (tmp_path / "evil.js").write_text(CALL)
    evil = "".join(text for text in attacks(server)[:12] if "refresh" not in text and "</textarea>" not in text)
    evil += "<script src=evil.js></script><script src=page/evil.js></script>"
    with Browser(tmp_path / "profile") as browser:
        for limit in (30_000, 10):
            monkeypatch.setattr(atlas_page, "_ONE_FILE", limit)
            page = atlas(tmp_path, ["a.jpg"])
            page.write_text(page.read_text(encoding="utf-8").replace("<noscript>", evil + "<noscript>"))
            browser.open(page)
            browser.wait("document.querySelector('.tile, .overlay')")
            assert browser.run("document.documentElement.getAttribute('ran')") is None
            assert browser.errors()  # the browser says what it has refused
    assert requests == []
