"""The page about an experiment of pruning, or a sparse checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from capruner.report.charts import Series, decades, halvings, line_chart, nice_ticks, power_of_ten
from capruner.report.contents import Contents, Measurement
from capruner.report.document import bar, document, facts, key_figures, number, table
from capruner.report.heatmap import depth_table, in_words, layer_table


def page(contents: Contents) -> str:
    """The whole document. Every name and value that comes from outside is escaped."""
    sections = {
        "Accuracy and sparsity": _accuracy(contents),
        "What is left": _left(contents),
        "Sparsity by layer and depth": _layers(contents),
        "Choice of the sparsity": _search(contents),
        "Predicted and measured loss": _loss(contents),
        "Training": _epochs(contents),
        "Time and memory": _stages(contents),
        "What was run": _run(contents),
        "Files": _files(contents),
    }
    return document(contents.title, _summary(contents), _key_figures(contents), contents.notes, sections)


def _summary(contents: Contents) -> str:
    """The outcome in a sentence or two."""
    if not contents.pruned:
        return "Nothing is pruned yet."
    last, dense = contents.pruned[-1], contents.dense
    if last.top1 is None:
        return f"{100 * last.prunable:.2f} % of the prunable weights are zero, {100 * last.overall:.2f} % of all."
    steps = [f"{level.top1:.2f} % at {level.name}" for level in contents.pruned if level.top1 is not None]
    before = (
        f"Top-1 accuracy is {dense.top1:.2f} % {dense.name}, "
        if dense and dense.top1 is not None
        else "Top-1 accuracy is "
    )
    return before + _listed(steps) + " of the prunable weights removed."


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _key_figures(contents: Contents) -> str:
    """Of the sparsest model within a point of the dense accuracy, or of the only one."""
    dense, chosen = contents.dense, contents.pruned[-1:] if len(contents.pruned) == 1 else []
    heading = ""
    if dense and dense.top1 is not None:
        near = [level for level in contents.pruned if level.top1 is not None and level.top1 >= dense.top1 - 1]
        if near:
            chosen, heading = near[-1:], "The sparsest model within one point of the dense accuracy:"
    if not chosen:
        return ""
    level = chosen[0]
    figures = [
        ("of the prunable weights removed", f"{100 * level.prunable:.2f} %"),
        ("of all weights", f"{100 * level.overall:.2f} %"),
    ]
    if level.top1 is not None:
        figures.append(("top-1 accuracy", f"{level.top1:.2f} %"))
    if level.macs is not None and contents.macs_dense:
        figures.append(("multiply-adds left", f"{100 * level.macs / contents.macs_dense:.1f} %"))
    return key_figures(figures, heading)


def _million(count: int | None) -> str:
    return "–" if count is None else format(count / 1e6, ",.1f" if count >= 1e7 else ".3g")


def _links(level: Measurement) -> str:
    return (
        '<td class="text">'
        + ("<br>".join(f'<a href="{escape(href)}">{escape(text)}</a>' for text, href in level.checkpoints) or "–")
        + "</td>"
    )


def _x_ticks(levels: Sequence[Measurement]) -> list[tuple[float, str]]:
    return [(halvings(level.requested or 0.0), level.name.removesuffix(" %")) for level in levels]


def _accuracy(contents: Contents) -> str:
    measured = [level for level in contents.pruned if level.top1 is not None]
    if not measured:
        return ""
    dense = contents.dense.top1 if contents.dense else None
    points = [(halvings(v.requested or 0.0), v.top1 or 0.0) for v in measured]
    values = [value for _, value in points] + ([] if dense is None else [dense])
    whole = min(values) < 60
    chart = line_chart(
        "accuracy-chart",
        "Top-1 accuracy against sparsity",
        _summary(contents),
        [Series("top-1", points, lambda value: f"{value:.1f}")],
        _x_ticks(measured),
        "weights removed (%)",
        nice_ticks(0, 100) if whole else nice_ticks(min(values) - 2, min(100, max(values) + 1)),
        dense=dense,
    )
    line = "" if dense is None or contents.dense is None else f" The dashed line: {contents.dense.name}."
    caption = f"Top-1 accuracy (%) against the share of weights removed, logarithmic in what remains.{line}"
    figure = f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"
    recalibrated = any(level.top1_bn is not None for level in contents.levels)
    columns = [
        "removed",
        "top-1 %",
        *(["with BatchNorm recalibrated"] if recalibrated else []),
        "top-5 %",
        "loss",
        "checkpoint",
    ]
    rows = [
        [
            escape(level.name),
            number(level.top1),
            *([number(level.top1_bn)] if recalibrated else []),
            number(level.top5),
            number(level.loss, ".4f"),
            _links(level),
        ]
        for level in contents.levels
    ]
    return figure + table("Accuracy at each sparsity", columns, rows)


def _left(contents: Contents) -> str:
    if not contents.levels:
        return ""
    columns, dense = ["removed", "% of prunable", "% of all"], contents.macs_dense
    columns += ["million multiply-adds", "% of dense"] if dense else []
    rows = []
    for level in contents.levels:
        row = [escape(level.name), f"{100 * level.prunable:.3f}", f"{100 * level.overall:.3f}"]
        if dense:
            row += [_million(level.macs), number(None if level.macs is None else 100 * level.macs / dense, ".1f")]
        rows.append(row)
    text = (
        "<p>Two denominators: the prunable weights are those of the layers listed below; all weights are every parameter of the model, "
        "biases, norms and embeddings too.</p>"
    )
    if dense:
        size = "×".join(map(str, contents.macs_input))
        fixed = (
            f" {_million(contents.macs_fixed)} million of them multiply activations with each other (attention), which no sparsity of weights saves."
            if contents.macs_fixed
            else ""
        )
        text += (
            f"<p>A multiply-add is two FLOPs. The dense model does {_million(dense)} million ({2 * dense / 1e9:,.3g} GFLOPs) for one {size} input.{fixed} "
            "What is left counts products with non-zero weights only: it is what an engine that skips every zero would do, not a measured speed.</p>"
        )
    return text + table("Zeros by both denominators, and the multiply-adds that are left", columns, rows)


def _layers(contents: Contents) -> str:
    levels = [level for level in contents.pruned if level.layers]
    if not levels:
        return ""
    opened = levels[len(levels) // 2]
    figures = []
    for level in levels:
        figures.append(
            f"<details{' open' if level is opened else ''}><summary>{escape(level.name)} removed</summary>"
            f"<figure>{depth_table(level)}<figcaption>{escape(in_words(level))}</figcaption></figure></details>"
        )
    text = "<p>Rows run from the input to the output. The darker (by night: the brighter) a cell, the fewer weights stay; one shade for each halving.</p>"
    return (
        text
        + "".join(figures)
        + f"<details><summary>All layers, all sparsities</summary>{layer_table(levels)}</details>"
    )


def _search(contents: Contents) -> str:
    search = contents.search
    if search is None:
        return ""
    bound = search["dense"] - search["max_drop"]
    rows = [
        [
            f"{100 * sparsity:.2f} %",
            f"{top1:.2f}",
            "yes" if top1 >= bound else "no",
            "chosen" if sparsity == search["sparsity"] else "",
        ]
        for sparsity, top1 in search["curve"]
    ]
    text = (
        f"<p>The largest sparsity within {search['max_drop']:g} points of the dense network, by bisection over one calibration, on {search['images']:,} "
        f"training images that the calibration has not seen (dense: {search['dense']:.2f} %). The validation images had no part in it.</p>"
    )
    return text + table("Sparsities tried", ["removed", "top-1 on held-out images (%)", "within the bound", ""], rows)


def _loss(contents: Contents) -> str:
    dense = contents.dense
    levels = [level for level in contents.pruned if level.predicted is not None]
    if not levels:
        return ""
    base = dense.loss if dense else None
    found = [(v, v.predicted or 0.0, None if base is None or v.loss is None else v.loss - base) for v in levels]
    rows = [
        [
            escape(v.name),
            f"{p:.4g}",
            number(v.divergence, ".4g"),
            number(m, ".4g"),
            "–" if m is None or m <= 0 or p <= 0 else f"{float(f'{m / p:.2g}'):,g}×",
        ]
        for v, p, m in found
    ]
    text = (
        "<p>Predicted is the increase of the calibration loss by the quadratic model that chose the weights. It approximates the divergence: Kullback-Leibler, "
        "of the pruned network's class probabilities from the dense one's, on up to 512 calibration images. Measured is the increase of the validation loss. "
        "A factor between them is usual: gradients averaged over a batch are smaller than those of single images, and the Fisher matrix with "
        "them. Where the factor climbs, the quadratic model no longer holds, and smaller steps (num_recomputations) or retraining pay.</p>"
    )
    columns = ["removed", "predicted", "divergence", "measured", "measured / predicted"]
    return text + _loss_chart(found) + table("Increase of the loss", columns, rows)


def _loss_chart(found: Sequence[tuple[Measurement, float, float | None]]) -> str:
    """Predicted and measured increase of the loss at each level; empty if it never rose."""
    series = [
        Series("predicted", [(halvings(v.requested or 0.0), p) for v, p, _ in found if p > 0]),
        Series("measured", [(halvings(v.requested or 0.0), m) for v, _, m in found if m is not None and m > 0]),
    ]
    values = [value for one in series for _, value in one.points]
    if not values:
        return ""
    words = "; ".join(
        f"at {v.name} predicted {p:.3g}, measured {'nothing' if m is None else format(m, '.3g')}" for v, p, m in found
    )
    drawn = [one for one in series if one.points]
    alone = f", {drawn[0].name}" if len(drawn) == 1 else ""  # a chart of one series has no legend
    chart = line_chart(
        "loss-chart",
        "Increase of the loss, predicted and measured",
        words,
        drawn,
        _x_ticks([level for level, _, _ in found]),
        "weights removed (%)",
        decades(min(values), max(values)),
        logarithmic=True,
        show=power_of_ten,
    )
    missing = " Where the loss did not rise there is no point." if len(values) < 2 * len(found) else ""
    return f"<figure>{chart}<figcaption>Increase of the loss by pruning{alone}; both axes logarithmic.{missing}</figcaption></figure>"


def _epochs(contents: Contents) -> str:
    rows = contents.epochs
    if len(rows) < 2:
        return ""
    averaged = any(row.get("ema_top1") is not None for row in rows)
    series = [Series("model", [(row["epoch"], row["top1"]) for row in rows if row.get("top1") is not None])]
    if averaged:
        series.append(
            Series(
                "moving average", [(row["epoch"], row["ema_top1"]) for row in rows if row.get("ema_top1") is not None]
            )
        )
    values = [value for one in series for _, value in one.points]
    begin, end = (series[0].points[i][1] for i in (0, -1))
    words = f"Top-1 accuracy begins at {begin:.2f} % and ends at {end:.2f} %; sparsity ends at {100 * rows[-1]['sparsity']:.2f} %."
    ticks = [(row["epoch"], f"{row['epoch']:.0f}") for row in rows]
    chart = line_chart(
        "epochs-chart", "Top-1 accuracy by epoch", words, series, ticks, "epoch", nice_ticks(min(values), max(values))
    )
    columns = {
        "sparsity": "sparsity %",
        "top1": "top-1 %",
        "ema_top1": "top-1 % (moving average)",
        "train_loss": "training loss",
        "lr": "learning rate",
    }
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    forms = {"train_loss": ".4f", "lr": ".2e"}
    cells = [
        [
            f"{row['epoch']:.0f}",
            *(number(100 * row[k] if k == "sparsity" else row.get(k), forms.get(k, ".2f")) for k in shown),
        ]
        for row in rows
    ]
    each = table("Epoch by epoch", ["epoch", *(columns[key] for key in shown)], cells)
    return f"<figure>{chart}<figcaption>{escape(words)}</figcaption></figure><details><summary>Epoch by epoch</summary>{each}</details>"


def _stages(contents: Contents) -> str:
    if not contents.stages:
        return ""
    total = sum(row["seconds"] for row in contents.stages) or 1.0
    memory = any(row.get("peak_memory_gib") is not None for row in contents.stages)
    rows = []
    for row in contents.stages:
        rows.append(_stage(escape(row["stage"]), row["seconds"], total, row.get("peak_memory_gib"), memory))
        for part, seconds in row.get("parts", {}).items():
            rows.append(_stage(f"&emsp;– {escape(part)}", seconds, total, None, memory))
    text = f"<p>{total:,.1f} seconds in all.</p>"
    if memory:
        text += "<p>Memory is the highest that the process had needed by the end of each stage, so it never falls.</p>"
    return text + table("Stages", ["stage", "seconds", "share", *(["peak GiB"] if memory else [])], rows)


def _stage(name: str, seconds: float, total: float, gib: float | None, memory: bool) -> list[str]:
    share = seconds / total
    return [name, f"{seconds:,.2f}", bar(share, f"{100 * share:.0f} % of the time"), *([number(gib)] if memory else [])]


def _run(contents: Contents) -> str:
    recipe = f"<h3>Recipe</h3><pre tabindex=0>{escape(contents.recipe)}</pre>" if contents.recipe else ""
    return facts("Arguments", contents.facts) + recipe + facts("Versions", contents.versions)


def _files(contents: Contents) -> str:
    links = [
        pair
        for level in contents.levels
        for pair in [(f"{level.name}: {text}", href) for text, href in level.checkpoints]
    ]
    items = "".join(f'<li><a href="{escape(href)}">{escape(text)}</a></li>' for text, href in [*links, *contents.files])
    return f"<ul>{items}</ul>" if items else ""
