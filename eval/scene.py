"""How scenes are judged: against a solid of known shape where the prompt names one, by CLIP otherwise.

A prompt leaves size, place and turn open, so the truth is the solid of that shape which fits the exported mesh best, in
volume and outlines; the views that it is then compared in are at azimuths between those of the fit.

python -m eval.scene RUN/a-red-cube [RUN/...] [--clip MODEL:WEIGHTS] [--output FOLDER]

Writes report.html and report.json, for several scenes contact_sheet.png too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from eval.clip import CLIP
from eval.fake_score import Errors, fake_score_errors
from eval.glb import Exported, on_white
from eval.machine import place_of
from eval.nearest_solid import SIZE
from eval.scene_report import Shown, write
from eval.scene_scores import VIEWS, judge_clip, judge_export, judge_solid
from eval.scene_seeds import Seed, diversity, means
from models.errors import UserError, run_command
from models.prompts import read_prompts
from models.scene import captions, export, saved, solids
from models.scene.fields import Field
from models.scene.mesh import Mesh
from models.yaml_text import read_yaml


@dataclass(frozen=True)
class SceneFolder:
    """OUTPUT/PROMPT of a run. stages: its finished ones in order; models: its GLB files, one for each particle."""

    path: Path
    stages: list[Path]
    scene: saved.Scene
    models: list[Path]

    @classmethod
    def of(cls, path: Path) -> "SceneFolder":
        """UserError if there is no finished scene in it."""
        stages = _stages(path)
        models = sorted((path / "student").glob("*model.glb"), key=_particle)
        if not models:
            raise UserError(f"{path} has no student/model.glb: run it to its end")
        scene = saved.read(stages[-1] / "student")[0]
        if len(models) != scene.particles:
            raise UserError(f"{path}/student has {len(models)} of {scene.particles} model.glb: export the scene again")
        return cls(path, stages, scene, models)

    def thing(self) -> captions.Thing | None:
        """The solid that the prompt names; None where it names other things, or several."""
        try:
            things = captions.things_of(captions.parse(self.scene.sentence))
        except UserError:
            return None
        return things[0] if len(things) == 1 else None

    def particles(self) -> tuple[list[Mesh], list[Field]]:
        """The last stage's own, as its files were made from."""
        config = read_yaml((self.stages[-1] / "config.yaml").read_text())
        _, meshes, fields, _ = export.load(self.stages[-1] / "student", config["method"]["export"]["threshold"])
        return meshes, fields


def _particle(model: Path) -> int:
    """The number in front of a file's name; 0 where there is one particle."""
    return int(re.match(r"(\d*)", model.name)[1] or 0)  # type: ignore[index]


def _stages(path: Path) -> list[Path]:
    """Stage folders that have ended, each behind the one that it starts from; UserError if there are none."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    found = [stage.parent.parent for stage in path.glob("*/student/scene.json")]
    if not found:
        raise UserError(
            f"{path} holds no stage of text to 3D: give OUTPUT/PROMPT of a run, e.g. runs/vsd_3d/a-red-cube"
        )
    before: dict[str, Path] = {}
    for stage in found:
        try:
            start = read_yaml((stage / "config.yaml").read_text())["method"].get("start")
            before[Path(start).name if start else ""] = stage
        except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{stage}/config.yaml is not that of a stage of text to 3D: {reason}") from error
    order: list[Path] = []
    while (name := order[-1].name if order else "") in before:
        order.append(before.pop(name))
    if before:
        raise UserError(f"{path}: the stages {', '.join(stage.name for stage in found)} do not start from each other")
    return order


@dataclass
class Options:
    """Judge finished scenes and write a report."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Scene folders: OUTPUT/PROMPT of a run; several of one prompt are its seeds."""
    clip: str | None = None
    """MODEL:WEIGHTS of open_clip, or a folder in its layout, for CLIP score, R-precision and the front seen twice."""
    prompts: Path | None = None
    """Text file of further prompts, one a line, that R-precision is counted among; the scenes' own always are."""
    fake_score: bool = True
    """Compare the stages' critics with the exact scores, which needs their teacher and checkpoints."""
    output: Path | None = None
    """Folder for the report; for one scene its own report/, for several report/ beside the first."""
    device: str | None = None
    """Where CLIP and critics run; default: cuda if there is one, else cpu."""

    def run(self) -> None:
        if not self.folders:
            raise UserError("folders: name at least one scene, e.g. runs/solids/vsd_3d/a-red-cube")
        scenes = [SceneFolder.of(folder) for folder in self.folders]
        things = [scene.thing() for scene in scenes]
        place = place_of(self.device)
        clip = None if self.clip is None else CLIP(self.clip, place)
        sentences = {scene.scene.sentence for scene in scenes} | set(self._further())
        judged: list[_Judgement] = []
        for scene, thing in zip(tqdm(scenes, unit="scene", disable=len(scenes) == 1), things, strict=True):
            errors = _fake_scores(scene.stages, place) if self.fake_score else {}
            meshes, fields = scene.particles()
            for model, mesh, coloured in zip(scene.models, meshes, fields, strict=True):
                found = _judge(scene, model, thing, errors)
                found.scores |= judge_export(found.exported, mesh, coloured, scene.scene.orbit)
                if clip is not None:
                    others = sorted(sentences - {scene.scene.sentence})
                    found.scores |= judge_clip(found.exported, clip, scene.scene.sentence, others, scene.scene.orbit)
                judged.append(found)
                tqdm.write(_line(found.scores))
        result = _result(judged)
        output = self.output or (scenes[0].path if len(scenes) == 1 else scenes[0].path.parent) / "report"
        page = write(result, [found.shown for found in judged], output)
        if len(judged) > 1:
            print("mean  " + _line(result["mean"]))
        for prompt, found in result["diversity"].items():
            print(f"{prompt}: {_line(found)}")
        print(f"report: {page}")

    def _further(self) -> list[str]:
        return [] if self.prompts is None else read_prompts(self.prompts, "prompts")


@dataclass
class _Judgement:
    """One particle: its scores, what the report shows of it, and the pictures (V, 3, H, W) that it is compared by."""

    scores: dict[str, Any]
    exported: Exported
    shown: Shown
    pictures: Tensor = field(repr=False)


def _judge(scene: SceneFolder, model: Path, thing: captions.Thing | None, errors: dict[str, Errors]) -> _Judgement:
    exported, orbit = Exported.read(model), scene.scene.orbit
    scores: dict[str, Any] = {"scene": str(scene.path), "model": model.name, "prompt": scene.scene.sentence}
    truth: solids.Solid | None = None
    if thing is not None:
        judged = judge_solid(exported, thing, scene.scene.box, orbit)
        scores, truth = scores | judged.scores, judged.solid
    if errors:
        scores["fake_score_error"] = list(errors.values())[-1].relative
        scores["fake_score"] = {stage: found.summary() for stage, found in errors.items()}
    pictures = on_white(*exported.views(orbit.turntable(VIEWS), SIZE))
    shown = Shown(scene.path, model, scene.stages, exported, orbit, truth, scores)
    return _Judgement(scores, exported, shown, pictures)


def _fake_scores(stages: Sequence[Path], device: torch.device) -> dict[str, Errors]:
    """Of the stages that have a critic, by name."""
    try:
        found = {stage.name: fake_score_errors(stage, device) for stage in stages}
    except UserError as error:
        raise UserError(f"{error}; or leave the fake score out: --no-fake-score") from error
    return {name: errors for name, errors in found.items() if errors is not None}


def _result(judged: Sequence[_Judgement]) -> dict[str, Any]:
    """What report.json holds: all scores, their means, and of each prompt with several scenes their diversity."""
    rows = [found.scores for found in judged]
    prompts: dict[str, dict[str, list[_Judgement]]] = {}
    for found in judged:
        prompts.setdefault(found.scores["prompt"], {}).setdefault(found.scores["scene"], []).append(found)
    several: dict[str, Any] = {}
    for prompt, scenes in prompts.items():
        if sum(map(len, scenes.values())) > 1:
            several[prompt] = diversity(
                [Seed([p.scores.get("variant") for p in each], torch.stack([p.pictures for p in each]))
                 for each in scenes.values()]
            )  # fmt: skip
    return {"scenes": rows, "mean": means(rows), "diversity": several}


def _line(scores: dict[str, Any]) -> str:
    """For a terminal."""
    parts = {key: value for key, value in scores.items() if key != "fake_score" and value is not None}
    return "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in parts.items())


if __name__ == "__main__":
    run_command(tyro.cli(Options).run)
