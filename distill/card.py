"""The model card of an exported network."""

import yaml

from distill.settings import Autoencoder, Config
from models.teachers.base import Spec


def model_card(config: Config, spec: Spec) -> str:
    """Markdown with the metadata block that model hubs read."""
    method = config.method.kind
    what = "Denoiser"
    if isinstance(config.method, Autoencoder):
        what = "Autoencoder"
    elif spec.student and config.teacher is not None:
        what = f"One-step student distilled from `{config.teacher.path}` with `{method}`"
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"""---
library_name: diffusers
license: apache-2.0
tags: [diffusers, one-step, distillation, {method}]
---

# {what}

{spec.summary}

```python
{spec.usage}
```

Trained by this configuration:

```yaml
{settings}```
"""
