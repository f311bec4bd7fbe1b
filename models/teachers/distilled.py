"""Whether a checkpoint is distilled, so that it knows no classifier-free guidance: read from its files, never from its
name."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from models.teachers.keys import note
from models.yaml_text import read_yaml

SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")
"""Those of consistency and trajectory distillation."""
TAGS = frozenset({
    "distillation", "distilled", "lcm", "latent-consistency", "latent-consistency-models", "consistency-distillation",
    "adversarial-diffusion-distillation", "few-step", "one-step", "turbo", "lightning",
})  # fmt: skip
"""Of a model card."""
SAYS_SO = re.compile(
    r"\b(?:is|are|was|were|been|with|using|by)\b(?![^.\n]{0,60}\b(?:not|non|never|without)\b)[^.\n]{0,160}"
    r"\bdistill(?:ed|ation)\b|\b(?:guidance|step|timestep|progressively)[- ]distilled\b"
    r"|(?<!not )(?<!non-)\bdistilled (?:version|variant|model|from|in|into|to)\b",
    re.IGNORECASE,
)
"""A sentence of a card in which a model is distilled."""


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata block of a model card; empty where there is none, and, with a line, where it is no YAML."""
    try:
        _, fence, rest = readme.read_text(encoding="utf-8").partition("---\n")
        block, end, _ = rest.partition("\n---")
        values = read_yaml(block) if fence and end else None
        return values if isinstance(values, dict) else {}
    except (OSError, UnicodeDecodeError):
        return {}
    except yaml.YAMLError as error:
        note(f"{readme}: its metadata are not read: {' '.join(str(error).split())[:120]}")
        return {}


def reason(scheduler: dict[str, Any], index: dict[str, Any], card: Path | None) -> str:
    """The fact that says that a checkpoint is distilled; empty if none does.

    ``scheduler`` is its config with its class's name, ``index`` its model_index.json, ``card`` its README.md, None
    where that is not the network's own.
    """
    if scheduler["_class_name"] in SCHEDULERS:
        return f"its scheduler is an {scheduler['_class_name']}"
    if index.get("is_distilled"):
        return "is_distilled in its model_index.json"
    if card is None:
        return ""
    tags = front_matter(card).get("tags") or []
    if found := TAGS & {str(tag).lower() for tag in (tags if isinstance(tags, list) else [tags])}:
        return f"its card has the tag {min(found)}"
    with suppress(OSError, UnicodeDecodeError):
        text = re.sub(r"\]\([^)]*\)", "]", card.read_text(encoding="utf-8"))  # links have full stops
        if found := SAYS_SO.search(text):
            return f"its card says '{' '.join(found[0].split())[-60:]}'"
    return ""
