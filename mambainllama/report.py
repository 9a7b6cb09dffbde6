"""One HTML file that shows what a run of a recipe did: no scripts, no links, no other files.

    write_report(folder, results)     run/report.html, from results.json and the stages' metrics

Figures are drawn as SVG here, so that a report needs nothing but Python to be written and nothing
but a browser to be read; it follows the reader's light or dark setting, and prints.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpointing import write_text
from .errors import NotFoundError
from .history import History

__all__ = ["report_html", "write_report"]


def write_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes report.html; returns its path."""
    histories = {}
    for row in results["stages"]:
        try:
            histories[row["stage"]] = History.read(folder / row["stage"])
        except NotFoundError:
            continue
    path = folder / "report.html"
    write_text(path, report_html(results, histories))
    return path


def report_html(results: Mapping[str, Any], histories: Mapping[str, History]) -> str:
    """The page."""
    stages = results["stages"]
    measured = [row for row in stages if "kept" in row]
    parts = [
        header(results, measured),
        section("Kept of the teacher", kept_section(results, measured)) if measured else "",
        section("Which layers stay attention", layers_section(stages)),
        section("Learning curves", curves_section(stages, histories)),
        section("The same prompts", samples_section(results, measured))
        if results.get("samples") and measured
        else "",
        section("Time and memory", cost_section(stages)),
        section("Settings", settings_section(results, stages)),
        section("What the figures mean", MEANING.format(measured_on=text(results["measured_on"]))),
        footer(results),
    ]
    page = PAGE.format(
        title=text(results["title"]), style=STYLE, body="\n".join(part for part in parts if part)
    )
    # A name that is not UTF-8 holds lone surrogates, which no page can: they become "?".
    return page.encode("utf-8", "replace").decode()


# ---- words -------------------------------------------------------------------------------------


def text(value: Any) -> str:
    return html.escape(str(value))


def section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n{body}\n</section>" if body else ""


def counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def per_cent(share: float) -> str:
    return f"{100 * share:.1f}&#8239;%"


def figure(value: Any) -> str:
    """A number for a table: thin spaces between thousands, four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "&#8239;")
    if isinstance(value, float):
        if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:,.0f}".replace(",", "&#8239;") if abs(value) >= 1000 else f"{value:.4g}"
    return text(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}&#8239;s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}&#8239;h {minutes:02}&#8239;min" if hours else f"{minutes}:{rest:02}&#8239;min"


def amount(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}&#8239;{unit}"
    return f"{count:.0f}"


def megabytes(count: float | None) -> str:
    if count is None:
        return "–"
    size = count / 2**20
    return f"{size / 1024:.2f}&#8239;GiB" if size >= 1024 else f"{size:.0f}&#8239;MiB"


# ---- head and foot -----------------------------------------------------------------------------


def header(results: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    teacher, student = results["teacher"], results["student"]
    kept = measured[-1]["kept"]["attention_layers"] if measured else None
    mixer = {"mamba1": "Mamba", "mamba2": "Mamba-2"}[student.get("mixer", "mamba2")]
    about = (
        f"{text(teacher['name'])}: {teacher['layers']} layers, {amount(teacher['parameters'])} "
        f"parameters"
    )
    if kept is not None:
        made = teacher["layers"] - len(kept)
        about += f" → {counted(made, f'{mixer} mixer')}, {counted(len(kept), 'attention layer')}"
    lines = [
        "<header>",
        f"<p class=kicker>mambainllama · {text(results['recipe'])}</p>",
        f"<h1>{text(results['title'])}</h1>",
        f"<p class=about>{about}</p>",
    ]
    if kept is not None:
        lines.append(layer_strip(teacher["layers"], kept, mixer))
    lines.append(cards(results, measured))
    lines.append("</header>")
    return "\n".join(lines)


def layer_strip(count: int, kept: Iterable[int], mixer: str) -> str:
    """One cell a layer, so that one sees where attention stayed."""
    kept = set(kept)
    cells = "".join(
        f'<i class="{"attention" if i in kept else "mixer"}" '
        f'title="layer {i}: {"attention" if i in kept else mixer}"></i>'
        for i in range(count)
    )
    return (
        f"<p class=strip>{cells}<span><i class=mixer></i> {mixer} "
        "<i class=attention></i> attention</span></p>"
    )


def cards(results: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    found = []
    if measured:
        kept = measured[-1]["kept"]
        found.append(("kept by likelihood", per_cent(kept["likelihood"]["kept"])))
        if kept["generation"]:
            found.append(("kept by generation", per_cent(kept["generation"]["kept"])))
        found.append(("same likeliest token", per_cent(kept["likelihood"]["same_top"])))
        found.append(
            (
                "perplexity (teacher)",
                f"{kept['likelihood']['perplexity']:.4g} "
                f"<small>({kept['likelihood']['teacher_perplexity']:.4g})</small>",
            )
        )
    tokens = sum(row.get("tokens", 0) for row in results["stages"])
    if tokens:
        found.append(("tokens trained on", amount(tokens)))
    found.append(("time in stages", duration(sum(row["seconds"] for row in results["stages"]))))
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in found)
    return f"<div class=cards>{cells}</div>"


def footer(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"<footer>{text(machine['machine'])}, {machine['threads']} threads, "
        f"{text(machine['device'])} · mambainllama {text(machine['mambainllama'])}, NumPy "
        f"{text(machine['numpy'])}, Python {text(machine['python'])} · begun "
        f"{text(results.get('begun'))}, written {text(results['written'])}</footer>"
    )


# ---- kept of the teacher -----------------------------------------------------------------------


def kept_section(results: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    generated = any(row["kept"]["generation"] for row in measured)
    head = (
        "<tr><th rowspan=2>after</th><th colspan=4>by likelihood</th>"
        + ("<th colspan=4>by generation</th>" if generated else "")
        + "</tr><tr><th>kept</th><th>KL</th><th>same top</th><th>perplexity</th>"
        + (
            "<th>kept</th><th>same start</th><th>same answers</th><th>same words</th>"
            if generated
            else ""
        )
        + "</tr>"
    )
    rows = []
    for row in measured:
        likelihood, generation = row["kept"]["likelihood"], row["kept"]["generation"]
        cells = [
            f"<th>{text(row['stage'])}</th>",
            bar_cell(likelihood["kept"], "a"),
            number_cell(figure(likelihood["kl"])),
            number_cell(per_cent(likelihood["same_top"])),
            number_cell(figure(likelihood["perplexity"])),
        ]
        if generated:
            cells += (
                [
                    bar_cell(generation["kept"], "b"),
                    number_cell(per_cent(generation["same_start"])),
                    number_cell(per_cent(generation["same_answers"])),
                    number_cell(per_cent(generation["same_words"])),
                ]
                if generation
                else ["<td></td>"] * 4
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    last = measured[-1]["kept"]["likelihood"]
    teacher = (
        "<tr class=teacher><th>the teacher itself</th><td class=bar>100&#8239;%</td><td>0</td>"
        f"<td>100&#8239;%</td><td>{figure(last['teacher_perplexity'])}</td>"
        + ("<td class=bar>100&#8239;%</td>" + 3 * "<td>100&#8239;%</td>" if generated else "")
        + "</tr>"
    )
    counts = f"Measured on {text(results['measured_on'])}: {figure(last['tokens'])} tokens"
    generation = measured[-1]["kept"]["generation"]
    if generation:
        counts += (
            f", and {generation['prompts']} prompts of it, answered with at most "
            f"{results['report']['max_new_tokens']} tokens each"
        )
    return (
        f"<div class=wide><table class=kept><thead>{head}</thead><tbody>{''.join(rows)}{teacher}"
        f"</tbody></table></div><p class=note>{counts}.</p>"
    )


def number_cell(words: str) -> str:
    return f"<td>{words}</td>"


def bar_cell(share: float, kind: str) -> str:
    width = 100 * min(1.0, max(0.0, share))
    return (
        f'<td class=bar><span class="fill {kind}" style="width:{width:.1f}%"></span>'
        f"<b>{per_cent(share)}</b></td>"
    )


# ---- layers ------------------------------------------------------------------------------------


def layers_section(stages: Sequence[Mapping[str, Any]]) -> str:
    """What each layer's attention is worth, where that was measured."""
    choice = next((row["layers"] for row in stages if "layers" in row), None)
    if choice is None:
        return ""
    scores = {int(layer): score for layer, score in choice["scores"].items()}
    top = max(max(scores.values()), 1e-9)
    rows = "".join(
        f'<tr><th>layer {layer}</th><td class=bar><span class="fill '
        f'{"b" if layer in choice["layers"] else "a"}" '
        f'style="width:{100 * max(0.0, score) / top:.1f}%"></span><b>{score:.4g}</b></td>'
        f"<td>{'attention' if layer in choice['layers'] else 'mixer'}</td></tr>"
        for layer, score in sorted(scores.items())
    )
    return (
        f"<div class=wide><table class=kept><tbody>{rows}</tbody></table></div><p class=note>Nats "
        f"a token that a layer's attention is worth before any training ({text(choice['method'])}, "
        f"{figure(choice['tokens'])} tokens). KL with this choice {figure(choice['kl'])}, with as "
        f"many layers evenly spread {figure(choice['evenly'])}.</p>"
    )


# ---- curves ------------------------------------------------------------------------------------

# Metric of training, the same on held-out data, what it is, and whether its ratios matter.
CURVES = (
    ("kl", "eval_kl", "KL to the teacher (nats per token)", True),
    ("ce", "eval_ce", "cross-entropy (nats per token)", True),
    ("align", None, "mixer against attention (relative squared error)", True),
    ("hidden", None, "residual stream (relative squared error)", True),
    ("accuracy", "eval_accuracy", "pairs told apart (share)", False),
    ("margin", "eval_margin", "margin of chosen over rejected", False),
)


def curves_section(stages: Sequence[Mapping[str, Any]], histories: Mapping[str, History]) -> str:
    charts = []
    for row in stages:
        history = histories.get(row["stage"])
        if not history:
            continue
        drawn = []
        for metric, held, words, ratios in CURVES:
            points, dots = series(history, metric), series(history, held)
            if len(points) > 1 and is_shown(metric, row["settings"], history):
                drawn.append(chart(points, dots, words, ratios))
        # Held-out KL tells also how a stage without KL in its loss does.
        if not any("kl" in r for r in history) and len(series(history, "eval_kl")) > 1:
            drawn.append(chart([], series(history, "eval_kl"), CURVES[0][2]))
        if is_preference(history) or not drawn:
            drawn.insert(0, chart(series(history, "loss"), series(history, "eval_loss"), "loss"))
        figures = "".join(f"<figure>{one}</figure>" for one in drawn if one)
        if figures:
            charts.append(f"<h3>{text(row['stage'])}</h3><div class=charts>{figures}</div>")
    if not charts:
        return ""
    key = (
        "<p class=note><svg class=key viewBox='0 0 30 10'><line class=line x1=1 y1=5 x2=29 y2=5 />"
        "</svg> training, smoothed &nbsp; <svg class=key viewBox='0 0 10 10'><circle class=dot "
        "cx=5 cy=5 r=3.5 /></svg> held out</p>"
    )
    return key + "\n".join(charts)


def is_shown(metric: str, settings: Mapping[str, Any], history: History) -> bool:
    """Whether a metric is one that this stage is about, not one that it merely reports."""
    if metric == "ce":
        return settings.get("ce_weight", 1.0) > 0
    return metric != "accuracy" or is_preference(history)


def is_preference(history: History) -> bool:
    return any("margin" in row for row in history)


def series(history: History, name: str | None) -> list[tuple[float, float]]:
    """(tokens, value) where it was measured and is finite."""
    return [
        (row["tokens"], float(row[name]))
        for row in history
        if name in row and math.isfinite(row[name])
    ]


WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 28, 38
POINTS = 240  # of a smoothed line, at most


def chart(
    line: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float]],
    words: str,
    ratios: bool = True,
) -> str:
    """An SVG of one metric over tokens; logarithmic where ratios matter and values allow it."""
    if not line and not dots:
        return ""
    smoothed = thinned(smooth(line))
    everything = [*smoothed, *dots]
    x_high = max(x for x, _ in everything) or 1
    values = [y for _, y in everything]
    logarithmic = ratios and min(values) > 0 and max(values) > 1.3 * min(values)
    if logarithmic:
        low, high = 0.95 * min(values), 1.05 * max(values)
        ticks = log_ticks(low, high)
    else:
        ticks = even_ticks(values)
        low, high = ticks[0], ticks[-1]

    def scale(value: float) -> float:
        return math.log(value) if logarithmic else value

    span = scale(high) - scale(low) or 1.0

    def x_at(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / x_high

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - scale(low)) / span

    unit, size = next(
        ((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if x_high >= s), ("", 1)
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{text(words)}">',
        f"<text class=title x={LEFT} y=16>{text(words)}</text>",
    ]
    for tick in ticks:
        y = y_at(tick)
        parts.append(
            f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />"
            f"<text class=tick x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{tick:g}</text>"
        )
    for tick in even_ticks([0.0, x_high / size]):
        if tick * size <= x_high * 1.001:
            parts.append(
                f"<text class=tick x={x_at(tick * size):.1f} y={HEIGHT - BOTTOM + 16} "
                f"text-anchor=middle>{tick:g}</text>"
            )
    parts.append(
        f"<text class=tick x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 5} text-anchor=middle>"
        f"training tokens{f' ({unit})' if unit else ''}</text>"
    )
    if len(smoothed) > 1:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in smoothed)
        parts.append(f'<polyline class=line points="{path}" />')
    for x, y in dots:
        parts.append(
            f"<circle class=dot cx={x_at(x):.1f} cy={y_at(y):.1f} r=3.5>"
            f"<title>{y:.4g} after {x:,.0f} tokens</title></circle>"
        )
    if dots:
        x, y = dots[-1]
        above = y_at(y) - 9 if y_at(y) > TOP + 16 else y_at(y) + 17
        parts.append(
            f"<text class=last x={min(x_at(x), WIDTH - RIGHT):.1f} y={above:.1f} text-anchor=end>"
            f"{y:.4g}</text>"
        )
    parts.append("</svg>")
    return "".join(parts)


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over the last twentieth of the points: the trend without the batches' noise."""
    window = max(1, len(points) // 20)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    return [
        (x, (sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window))
        for i, (x, _) in enumerate(points)
    ]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, the last one among them."""
    stride = -(-len(points) // POINTS) or 1
    return list(points[::-stride][::-1])


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, as many as fit a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * 10.0**e for e in decades for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 8)]
    return [tick for tick in even_ticks([low, high]) if low <= tick <= high]


def even_ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers around the values."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


# ---- samples -----------------------------------------------------------------------------------


def samples_section(results: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """Answers side by side: what is the same as the teacher's is set apart from what is not."""
    count = results["report"]["samples"]
    shown = []
    for index, sample in enumerate(results["samples"][:count]):
        cells = [
            f"<div class=answer><h4>teacher</h4><p>{text(sample['teacher']) or '<i>(nothing)</i>'}"
            "</p></div>"
        ]
        for row in measured:
            answer = row["kept"]["answers"][index]
            cells.append(
                f"<div class=answer><h4>after {text(row['stage'])}</h4>"
                f"<p>{marked(answer)}</p></div>"
            )
        shown.append(
            f"<article><p class=prompt>{text(sample['prompt'])}</p>"
            f"<div class=answers>{''.join(cells)}</div></article>"
        )
    return (
        "<p class=note>Greedy answers. <mark>Marked</mark> is what a student says as the teacher "
        "does, up to the first difference.</p>" + "\n".join(shown)
    )


def marked(answer: Mapping[str, str]) -> str:
    """An answer, its common beginning with the teacher's marked."""
    words, start = answer["text"], answer["start"]
    if not words:
        return "<i>(nothing)</i>"
    if not start or not words.startswith(start):
        return text(words)
    return f"<mark>{text(start)}</mark>{text(words[len(start) :])}"


# ---- cost and settings -------------------------------------------------------------------------


def cost_section(stages: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "steps", "tokens", "time", "tokens/s", "peak memory", "measuring")
    )
    rows = []
    for row in stages:
        seconds = row.get("training_seconds", row["seconds"])
        cells = (
            figure(row.get("steps")),
            figure(row.get("tokens")),
            duration(seconds),
            figure(row.get("tokens_per_second")),
            megabytes(row.get("peak_memory_bytes")),
            duration(row["kept"]["seconds"]) if "kept" in row else "–",
        )
        rows.append(
            f"<tr><th>{text(row['stage'])} <small>{text(row['words'])}</small></th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div><p class=note>Time is that of training steps, over all starts of an "
        "interrupted run. Peak memory is the process's until then.</p>" + skipped_note(stages)
    )


def skipped_note(stages: Sequence[Mapping[str, Any]]) -> str:
    """What bad records were left out, stage by stage."""
    notes = [
        f"{text(row['stage'])}: {figure(row['final']['skipped_records'])} bad records were left "
        f"out, the first: {text(row['final'].get('first_skipped_record', ''))}"
        for row in stages
        if row.get("final", {}).get("skipped_records")
    ]
    return f"<p class=note>{'<br>'.join(notes)}</p>" if notes else ""


def settings_section(results: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    blocks = []
    student = {"teacher": results["teacher"]["name"], **results["student"]}
    blocks.append(settings_table("student", student, {}))
    for row in stages:
        if "settings" in row:
            blocks.append(settings_table(row["stage"], row["settings"], row["standard"]))
        elif row["stage"] == "label":
            blocks.append(settings_table("label", row["identity"], {}))
    files = {
        name: f"{mark['bytes']:,} bytes, {mark['hash'][:12]}"
        for name, mark in results["files"].items()
    }
    blocks.append(settings_table("data files", files, {}))
    return (
        "<p class=note>Bold differs from the stage's own default.</p><div class=settings>"
        + "".join(blocks)
        + "</div>"
    )


def settings_table(name: str, values: Mapping[str, Any], standard: Mapping[str, Any]) -> str:
    changed = [key for key in values if key not in standard or values[key] != standard[key]]
    rows = "".join(
        f"<tr{' class=changed' if standard and key in changed else ''}><th>{text(key)}</th>"
        f"<td>{setting(value)}</td></tr>"
        for key, value in values.items()
        if value is not None
    )
    return f"<details><summary>{text(name)}</summary><table>{rows}</table></details>"


def setting(value: Any) -> str:
    """A setting as one would write it; floats are not rounded."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(item) for item in value)
    return text(f"{value:g}" if isinstance(value, float) else value)


# ---- the page ----------------------------------------------------------------------------------

MEANING = """<dl>
<dt>kept by likelihood</dt><dd>exp(−KL), with KL(teacher ‖ student) the mean over held-out tokens in
nats: of the probability that the teacher gives its own words, the share that the student gives them
(geometric mean over words). Measured on {measured_on}; of chats, on the answers.</dd>
<dt>same top</dt><dd>share of held-out places where both models think the same token likeliest.</dd>
<dt>perplexity</dt><dd>of the held-out text itself, so the teacher has one, too.</dd>
<dt>kept by generation</dt><dd>the student answers prompts in its own words (sampled at
temperature 1), and both models read them: exp(−KL), with KL(student ‖ teacher) the mean over those
words. Of the probability that the student gives its own words, the share that the teacher gives
them. Errors add up here that likelihood on given text hides.</dd>
<dt>same start</dt><dd>both answer the prompts greedily; the common beginning as a share of the
longer answer, mean over prompts. Strict: one other word ends it.</dd>
<dt>same answers</dt><dd>share of prompts whose greedy answers are equal to the end.</dd>
<dt>same words</dt><dd>tokens that both greedy answers hold, wherever they stand: twice their number
over the sum of both lengths, mean over prompts.</dd>
</dl>"""

STYLE = """
:root { --page:#fbfaf8; --paper:#fff; --ink:#1d1f24; --soft:#656a75; --rule:#e4e2dc; --a:#2563a8;
  --b:#c2571a; --mark:#dcefdc; --shadow:0 1px 3px #0001; }
@media (prefers-color-scheme: dark) { :root { --page:#16181c; --paper:#1e2126; --ink:#e8e6e1;
  --soft:#9aa0ab; --rule:#33373f; --a:#6aa9ec; --b:#ef9a63; --mark:#24452c; --shadow:none; } }
* { box-sizing:border-box }
body { margin:0 auto; max-width:72rem; padding:2.5rem 1.5rem 4rem; background:var(--page);
  color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:2rem; line-height:1.2; margin:.2rem 0 .4rem; letter-spacing:-.01em }
h2 { font-size:1.2rem; margin:2.8rem 0 .8rem; padding-top:.9rem; border-top:2px solid var(--ink) }
h3 { font-size:1rem; margin:1.4rem 0 .5rem }
h4 { font-size:.75rem; margin:0 0 .35rem; color:var(--soft); font-weight:600 }
.kicker { margin:0; color:var(--soft); font-size:.85rem; letter-spacing:.03em }
.about { margin:0 0 .8rem; color:var(--soft) }
.note { color:var(--soft); font-size:.87rem; margin:.7rem 0 }
.strip { display:flex; flex-wrap:wrap; gap:3px; align-items:center; margin:.4rem 0 1.4rem }
.strip i { width:18px; height:18px; border-radius:3px; display:inline-block }
.strip span { margin-left:.8rem; color:var(--soft); font-size:.85rem; display:flex; gap:.35rem;
  align-items:center }
.strip span i { width:11px; height:11px; margin-left:.5rem }
i.mixer { background:var(--a) } i.attention { background:var(--b) }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(10rem,1fr)); gap:.8rem }
.cards div { background:var(--paper); border:1px solid var(--rule); border-radius:8px;
  padding:.8rem 1rem; box-shadow:var(--shadow) }
.cards b { display:block; font-size:1.55rem; font-weight:600; line-height:1.25;
  font-variant-numeric:tabular-nums; white-space:nowrap }
.cards small { font-size:.95rem; color:var(--soft); font-weight:400 }
.cards span { color:var(--soft); font-size:.83rem }
.wide { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { padding:.42rem .8rem; text-align:right; border-bottom:1px solid var(--rule);
  font-weight:400; white-space:nowrap }
thead th { color:var(--soft); font-size:.82rem }
thead th[colspan] { text-align:center }
tbody th, th:first-child { text-align:left; font-weight:600 }
tbody th small { font-weight:400; color:var(--soft); margin-left:.5rem; white-space:normal }
.teacher th,.teacher td { color:var(--soft); font-weight:400 }
td.bar { position:relative; min-width:9rem }
td.bar b { position:relative; font-weight:600 }
.fill { position:absolute; left:0; top:.3rem; bottom:.3rem; border-radius:3px; opacity:.28 }
.fill.a { background:var(--a) } .fill.b { background:var(--b) }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(20rem,1fr)); gap:1rem }
figure { margin:0; background:var(--paper); border:1px solid var(--rule); border-radius:8px;
  padding:.6rem .6rem .3rem; box-shadow:var(--shadow) }
svg { width:100%; height:auto; display:block; font:12px system-ui,sans-serif }
svg.key { display:inline-block; width:auto; height:10px; vertical-align:baseline }
svg .title { fill:var(--ink); font-weight:600 } svg .tick { fill:var(--soft); font-size:11px }
svg .last { fill:var(--b); font-weight:600; paint-order:stroke; stroke:var(--paper);
  stroke-width:4px }
svg .grid { stroke:var(--rule) } svg .line { fill:none; stroke:var(--a); stroke-width:2;
  stroke-linejoin:round } svg .dot { fill:var(--paper); stroke:var(--b); stroke-width:2 }
article { margin:0 0 1.4rem; background:var(--paper); border:1px solid var(--rule);
  border-radius:8px; overflow:hidden; box-shadow:var(--shadow) }
.prompt { margin:0; padding:.7rem 1rem; border-bottom:1px solid var(--rule); font-weight:600;
  white-space:pre-wrap; overflow-wrap:anywhere }
.answers { display:grid; grid-auto-flow:column; grid-auto-columns:minmax(12rem,1fr);
  overflow-x:auto }
.answer { padding:.7rem 1rem; border-right:1px solid var(--rule); min-width:0 }
.answer:last-child { border-right:0 }
.answer p { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font-size:.88rem }
mark { background:var(--mark); color:inherit; border-radius:2px }
details { border:1px solid var(--rule); border-radius:8px; margin:.5rem 0; background:var(--paper) }
summary { padding:.5rem 1rem; cursor:pointer; font-weight:600 }
.settings tbody { display:block; columns:19rem; column-gap:2.5rem; padding:.2rem 1rem .7rem }
.settings tr { display:flex; break-inside:avoid; border-bottom:1px solid var(--rule) }
.settings th, .settings td { border:0; padding:.2rem 0; text-align:left; white-space:normal }
.settings th:first-child { flex:0 0 13rem; font-weight:400 }
.settings td { overflow-wrap:anywhere } .settings tr.changed > * { font-weight:700 }
dt { font-weight:600 } dd { margin:0 0 .6rem; max-width:50rem }
footer { margin-top:3rem; padding-top:1rem; border-top:1px solid var(--rule); color:var(--soft);
  font-size:.82rem }
@media print { body { max-width:none; padding:0; background:#fff }
  article,figure { break-inside:avoid } details:not([open]) { display:none } }
"""

PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
