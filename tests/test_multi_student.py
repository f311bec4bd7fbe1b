"""Multi-student distillation: partitions, routing, what each student sees, and the whole plan from one command."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import losses, rows
from distill.build import build_method, build_stream
from distill.data import Batch, Classes
from distill.methods.base import Turn
from distill.methods.multi_student import runs
from distill.methods.pretrain import Pretraining
from distill.noise_levels import LogUniform
from distill.pairs import Arguments, make
from distill.run import plan_students
from distill.run import train as run_training
from distill.settings import Config, Pretrain
from eval import fid
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.errors import UserError
from models.multi_student import MultiStudent, Quadrants, assemble, consecutive, kmeans, partition
from models.process import EDM
from models.seeds import Draws
from tests.analytic import ExactNetwork, Mixture, relative_error, student_nodes, vector
from tests.tiny import save_network, settings, torch_threads, train, write_settings

# ---------------------------------------------------------------------------------------------------- partitions


def embeddings(count: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["consecutive", "kmeans", "quadrants"])
@pytest.mark.parametrize(("count", "students"), [(10, 4), (10, 1), (10, 2), (17, 8), (64, 4), (4, 4)])
def test_parts_are_disjoint_complete_and_equal(kind: str, count: int, students: int) -> None:
    owner = partition(kind, embeddings(count), students)
    sizes = torch.bincount(owner, minlength=students)
    assert len(owner) == count and len(sizes) == students  # one student each: disjoint and complete
    assert int(sizes.max() - sizes.min()) <= 1


def test_consecutive_classes_stay_together() -> None:
    assert consecutive(10, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="3 conditions cannot be divided among 4"):
        consecutive(3, 4)


def test_kmeans_finds_separate_groups_of_equal_size() -> None:
    centres = 20 * embeddings(4, 3, seed=1)
    truth = torch.arange(40) % 4
    owner, found = kmeans(centres[truth] + embeddings(40, 3), 4)
    assert len({(int(a), int(b)) for a, b in zip(owner, truth, strict=True)}) == 4
    assert torch.cdist(found, centres).min(1).values.max() < 2


def test_kmeans_is_balanced_where_the_groups_are_not() -> None:
    """Twelve points in one place and four in another: four of the twelve go to the smaller part, and only four."""
    points = torch.cat([embeddings(12, 2), 30 + embeddings(4, 2, seed=1)])
    owner, _ = kmeans(points, 2)
    assert torch.bincount(owner).tolist() == [8, 8] and len(owner[12:].unique()) == 1


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_assignment_cannot_be_improved_by_an_exchange(seed: int) -> None:
    points = embeddings(30, 4, seed)
    owner, _ = kmeans(points, 5)
    centres = torch.stack([points[owner == k].mean(0) for k in range(5)])
    cost = torch.cdist(points, centres) ** 2
    for i in range(30):
        for j in range(i):
            now = cost[i, owner[i]] + cost[j, owner[j]]
            assert cost[i, owner[j]] + cost[j, owner[i]] >= now - 1e-9


def test_quadrants_route_new_embeddings_by_sign() -> None:
    """Points about the corners of a long rectangle: the leading component is its long side."""
    corners = torch.tensor([[-5.0, -1], [-5, 1], [5, -1], [5, 1]], dtype=torch.float64)
    points = corners.repeat(16, 1) + 0.1 * embeddings(64, 2)
    quadrants = Quadrants.fit(points, 4)
    owner = quadrants.route(points)
    assert all(len(owner[i::4].unique()) == 1 for i in range(4)) and len(owner.unique()) == 4
    assert torch.equal(quadrants.route(corners + 0.3 * embeddings(4, 2, seed=3)), owner[:4])
    with pytest.raises(UserError, match="power of two"):
        Quadrants.fit(points, 3)


# ------------------------------------------------------------------------------------------- what theory says of it


def test_students_of_one_mean_gain_the_variance_between_their_parts() -> None:
    """Capacity-limited closed form: the loss that K students save is the variance between parts / 2Q, exactly.

    The production surrogate must be at rest at each part's mean, and nowhere else.
    """
    v, sigma, generator = 0.5, 1.0, torch.Generator().manual_seed(0)
    means = (1.5 * torch.randn(1000, generator=generator, dtype=torch.float64)).sort().values
    q = v**2 + sigma**2

    def best_loss(owner: Tensor) -> float:
        """Mean KL between N(mean of the part, v^2) and each class, both under noise sigma."""
        centres = torch.stack([means[owner == k].mean() for k in range(int(owner.max()) + 1)])
        return float(((centres[owner] - means) ** 2).mean() / (2 * q))

    sizes = (1, 2, 4, 8)
    found = {k: best_loss(consecutive(1000, k)) for k in sizes}
    for k in sizes:
        owner = consecutive(1000, k)
        centres = torch.stack([means[owner == i].mean() for i in range(k)])
        between = float(((centres[owner] - means.mean()) ** 2).mean())
        assert found[1] - found[k] == pytest.approx(between / (2 * q), rel=1e-12)
    assert found[1] > found[2] > found[4] > found[8]
    random = best_loss(consecutive(1000, 4)[torch.randperm(1000, generator=generator)])
    assert random > 0.98 * found[1] and found[4] < 0.3 * found[1]  # why parts are kept coherent

    def pull(mean: float, classes: Tensor) -> float:
        student, total = Mixture.gaussian(mean, v).student(), 0.0
        for target in classes:
            x0, x_t, mass = student_nodes(student, 1.0, sigma)
            fake, real = (
                student.frozen().denoise(x_t, 1.0, sigma),
                Mixture.gaussian(float(target), v).denoise(x_t, 1.0, sigma),
            )
            level = vector(1.0).expand(len(x0)), vector(sigma).expand(len(x0))
            ks = rows.reverse_kl().coefficients(mass, mass, mass, mass)
            value = (mass * losses.score_surrogate(x0, real.detach(), fake.detach(), *level, *ks)).sum()
            total += float(torch.autograd.grad(value, student.means)[0]) / len(classes)
        return total

    part = means[consecutive(1000, 4) == 1][::50]
    centre = float(part.mean())
    assert abs(pull(centre, part)) <= 1e-10
    assert pull(centre + 0.2, part) == pytest.approx(0.2 / q, rel=1e-8)


class Linear(nn.Module):
    """``a x_t + b`` as a network that predicts x0."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.coefficients[0] * x_t + self.coefficients[1]


class ManyDraws(Draws):
    """Random numbers for a large batch from one generator."""

    def __init__(self, count: int):
        super().__init__([0])
        self.count = count

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self._generators[0], dtype=torch.float64)

    def uniform(self) -> Tensor:
        return torch.rand(self.count, generator=self._generators[0], dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_a_linear_student_of_the_teachers_score_is_the_best_linear_one(sigma: float) -> None:
    """TSM's optimum for a linear network is the LMMSE estimator of x0, whatever the teacher's shape."""
    data = Mixture.line(vector(0.3, 0.7), vector(-1.0, 0.8), vector(0.2, 0.4))
    mean = float((data.weights * data.means[:, 0]).sum())
    variance = float((data.weights * (data.stds**2 + data.means[:, 0] ** 2)).sum()) - mean**2
    slope = variance / (variance + sigma**2)

    count, process = 400_000, EDM()
    level = LogUniform(low=sigma, high=sigma * (1 + 1e-9))
    teacher = Guided(Denoiser(ExactNetwork(data, process), process, "x0"), 1.0)
    network = Linear()
    method = Pretraining(Pretrain(noise_levels=level), Denoiser(network, process, "x0"), teacher)
    real = data.samples(count, torch.Generator().manual_seed(1)).reshape(count, 1, 1, 1)

    def slope_of_loss(*at: float) -> Tensor:
        with torch.no_grad():
            network.coefficients.copy_(vector(*at))
        loss, _ = method.student_loss(Turn(0, ManyDraws(count), Batch(real, Condition())))
        return torch.autograd.grad(loss, network.coefficients)[0]

    base = slope_of_loss(0.0, 0.0)
    hessian = torch.stack([slope_of_loss(1.0, 0.0) - base, slope_of_loss(0.0, 1.0) - base], 1)
    found = torch.linalg.solve(hessian, -base)
    assert relative_error(found, vector(slope, mean * (1 - slope))) < 0.01


# --------------------------------------------------------------------------------------------- generation and export


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three students of 10 classes in one folder."""
    base = tmp_path_factory.mktemp("several")
    parts = [save_network(base / f"part{k}", 2.5, seed=k) for k in range(3)]
    assemble(base / "student", parts, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2], "card")
    return base


def test_a_mixed_batch_goes_to_its_students(several: Path) -> None:
    students = MultiStudent(several / "student")
    classes = torch.tensor([9, 0, 4, 1, 8, 5, 0])
    z = torch.randn(7, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    made = students.generate(z, Condition(class_ids=classes))
    for i, owner in enumerate([2, 0, 1, 0, 2, 1, 0]):
        alone = students.student(owner)(z[i : i + 1], Condition(class_ids=classes[i : i + 1]))
        torch.testing.assert_close(made[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        others = [students.student(k)(z[:1], Condition(class_ids=classes[:1])) for k in (0, 1)]
    assert all(float((made[:1] - other).abs().max()) > 1e-2 for other in others)
    with pytest.raises(ValueError, match="none of them is unconditional"):
        students.generate(z[:1], Condition(class_ids=torch.tensor([-1])))


def test_threads_begun_later_keep_their_share(several: Path) -> None:
    with torch_threads(2):
        z = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        MultiStudent(several / "student").generate(z, Condition(class_ids=torch.tensor([0, 4, 7])))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


def test_at_most_as_many_are_loaded_as_allowed(several: Path) -> None:
    students = MultiStudent(several / "student", max_loaded=2)
    z = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    made = students.generate(z, Condition(class_ids=torch.tensor([0, 4, 7])))
    assert list(students._loaded) == [1, 2]
    kept = students.student(1)
    students.student(0)
    assert list(students._loaded) == [1, 0] and students.student(1) is kept
    assert torch.equal(
        made, MultiStudent(several / "student").generate(z, Condition(class_ids=torch.tensor([0, 4, 7])))
    )


def test_stock_diffusers_loads_the_folder(several: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(several / "student", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    classes, z = [9, 0, 4, 1], torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = MultiStudent(several / "student").generate(z, Condition(class_ids=torch.tensor(classes)))
    found = pipe(classes, latents=z, output_type="pt").images
    assert float((found - expected).abs().max()) <= 1e-5
    with pytest.raises(ValueError, match="unconditional"):
        pipe([-1])


def test_a_student_alone_is_not_several(several: Path) -> None:
    with pytest.raises(UserError, match="holds one student"):
        MultiStudent(several / "part0")


def test_scores_are_those_of_the_students_together(several: Path) -> None:
    result = fid.evaluate(several / "student", None, 20)
    assert result["scores"][0]["sampler"] == "3 students, 1 step"
    digests = {fid.weights_digest(several / name) for name in ("student", "part0", "part1")}
    assert len(digests) == 3


# ---------------------------------------------------------------------------------------------------------- training


def plan(base: Path, **changes: object) -> dict[str, object]:
    """Two students of one class each, through all three stages."""
    stages = [
        {"name": "tsm", "method": {"kind": "score_matching", "channels": [8, 16], "patch": 4}, "share": 0.4},
        {"name": "dm", "method": {"kind": "diff_instruct", "critic_turns": 1}, "share": 0.3},
        {"name": "adm", "method": {"kind": "dmd2", "critic_turns": 1, "gan": {"width": 8}}, "share": 0.3},
    ]
    return {"kind": "multi_student", "students": 2, "stages": stages} | changes


def test_one_command_trains_all_students_and_repeating_it_does_nothing(tmp_path: Path) -> None:
    config = write_settings(tmp_path, "msd", method=plan(tmp_path), evaluation={"num_images": 0})
    done = train("--config", config)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "msd"
    assert [p.name for p in sorted(out.glob("student-*/*"))] == ["adm", "dm", "tsm"] * 2
    index = json.loads((out / "student" / "model_index.json").read_text())
    assert index["student_of_class"] == [0, 1] and index["patch"] == 4
    smaller = MultiStudent(out / "student").student(0).denoiser
    teacher = build_method(Config.model_validate(settings(tmp_path)), (1, 16, 16), ["a", "b"])[0].frozen[0]
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(smaller) < 0.6 * count(teacher)
    again = train("--config", config)
    assert again.returncode == 0 and "steps" not in again.stdout
    wrong = train("--config", config, "--train.seed", "5")
    assert wrong.returncode == 2 and "train.seed 0 -> 5" in wrong.stderr
    longer = train("--config", config, "--train.steps", "12")
    assert longer.returncode == 2 and "was trained for 2 steps, now 5 are asked for" in longer.stderr
    card = (out / "student" / "README.md").read_text()
    assert "with `multi_student`" in card and f"output: {out}\n" in card


def test_a_late_mistake_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    """The last stage has a tap that the teacher lacks."""
    stages = plan(tmp_path)["stages"]
    stages[2]["method"]["gan"]["taps"] = ["unet.nowhere"]  # type: ignore[index]
    with pytest.raises(UserError, match="nowhere"):
        run_training(Config.model_validate(settings(tmp_path, "late", method=plan(tmp_path, stages=stages))))
    assert not (tmp_path / "late").exists()


def test_a_dry_run_times_the_smaller_network(tmp_path: Path) -> None:
    done = train("--config", write_settings(tmp_path, "dry", method=plan(tmp_path)), "--dry-run")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("\n{") :])
    sizes = {name: stage["parameters"]["student"] for name, stage in found["stages"].items()}
    assert found["students"] == 2 and len(set(sizes.values())) == 1
    assert sizes["dm"] < 0.6 * found["stages"]["dm"]["parameters"]["critic"]


def test_students_of_another_partition_are_not_assembled(tmp_path: Path) -> None:
    values = settings(tmp_path, "mixed", method=plan(tmp_path, only=0))
    assert run_training(Config.model_validate(values)) == 0
    out = tmp_path / "mixed"
    shutil.copytree(out / "student-0", out / "student-1")
    for path in (out / "student-1").glob("*/config.yaml"):  # as from a machine whose student 1 was of class 0
        path.write_text(path.read_text().replace(f"{out}/student-0", f"{out}/student-1"))
    with pytest.raises(UserError, match="trained for classes"):
        run_training(Config.model_validate(values))


def test_students_may_be_trained_on_machines_of_their_own(tmp_path: Path) -> None:
    values = settings(tmp_path, "alone", method=plan(tmp_path, only=1))
    assert run_training(Config.model_validate(values)) == 0
    out = tmp_path / "alone"
    assert (
        (out / "student-1/adm/student").is_dir() and not (out / "student-0").exists() and not (out / "student").exists()
    )
    values["method"] = plan(tmp_path, only=0)
    assert run_training(Config.model_validate(values)) == 0
    assert (out / "student/student_1/unet").is_dir()


def test_each_student_sees_its_own_classes_and_all_pairs(tmp_path: Path) -> None:
    base, pairs = tmp_path, tmp_path / "pairs.safetensors"
    settings(base)
    make(Arguments(str(base / "teacher"), pairs, count=8, steps=2))
    stages = plan(tmp_path)["stages"]
    stages[1]["method"]["regression"] = {"path": str(pairs), "every": 1}  # type: ignore[index]
    config = Config.model_validate(settings(tmp_path, method=plan(tmp_path, stages=stages)))
    owner, students = plan_students(config, config.method)  # type: ignore[arg-type]
    assert owner == [0, 1]
    for k, stages in students.items():
        assert [stage.train.steps for stage in stages] == [2, 2, 2]
        assert [stage.classes for stage in stages] == [[k]] * 3
        assert [getattr(stage.method, "start", None) for stage in stages[1:]] == [stage.output for stage in stages[:-1]]
        stream, shape, names = build_stream(stages[-1], 0, 1)
        assert stream is not None and shape == (1, 16, 16)
        assert {int(c) for _ in range(4) for c in stream.next().cond.class_ids} == {k}  # type: ignore[union-attr]
        first = stages[1].method.model_copy(update={"start": None})
        method = build_method(stages[1].model_copy(update={"method": first}), shape, names)[0]
        draws = Draws(list(range(64)))
        assert set(method.conditions.sample(draws).class_ids.tolist()) == {k}  # type: ignore[attr-defined]
        assert set(method.pairs.sample(draws)[1].class_ids.tolist()) == {0, 1}  # type: ignore[attr-defined]
    drawn = Classes(10, [2, 5, 7]).sample(Draws(list(range(200)))).class_ids
    assert drawn is not None and sorted(set(drawn.tolist())) == [2, 5, 7]


def test_later_stages_go_on_with_the_critic(tmp_path: Path) -> None:
    method = plan(tmp_path)
    method["stages"] = [stage | {"share": 0.5} for stage in method["stages"][1:]]  # type: ignore[index]
    config = Config.model_validate(settings(tmp_path, method=method, train__steps=4))
    first, second = runs(config, config.method, 0, [0])  # type: ignore[arg-type]
    assert run_training(first) == 0
    saved = load_file(first.output / "checkpoints/step-2/critic/model.safetensors")
    networks = build_method(second, (1, 16, 16), ["a", "b"])[0].networks
    assert all(torch.equal(value, saved[name]) for name, value in networks["critic"].state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": 3}, "method.students: 3 students for 2 classes"),
        ({"only": 2}, "method.only: there are students 0 to 1"),
        ({"partition": "quarters"}, "method.partition"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    done = train("--config", write_settings(tmp_path, "bad", method=plan(tmp_path, **changes)))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_stages_must_fit_together(tmp_path: Path) -> None:
    def error(**changes: object) -> str:
        config = Config.model_validate(settings(tmp_path, **changes))
        with pytest.raises(UserError) as caught:
            plan_students(config, config.method)  # type: ignore[arg-type]
        return str(caught.value)

    stages = plan(tmp_path)["stages"]
    assert "the shares [0.3] do not make 1" in error(method=plan(tmp_path, stages=stages[1:2]))  # type: ignore[index]
    assert "of 2 steps none is left for the stage tsm" in error(method=plan(tmp_path), train__steps=2)
    second = [stages[0], stages[1] | {"method": {"kind": "sid", "start": "here"}}, stages[2]]  # type: ignore[index]
    assert "dm starts from the stage before it" in error(method=plan(tmp_path, stages=second))
    assert "whole networks, not adapters" in error(method=plan(tmp_path), lora={"rank": 2})
    assert "divides all classes itself" in error(method=plan(tmp_path), classes=[0])
    tsm_last = plan(tmp_path, stages=[stages[0] | {"share": 1.0}])  # type: ignore[index]
    assert "makes no one-step student" in error(method=tsm_last)
    tsm_second = plan(tmp_path, stages=[stages[1], stages[0], stages[2]])  # type: ignore[index]
    assert "can only come first" in error(method=tsm_second)
