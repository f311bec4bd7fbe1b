"""Text to 3D in stages."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.schema import Schema
from distill.settings.matching import SIM, DiffInstruct, FDistill, SiD, UniInstruct
from distill.settings.train import Optimizer


class SceneCameras(Schema):
    """Where a scene is looked at from: uniform in these ranges, degrees and world units."""

    azimuth: tuple[float, float] = (0.0, 360.0)
    """0 is in front."""
    elevation: tuple[float, float] = (-10.0, 60.0)
    """Above the horizon; between -89 and 89."""
    radius: tuple[float, float] = (2.5, 3.0)
    """Distance from the origin."""
    fov: tuple[float, float] = (40.0, 40.0)
    """Whole angle of view."""
    sphere: float = Field(default=0.0, ge=0, le=1)
    """Share of views whose elevation is that of a point uniform on the sphere."""
    sectors: int = Field(default=1, gt=0)
    """How often the range of azimuths is repeated around, for what looks alike from several sides."""
    view_words: Literal["none", "sides", "degrees"] = "sides"
    """What is added to the teacher's prompt (not to the critic's): sides ", front view" and its like, degrees ", seen
    from 45 degrees" and its like, which `embedded:solids` knows."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("azimuth", "elevation", "radius", "fov"):
            low, high = getattr(self, name)
            limits = {"elevation": (-89, 89), "radius": (0.01, 1e4), "fov": (1, 170)}.get(name, (-1e4, 1e4))
            if not limits[0] <= low <= high <= limits[1]:
                raise ValueError(f"{name}: {low:g} to {high:g} is no range within {limits[0]:g} to {limits[1]:g}")
        return self


class SceneField(Schema):
    """The radiance field of a particle."""

    kind: Literal["triplane", "voxels", "hash"] = "triplane"
    """triplane is fastest on a CPU, hash on a GPU."""
    side: int = Field(default=64, gt=1)
    """Side of the planes or voxels."""
    channels: int = Field(default=16, gt=0)
    """Of the planes."""
    width: int = Field(default=32, gt=0)
    """Of the decoder."""
    levels: int = Field(default=16, gt=0)
    """Of the hash grid."""
    log_table: int = Field(default=19, gt=3, le=26)
    """Log2 of a hash table's length."""
    coarsest: int = Field(default=16, gt=1)
    """Side of the coarsest level."""
    finest: int = Field(default=2048, gt=1)
    """Side of the finest level."""
    fused: bool = False
    """tiny-cuda-nn's kernel for the hash grid (`python -m models.scene.doctor`)."""


class SceneCritic(Schema):
    """The fake score: LoRA of the teacher with a camera embedding."""

    rank: int = Field(default=4, gt=0)
    """Of every adapter."""
    path: str | None = None
    """Another teacher to adapt, e.g. one that predicts v, in the same latents; null: the teacher itself."""
    camera_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of the critic's pictures without their camera."""


class Anneal(Schema):
    """Noise levels that fall: u of ``noise_levels`` is drawn from less than [0, 1]."""

    kind: Literal["step", "sqrt"] = "step"
    """step: [0, 1] before `at`, [0, to] behind it. sqrt: the one level 1 - (1 - to) sqrt(progress) (HiFA)."""
    at: float = Field(default=0.2, ge=0, le=1)
    """Share of the stage's steps."""
    to: float = Field(default=0.5, gt=0, le=1)
    """Upper end afterwards."""


class SceneWeights(Schema):
    """Weights of a stage's regularisers; 0 leaves one out."""

    entropy: float = Field(default=0.0, ge=0)
    """Binary entropy of the pixels' opacity, against fog (volume)."""
    sparsity: float = Field(default=0.0, ge=0)
    """sqrt(opacity^2 + 0.01), against floaters (volume)."""
    creases: float = Field(default=0.0, ge=0)
    """Total variation of a mesh's normals: flat sides, sharp edges (geometry)."""
    normals: float = Field(default=0.0, ge=0)
    """1 - cosine between the normals of neighbouring faces (geometry)."""
    laplacian: float = Field(default=0.0, ge=0)
    """Squared second difference of the signed distances (geometry)."""


SceneMatching = Annotated[DiffInstruct | FDistill | SIM | SiD | UniInstruct, Field(discriminator="kind")]


class SceneStage(Schema):
    """One stage; it starts from the stage before."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of its folder."""
    kind: Literal["volume", "geometry", "texture"]
    """volume: fields; geometry: marching tetrahedra from the fields' surface; texture: colours on fixed meshes."""
    share: float = Field(gt=0, le=1)
    """Its share of train.steps; the shares of all stages make 1."""
    matching: SceneMatching = DiffInstruct()
    """The row of the distribution-matching table; diff_instruct is VSD."""
    fake: Literal["noise", "lora", "exact"] = "lora"
    """The particles' score: that of one sample (SDS), a trained critic (VSD), or the exact one of all particles."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: the teacher's."""
    latents: float = Field(default=1.0, ge=0)
    """Weight of the row's loss, which is in the teacher's latents."""
    pictures: float = Field(default=0.0, ge=0)
    """Weight of SDS in pictures (HiFA, arXiv 2305.18766): half the squared distance, over all pixels, to the decoded
    picture that the teacher sees in the noised one. Smooth and of the right colour; what views differ in is evened."""
    anneal: Anneal = Anneal()
    """How the noise levels fall."""
    resolutions: list[tuple[float, int]] = Field(default=[(0.0, 64)], min_length=1)
    """Pixels a side from each share of the steps on; pictures are then resized to the teacher's size."""
    samples: int = Field(default=48, gt=1)
    """Samples a ray (volume); lowered where memory would not do."""
    picture: Literal["colour", "shaded", "normals"] = "colour"
    """What the teacher sees of a mesh (geometry, texture)."""
    tetrahedra: int = Field(default=48, gt=3)
    """Cells a side of the grid of tetrahedra (geometry)."""
    weights: SceneWeights = SceneWeights()
    """Regularisers."""
    student: Optimizer | None = None
    """Optimizer of the particles; null: the run's."""
    critic: Optimizer | None = None
    """Optimizer of the critic; null: the run's."""

    @field_validator("resolutions")
    @classmethod
    def _rising(cls, resolutions: list[tuple[float, int]]) -> list[tuple[float, int]]:
        shares = [share for share, _ in resolutions]
        if shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] >= 1 or min(s for _, s in resolutions) < 8:
            raise ValueError("shares must rise from 0 and stay below 1, sizes must be 8 or more")
        return resolutions

    @model_validator(mode="after")
    def _all_is_used(self) -> Self:
        terms = {"volume": ["entropy", "sparsity"], "geometry": ["creases", "normals", "laplacian"], "texture": []}
        matching = ["start", "sigma_init", "clip_samples", "student_steps", "reuse_samples", "regression"]
        weights = [name for name in SceneWeights.model_fields if name not in terms[self.kind]]
        for part, names in (("weights", weights), ("matching", matching)):
            values = getattr(self, part)
            for name in names:
                if getattr(values, name) != type(values).model_fields[name].default:
                    raise ValueError(f"{part}.{name}: a stage of kind {self.kind} has no use for it: remove the key")
        if self.kind == "texture" and self.picture == "normals":
            raise ValueError("picture: normals show no texture: choose colour or shaded")
        return self

    @model_validator(mode="after")
    def _fake_fits(self) -> Self:
        if self.latents == 0 and self.pictures == 0:
            raise ValueError("latents, pictures: one of them must be above 0")
        if self.fake != "lora" and self.matching.kind != "diff_instruct":
            raise ValueError(f"fake: {self.matching.kind} needs a trained critic: choose lora")
        return self


class SceneExport(Schema):
    """The files made at the end."""

    threshold: float | None = Field(default=None, gt=0)
    """Density of the surface, 1 / world unit; null: found from the pictures' opacity."""
    faces: int = Field(default=6000, ge=100)
    """Triangles that the mesh is simplified to."""
    texture: int = Field(default=512, ge=64)
    """Side of the texture, pixels."""
    frames: int = Field(default=48, gt=0)
    """Pictures of the turntable."""
    size: int = Field(default=256, ge=32, multiple_of=2)
    """Their side, pixels."""


class SceneDistillation(Schema):
    """Text to 3D by variational score distillation (ProlificDreamer, arXiv 2305.16213), in stages."""

    kind: Literal["scene_distillation"] = "scene_distillation"
    prompt: str = Field(min_length=1)
    """What to make; --prompt for short."""
    template: str = "{}"
    """Sentence that the prompt is put into for the teacher; words before {} that the prompt has too are not doubled."""
    particles: int = Field(default=1, gt=0)
    """Fields that are trained together, with one critic."""
    cameras: SceneCameras = SceneCameras()
    """Views in training."""
    field: SceneField = SceneField()
    """Representation."""
    box_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Centre of the cube that holds everything, world units."""
    box_half: float = Field(default=1.0, gt=0)
    """Half its side."""
    blob_strength: float = 10.0
    """Density at the start, of softplus(strength (1 - distance / radius)): 10 for objects, -10 for hollow scenes."""
    blob_radius: float = Field(default=0.5, gt=0)
    """In half sides of the box."""
    blob_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """In half sides from the box's centre."""
    backdrop: Literal["studio", "learned", "random", "white", "black", "grey"] = "learned"
    """studio: the wall and floor of solids; learned: a network of the direction, or half the time a plain colour."""
    critic: SceneCritic = SceneCritic()
    """The fake score."""
    stages: list[SceneStage] = Field(min_length=1)
    """What is trained, in order: those of kind volume, at most one of kind geometry, those of kind texture."""
    only: str | None = None
    """Run this stage alone; null: all."""
    stage: str | None = None
    """Which stage this run is; set in the folders of stages."""
    start: Path | None = None
    """Run folder of the stage before; set in the folders of stages."""
    export: SceneExport = SceneExport()
    """The files made at the end."""

    @property
    def sentence(self) -> str:
        """What the teacher is asked for."""
        return self.template.replace("{}", self.prompt.removeprefix(self.template.partition("{}")[0]))

    @model_validator(mode="after")
    def _order(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have one name: {names}")
        kinds = [stage.kind for stage in self.stages]
        if self.stage is not None:
            return self
        order = ["volume", "geometry", "texture"]
        if kinds[0] != "volume" or kinds.count("geometry") > 1 or kinds != sorted(kinds, key=order.index):
            raise ValueError(
                "stages: first those of kind volume, one or more, then at most one of kind geometry, then those of "
                "kind texture"
            )
        for name in (self.only, self.stage):
            if name is not None and name not in names:
                raise ValueError(f"there is no stage {name}; there are {names}")
        if abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"stages: the shares {[stage.share for stage in self.stages]} do not make 1")
        if self.template.count("{}") != 1:
            raise ValueError("template: write {} once, where the prompt belongs")
        return self
