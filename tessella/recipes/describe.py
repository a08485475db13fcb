"""Recipes in words: a list of all, and a page for each."""

from __future__ import annotations

import inspect
import textwrap

from tessella.methods import METHODS, method_of, views_of
from tessella.methods.method import Pass
from tessella.recipes import RECIPES, recipe
from tessella.recipes.batch import at_batch_size, flags
from tessella.recipes.cost import GPU, forwards, gpu_hours, images_of, passes, tflops, training_flops
from tessella.report.published import PUBLISHED, Score, per_cent
from tessella.run.config import RunConfig, to_yaml

_FIGURES = {
    ("linear", "top1"): "linear",
    ("knn", "top1"): "kNN",
    ("clustering", "accuracy"): "clustering ACC",
    ("clustering", "nmi"): "NMI",
    ("clustering", "ari"): "ARI",
    ("finetune-1%", "top1"): "1 % of labels",
    ("finetune-10%", "top1"): "10 % of labels",
    ("coco", "box_ap"): "COCO box AP",
}
_NOMINAL_IMAGES = 100_000  # for recipes that are made for any images
_CPU_NETWORK = "resnet10"


# --- the list -----------------------------------------------------------------------------------------------


def listing() -> list[str]:
    """Lines of a table of all recipes: method by method, small images first."""
    configs = sorted(map(recipe, RECIPES), key=lambda c: (c.image_size, c.backbone.name != _CPU_NETWORK, c.recipe))
    titles = {name: METHODS[name].title for name in METHODS}
    rows = [("", "network", "views", "batch", "epochs", "published")]
    for name, title in titles.items():
        rows.append((title, "", "", "", "", ""))
        rows += [_row(config) for config in configs if config.method.name == name]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if column in (3, 4) else cell.ljust(w) for column, (cell, w) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return [
        *(line.rstrip() for line in lines),
        "",
        "Per cent; in brackets what others have published for settings close to these.",
    ]


def _row(config: RunConfig) -> tuple[str, str, str, str, str, str]:
    best = PUBLISHED.get(config.recipe)
    network = config.backbone.name.removeprefix("timm:")
    if config.backbone.width != 64:
        network += f", width {config.backbone.width}"
    return (
        f"  {config.recipe}",
        network,
        views_in_words(config),
        str(config.batch_size),
        str(config.epochs),
        _short(best[0]) if best else "",
    )


def _short(score: Score) -> str:
    return _figure(score) if score.same_run else f"({_figure(score)})"


def _figure(score: Score) -> str:
    return f"{_FIGURES[score.protocol, score.metric]} {per_cent(score.value)}"


def views_in_words(config: RunConfig) -> str:
    """The views of an image, such as "2x224 + 6x96"."""
    groups = views_of(config.method).groups
    if groups[0].tiles > 1:
        return f"{groups[0].tiles}x{groups[0].tiles} tiles of {groups[0].size}"
    pipelines = method_of(config.method).pipelines
    crops = _crops([Pass(g.views, g.size, True) for g in groups[: len(groups) // pipelines]])
    return crops if pipelines == 1 else f"{pipelines} x ({crops})"


def _crops(seen: list[Pass]) -> str:
    counts: dict[int, int] = {}
    for p in seen:
        counts[p.size] = counts.get(p.size, 0) + p.images
    return " + ".join(f"{count}x{size}" for size, count in counts.items())


# --- one recipe ---------------------------------------------------------------------------------------------


def page(config: RunConfig) -> list[str]:
    """Lines about one recipe, from `recipe`: source, cost, expected score, rule for other batch sizes, settings."""
    name = config.recipe
    data = "" if config.data else "--data DATA "
    return [
        inspect.getdoc(RECIPES[name]) or "",
        "",
        f"Command: tessella pretrain {name} {data}--out RUN",
        *_entry("Cost", _cost(config)),
        *_entry("Score", _scores(PUBLISHED.get(name, ()))),
        *_entry("Batch", _batch(config)),
        "",
        "Settings; each is an option, as in --method.temperature 0.2:",
        "",
        to_yaml(config).rstrip(),
    ]


def _entry(title: str, sentences: list[str]) -> list[str]:
    """A title and its sentences, each on its own lines."""
    lines = [line for s in sentences for line in textwrap.wrap(s, 110, break_on_hyphens=False, break_long_words=False)]
    return [f"{title + ':' if number == 0 else '':<9}{line}" for number, line in enumerate(lines)]


def _cost(config: RunConfig) -> list[str]:
    seen = passes(config)
    side, total, untrained = seen[0].size, forwards(seen), [p for p in seen if not p.trained]
    unit = "forward" if total == 1 else "forwards"
    sizes, without = _crops([p for p in seen if p.trained]), ""
    if views_of(config.method).groups[0].tiles > 1:
        sizes = "one montage"
    if untrained:
        share = sum(p.images * p.size**2 for p in untrained) / side**2
        sizes += f", and {_crops(untrained)} without"
        without = f", {share:.3g} of them without a backward pass"
    arithmetic = f"{training_flops(config) / 1e9:,.3g} GFLOP to train on an image once: the backbone alone, a backward "
    return [
        f"{total:.3g} {unit} of {side} x {side} pixels per image and epoch{without} ({sizes})",
        arithmetic + "pass counted as two forwards",
        *([] if config.backbone.name == _CPU_NETWORK else [_hours(config)]),
    ]


def _hours(config: RunConfig) -> str:
    images = images_of(config)
    hours = gpu_hours(config, images or _NOMINAL_IMAGES)
    amount = f"{hours:.1f}" if hours < 10 else f"{float(f'{hours:.2g}'):,.0f}"
    what = f"{images:,} images" if images else f"each {_NOMINAL_IMAGES:,} images"
    return (
        f"about {amount} GPU-hours on one {GPU} for {config.epochs} epochs of {what}. An estimate, not measured: it "
        f"assumes {tflops(config)} TFLOP/s sustained in bf16, and that the GPU never waits for its input"
    )


def _scores(scores: tuple[Score, ...]) -> list[str]:
    if not scores:
        return ["nothing is published for these settings"]
    figures: dict[str, list[str]] = {}  # source -> its figures
    for score in scores:
        source = score.source if score.same_run else f"{score.source}; not the same run"
        figures.setdefault(source, []).append(_figure(score))
    return [f"{', '.join(values)} ({source})" for source, values in figures.items()]


def _batch(config: RunConfig) -> list[str]:
    other = min(512, config.batch_size // 2)
    rule = method_of(config.method).batch_rule
    words = " ".join(flags(config, at_batch_size(config, other)).values())
    return [
        f"{config.batch_size} images per update. At another size nothing is scaled automatically. The rule: {rule}.",
        f"For example --batch-size {other} {words}",
    ]
