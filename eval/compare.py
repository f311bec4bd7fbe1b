"""Moved: ``python -m distill.compare``. The old command works until the next release."""

import runpy
import sys

if __name__ == "__main__":
    print("eval.compare is now distill.compare: python -m distill.compare", file=sys.stderr)
    runpy.run_module("distill.compare", run_name="__main__")
