"""`trivium report RUN`: one self-contained page about a run: curves, samples over time, goodput, attempts,
lineage.

It only reads, so it works on a run that is going on, on a login node, with no network. The page has no
scripts and loads nothing; every text in it (the model's own above all) is escaped."""

import argparse
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.observe.console import duration, printable, short_number
from trainer.observe.files import explained, read_lines, replace_text
from trainer.observe.goodput import KINDS, GoodputSummary, summarize
from trainer.observe.loggers import read_metrics
from trainer.observe.metrics import AXIS
from trainer.run import RunDirectory

MAX_SAMPLE_STEPS = 8  # of a prompt: first, last and some between; the rest is in samples.jsonl
KIND_COLOURS = dict(
    zip(KINDS, ("#3a8f5c", "#d1602b", "#b08900", "#8a4fa3", "#1f5fa8", "#5fa8a8", "#999999", "#cccccc"))
)
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin: 0 }
h2 { font-size: 1.15em; margin: 2em 0 .6em; border-bottom: 1px solid #ddd }
.muted { color: #666 }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 1.2em 0 }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px 16px }
.card b { display: block; font-size: 1.35em }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 12px }
.plots svg { width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: 4px 10px; border-bottom: 1px solid #eee }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 100%;
          font: 13px/1.5 ui-monospace, monospace }
.prompt { color: #1f5fa8 }
pre { background: #f7f7f7; padding: 12px; overflow: auto; font-size: 13px }
.bar { display: flex; height: 26px; border-radius: 4px; overflow: hidden; margin: .6em 0 }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em }
summary { cursor: pointer }
"""


def status(run: RunDirectory, life: GoodputSummary | None) -> str:
    """In one or two words what the run is doing, as far as its files tell."""
    if run.is_done:
        return "done"
    if life is None:
        return "not started"
    return {"running": "running, or killed", "done": "done"}.get(life.stops[-1], f"stopped: {life.stops[-1]}")


def cards(
    run: RunDirectory, records: list[dict[str, Any]], life: GoodputSummary | None
) -> list[tuple[str, str]]:
    """The numbers one looks for first: (label, value)."""
    if not records:
        return []
    last = records[-1]
    found = [
        ("step", f"{last['step']} / {run.config.get('steps', '?')}"),
        ("tokens", short_number(last[AXIS])),
    ]
    for label, name, form in (
        ("train loss", "train/loss", "{:.4f}"), ("val loss", "val/loss", "{:.4f}"),
        ("val bits/byte", "val/bpb", "{:.4f}"),
        ("reward", "rl/reward", "{:.3f}"), ("pass@1", "rl/pass@1", "{:.1%}"), ("MFU", "speed/mfu", "{:.1%}"),
    ):  # fmt: skip
        values = [record[name] for record in records if name in record]
        if values:
            found.append((label, form.format(float(values[-1]))))
    speeds = sorted(record["speed/tokens_per_s"] for record in records if "speed/tokens_per_s" in record)
    if speeds:
        found.append(("tokens/s, median", short_number(speeds[len(speeds) // 2])))
    if life:
        found += [("goodput", f"{life.goodput:.1%}"), ("wall time", duration(life.wall))]
    return found


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def samples_html(samples: list[dict[str, Any]]) -> str:
    """For each fixed prompt, what the model made of it as training went on."""
    by_prompt: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in samples:
        prompt = str(sample["row"].get("prompt", ""))
        by_prompt.setdefault((str(sample["name"]), prompt), []).append(sample)
    parts = []
    for (name, prompt), rows in _spread(list(by_prompt.items()), 12):
        body = []
        for sample in _spread(rows, MAX_SAMPLE_STEPS):
            rest = {k: v for k, v in sample["row"].items() if k not in ("prompt", "completion")}
            notes = "".join(f'<br><span class="muted">{_text(k)}: {_text(v)}</span>' for k, v in rest.items())
            text = f'<span class="prompt">{_text(prompt)}</span>{_text(sample["row"].get("completion", ""))}'
            body.append(f"<tr><td>{sample['step']}</td><td class=text>{text}{notes}</td></tr>")
        parts.append(f"<table><tr><th>step</th><th>{_text(name)}</th></tr>{''.join(body)}</table>")
    return "<br>".join(parts)


def goodput_html(life: GoodputSummary) -> str:
    """A bar and a table of where the time of all attempts went."""
    shares = {kind: value / life.wall for kind, value in life.seconds.items() if life.wall > 0 and value > 0}
    bar = "".join(
        f'<div style="width:{share:.3%};background:{KIND_COLOURS[kind]}" title="{kind} {share:.1%}"></div>'
        for kind, share in shares.items()
    )
    rows = "".join(
        f'<tr><td><span class=dot style="background:{KIND_COLOURS[kind]}"></span>{kind}</td>'
        f"<td>{share:.1%}</td>"
        f"<td>{duration(life.seconds[kind])}</td><td class=muted>{escape(KINDS[kind])}</td></tr>"
        for kind, share in shares.items()
    )
    again = f", {life.recomputed_steps} steps trained twice" if life.recomputed_steps else ""
    head = f"<p>goodput {life.goodput:.1%} of {duration(life.wall)}{again}</p>"
    return f"{head}<div class=bar>{bar}</div><table>{rows}</table>"


def attempts_html(run: RunDirectory, life: GoodputSummary | None) -> str:
    """One row per start of the run: when, where, from which step, what was changed, how it ended."""
    stops = life.stops if life else []
    rows = []
    for attempt, stop in zip(run.state["attempts"], [*stops, *["?"] * len(run.state["attempts"])]):
        code = attempt.get("code", {})
        commit = (code.get("commit") or "")[:10] + (" + changes" if code.get("dirty") else "")
        changes = "<br>".join(_text(change) for change in attempt["changes"])
        cells = [attempt[name] for name in ("attempt", "started", "from_step", "world", "host")]
        plain = "".join(f"<td>{_text('' if cell is None else cell)}</td>" for cell in cells)
        rows.append(f"<tr>{plain}<td>{_text(commit)}</td><td>{changes}</td><td>{_text(stop)}</td></tr>")
    names = ("attempt", "started", "after step", "ranks", "host", "code", "changed", "ended")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _text(value: Any) -> str:
    return escape(printable(value))


def render(run: RunDirectory) -> str:
    """The whole page."""
    from trainer.observe.plots import svgs  # matplotlib takes half a second

    records = read_metrics(run.metrics_file)
    life = summarize(run.goodput_file)
    first_tokens = {record["step"]: record[AXIS] for record in records}
    resumed_at = [first_tokens.get(a["from_step"]) for a in run.state["attempts"] if a.get("from_step")]
    pictures = svgs(records, [tokens for tokens in resumed_at if tokens is not None])
    samples = samples_html(read_lines(run.samples_file))
    top = "".join(
        f"<div class=card>{label}<b>{value}</b></div>" for label, value in cards(run, records, life)
    )
    sections = [
        ("Curves", f"<div class=plots>{''.join(pictures)}</div>" if pictures else ""),
        ("What it writes", samples),
        ("Where the time went", goodput_html(life) if life else ""),
        ("Attempts", attempts_html(run, life)),
        (
            "Made from",
            f"<pre>{_text(yaml.safe_dump(run.lineage or {}, sort_keys=False))}</pre>" if run.lineage else "",
        ),
        (
            "Config",
            f"<details><summary>config.yaml of the newest attempt</summary><pre>"
            f"{_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre></details>",
        ),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(run.name)}</title>'
        f"<style>{CSS}</style></head><body><h1>{_text(run.name)}</h1>"
        f"<p class=muted>{_text(run.stage)} · {_text(status(run, life))} · run {_text(run.run_id)} · page of "
        f"{time.strftime('%Y-%m-%d %H:%M')}</p><div class=cards>{top}</div>{body}</body></html>\n"
    )


def main(argv: list[str] | None = None) -> int:
    """`trivium report RUN [--out FILE] [--png FILE]`: writes RUN/report.html (and the loss curve as PNG)."""
    parser = argparse.ArgumentParser(
        prog="trivium report", description="One page about a run, to read or to send."
    )
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--out", help="where to write the page (default: RUN/report.html)")
    parser.add_argument("--png", help="also write the loss curve there, e.g. loss.png")
    arguments = parser.parse_args(argv)
    run = RunDirectory.read(arguments.run)
    out = Path(arguments.out or run.path / "report.html")
    replace_text(out, render(run))
    print(out)
    if arguments.png:
        records = read_metrics(run.metrics_file)
        if not records:
            raise UserError(f"{run.metrics_file}: no steps yet, so there is no curve to draw: train first")
        from trainer.observe.plots import save_png

        with explained(arguments.png):
            save_png(records, Path(arguments.png), f"{run.name} ({run.stage})")
        print(arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
