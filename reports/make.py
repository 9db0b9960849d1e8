"""The committed reports: the commands that make each, run in turn, and the pages that list them.

    python reports/make.py                  # all of them, about 12 minutes on two cores
    python reports/make.py bert zoo         # some
    python reports/make.py --list           # the commands, to run by hand
    python reports/make.py --index          # reports/index.html and reports/README.md alone

Each report is one self-contained page below reports/. Its commands are those of the command line, one after another;
run directories go to runs/, which is not committed. A report that cannot be made here (a package is missing, no GPU)
is left as it is.
"""

from __future__ import annotations

import argparse
import html
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Report:
    """One page. title, about: for the index. page: below reports/. commands: what makes it, in order. may_fail: indices
    of commands that may end with 1, which then says that something was missed."""

    title: str
    about: str
    page: str
    commands: tuple[str, ...]
    may_fail: tuple[int, ...] = ()


def _trained(task: str, name: str, title: str, *, profile: str, steps: str) -> tuple[str, ...]:
    """Record, recommend, train as fp32, bf16 autocast and the plan, and report."""
    runs, page = f"runs/{name}", f"reports/{name}/index.html"
    return (
        f"precscope profile {task} {profile} --out {runs}/profile --overwrite",
        f"precscope recommend {runs}/profile --task {task} --out {runs}/plan.json",
        *(f"precscope train {task} --precision {p} {steps} --out {runs}/{p} --overwrite" for p in ("fp32", "bf16")),
        f"precscope train {task} --plan {runs}/plan.json {steps} --out {runs}/plan --overwrite",
        f"precscope report {runs}/profile --plan {runs}/plan.json --run {runs}/fp32 --run {runs}/bf16 "
        f"--run {runs}/plan --title {shlex.quote(title)} --out {page}",
    )


REPORTS = {
    "demo": Report(
        "A GPT on source code",
        "The demo: a byte-level GPT trained on the standard library's own source as fp32, under plain autocast and "
        "with the plan.",
        "demo/index.html",
        ("precscope demo",),
    ),
    "bert": Report(
        "MiniLM fine-tuned on film reviews",
        "A pretrained BERT (all-MiniLM-L6-v2) learns to tell good film reviews from bad ones: fp32, bf16 autocast and "
        "the plan. The accuracies of five seeds are in docs/benchmarks.md.",
        "bert/index.html",
        _trained(
            "text",
            "bert",
            "MiniLM fine-tuned on film reviews",
            profile="--steps 40",
            steps="--steps 120 --eval-every 30",
        ),
    ),
    "smollm2": Report(
        "SmolLM2-135M, reading source code",
        "A pretrained language model with massive activations, recorded in fp32 without being trained: which modules "
        "make them, and how much room fp16 leaves.",
        "smollm2/index.html",
        (
            "precscope profile smollm2 --infer --steps 24 --every 1 --precision fp32 --shadow-every none --no-costs "
            "--out runs/smollm2/profile --overwrite",
            "precscope recommend runs/smollm2/profile --formats fp16,fp32 --policy cast --costs model "
            "--out runs/smollm2/plan.json",
            "precscope report runs/smollm2/profile --plan runs/smollm2/plan.json "
            "--title 'SmolLM2-135M, reading source code' --out reports/smollm2/index.html",
        ),
    ),
    "zoo": Report(
        "The zoo: failures on purpose",
        "Small models that fail in fp16 or bf16, and look-alikes that do not: is the advice right?",
        "zoo/index.html",
        ("precscope bench zoo --html reports/zoo/index.html",),
        may_fail=(0,),
    ),
}


def make(name: str) -> bool:
    """Run the commands of one report; whether all did what they should."""
    report = REPORTS[name]
    for index, command in enumerate(report.commands):
        print(f"$ {command}", flush=True)
        words = [sys.executable, "-m", *shlex.split(command)]
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        if status and not (status == 1 and index in report.may_fail):
            print(f"{name}: ended with {status}; its page is left as it was", file=sys.stderr)
            return False
    return True


def lead_of(page: Path) -> str:
    """The verdict's first sentence, as the page has it."""
    found = re.search(r'<p class="lead">(.*?)</p>', page.read_text(encoding="utf-8"), re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", found[1])).split()) if found else ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>])", r"\\\1", text)


def write_index(folder: Path = ROOT / "reports") -> None:
    """README.md and index.html in `folder`, of the pages that are there."""
    from markupsafe import Markup

    from precscope import __version__
    from precscope.reporting.html import TEMPLATES, environment, save

    there = [(r, lead_of(folder / r.page)) for r in REPORTS.values() if (folder / r.page).is_file()]
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    gpu = (folder / "gpu" / "README.md").is_file()
    page = environment().get_template("index.html.j2").render(css=css, reports=there, gpu=gpu, version=__version__)
    save(page, folder / "index.html")
    lines = [
        "# Reports",
        "",
        "Each is one self-contained page: download it and open it from disk; [index.html](index.html) lists them, too.",
        "`python reports/make.py` makes them again on your machine, `make demo` the first one. These ran on the",
        "machine described in [docs/benchmarks.md](../docs/benchmarks.md).",
    ]
    for report, lead in there:
        lines += ["", f"## [{report.title}]({report.page})", "", report.about]
        lines += ["", f"> {_plain(lead)}"] * bool(lead)
        lines += ["", *(f"    {command}" for command in report.commands)]
    if gpu:
        said = "What `python benchmarks/gpu.py` measured, and on what; where nothing was measured, the page says so."
        lines += ["", "## [GPU](gpu/README.md)", "", said]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("wrote reports/index.html and reports/README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*REPORTS, []], metavar="NAME", help=", ".join(REPORTS))
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--index", action="store_true", help="write the pages that list the reports and no more")
    given = parser.parse_args()
    names = given.names or list(REPORTS)
    if given.list:
        for name in names:
            print("\n".join([f"# {name}", *REPORTS[name].commands]))
        return 0
    done = [] if given.index else [make(name) for name in names]
    write_index()
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
