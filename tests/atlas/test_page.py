"""The page of an atlas in a real browser: it shows, takes actions by keys, and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from tessella.atlas import page as page_module
from tessella.atlas.names import read_names, resolve
from tessella.atlas.page import write_page
from tests.atlas.contents import generated
from tests.browser import CHROMIUM, Browser

chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
EVENTS = "JSON.parse(localStorage.getItem('tessella generated first'))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.look(1400, 900)
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(generated(300), tmp_path_factory.mktemp("atlas"))


def fresh(browser: Browser, page: Path, fragment: str = "") -> None:
    """Open a page in a browser that has kept nothing."""
    browser.open(page, fragment)
    browser.run("localStorage.clear()")
    browser.open(page, fragment)


def actions(browser: Browser) -> list[dict]:
    """The events that the browser has kept, without their times."""
    return [{key: value for key, value in event.items() if key != "time"} for event in browser.run(EVENTS)]


@chromium
def test_the_page_opens_without_an_error_and_without_a_request(browser, written):
    fresh(browser, written)
    for key, view in (("1", "map"), ("2", "wall"), ("3", "inbox")):
        browser.press(key)
        assert browser.run("document.body.dataset.view") == view
        browser.wait(
            f"[...document.querySelectorAll('#view-{view} canvas')].some(canvas => "
            "canvas.getContext('2d')?.getImageData(0, 0, canvas.width, canvas.height).data.some(value => value))"
        )
    assert browser.errors() == []
    assert browser.requests() == [written.as_uri()]


@chromium
def test_both_renderers_show_the_same_pictures(browser, written, tmp_path):
    shown = []
    for renderer in ("#plain", "#webgl2"):
        fresh(browser, written, renderer)
        browser.wait(
            "document.querySelectorAll('#map canvas').length === 2 && document.querySelector('.pictures').width > 600"
        )
        browser.run("new Promise((resolve) => setTimeout(resolve, 400))")
        browser.screenshot(tmp_path / "map.png")
        with Image.open(tmp_path / "map.png") as picture:
            shown.append(np.asarray(picture.convert("RGB"), np.float32)[150:880, 300:1060])
        assert browser.errors() == []
    paper = shown[0][0, 0]
    assert (np.abs(shown[0] - paper).max(2) > 40).mean() > 0.05  # there are pictures at all
    assert (np.abs(shown[0] - shown[1]).max(2) > 40).mean() < 0.02  # and but for edges the same ones


@chromium
def test_clusters_are_named_by_keys_one_after_the_other(browser, written):
    fresh(browser, written)
    browser.press("n")
    for name in ("beach", "wood"):
        browser.wait("document.activeElement.id === 'name'")
        browser.type(name)
        browser.press("Enter")
    browser.press("Escape")  # the third is left for later
    assert actions(browser) == [
        {"action": "name", "clusters": ["1"], "name": "beach"},
        {"action": "name", "clusters": ["2"], "name": "wood"},
    ]
    sizes = [cluster.size for cluster in generated(300).clusters if cluster.path in ("1", "2")]
    assert browser.run("document.getElementById('counter').textContent").startswith(f"{sum(sizes)} of 300 named")
    browser.press("u")
    assert actions(browser)[2:] == [{"action": "undo"}]
    assert browser.run("document.getElementById('counter').textContent").startswith(f"{sizes[0]} of 300 named")

    browser.open(written)  # the browser has kept it
    assert browser.run("document.getElementById('counter').textContent").startswith(f"{sizes[0]} of 300 named")
    assert browser.run("document.getElementById('node-1').textContent").startswith("▸beach")


@chromium
def test_several_clusters_get_one_name_and_a_fine_one_is_split(browser, written):
    fresh(browser, written)
    browser.click("#node-1")
    browser.click("#node-3 input")
    browser.press("m")
    browser.wait("document.activeElement.id === 'name'")
    browser.type("sea")
    browser.press("Enter", "Escape")
    browser.click("#node-2")
    browser.press("s", "s", "s")  # opens 2, then 2.1, then asks about 2.1.1
    browser.wait("document.getElementById('dialog').open")
    browser.press("Enter")
    merged, split = actions(browser)
    assert merged == {"action": "name", "clusters": ["1", "3"], "name": "sea"}
    content = generated(300)
    cluster = next(cluster for cluster in content.clusters if cluster.path == "2.1.1")
    ids = content.ids[cluster.start : cluster.start + cluster.size]
    kinds = {tuple(map(str, ids[0::2])), tuple(map(str, ids[1::2]))}  # what `generated` has put into it
    assert split["cluster"] == "2.1.1" and tuple(split["images"]) in kinds
    assert browser.run("document.getElementById('node-2.1.1.1') !== null")


@chromium
def test_copies_are_dropped_by_one_click_and_one_of_each_stays(browser, written):
    fresh(browser, written)
    ids = [str(number) for number in generated(300).ids]
    browser.press("3")
    browser.click("#kind-near-copies header .warn")  # 2 and 3 are copies, and 3 and 4
    browser.click("#kind-exact-copies .card .warn")
    browser.click("#kind-outliers .card .warn")
    assert actions(browser) == [
        {"action": "drop", "images": [ids[3]]},
        {"action": "drop", "images": [ids[5], ids[9]]},
        {"action": "drop", "images": [ids[7]]},
    ]
    browser.press("u", "u", "u")
    assert browser.run("document.querySelectorAll('.card.decided').length") == 0


@chromium
def test_names_are_saved_as_a_file_and_loaded_again_but_not_those_of_another_clustering(browser, written, tmp_path):
    fresh(browser, written)
    browser.press("n")
    browser.wait("document.activeElement.id === 'name'")
    browser.type("\u202e</script>\u2028é")
    browser.press("Enter", "Escape")
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.click("#save")
    file = tmp_path / "names.json"
    browser.wait("true")
    for _ in range(200):
        if file.exists() and file.stat().st_size:
            break
        browser.run("new Promise((resolve) => setTimeout(resolve, 20))")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert read_names(file) == ("first", saved["events"])
    assert {key: saved[key] for key in ("format", "version", "atlas", "revision")} == {
        "format": "tessella names",
        "version": 1,
        "atlas": "generated",
        "revision": "first",
    }
    assert saved["events"] == browser.run(EVENTS)
    assert saved["events"][0]["name"] == "</script> é"  # `tessella label` refuses characters that steer

    def load(value: dict) -> str:
        file.write_text(json.dumps(value))
        node = browser.send("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
        browser.run("document.getElementById('toast').textContent = ''")
        browser.send("DOM.setFileInputFiles", files=[str(file)], objectId=node)
        browser.wait("document.getElementById('toast').textContent")
        return browser.run("document.getElementById('toast').textContent")

    fresh(browser, written)
    assert load(saved | {"revision": "second"}).startswith("These names belong to another clustering")
    assert load(saved | {"atlas": "other"}) == "These names belong to another atlas."
    assert load(saved | {"events": [{"action": "name"}]}).startswith("This names.json holds an event")
    assert browser.run("localStorage.length") == 0
    assert load(saved) == "Loaded 1 event."
    assert browser.run(EVENTS) == saved["events"]


@chromium
def test_before_there_are_clusters_the_page_shows_the_images_and_says_what_is_to_come(browser, tmp_path):
    content = generated(
        40, clusters=[], fine=np.full(40, -1, np.int32), runner_up=np.full(40, -1, np.int32), place=None,
        neighbours=np.zeros((40, 0), np.int32), similarity=np.zeros((40, 0), np.float32),
        components=np.zeros((40, 0), np.int8), stages=[("index", "done in 1 s"), ("clusters", "to do")], revision="",
    )  # fmt: skip
    fresh(browser, write_page(content, tmp_path))
    assert browser.run("document.body.dataset.view") == "wall"
    assert browser.run("document.querySelectorAll('#wall .tile').length") == 40
    assert "Still to come: clusters" in browser.run("document.getElementById('banner').textContent")
    browser.click("#wall .tile")
    browser.press("d")
    browser.open(write_page(generated(40), tmp_path))  # the next stage: what was decided about images stays
    assert browser.run("document.getElementById('counter').textContent").endswith("1 action")
    browser.click("#node-1")
    browser.press("k")
    first = {"action": "drop", "images": [str(content.ids[0])]}
    assert actions(browser)[0] == first and [event["action"] for event in actions(browser)] == ["drop", "keep"]
    assert browser.errors() == []


@chromium
def test_many_images_are_loaded_from_scripts_when_they_are_needed(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_ONE_FILE", 100)
    monkeypatch.setattr(page_module, "_SHEETS_PER_SCRIPT", 1)
    old = write_page(generated(1500, title="old"), tmp_path)
    (tmp_path / "page" / "mine.txt").write_text("kept")
    before = {path.name for path in tmp_path.glob("page/*.js")}
    page = write_page(generated(1500, side=16, place=None), tmp_path)
    now = {path.name for path in tmp_path.glob("page/*.js")}
    assert page == old and before and now and not before & now and (tmp_path / "page" / "mine.txt").exists()
    fresh(browser, page)
    browser.wait(
        "[...document.querySelectorAll('.tile canvas')]"
        ".every(canvas => canvas.getContext('2d').getImageData(8, 8, 1, 1).data[3])"
    )
    assert browser.errors() == []
    asked = [address for address in browser.requests() if address != page.as_uri()]
    assert asked and {Path(address).name for address in asked} <= now


def test_a_page_of_few_images_is_one_file_and_replaces_the_scripts_of_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_ONE_FILE", 10)
    write_page(generated(50), tmp_path)
    assert len(list(tmp_path.glob("page/*.js"))) == 1
    monkeypatch.undo()
    write_page(generated(50), tmp_path)
    assert not list(tmp_path.glob("page/*.js"))


@chromium
def test_names_resolve_as_in_python(browser, written):
    source = (resources.files("tessella.atlas") / "templates" / "names.js").read_text(encoding="utf-8")
    browser.open(written)
    fine = [path for path in ("1.1.1", "1.1.2", "1.2.1", "2.1.1", "10.1.1") for _ in range(4)]
    ids = [str(7 * row - 40) for row in range(len(fine))]
    random = Random(0)

    def event() -> dict:
        images = random.sample(ids, 6)
        clusters = random.choices(["1", "1.1", "1.1.1", "1.1.1.2", "1.2.1", "2", "2.1.1.1", "10"], k=2)
        text = random.choice(["sea", "ship", "gull", ""])
        return random.choice(
            [
                {"action": "name", "clusters": clusters, "name": text},
                {"action": "split", "cluster": random.choice(["1.1.1", "1.1.1.1", "2.1.1", "1"]), "images": images},
                {"action": "label", "images": images[:2], "name": text},
                {"action": "drop", "images": images[:2]},
                {"action": "keep", "images": images[:3]},
                {"action": "undo"},
            ]
        )

    logs = [[event() for _ in range(random.randrange(1, 25))] for _ in range(60)]
    arguments = json.dumps([fine, ids, logs])
    answers = browser.run(
        f"(([fine, ids, logs]) => {{ {source}; return logs.map((log) => resolveNames(fine, ids, log)); }})({arguments})"
    )
    for log, answer in zip(logs, answers, strict=True):
        expected = resolve(log, fine, np.array(ids, np.int64))
        assert answer["labels"] == expected.label, log
        assert answer["paths"] == expected.path, log
        assert [state == "dropped" for state in answer["states"]] == expected.dropped.tolist(), log
    assert any(label for answer in answers for label in answer["labels"])
