"""Train a student (or a teacher). The same command again resumes.

accelerate launch distill/train.py --config configs/fashion_mnist/quickstart.yaml
accelerate launch distill/train.py --config configs/fashion_mnist/f_distill.yaml --help
accelerate launch distill/train.py --config configs/fashion_mnist/f_distill.yaml --dry-run --method.divergence jeffreys
"""

import sys

from distill.settings import parse
from models.errors import UserError


def main() -> int:
    try:
        config, dry = parse(sys.argv[1:])
        from distill.run import dry_run, train  # seconds of imports, which no mistake in the settings should wait for

        return dry_run(config) if dry else train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside the loop, which saves before it ends
        return 130


if __name__ == "__main__":
    sys.exit(main())
