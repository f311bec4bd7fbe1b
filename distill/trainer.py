"""The one training loop. It knows networks, turns and files; it knows nothing of what a method's losses mean."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import checkpoint, parallel
from distill.data import Stream
from distill.methods.base import Method, Turn
from distill.metrics import Metrics
from distill.optimizers import learning_rate, new_optimizer, take_step
from distill.preview import Preview
from distill.reduce import any_process, of_all_processes, sum_over_processes
from distill.settings import Config, Optimizer
from models.errors import UserError
from models.seeds import Draws, mix
from models.teachers.base import Spec

PATIENCE = 10
"""Steps in a row whose loss or gradient is not finite before the run gives up."""

DROPOUT = 0xD207
"""Sets the random numbers of dropout apart from those of the first row."""


class Trainer:
    """Runs ``method`` for ``config.train.steps`` student steps, resuming from the newest checkpoint in the run folder.

    A step is one student turn, then the method's critic turns; the moving average follows once per step. All random
    numbers of a turn depend on (seed, step, turn, place in the global batch) alone, so a resumed run repeats the
    uninterrupted one and two processes repeat one.
    """

    def __init__(self, config: Config, method: Method, stream: Stream | None, accelerator: Accelerator, spec: Spec):
        self.config, self.method, self.stream, self.accelerator = config, method, stream, accelerator
        train, device = config.train, accelerator.device
        self.spec = spec.to(device)
        self.step, self.micro_batches = 0, train.gradient_accumulation_steps
        self.size: int = train.batch_size // (accelerator.num_processes * self.micro_batches)
        self.bare: dict[str, nn.Module] = dict(method.networks)
        self.wrapped: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for network in self.bare.values() if train.channels_last else ():
            network.to(memory_format=torch.channels_last)
        for module in [*method.buffers.values(), *method.frozen]:
            module.to(device)
        if train.parallel == "fsdp2" and accelerator.num_processes > 1:
            parallel.shard([*method.frozen, *self.bare.values()], accelerator)
        for name, network in self.bare.items():
            make = lambda network=network, name=name: new_optimizer(network, self._settings(name))
            if parallel.is_sharded(network):
                self.wrapped[name], self.optimizers[name] = network, accelerator.prepare_optimizer(make())
            else:
                self.wrapped[name], self.optimizers[name] = accelerator.prepare(network, make())
            if train.compile:
                self.wrapped[name].compile()
        # At step n the average reaches back about n^0.75 steps, until ema_decay is reached.
        schedule = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        whole = not parallel.is_sharded(self.bare["student"])
        self.ema = EMAModel(self.bare["student"].parameters(), decay=train.ema_decay, foreach=whole, **schedule)
        self.metrics = Metrics(config.output / "metrics.jsonl")
        self.preview = Preview(config.output / "samples", self.spec, config.evaluation.teacher_steps, device)
        self.bad_steps = torch.zeros(3, device=device)
        """Steps that were not finite: how many in a row up to now, in the longest row, in all."""
        self.stopping = False

    def _settings(self, name: str) -> Optimizer:
        return self.config.student if name == "student" else self.config.critic or self.config.student

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student with its averaged weights."""
        parameters = list(self.bare["student"].parameters())
        with parallel.kept(parameters):
            self.ema.copy_to(parameters)
            yield

    # -------------------------------------------------------------------------------------------------------- turns

    def run_step(self) -> None:
        """One student step with its critic turns."""
        bad = self.turn("student", 0)
        self.ema.step(self.bare["student"].parameters())
        for index in range(self.method.critic_turns):
            bad = torch.maximum(bad, self.turn("critic", index + 1))
        self.step += 1
        row = (self.bad_steps[0] + 1) * bad
        self.bad_steps = torch.stack([row, torch.maximum(self.bad_steps[1], row), self.bad_steps[2] + bad])

    def turn(self, kind: str, index: int) -> Tensor:
        """One optimizer step of the student (``kind`` "student") or of all else ("critic"); 1 if it was not finite."""
        names = [name for name in self.bare if (name == "student") == (kind == "student")]
        for name, network in self.bare.items():
            network.requires_grad_(name in names).train(name in names)  # what is only asked has no dropout
            self.method.networks[name] = self.wrapped[name] if name in names else network
        loss_of = self.method.student_loss if kind == "student" else self.method.critic_loss
        total = torch.zeros((), device=self.accelerator.device)
        for micro in range(self.micro_batches):
            with ExitStack() as stack:
                if micro < self.micro_batches - 1:
                    for name in names:
                        stack.enter_context(parallel.no_sync(self.wrapped[name], self.accelerator))
                with self.accelerator.autocast():
                    loss, logs = loss_of(self._inputs(kind, index, micro))
                self.accelerator.backward(loss / self.micro_batches)
            total = total + loss.detach()
            self.metrics.add(logs)
        return self._update(names, total)

    def _inputs(self, kind: str, index: int, micro: int) -> Turn:
        """Random numbers by place in the global batch, and this process's pictures if the turn needs any."""
        accelerator, seed = self.accelerator, self.config.train.seed
        first = (micro * accelerator.num_processes + accelerator.process_index) * self.size
        seeds = [mix(seed, self.step, index, first + i) for i in range(self.size)]
        torch.manual_seed(mix(seed, self.step, index, first, DROPOUT))
        real = None
        if kind in self.method.pictures and self.stream is not None:
            real = self.stream.next().checked(self.spec).to(accelerator.device).through(self.spec, seeds)
        return Turn(micro, Draws(seeds, accelerator.device), real)

    def _update(self, names: list[str], loss: Tensor) -> Tensor:
        """Clip and step each network of the turn. What is not finite changes nothing."""
        norms = {}
        for name in names:
            limit = self._settings(name).max_grad_norm
            norms[name] = parallel.clip_grad_norm(self.wrapped[name].parameters(), limit)
        finite = torch.stack([norm.isfinite() for norm in norms.values()]).all() & loss.isfinite()
        bad = sum_over_processes((~finite).float()).clamp(max=1)
        for name in names:
            settings = self._settings(name)
            lr = learning_rate(settings, self.step, self.config.train.steps)
            take_step(self.optimizers[name], settings, lr, bad)
        self.metrics.add({f"grad_norm/{name}": norm.detach() for name, norm in norms.items()})
        return bad

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint of everything that is trained and of every position."""
        stream = self.stream.state_dict() if self.stream is not None else {}
        names = [name for name, _ in self.bare["student"].named_parameters()]
        average = dict(zip(names, self.ema.shadow_params, strict=True))
        state = {
            "step": self.step,
            "streams": of_all_processes(stream),
            "sums": self.metrics.state(),
            "bad_steps": self.bad_steps,
            "ema_step": self.ema.optimization_step,
            "buffers": {name: module.state_dict() for name, module in self.method.buffers.items()},
        }
        optimizers = {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}
        keep, folder = self.config.train.checkpoints_total_limit, self.config.output / "checkpoints"
        place = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint.save(folder, self.step, self.bare, optimizers, average, state, keep, *place)
        self.saved, self.saved_at = self.step, monotonic()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        folder, device = self.config.output / "checkpoints", self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if steps := checkpoint.list_steps(folder):
            optimizers = {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}
            average, state = checkpoint.load(folder, steps[-1], self.bare, optimizers, device)
            self.step, self.ema.optimization_step = state["step"], state["ema_step"]
            self.ema.shadow_params = [average[name] for name, _ in self.bare["student"].named_parameters()]
            self.metrics.load(state["sums"], rank, world, device)
            self.bad_steps = state["bad_steps"].to(device)
            for name, module in self.method.buffers.items():
                module.load_state_dict(state["buffers"][name])
            if self.stream is not None:
                self.stream.load_states(state["streams"])
        if self.accelerator.is_main_process:
            self.metrics.rewind(self.step)

    # ---------------------------------------------------------------------------------------------------------- run

    def run(self) -> bool:
        """Train to the last step; False if SIGTERM or Ctrl-C ended it earlier (everything is saved then)."""
        train, main, device = self.config.train, self.accelerator.is_main_process, self.accelerator.device
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(total=train.steps, initial=self.step, desc="steps", disable=not main)
        self.saved, self.saved_at = self.step, monotonic()
        if self.step == 0:
            self._sample()
        try:
            while self.step < train.steps and not any_process(self.stopping, device):
                self.run_step()
                bar.update()
                last = self.step == train.steps
                if last or self.step % PATIENCE == 0:
                    self._check_finite()
                if last or self.step % train.log_every == 0:
                    line = self.metrics.flush(self.step, int(self.bad_steps[2]), main)
                    numbers = {name: value for name, value in line.items() if isinstance(value, float)}
                    bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()}, refresh=False)
                    if train.trackers:
                        self.accelerator.log(numbers, self.step)
                if last or self.step % train.sample_every == 0:
                    self._sample()
                if last or self.step % train.checkpoint_every == 0 or self._is_due():
                    self.save()
            if self.saved != self.step:
                self.save()
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.step >= train.steps

    def _sample(self) -> None:
        """Diagnostics, and a grid by the first process; by all, where each has a part of the networks."""
        main = self.accelerator.is_main_process
        self.bare["student"].eval()  # until its next turn
        with self.ema_weights():
            self.metrics.add(self.method.diagnose())
            if main or self.config.train.parallel == "fsdp2":
                self.preview.draw(self.method, self.step, write=main)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def _is_due(self) -> bool:
        """Whether ``checkpoint_minutes`` have gone since the last checkpoint, by the first process's clock."""
        minutes = self.config.train.checkpoint_minutes
        if minutes is None:
            return False
        due = self.accelerator.is_main_process and monotonic() - self.saved_at >= 60 * minutes
        return any_process(due, self.accelerator.device)

    def _check_finite(self) -> None:
        if self.bad_steps[1] < PATIENCE:
            return
        steps = checkpoint.list_steps(self.config.output / "checkpoints")
        kept = f"checkpoint step-{steps[-1]} is kept" if steps else "there is no checkpoint yet"
        raise UserError(
            f"loss or gradient was not finite for {PATIENCE} steps in a row, up to step {self.step}: {kept}; "
            "lower student.lr and critic.lr, or train without bf16"
        )
