"""One run from its configuration: build, resume, train, export, score."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers

from distill import parallel, precision
from distill.build import build_method, build_stream, class_teacher
from distill.build import scene as build_scene
from distill.card import model_card, scores_table
from distill.data import ShuffledStream, Stream
from distill.methods import multi_student
from distill.methods.scene_distillation import SceneDistillation as SceneMethod
from distill.settings import (
    Config,
    MultiStudent,
    PrecomputedData,
    Pretrain,
    SceneDistillation,
    check,
    read_values,
    write_config,
)
from distill.trainer import Trainer
from distill.upload import check_token, upload
from models.adapters import merged
from models.errors import UserError
from models.folders import replace_text
from models.multi_student import assemble
from models.scene.particles import Fields
from models.teachers import resolve
from models.teachers.base import ClassSpec, Spec
from models.teachers.embedded import PatchUNet, read_spec

STOPPED = 130
"""Exit status after SIGTERM or Ctrl-C; everything is saved."""

FREE_KEYS = {"output", "evaluation", "method.only", "push_to_hub"}
FREE_KEYS |= {f"method.export.{name}" for name in ("faces", "texture", "frames", "size")}
FREE_KEYS |= {
    f"train.{name}"
    for name in (
        "steps",
        "cpu_threads",
        "parallel",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "checkpoints_total_limit",
        "trackers",
    )
}
"""What may change between the start of a run and its resumption."""


def build(config: Config) -> Trainer:
    """The trainer of ``config``, everything on its device, at step 0."""
    config, _ = with_precision(config)
    if missing := set(config.train.trackers) - set(map(str, get_available_trackers())):
        raise UserError(f"train.trackers: {min(missing)} is not installed: pip install {min(missing)}")
    torch.manual_seed(config.train.seed)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it accelerate does not see torchrun's processes on a CPU
        mixed_precision=config.train.mixed_precision,
        kwargs_handlers=[precision.AUTOCAST],
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.output),
        step_scheduler_with_optimizer=False,
    )
    parallel.check_launch(accelerator)
    if accelerator.device.type == "cpu":  # accelerate launch leaves each process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.train.cpu_threads or max(1, share))
        if config.train.mixed_precision == "bf16":  # on short sequences eight times slower there than plain attention
            torch.backends.cuda.enable_flash_sdp(False)  # the CPU's kernel too, in spite of its name
    shares = accelerator.num_processes * config.train.gradient_accumulation_steps
    if config.train.batch_size % shares:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of {shares} = "
            f"{accelerator.num_processes} processes x train.gradient_accumulation_steps"
        )
    stream, shape, names = build_stream(config, accelerator.process_index, accelerator.num_processes)
    method, spec = build_method(config, shape, names, stream)
    check_scores(config, spec)
    return Trainer(config, method, stream, accelerator, spec)


def check_scores(config: Config, spec: Spec) -> None:
    """UserError if what is trained could not be scored at the end."""
    n = config.evaluation.num_images
    if n == 0:
        return
    from eval.features import FashionCNN
    from eval.scoring import MIN_IMAGES

    student = isinstance(spec, ClassSpec) and not isinstance(config.method, Pretrain)
    if not student or spec.picture != FashionCNN.shape or n < MIN_IMAGES:
        raise UserError(
            f"evaluation.num_images: only students of classes are scored at the end, on {MIN_IMAGES} pictures or more "
            f"of {' x '.join(map(str, FashionCNN.shape))}: give 0, and see `python -m eval.fid --help` for others"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_run(run: Path) -> dict[str, Any]:
    """The settings that a run was started with; UserError if its file is damaged."""
    try:
        return read_values(run / "config.yaml")
    except UserError as error:
        raise UserError(f"output: {error}: delete that file to go on with the settings given now") from error


def check_output(folder: Path) -> None:
    """UserError if it cannot be made or written to; nothing is left there."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror}): choose another --output") from error


def with_precision(config: Config) -> tuple[Config, str]:
    """``config`` with ``train.mixed_precision: auto`` decided, and why; a run that is there keeps its own."""
    known = (config.output / "config.yaml").is_file()
    before = (read_run(config.output).get("train") or {}).get("mixed_precision") if known else None
    device = cast(torch.device, PartialState(cpu=not torch.accelerator.is_available()).device)
    return precision.resolved(config, device, before)


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with today's defaults for the keys that came after it; as they are if they fit no more."""
    try:
        return check(values, "config.yaml").model_dump(mode="json")
    except UserError:
        return values


def check_same_run(config: Config) -> None:
    """UserError if the run folder belongs to a run with other settings."""
    path = config.output / "config.yaml"
    if not path.is_file():
        return
    old, new = _flat(_with_defaults(read_run(config.output))), _flat(config.model_dump(mode="json"))
    starts = [
        values.get("method.start") and os.path.relpath(values["method.start"], values["output"])
        for values in (old, new)
    ]
    if starts[0] == starts[1]:  # also where both were moved, or are named by another path
        old["method.start"] = new.get("method.start")
    changed = [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not {key, key.split(".")[0]} & FREE_KEYS
    ]
    if changed:
        raise UserError(
            f"output: {config.output} holds a run with other settings ({', '.join(changed[:3])}): "
            "choose another --output, or delete that folder to start afresh"
        )


def train(config: Config) -> int:
    """Train to the end, export the student, score and upload it if asked to; returns the process's exit status."""
    if config.push_to_hub is not None:
        check_token(config.push_to_hub)
    check_output(config.output)
    config, _ = with_precision(config)
    if isinstance(config.method, MultiStudent):
        return train_students(config, config.method)
    if isinstance(config.method, SceneDistillation) and config.method.stage is None:
        return train_scene(config, config.method)
    check_same_run(config)
    trainer = build(config)
    main = trainer.accelerator.is_main_process
    if main:
        config.output.mkdir(parents=True, exist_ok=True)
        write_config(config, config.output / "config.yaml")
    if config.train.trackers:
        values = {key: str(value) for key, value in _flat(config.model_dump(mode="json")).items()}
        trainer.accelerator.init_trackers(config.output.name, config=values)
    trainer.accelerator.wait_for_everyone()
    trainer.resume()
    finished = trainer.run()
    for tracker in trainer.accelerator.trackers:  # not end_training, which ends the process group too
        tracker.finish()
    if not finished:
        if main:
            print(f"stopped at step {trainer.step} of {config.train.steps}; the same command resumes", file=sys.stderr)
        return STOPPED
    check_trained(trainer)
    with trainer.ema_weights():
        if main:
            card = model_card(config, trainer.spec)
            trainer.spec.save(config.output / "student", trainer.method.exported(), card)
        elif config.train.parallel == "fsdp2":  # its parts are gathered
            merged(trainer.method.exported())
    trainer.accelerator.wait_for_everyone()  # for the export alone: a barrier does not wait as long as scores may take
    if main:
        publish(config, trainer.stream)
    return STOPPED if trainer.stopping else 0


def check_trained(trainer: Trainer) -> None:
    """UserError if most steps of a run changed nothing."""
    skipped = int(trainer.bad_steps[2])
    if 2 * skipped > trainer.step:
        raise UserError(
            f"{skipped} of {trainer.step} steps were skipped, whose loss or gradient was not finite: no student is "
            "exported; lower student.lr and critic.lr, or train without bf16, into another --output"
        )


def plan_students(config: Config, settings: MultiStudent) -> tuple[list[int], dict[int, list[Config]]]:
    """The student of each class, and the runs of each student that is to be trained here."""
    multi_student.check(config, settings)
    denoiser, spec = class_teacher(config)
    check_scores(config, spec)
    embeddings = cast(PatchUNet, denoiser.network).class_embeddings().detach()
    owner = multi_student.student_of_class(settings, embeddings)
    chosen = range(settings.students) if settings.only is None else [settings.only]
    return owner, {k: multi_student.runs(config, settings, k, multi_student.classes_of(k, owner)) for k in chosen}


def _rehearse(runs: list[Config]) -> Iterator[tuple[Config, Trainer]]:
    """Each stage as it will be built, from an untrained student of the stage before; raises what it would raise."""
    with tempfile.TemporaryDirectory() as temporary:
        start = None
        for run in runs:
            method = run.method if start is None else run.method.model_copy(update={"start": start})
            trainer = build(run.model_copy(update={"method": method}))
            start = Path(temporary) / run.output.name
            trainer.spec.save(start / "student", trainer.method.exported(), "")
            yield run, trainer


def _finished(run: Config) -> bool:
    """Whether a stage has been trained; UserError if by other settings than are asked for now."""
    check_same_run(run)
    if not any((run.output / "student" / name).is_file() for name in ("model_index.json", "scene.json")):
        return False
    steps = read_run(run.output)["train"]["steps"]
    if steps != run.train.steps:
        raise UserError(
            f"train.steps: {run.output} was trained for {steps} steps, now {run.train.steps} are asked for; the stages "
            "after it started from there: choose another --output"
        )
    return True


def train_students(config: Config, settings: MultiStudent) -> int:
    """Train the students, finished runs aside, and assemble them once all of them are there."""
    check_same_run(config)
    owner, plan = plan_students(config, settings)
    waiting = [run for runs in plan.values() for run in runs if not _finished(run)]
    if waiting:
        for _ in _rehearse(next(iter(plan.values()))):
            pass
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        config.output.mkdir(parents=True, exist_ok=True)
        write_config(config, config.output / "config.yaml")
    state.wait_for_everyone()
    for run in waiting:
        if state.is_main_process:
            print(f"{run.output}: classes {run.classes}, {run.method.kind}, {run.train.steps} steps")
        if status := train(run):
            return status
    if not state.is_main_process:
        return 0
    last = settings.stages[-1].name
    parts = [multi_student.folder(config, k) / last for k in range(settings.students)]
    if missing := [str(part) for part in parts if not (part / "student" / "model_index.json").is_file()]:
        print(f"not trained yet: {', '.join(missing)}; the student is assembled when all are in {config.output}")
        return 0
    for k, part in enumerate(parts):
        classes = read_run(part).get("classes")
        if classes != multi_student.classes_of(k, owner):
            raise UserError(f"{part}: trained for classes {classes}, which are not student {k}'s in this partition")
    spec = read_spec(parts[0] / "student")
    assemble(config.output / "student", [part / "student" for part in parts], owner, model_card(config, spec))
    publish(config)
    return 0


def train_scene(config: Config, settings: SceneDistillation) -> int:
    """Run the stages, finished ones aside, and write the scene's files."""
    from models.scene.export import check_libraries

    check_libraries()
    for run in build_scene.runs(config, settings):
        wanted = settings.only in (None, cast(SceneDistillation, run.method).stage)
        if wanted and not _finished(run) and (status := train(run)):
            return status
    if PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
        files = build_scene.write_files(config, settings)
        if config.push_to_hub is not None:
            print(f"uploaded: {upload(files, config.push_to_hub)}")
    return 0


def publish(config: Config, stream: Stream | None = None) -> None:
    """Tell where the exported student is; score and upload it if that is asked for."""
    student = config.output / "student"
    print(f"student: {student}")
    if config.evaluation.num_images:
        evaluate(config, stream)
    if config.push_to_hub is not None:
        print(f"uploaded: {upload(student, config.push_to_hub)}")


def evaluate(config: Config, stream: Stream | None = None) -> None:
    """Score the exported student beside its teacher and write the report into the run folder.

    Pictures of ``stream`` that the student's may be copies of are looked for where it gives them one by one.
    """
    from eval import fid, report

    folder = config.output / "report"
    whole = config.teacher is not None and config.teacher.config is None  # a single file has no folder to be scored
    teacher = resolve(config.teacher.path) if config.teacher and whole else None
    settings = config.evaluation
    student = config.output / "student"
    result = fid.evaluate(
        student,
        teacher,
        settings.num_images,
        teacher_steps=settings.teacher_steps,
        training=stream.pictures
        if isinstance(stream, ShuffledStream) and not isinstance(config.data, PrecomputedData)
        else None,
        grid=folder / "grid.png",
    )
    report.write(result, folder, config.output)
    replace_text(student / "README.md", (student / "README.md").read_text() + scores_table(result))
    print(report.as_text(result))
    print(f"report: {folder / 'report.html'}")


def _scene_estimate(config: Config, settings: SceneDistillation) -> dict[str, Any]:
    """Of every stage as if all its steps were at its largest size and no part of the box known to be empty, so hours
    and memory are upper bounds; then of the whole run."""
    from distill.estimate import estimate

    stages: dict[str, dict[str, Any]] = {}
    for run, trainer in _rehearse(build_scene.runs(config, settings)):
        method = cast(SceneMethod, trainer.method)
        drawn: dict[str, Any] = {"size": build_scene.enlarge(method)}
        if isinstance(method.generator, Fields):
            drawn["samples_per_ray"] = method.generator.samples
        stages[run.output.name] = drawn | estimate(trainer)
    hours = [stage["hours"] for stage in stages.values()]
    peaks = [stage["measured_peak_gib"] or stage["memory_gib"]["total"] for stage in stages.values()]
    whole = {"hours": None if None in hours else round(sum(hours), 3), "peak_gib": max(peaks)}
    return whole | {"samples_per_ray": stages[settings.stages[0].name]["samples_per_ray"], "stages": stages}


def dry_run(config: Config) -> int:
    """Print the resolved configuration and an estimate, from two steps really made on this device."""
    from distill.estimate import estimate

    asked = config.train.mixed_precision
    config, reason = with_precision(config)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if asked == "auto":
        print(f"train.mixed_precision: auto is {config.train.mixed_precision}: {reason}\n")
    if isinstance(config.method, SceneDistillation):
        print(json.dumps(_scene_estimate(config, config.method), indent=2))
        return 0
    if not isinstance(config.method, MultiStudent):
        print(json.dumps(estimate(build(config)), indent=2))
        return 0
    _, plan = plan_students(config, config.method)
    stages = {run.output.name: estimate(trainer) for run, trainer in _rehearse(next(iter(plan.values())))}
    hours = sum(stage["hours"] or 0 for stage in stages.values())
    print(json.dumps({"students": len(plan), "hours": round(len(plan) * hours, 3), "stages": stages}, indent=2))
    return 0
