"""The model card of an exported student or teacher."""

import yaml

from distill.settings import Config
from models.teachers.embedded import Spec


def model_card(config: Config, spec: Spec) -> str:
    """Markdown with the metadata block that model hubs read."""
    method = config.method.kind
    teacher = config.teacher.path if config.teacher else None
    what = (
        "Denoiser (EDM preconditioning)"
        if spec.sigma_init is None
        else f"One-step student distilled from `{teacher}` with `{method}`"
    )
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"""---
library_name: diffusers
license: apache-2.0
tags: [diffusers, one-step, distillation, {method}]
---

# {what}

{spec.num_classes} classes ({", ".join(spec.class_names)}), {spec.size} x {spec.size}, {spec.channels} channel(s).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH", trust_remote_code=True)  # runs pipeline.py of this folder
images = pipe([0, 1, 2], seeds=[0, 1, 2]).images
```

Trained by this configuration:

```yaml
{settings}```
"""
