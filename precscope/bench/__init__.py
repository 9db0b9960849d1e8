"""Benchmarks that come with the package, for users to run on their own machine.

cases.py (a folder of case files), harness.py (train a case in fp32, in a format, with a plan), scoring.py (what a
plan is worth on a case), zoo.py (the loop, the JSON), tables.py (the text).
"""

from __future__ import annotations

BENCHMARKS = {"zoo": "the advice on small models that fail in fp16 or bf16, and on healthy look-alikes"}
"""Names of `precscope bench NAME`, and what each measures."""
