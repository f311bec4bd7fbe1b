"""GenEval (arXiv 2310.11513): does a picture show what its prompt asks for?"""

from eval.geneval.judge import Detection, Options, judge, summarize

__all__ = ["Detection", "Options", "judge", "summarize"]
