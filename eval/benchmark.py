"""Moved: ``python -m distill.benchmark``. The old command works until the next release."""

import runpy
import sys

if __name__ == "__main__":
    print("eval.benchmark is now distill.benchmark: python -m distill.benchmark", file=sys.stderr)
    runpy.run_module("distill.benchmark", run_name="__main__")
