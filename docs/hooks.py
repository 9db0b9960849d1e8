"""What mkdocs does beyond its pages: see mkdocs.yml. Not part of the package, and not copied to the site.

- Pages that live elsewhere in the repository (notebooks, examples, reports, the changelog) are mirrored into the site,
  and links to them point there. A link to anything else that is no page is an error of `mkdocs build --strict`.
- `<!-- generated: NAME -->` in a page is replaced by what the package itself says: the commands' help, the public
  names for mkdocstrings, the cases of the zoo. So these cannot drift.
- `$$ formula $$` and `$formula$` become MathML, which browsers draw without a script: GitHub reads the same source.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "Record": ("record", "profile", "Recorder", "Task"),
    "Ask": ("Profile", "summarize", "TensorStats", "FloatFormat", "get_format", "quantize", "Site", "Role"),
    "Recommend": ("recommend", "PrecisionPlan", "LayerPrecision", "Reason", "apply", "emulate"),
    "Train": ("train", "TrainConfig", "TrainResult", "GuardConfig", "read_events", "tune"),
    "Prove": ("compare", "verify", "trace", "trace_step"),
    "Use": ("infer", "export", "convert", "report", "plot"),
    "Errors": ("PrecscopeError", "UsageError", "RunError"),
}
"""Public names in the order of the API page; a name that is missing here comes last, under "More"."""

MOVED = {"CHANGELOG.md": "changelog.md", "examples/README.md": "examples.md", "reports/README.md": "reports.md"}
"""Pages from elsewhere under other names: a README in a menu would become the page of its section."""

_GENERATED = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_FENCE = re.compile(r"^(```.*?^```$|~~~.*?^~~~$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


# pages from elsewhere


def mirrored() -> dict[str, str]:
    """Path in the repository -> path in the site, of what is shown there but does not live in docs/."""
    found = dict(MOVED)
    for folder in ("examples", "reports", "notebooks"):
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if not path.is_file() or "__pycache__" in name or "/." in name or name in MOVED:
                continue
            if name.endswith(".ipynb"):
                found[name] = name.removesuffix(".ipynb") + ".md"
            else:
                found[name] = name
    return found


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, target in mirrored().items():
        path = ROOT / source
        if source.endswith(".ipynb"):
            page, pictures = notebook_page(path)
            files.append(_generated(File, config, target, content=page))
            for name, picture in pictures.items():
                files.append(_generated(File, config, f"notebooks/{name}", content=picture))
        elif source.endswith(".md"):
            files.append(_generated(File, config, target, content=path.read_text(encoding="utf-8")))
        else:
            files.append(_generated(File, config, target, abs_src_path=str(path)))
    return files


def _generated(kind: Any, config: Any, target: str, **source: Any) -> Any:
    old = config.plugins._current_plugin
    config.plugins._current_plugin = old or "docs/hooks.py"
    try:
        return kind.generated(config, target, **source)
    finally:
        config.plugins._current_plugin = old


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown with its committed outputs, and its pictures by file name."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace("<details>", '<details markdown="1">'))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
            if "image/png" in data:
                name = f"{path.stem}-{number}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![picture made by the cell above]({name})")
            elif "text/html" in data:
                table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
                parts.append(re.sub(r"\n\s*", "", table.replace(' border="1" class="dataframe"', "")))
            else:
                parts.append("```text\n" + ("".join(output.get("text", "")) or data["text/plain"]).rstrip() + "\n```")
    parts.append(f"*Run it: `notebooks/{path.name}`.*")
    return "\n\n".join(parts) + "\n", pictures


def rewritten_links(text: str, source: str, target: str) -> str:
    """Links of a page for its place in the site. source: its path in the repository, target: that in the site."""
    moved = mirrored()

    def replaced(found: re.Match[str]) -> str:
        link = found[2]
        if "://" in link or link.startswith(("/", "mailto:")):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        path = {"docs": "docs/index.md", "README.md": "docs/index.md"}.get(path, path)
        place = moved.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            return found[0]
        relative = posixpath.relpath(place, posixpath.dirname(target) or ".")
        return f"{found[1]}{relative}{found[3] or ''}{found[4]}"

    return outside_code(text, lambda part: _LINK.sub(replaced, part))


def outside_code(text: str, change: Any) -> str:
    """`text` with `change` applied to what is in no fenced block."""
    parts = _FENCE.split(text)
    return "".join(part if _FENCE.fullmatch(part) else change(part) for part in parts)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    target = page.file.src_uri
    source = next((s for s, t in mirrored().items() if t == target), f"docs/{target}")
    markdown = _GENERATED.sub(lambda found: GENERATORS[found[1]](), markdown)
    return with_formulas(rewritten_links(markdown, source, target))


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """The theme's search has no name for a screen reader."""
    return output.replace('data-md-component="search" role="dialog"',
                          'data-md-component="search" role="dialog" aria-label="Search"')  # fmt: skip


# formulas


def with_formulas(text: str) -> str:
    """`$$ ... $$` (on lines of their own) and `$...$` as MathML."""
    return outside_code(text, _formulas)


def _formulas(text: str) -> str:
    text = re.sub(r"^\$\$\n?(.*?)\n?\$\$$", lambda m: f'<div class="formula">{mathml(m[1], "block")}</div>',
                  text, flags=re.MULTILINE | re.DOTALL)  # fmt: skip
    text = re.sub(r"(?<=\S)\n(?=\$[^$\n]+\$)", " ", text)  # at the start of a line it would become a block of its own
    return re.sub(r"(?<![\\$\w`])\$([^$\n`]+)\$(?![\w$])", lambda m: mathml(m[1], "inline"), text)


def mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return re.sub(r"\n\s*", "", convert(" ".join(latex.split()), display=display))


# what the package says of itself


def commands() -> dict[str, str]:
    """Every command of the console script -> its help as the terminal shows it. Of `bench` only what it does itself:
    each benchmark's help is its script's own."""
    import typer

    from precscope.bench import BENCHMARKS
    from precscope.cli.application import app

    scripts = {f"precscope bench {name}" for name, benchmark in BENCHMARKS.items() if benchmark.script}

    def walk(command: Any, words: str) -> Any:
        yield words, help_of(app, words.split()[1:])
        for name, child in sorted(getattr(command, "commands", {}).items()):
            if f"{words} {name}" not in scripts:
                yield from walk(child, f"{words} {name}")

    root = typer.main.get_command(app)
    found = dict(walk(root, "precscope"))
    order = ["precscope"] + [f"precscope {name}" for name in root.commands]
    return dict(sorted(found.items(), key=lambda item: (order.index(" ".join(item[0].split()[:2])), item[0])))


def help_of(app: Any, words: list[str]) -> str:
    said = io.StringIO()
    before = dict(os.environ)
    os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            app([*words, "--help"], prog_name="precscope")
    finally:
        os.environ.clear()
        os.environ.update(before)
    return said.getvalue().rstrip()


def cli_reference() -> str:
    parts = []
    for words, said in commands().items():
        level = "##" if words.count(" ") < 2 else "###"
        parts.append(f"{level} {words}\n\n```text\n{said}\n```")
    return "\n\n".join(parts)


def api_reference() -> str:
    """A section per group of public names, each a directive of mkdocstrings for where the name is defined."""
    import precscope

    public = [name for name in precscope.__all__ if not name.startswith("__")]
    told = {name for names in SECTIONS.values() for name in names}
    sections = {**SECTIONS, "More": tuple(name for name in public if name not in told)}
    parts = []
    for title, names in sections.items():
        here = [name for name in names if name in public]
        if here:
            parts.append(f"## {title}")
            parts += [_directive(precscope, name) for name in here]
    return "\n\n".join(parts)


def _directive(package: Any, name: str) -> str:
    thing = getattr(package, name)
    where = thing.__name__ if isinstance(thing, type(sys)) else f"{thing.__module__}.{thing.__qualname__}"
    options = f'    options:\n      heading: "ps.{name}"\n      toc_label: "{name}"'
    if isinstance(thing, type(sys)):  # a module that is public: its public functions, wherever they are
        parts = [f"::: {where}\n{options}\n      members: false"]
        for child in thing.__all__:
            member = getattr(thing, child)
            parts.append(
                f"::: {member.__module__}.{member.__qualname__}\n    options:\n      heading_level: 4\n"
                f'      heading: "ps.{name}.{child}"\n      toc_label: "{name}.{child}"'
            )
        return "\n\n".join(parts)
    return f"::: {where}\n{options}"


def zoo_table() -> str:
    """Cases and controls: what goes wrong, in which format and module, where it was met, what mends it."""
    from precscope.bench.cases import FORMATS, load_cases

    cases = load_cases(ROOT / "precscope" / "zoo")
    parts = []
    for title, chosen in (("Failures", [c for c in cases if not c.is_control]),
                          ("Look-alikes in which nothing is wrong", [c for c in cases if c.is_control])):  # fmt: skip
        parts.append(f"## {title}")
        for case in chosen:
            guilty = [f"{f}: {', '.join(f'`{m}`' for m in case.guilty[f])}" for f in FORMATS if case.guilty[f]]
            lines = [f"### {case.name}", "", summary_of(case.path), ""]
            if case.kind:
                lines.append(f"- what: {case.kind}, {case.phase}")
            lines.append(f"- guilty: {'; '.join(guilty) or 'nothing'}")
            if case.mode == "pure":
                lines.append("- recipe: weights and inputs in the format, no loss scale")
            if case.source:
                link = f"<{case.source}>" if case.source.startswith("http") else html.escape(case.source)
                lines.append(f"- met in: {link}")
            if case.fix:
                lines.append(f"- mend: {html.escape(case.fix)}")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def summary_of(path: Path) -> str:
    import ast

    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return html.escape(" ".join(text.split()), quote=False)


GENERATORS = {"cli": cli_reference, "api": api_reference, "zoo": zoo_table}
