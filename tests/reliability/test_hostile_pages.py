"""Names that are programs, on every page: shown letter by letter, run by no browser, and no page asks for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tessella.modules.backbone import BackboneConfig
from tessella.report.compare import compare
from tessella.report.evaluation import write_pages
from tests.report.test_evaluation import record
from tests.report.test_run_report import Elements, clusters, images, page_of, run_folder, write_log

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
