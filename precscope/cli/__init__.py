"""The command line: parsing and printing only. Each command calls the function of the same name in the package, prints
what it wrote and the next command to try.

running.py has the commands that run a model, inference.py those that only infer or export, reading.py those that read
runs, advice.py those that advise, machine.py those about this machine. Exit status: 0 done, 1 failed honestly, 2 wrong
use.
"""

from .application import app, main

__all__ = ["app", "main"]
