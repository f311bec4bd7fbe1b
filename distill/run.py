"""One run from its configuration: build, resume, train, export, score."""

import json
import os
import sys
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator

from distill.build import build_method, build_stream
from distill.card import model_card
from distill.settings import Config, write_config
from distill.trainer import Trainer
from models.errors import UserError
from models.export import export
from models.teachers import resolve
from models.teachers.embedded import PatchUNet

FREE_KEYS = {"output", "evaluation"} | {
    f"train.{name}"
    for name in ("steps", "cpu_threads", "log_every", "sample_every", "checkpoint_every", "checkpoints_total_limit", "trackers")
}
"""What may change between the start of a run and its resumption."""


def build(config: Config) -> Trainer:
    """The trainer of ``config``, everything on its device, at step 0."""
    torch.manual_seed(config.train.seed)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it accelerate does not see torchrun's processes on a CPU
        mixed_precision=config.train.mixed_precision,
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.output),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.device.type == "cpu":  # accelerate launch leaves each process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.train.cpu_threads or max(1, share))
    shares = accelerator.num_processes * config.train.gradient_accumulation_steps
    if config.train.batch_size % shares:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of {shares} = "
            f"{accelerator.num_processes} processes x train.gradient_accumulation_steps"
        )
    stream, shape, names = build_stream(config, accelerator.process_index, accelerator.num_processes)
    method, spec = build_method(config, shape, names)
    return Trainer(config, method, stream, accelerator, spec)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_same_run(config: Config) -> None:
    """UserError if the run folder belongs to a run with other settings."""
    path = config.output / "config.yaml"
    if not path.is_file():
        return
    old, new = _flat(yaml.safe_load(path.read_text())), _flat(config.model_dump(mode="json"))
    changed = [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_KEYS and key.split(".")[0] not in FREE_KEYS
    ]
    if changed:
        raise UserError(
            f"output: {config.output} holds a run with other settings ({', '.join(changed[:3])}): "
            "choose another --output, or delete that folder to start afresh"
        )


def train(config: Config) -> int:
    """Train to the end and export the student; returns the process's exit status."""
    check_same_run(config)
    trainer = build(config)
    main = trainer.accelerator.is_main_process
    if main:
        config.output.mkdir(parents=True, exist_ok=True)
        write_config(config, config.output / "config.yaml")
    if config.train.trackers:
        trainer.accelerator.init_trackers(config.output.name, config=_flat(config.model_dump(mode="json")))
    trainer.accelerator.wait_for_everyone()
    trainer.resume()
    finished = trainer.run()
    if config.train.trackers:
        trainer.accelerator.end_training()
    if not finished:
        if main:
            print(f"stopped at step {trainer.step} of {config.train.steps}; the same command resumes", file=sys.stderr)
        return 130
    if main:
        with trainer.ema_weights():
            network = cast(PatchUNet, trainer.method.exported())
            export(config.output / "student", network, trainer.spec, model_card(config, trainer.spec))
        print(f"student: {config.output / 'student'}")
        if config.evaluation.num_images:
            evaluate(config)
    return 0


def evaluate(config: Config) -> None:
    """Score the exported student beside its teacher and write the report into the run folder."""
    from eval import fid, report

    folder = config.output / "report"
    teacher = resolve(config.teacher.path) if config.teacher else None
    settings = config.evaluation
    student = config.output / "student"
    result = fid.evaluate(
        student, teacher, settings.num_images, teacher_steps=settings.teacher_steps, grid=folder / "grid.png"
    )
    report.write(result, folder, config.output)
    print(report.as_text(result))
    print(f"report: {folder / 'report.html'}")


def dry_run(config: Config) -> int:
    """Print the resolved configuration and an estimate, from two steps really made on this device."""
    from distill.estimate import estimate

    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print(json.dumps(estimate(build(config)), indent=2))
    return 0
