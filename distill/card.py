"""The model card of an exported network."""

from contextlib import suppress
from typing import Any

import yaml

from distill.settings import Autoencoder, Config, SceneDistillation, Teacher
from models.errors import UserError
from models.teachers import is_hub_id, resolve
from models.teachers.base import Spec
from models.teachers.distilled import front_matter

OWN = "apache-2.0"
"""Licence of what is trained from nothing."""


def licence(teacher: Teacher | None) -> dict[str, Any]:
    """The licence keys of a card: a student's are its teacher's, ``other`` where that names none."""
    if teacher is None:
        return {"license": OWN}
    found: dict[str, Any] = {}
    if teacher.config is None:  # the folder beside a single file says nothing of the file
        with suppress(UserError):
            found = front_matter(resolve(teacher.path) / "README.md")
    keys = ("license", "license_name", "license_link")
    known = {key: found[key] for key in keys if found.get(key)}
    return known if "license" in known else {"license": "other"}


def model_card(config: Config, spec: Spec) -> str:
    """Markdown with the metadata block that model hubs read."""
    method, teacher = config.method.kind, config.teacher
    library, tags, language, what = {"library_name": "diffusers"}, ["diffusers", "one-step"], "python", "Denoiser"
    if isinstance(config.method, SceneDistillation) and teacher is not None:
        library, tags, language = {}, ["text-to-3d"], "bash"
        what = f"Scene distilled from `{teacher.path}` with `{method}`"
    elif isinstance(config.method, Autoencoder):
        what = "Autoencoder"
    elif spec.student and teacher is not None:
        what = f"One-step student distilled from `{teacher.path}` with `{method}`"
    metadata: dict[str, Any] = library | licence(teacher)
    terms = ""
    if teacher is not None and metadata["license"] == "other":
        terms = f"\nThe licence of the teacher `{teacher.path}` applies to these weights, which were made from it.\n"
    if teacher is not None and is_hub_id(teacher.path):
        metadata["base_model"] = teacher.path
    metadata["tags"] = [*tags, "distillation", method]
    block = yaml.safe_dump(metadata, sort_keys=False, default_flow_style=None)
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"""---
{block}---

# {what}

{spec.summary}
{terms}
```{language}
{spec.usage}
```

Trained by this configuration:

```yaml
{settings}```
"""


def scores_table(result: dict[str, Any]) -> str:
    """A section for the card: what eval.fid measured."""
    rules = result["protocol"]
    lines = [
        "\n## Scores\n",
        f"{rules['extractor']} over {rules['images']:,} pictures, lower is better (protocol {rules['digest'][:12]}).\n",
        "| | network calls | distance |\n|---|---|---|",
        *(f"| {row['sampler']} | {row['nfe']} | {row['fd']:.3f} |" for row in result["scores"]),
    ]
    return "\n".join(lines) + "\n"
