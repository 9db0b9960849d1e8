"""Failures of fp16 and bf16 as small models, and healthy models that look like them.

`precscope bench zoo` asks for advice on each of them and trains with it. A file is a case: what goes wrong, where it
was met (a link, or "made up here"), the guilty modules per format, and `build()`; `precscope/bench/cases.py` describes
the constants. Files called ctl_* are controls, in which nothing is wrong. `accept.json` holds other right answers:
modules whose fp32 cures a case just as well (measured by benchmarks/zoo_answers.py).
"""
