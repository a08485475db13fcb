"""The page of a run: complete, true to the log, and harmless whatever names it has to show."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.data.loader import Loader
from tessella.data.sources import ArrayImages, open_images
from tessella.data.views import CropGroup, ViewPlan, ViewSpec, draw
from tessella.errors import UserError
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.swav import SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.ops.montage import montage_positions
from tessella.ops.philox import permutation, stream_key
from tessella.report.charts import bar_chart, line_chart, nice_ticks, tick_labels
from tessella.report.page import literal
from tessella.report.pictures import COLOURS, Album, example_rows, show_clusters, show_views
from tessella.report.run import Clusters, write_report
from tessella.run.config import RunConfig, to_yaml

ATTACK = '"><img src=x onerror="document.title=1"><script>alert(1)</script>'
SPEC = ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(3, 8, (0.1, 0.3))))
CONFIG = RunConfig(
    SwavConfig(prototypes=6, views=SPEC),
    BackboneConfig("resnet18", 16, "small"),
    recipe="swav_cpu",
    data="somewhere/photos::train",
    epochs=10,
    batch_size=4,
    seed=3,
)


def images(n: int = 12, side: int = 20, names: list[str] | None = None) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side + 4, 3), dtype=np.uint8)
    return ArrayImages("noise", pixels, keys=names)


def clusters(numbers: list[int], count: int = 6) -> Clusters:
    return Clusters(np.array(numbers), count)


def run_folder(path: Path, steps: int = 10, **config: Any) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(dataclasses.replace(CONFIG, **config)))
    lines = [
        {
            "kind": "step",
            "step": step,
            "epoch": step // 3,
            "loss": 2.0 - step / 10,
            "loss_to_collapse": 1 - (2.0 - step / 10) / 1.7918,
            "lr": 0.1,
            "code_confidence": 0.5,
            "timing": {"seconds": 2.0 * step, "images_per_second": 2.0},
        }
        for step in range(1, steps + 1)
    ]
    write_log(path, lines)
    return path


def write_log(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(run: Path, **given: Any) -> str:
    return write_report(run, **given).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """What a browser would find: tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


# --- the page ------------------------------------------------------------------------------------------


def test_a_run_with_a_configuration_alone_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    page = Elements(page_of(tmp_path))
    assert "stopped at step 0" in page.text
    assert "What pretraining bought" not in page.text and page.count("img") == 0


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    for text in ("- a list", "!!python/object/apply:os.system ['true']", "self: &s [*s]"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml"):
            write_report(tmp_path)


def test_the_head_says_what_was_run_and_how_far_it_came(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    text = Elements(page_of(run, images=images())).text
    for words in ("swav_cpu", "photos::train", "SwAV", "resnet18, width 16, small stem", "20 s", "3 of 10"):
        assert words in text
    assert "stopped at step 10 of 30" in text  # 12 images in batches of 4, ten times
    assert f"tessella resume {run}" in text
    (run / "backbone.safetensors").write_bytes(b"")
    text = Elements(page_of(run, images=images())).text
    assert "complete after 10 steps" in text and "tessella resume" not in text


def test_time_adds_up_over_restarts(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    seconds = [10.0, 20.0, 5.0, 65.0]  # resumed after the second line
    write_log(run, [{"kind": "step", "step": i, "timing": {"seconds": s}} for i, s in enumerate(seconds)])
    assert "1 min 25 s" in Elements(page_of(run)).text


def test_alarms_are_shown_in_their_words_and_their_absence_is_said(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert "No alarms in 10 steps; whether a run collapses" in Elements(page_of(run)).text
    write_log(run, [{"kind": "step", "step": 400, "loss": 1.0}])
    assert "No alarms in 400 steps: nothing looked like a collapse" in Elements(page_of(run)).text
    write_log(run, [{"kind": "alarm", "step": 7, "name": "few_clusters", "text": "lower epsilon"}])
    text = Elements(page_of(run)).text
    assert "Step 7. lower epsilon" in text and "No alarms" not in text


def test_a_run_with_alarms_does_not_look_well(tmp_path: Path) -> None:
    def status(run: Path) -> dict[str, str | None]:
        return next(values for tag, values in Elements(page_of(run)).tags if "status" in (values.get("class") or ""))

    run = run_folder(tmp_path / "run")
    (run / "backbone.safetensors").write_bytes(b"")
    assert status(run) == {"href": "#health", "class": "status"}
    alarm = {"kind": "alarm", "step": 7, "name": "few_clusters", "text": "lower epsilon"}
    write_log(run, [alarm, {"kind": "step", "step": 400, "loss": 1.0}])
    assert status(run) == {"href": "#health", "class": "status open"}
    assert "complete after 400 steps, with 1 alarm" in Elements(page_of(run)).text
    write_log(run, [alarm, alarm])
    assert "complete after 7 steps, with 2 alarms" in Elements(page_of(run)).text


def test_a_curve_has_the_name_of_its_figure_in_the_log(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    figures = {"loss": 2.0, "embedding_std": 1.0, "effective_rank": 9.0, "cluster_evenness": 0.9, "dead_clusters": 0.0}
    write_log(run, [{"kind": "step", "step": 1, **figures}])
    text = Elements(page_of(run)).text
    assert all(name.replace("_", " ").capitalize() in text for name in figures)


def test_curves_are_drawn_for_what_was_logged_and_for_nothing_else(tmp_path: Path) -> None:
    page = Elements(page_of(run_folder(tmp_path / "run")))
    charts = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert charts == [
        "Loss, at the end 1",
        "Learning rate (lr), at the end 0.1",
        "Images per second, at the end 2",
        "Code confidence, at the end 0.5",
    ]
    assert "same answer for every image: 1.792" in page.text


def test_a_half_written_last_line_costs_that_line_only(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 11, "lo')
    assert "stopped at step 10" in Elements(page_of(run)).text


def test_a_damaged_evaluation_is_left_out_and_said(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "evaluation.json").write_text("[{")
    assert "evaluation.json is damaged" in Elements(page_of(run)).text


def test_the_page_of_a_run_has_the_table_of_its_evaluation(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    scores = {"top1": 0.45, "top1_interval": [0.4, 0.5]}
    baseline = {"name": "random init, seed 0", "scores": {"top1": 0.30}}
    test = {"name": "/data/flowers::test", "images": 400, "classes": 10}
    record = {"protocol": "knn", "backbone": "run", "scores": scores, "baseline": baseline, "test": test}
    (run / "evaluation.json").write_text(json.dumps([record]))
    text = Elements(page_of(run)).text
    for words in ("run on flowers::test", "knn", "45.0 [40.0, 50.0] +15.0", "30.0", "Guessing one of 10 classes"):
        assert words in text, words


def test_unreadable_images_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "unreadable.txt").write_text("".join(f"{i:03d}.jpg\tempty file\n" for i in range(510)))
    text = Elements(page_of(run)).text
    assert "510 files were left out" in text and "499.jpg empty file" in text and "500.jpg" not in text


def test_settings_carry_the_names_of_their_options(tmp_path: Path) -> None:
    assert "method.views.groups.0.size 16" in Elements(page_of(run_folder(tmp_path / "run"))).text


def test_commands_quote_the_folder_for_a_shell(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "my run; rm x")
    assert f"tessella resume '{run}'" in Elements(page_of(run)).text


# --- nothing executes ----------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Elements:
    """A page with an attack in every place that takes a text."""
    run = run_folder(tmp_path / "run", recipe=ATTACK, data=ATTACK, init_from=ATTACK, backbone=BackboneConfig(ATTACK))
    (run / "environment.json").write_text(json.dumps({"gpu": ATTACK, ATTACK: ATTACK}))
    record = {"protocol": "knn", "scores": {"top1": 0.5}, "backbone": ATTACK, "test": {"name": ATTACK}}
    baseline = {"name": ATTACK + "2", "scores": {"top1": 0.1}}
    (run / "evaluation.json").write_text(json.dumps([record | {"baseline": baseline, "train": {"name": ATTACK}}]))
    write_log(
        run,
        [
            {"kind": "step", "step": 1, "loss": 1.0, ATTACK: 2.0},
            {"kind": "alarm", "step": 1, "name": ATTACK, "text": ATTACK},
        ],
    )
    (run / "unreadable.txt").write_text(f"{ATTACK}.jpg\t{ATTACK}\n")
    names = [f"{i}{ATTACK}\n\u202e\x1b[31m\udc80.jpg" for i in range(8)]
    page = page_of(run, images=images(8, names=names), clusters=clusters([0, 0, 1, 1, 1, 0, -1, 0], 3))
    return Elements(page)


def test_hostile_names_become_no_element_and_no_attribute(hostile: Elements) -> None:
    known = {
        *(
            "html",
            "head",
            "meta",
            "link",
            "title",
            "style",
            "body",
            "header",
            "nav",
            "main",
            "section",
            "footer",
        ),
        *(
            "h1",
            "h2",
            "h3",
            "p",
            "a",
            "b",
            "div",
            "span",
            "dl",
            "dt",
            "dd",
            "code",
            "details",
            "summary",
            "output",
        ),
        *("table", "thead", "tbody", "tr", "th", "td", "small", "figure", "figcaption", "img"),
        *("svg", "path", "line", "text", "rect"),
    }
    assert {tag for tag, _ in hostile.tags} <= known
    for tag, attributes in hostile.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert tag != "img" or re.fullmatch(r"data:image/png;base64,[\w+/=]+", attributes["src"] or "")
        assert tag != "a" or re.fullmatch(r"#[a-z]+", attributes["href"] or "")
        assert "javascript" not in str(attributes)


def test_hostile_names_are_shown_literally(hostile: Elements) -> None:
    assert hostile.text.count(ATTACK) >= 15
    assert f"{ATTACK}\\n\\u202e\\x1b[31m\\udc80.jpg" in hostile.text


def test_the_page_allows_nothing_and_asks_for_nothing(hostile: Elements) -> None:
    policies = [a["content"] for tag, a in hostile.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [policy and policy.split("; ")[:3] for policy in policies] == [
        ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    ]
    for tag, attributes in hostile.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in hostile.text and "@import" not in hostile.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, -(10**400), 5e-324, True, "1", None, []])
def test_numbers_that_lie_break_nothing(tmp_path: Path, number: Any) -> None:
    run = run_folder(tmp_path / "run")
    line = {"kind": "step", "step": number, "epoch": number, "loss": number, "loss_to_collapse": number}
    write_log(
        run,
        [
            line,
            line | {"step": 5, "timing": {"seconds": number}},
            {"kind": "alarm", "step": 5, "text": number},
        ],
    )
    record = {
        "protocol": "knn",
        "scores": {"top1": number, "std": number},
        "seed": number,
        "test": {"images": number},
    }
    (run / "evaluation.json").write_text(json.dumps([record, number, {"scores": number}]))
    assert "Health" in page_of(run, images=images())


def test_a_link_in_place_of_the_pictures_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(b"")
    run = run_folder(tmp_path / "run")
    (run / "pictures").symlink_to(mine)
    write_report(run, images())
    assert [path.name for path in mine.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("character", ["\n", "\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\ud800", "\ufeff"])
def test_what_a_browser_would_hide_is_written_out(character: str) -> None:
    shown = literal(f"a{character}b")
    assert shown.isprintable() and shown.isascii() and shown.startswith("a\\") and shown.endswith("b")


def test_letters_of_any_language_stay() -> None:
    assert literal("Größe 図 é ☂") == "Größe 図 é ☂"


# --- charts --------------------------------------------------------------------------------------------


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+),([\d.]+)", path)]


def test_a_curve_passes_through_its_values() -> None:
    chart = line_chart([(0, 0.0), (5, 10.0), (10, 5.0)], title="t", sentence="s")
    assert chart is not None
    assert corners(chart.path) == [(0, 1000), (500, 0), (1000, 500)]
    assert (chart.latest, [tick.label for tick in chart.x_ticks]) == ("5", ["0", "5", "10"])


def test_values_that_are_missing_leave_a_gap() -> None:
    points = [(1, 1.0), (2, None), (3, float("nan")), (4, 2.0), (5, 3.0)]
    chart = line_chart(points, title="t", sentence="s")
    assert chart is not None and chart.path.count("M") == 2
    assert line_chart([(1, None)], title="t", sentence="s") is None


def test_noise_fills_no_axis() -> None:
    chart = line_chart([(1, 3.4010), (2, 3.4030)], title="t", sentence="s")
    assert chart is not None and chart.y_ticks[0].label == "0"
    assert abs(corners(chart.path)[0][1] - corners(chart.path)[1][1]) < 2  # of 1000


def test_the_axis_reaches_the_line_to_compare_with() -> None:
    chart = line_chart([(1, 3.0), (2, 2.0)], title="t", sentence="s", rule=6.9)
    assert chart is not None and chart.rule is not None and 0 <= chart.rule.position <= 100


def test_a_long_curve_keeps_its_spikes_and_its_gaps() -> None:
    values: list[float | None] = [1.0] * 100_000
    values[77_777], values[33_333] = 50.0, -50.0
    values[10_000:20_000] = [None] * 10_000
    chart = line_chart(enumerate(values), title="t", sentence="s")
    assert chart is not None and len(corners(chart.path)) <= 700 and chart.path.count("M") == 2
    assert {0.0, 1000.0} <= {y for _, y in corners(chart.path)}


def test_ticks_are_round_few_and_enclose_the_values() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        low = float(generator.normal() * 10.0 ** generator.integers(-6, 7))
        high = low + float(generator.random() * 10.0 ** generator.integers(-6, 7))
        ticks = nice_ticks(low, high)
        room = 1e-8 * (high - low + abs(low))
        assert 2 <= len(ticks) <= 8 and ticks[0] <= low + room and ticks[-1] >= high - room
    assert tick_labels(nice_ticks(0, 0.003)) == ["0.000", "0.001", "0.002", "0.003"]
    assert tick_labels(nice_ticks(0, 7, whole=True)) == ["0", "2", "4", "6", "8"]


def test_bars_are_as_high_as_their_numbers() -> None:
    chart = bar_chart([100, 50, 0], title="t", sentence="s", x_label="cluster")
    assert re.findall(r"V(?!1000Z)([\d.]+)", chart.path) == [
        "0.0",
        "500.0",
    ]  # nothing is drawn for the empty one
    assert len(bar_chart(range(100_000, 0, -1), title="", sentence="", x_label="").path) < 100_000


# --- pictures ------------------------------------------------------------------------------------------


def pixels_of(source: str | None) -> np.ndarray:
    assert source is not None
    return np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


class Rows:
    """An order of one step."""

    steps_per_epoch = 1

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.batch_size = np.array(rows), len(rows)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        return self.rows


def as_trained(some: ArrayImages, spec: ViewSpec, rows: list[int], seed: int) -> list[np.ndarray]:
    """(v, B, s, s, 3) uint8 per group, from the loader of training."""
    (batch,) = next(iter(Loader(some, spec, Rows(rows), seed=seed, device="cpu", workers=1).epoch(0)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    pixels = [((group * std + mean) * 255).round().clamp(0, 255).to(torch.uint8) for group in batch.views]
    return [group.permute(0, 1, 3, 4, 2).numpy() for group in pixels]


def test_views_are_those_that_training_saw_in_its_first_epoch(tmp_path: Path) -> None:
    some = images()
    rows = [row for row, _ in example_rows(some)]
    examples, montages = show_views(some, SPEC, 3, Album(tmp_path / "pictures"))
    expected = as_trained(some, SPEC, rows, seed=3)
    assert len(examples) == 4 and not montages
    for i, example in enumerate(examples):
        assert example.name == some.key(rows[i])
        np.testing.assert_array_equal(pixels_of(example.original.source), some.image(rows[i]))
        for group, wanted in zip(example.groups, expected, strict=True):
            shown = np.stack([pixels_of(picture.source) for picture in group.pictures])
            assert np.abs(shown.astype(int) - wanted[:, i]).max() <= 1


def test_boxes_say_where_the_views_were_cut(tmp_path: Path) -> None:
    some = images()
    examples, _ = show_views(some, SPEC, 3, Album(tmp_path / "pictures"))
    rows = [row for row, _ in example_rows(some)]
    plan: ViewPlan = draw(SPEC, 3, 0, some.ids[rows], some.sizes[rows])
    boxes = np.array([example.boxes for example in examples]) * [24, 20, 24, 20] / 100
    np.testing.assert_allclose(boxes, plan.box, atol=1e-9)


def test_tiles_stand_at_their_places_and_montages_hold_them_shuffled_as_in_training(tmp_path: Path) -> None:
    some, spec, size = images(), Jigclu.view_spec(JigcluConfig(tile_size=64)), 64
    examples, montages = show_views(some, spec, 3, Album(tmp_path / "pictures"))
    rows = [row for row, _ in example_rows(some)]
    (tiles,) = as_trained(some, spec, rows, seed=3)  # (4, 4 images, ...), tiles numbered column by column
    for i, example in enumerate(examples):
        shown = [pixels_of(picture.source) for picture in example.groups[0].pictures]
        for pixels, tile in zip(shown, (0, 2, 1, 3), strict=True):  # row by row
            assert np.abs(pixels.astype(int) - tiles[tile, i]).max() <= 1

    order = permutation(stream_key(3, "tile"), range(16), 0)
    positions = montage_positions(4, 2, 0, 1).numpy()
    inner = slice(size // 20, size - size // 20)
    for j, montage in enumerate(montages):
        whole = pixels_of(montage.source)
        for slot in range(4):
            place, image = divmod(int(order[positions[slot, j]]), 4)
            corner = [slot // 2 * size, slot % 2 * size]
            cell = whole[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
            assert bytes(cell[0, 0]).hex() == COLOURS[image][1:] == examples[image].colour[1:]
            assert np.abs(cell[inner, inner].astype(int) - tiles[place, image][inner, inner]).max() <= 1


def test_an_image_that_cannot_be_read_gives_way_to_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    some = open_images(str(folder))
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) - 30])  # damaged after it was indexed
    assert [row for row, _ in example_rows(some)] == [2, 3, 5, 7]


def test_the_largest_clusters_come_first_with_members_from_the_whole_set(tmp_path: Path) -> None:
    some = images(60)
    numbers = np.array([5] * 40 + [2] * 15 + [-1] * 5)
    clusters = show_clusters(some, numbers, Album(tmp_path / "pictures"))
    assert [(c.number, c.size, len(c.members)) for c in clusters] == [(5, 40, 10), (2, 15, 10)]
    assert clusters[0].members[0].text == some.key(0) and clusters[0].members[-1].text == some.key(39)


def test_the_page_counts_empty_clusters(tmp_path: Path) -> None:
    page = Elements(page_of(run_folder(tmp_path / "run"), images=images(), clusters=clusters([0] * 9 + [2] * 2 + [-1])))
    assert "11 images fall into 2 of 6 clusters; 4 are empty, and the largest holds 81.8% of the images." in page.text


def test_pictures_are_saved_too_and_old_ones_go(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    page_of(run, images=images(), clusters=clusters([0] * 12))
    assert (run / "pictures" / "cluster-0-1.png").exists()
    page = Elements(page_of(run, images=images()))
    saved = {path.read_bytes() for path in (run / "pictures").iterdir()}
    shown = {base64.b64decode((a["src"] or "").partition(",")[2]) for tag, a in page.tags if tag == "img"}
    assert saved == shown and len(list((run / "pictures").iterdir())) == 4 * (1 + 5)


def test_photos_of_many_sizes_give_pictures_of_the_right_size(tmp_path: Path, shared_data: Path) -> None:
    some = open_images(str(shared_data / "imagenet-sample.tar"))
    spec = ViewSpec((CropGroup(2, 64, (0.14, 1.0)), CropGroup(4, 32, (0.05, 0.14))))
    examples, _ = show_views(some, spec, 0, Album(tmp_path / "pictures"))
    sizes = [[picture.width for group in example.groups for picture in group.pictures] for example in examples]
    assert sizes == [[64, 64, 32, 32, 32, 32]] * 4
    assert all(max(example.original.width, example.original.height) == 320 for example in examples)
