"""The report: README.md for the repository's pages, index.html with the figures inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import draw
from .tables import Table, tables
from .targets import MET, MISSED

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2027; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #dde2e7; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.met { color: #00693e; font-weight: 600; } .missed { color: #b00020; font-weight: 600; }
.warning { background: #fdecea; border-left: 4px solid #b00020; padding: 0.6rem 1rem; }
figure { margin: 1.2rem 0; } figcaption { color: #56606c; font-size: 0.85rem; } img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f4f6f8; padding: 0.6rem; font-size: 0.8rem; }
"""
REHEARSAL = (
    "A rehearsal on a CPU: it shows that the benchmark runs. No figure on this page says anything about a GPU, and no "
    "target is judged."
)


def write_report(content: dict[str, Any], out: Path) -> None:
    """README.md, index.html and the figures of what was found so far."""
    figures = draw(content, out)
    (out / "README.md").write_text(markdown(content, figures), encoding="utf-8")
    (out / "index.html").write_text(page(content, figures, out), encoding="utf-8")


def title(content: dict[str, Any]) -> str:
    """Of the report."""
    return ("Rehearsal of the GPU benchmark: " if content["rehearsal"] else "precscope on ") + content["machine"][
        "device"
    ]


def _facts(content: dict[str, Any]) -> list[str]:
    gpt, versions = content["gpt"], {k: v for k, v in content["versions"].items() if v}
    judged = [t["status"] for t in content.get("targets", [])]
    met, missed = judged.count(MET), judged.count(MISSED)
    return [
        f"Command: {content['command']}",
        f"GPT: {gpt['layers']} layers, width {gpt['width']}, {gpt['heads']} heads, vocabulary {gpt['vocabulary']}, "
        f"head tied to the embedding; {gpt['batch']} x {gpt['context']} tokens per step of the standard library",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        f"Commit: {content['commit'] or 'unknown'}",
        f"Targets: {met} met, {missed} missed, {len(judged) - met - missed} not measured",
    ]  # fmt: skip


def _failures(content: dict[str, Any]) -> dict[str, str]:
    return {name: part["error"] for name, part in content["parts"].items() if "error" in part}


def markdown(content: dict[str, Any], figures: dict[str, str]) -> str:
    """The report in Markdown."""
    lines = [f"# {title(content)}", ""]
    if content["rehearsal"]:
        lines += [f"**{REHEARSAL}**", ""]
    lines += [f"- {fact}" for fact in _facts(content)]
    for name, error in _failures(content).items():
        lines += ["", f"**{name}** did not end well:", "", "```", error, "```"]
    drawn = [line for name, caption in figures.items() for line in ("", f"![{caption}]({name})")]
    for i, table in enumerate(tables(content)):
        lines += drawn if i == 1 else []  # after the targets
        lines += ["", f"## {table.title}", ""]
        lines += [table.note, ""] if table.note else []
        lines += [_pipes(table.head), _pipes(["---"] * len(table.head)), *(_pipes(row) for row in table.rows)]
    return "\n".join(lines) + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def page(content: dict[str, Any], figures: dict[str, str], out: Path) -> str:
    """The report as one page that needs nothing beside it."""
    name = html.escape(title(content))
    parts = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f"<style>{_STYLE}</style></head><body><h1>{name}</h1>"]  # fmt: skip
    if content["rehearsal"]:
        parts.append(f'<p class="warning">{REHEARSAL}</p>')
    parts.append("<ul>" + "".join(f"<li>{html.escape(fact)}</li>" for fact in _facts(content)) + "</ul>")
    for part, error in _failures(content).items():
        parts.append(f'<p class="warning">{html.escape(part)} did not end well:</p><pre>{html.escape(error)}</pre>')
    first, *others = [_html(table) for table in tables(content)]
    parts += [first, *(_figure(out / file, caption) for file, caption in figures.items()), *others]
    return "\n".join([*parts, "</body></html>\n"])


def _figure(path: Path, caption: str) -> str:
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _html(table: Table) -> str:
    def cell(tag: str, text: str, column: int) -> str:
        kind = text if text in (MET, MISSED) else "n" if column in table.numbers else ""
        return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text, i) for i, text in enumerate(table.head))
    body = "".join(f"<tr>{''.join(cell('td', text, i) for i, text in enumerate(row))}</tr>" for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (f'<h2>{html.escape(table.title)}</h2>{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip
