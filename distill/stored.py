"""Latents and embeddings on disk: what training asks autoencoder and text encoders for, computed once.

A folder of them holds ``stored.json`` (what made them), ``reference.safetensors`` (the unconditional embedding, and
what the teacher makes of one picture and one prompt, by which another teacher is told) and webdataset shards
(models/shards.py) with the files of each sample:

``x0.safetensors``    x0 (C, H, W)
``text.safetensors``  text (L, D), of the tokens that count alone, and pooled (D,) where the teacher has it
``txt``, ``cls``      the caption or the class id
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from tqdm.auto import tqdm

from distill.data import Batch, Pictures
from models.condition import Condition
from models.errors import UserError
from models.folders import replace_file, replace_text
from models.shards import Shards, finished, made_of, write_shard
from models.teachers.base import ClassSpec, Texts, TextSpec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
AGAIN = "run `python -m distill.precompute` again, which goes on"
PROMPT = "a photo of a red cube"
"""The prompt that teachers are compared by."""
PROBE = 256
"""Most pixels of a side of the picture that they are compared by."""
TOLERANCE = 0.01
"""Relative difference that is still the same teacher: devices differ in rounding."""


# ------------------------------------------------------------------------------------------------- rows of texts


def split(cond: Condition) -> list[dict[str, Tensor]]:
    """The rows of a batch of texts: ``text`` (L, D) without padding, and ``pooled`` (D,) if there is one."""
    if cond.text is None:
        raise ValueError("a condition without text")
    rows = []
    for i, text in enumerate(cond.text):
        count = len(text)
        if cond.text_mask is not None:
            mask = cond.text_mask[i].bool()
            count = int(mask.sum())
            if not bool(mask[:count].all()):
                raise ValueError("padding is not at the end of the prompt")
        rows.append({"text": text[:count]} | ({} if cond.pooled is None else {"pooled": cond.pooled[i]}))
    return rows


def join(rows: Sequence[dict[str, Tensor]], like: Condition) -> Condition:
    """The inverse, in float32, as long as ``like`` and with a mask if it has one; padding is zero."""
    assert like.text is not None
    text = torch.zeros(len(rows), *like.text.shape[1:])
    mask = None if like.text_mask is None else like.text_mask.new_zeros(text.shape[:2])
    for i, row in enumerate(rows):
        count = len(row["text"])
        text[i, :count] = row["text"]
        if mask is not None:
            mask[i, :count] = 1
    pooled = None if like.pooled is None else torch.stack([row["pooled"].float() for row in rows])
    return Condition(text=text, text_mask=mask, pooled=pooled)


# --------------------------------------------------------------------------------------------------- the reference


@torch.no_grad()
def reference(spec: ClassSpec | TextSpec, device: torch.device, pictures: bool) -> dict[str, Tensor]:
    """What ``spec`` makes of one picture and one prompt, and its unconditional embedding, in float32."""
    found: dict[str, Tensor | None] = {}
    if pictures:
        channels, height, width = spec.picture
        shape = (1, channels, min(height, PROBE), min(width, PROBE))
        picture = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
        found["picture"] = spec.encode(picture.to(device))
    if isinstance(spec, TextSpec):
        cond = spec.text([PROMPT])
        found |= {"text": cond.text, "text_mask": cond.text_mask, "pooled": cond.pooled}
        found |= {"null_text": cond.null_text, "null_text_mask": cond.null_text_mask, "null_pooled": cond.null_pooled}
    return {name: value.cpu().contiguous() for name, value in found.items() if value is not None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether one teacher made both."""
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return False
    pairs = [(first[name].float(), second[name].float()) for name in first]
    return all(float((a - b).norm()) <= TOLERANCE * float(a.norm()) for a, b in pairs)


# --------------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes ``source``, pictures or prompts, as ``spec`` encodes them: shard by shard, those that are missing.

    ``facts`` describe the run; UserError if ``folder`` holds another's. Process ``rank`` of ``world`` writes its share.
    ``facts["source"]`` tells cheaply what is encoded (distill/source.py). Where it has changed, or with ``verify``, the
    pictures and captions of all finished shards are compared with those that were encoded, by their digests.
    """

    def __init__(
        self,
        folder: Path,
        spec: ClassSpec | TextSpec,
        source: Pictures | Sequence[str],
        facts: dict[str, Any],
        device: torch.device,
        verify: bool = False,
    ):
        self.verify = verify
        self.folder, self.spec, self.source, self.device = folder, spec, source, device
        self.dtype, self.batch = DTYPES[facts["dtype"]], facts["batch"]
        self.count, self.per_shard = facts["count"], facts["per_shard"]
        text = isinstance(spec, TextSpec)
        kind = {"asked_for": "prompts" if text else "classes", "picture": list(spec.picture), "x0": list(spec.shape)}
        pictures = not isinstance(source, Sequence)
        names = source.class_names if pictures and not text else []
        self.facts = kind | {"pictures": pictures, "class_names": names} | facts

    def prepare(self) -> None:
        """Write or compare what describes the folder, and remove what an interruption left. For one process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.partial"):
            leftover.unlink()
        made = reference(self.spec, self.device, self.facts["pictures"])
        path = self.folder / "stored.json"
        if path.is_file():
            old = _read_facts(self.folder)
            changed = [
                f"{key} {old.get(key)} -> {value}"
                for key, value in self.facts.items()
                if old.get(key) != value and key != "source"
            ]
            if not changed and not same(_read_reference(self.folder), made):
                changed = ["another teacher"]
            if changed:
                raise UserError(
                    f"{self.folder} holds what other settings made ({'; '.join(changed[:3])[:200]}): choose another "
                    "folder, or delete that one to start afresh"
                )
            now, then = self.facts.get("source"), old.get("source")
            if self.verify or now != then:
                self._compare()
                replace_text(path, json.dumps(self.facts, indent=2) + "\n")
            return
        with replace_file(self.folder / "reference.safetensors") as temporary:
            save_file(made, temporary)
            temporary.chmod(0o644)  # which the library leaves to this user alone
        replace_text(path, json.dumps(self.facts, indent=2) + "\n")

    def _compare(self) -> None:
        """Read the source of the finished shards again; UserError if it is not what was encoded."""
        done = [number for number in range(-(-self.count // self.per_shard)) if finished(self.folder, number)]
        known = {number: made_of(self.folder, number) for number in done}
        if unknown := [number for number in done if not known[number]]:
            print(f"{self.folder}: {len(unknown)} shards do not tell what they were made of: not compared")
        bar = tqdm([number for number in done if known[number]], desc="compare", unit="shard")
        changed = [number for number in bar if self._digest(number) != known[number]]
        if changed:
            raise UserError(
                f"{self.folder} holds what was made of other pictures or captions, in {len(changed)} of {len(done)} "
                "shards: choose another folder, or delete that one to start afresh"
            )

    def _digest(self, number: int) -> str:
        """What the writer of a shard is given of its source."""
        found = hashlib.sha256()
        for part in self._batches(number):
            _add(found, self._get(part), len(part))
        return found.hexdigest()

    def _batches(self, number: int) -> list[list[int]]:
        indices = list(range(number * self.per_shard, min((number + 1) * self.per_shard, self.count)))
        return [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]

    def write(self, rank: int = 0, world: int = 1) -> None:
        """This process's shards."""
        shards = range(-(-self.count // self.per_shard))[rank::world]
        bar = tqdm(total=self.count, desc="precompute", unit="sample", disable=rank > 0)
        with bar, ThreadPoolExecutor(1) as pool:
            for number in shards:
                if not finished(self.folder, number):
                    self._shard(number, pool)
                bar.update(min(self.per_shard * world, self.count - bar.n))

    def _shard(self, number: int, pool: ThreadPoolExecutor) -> None:
        batches, source = self._batches(number), hashlib.sha256()
        filled = [part + part[-1:] * (self.batch - len(part)) for part in batches]  # a smaller one is rounded otherwise
        ahead = pool.submit(self._get, filled[0])
        with write_shard(self.folder, number) as shard:
            for i, part in enumerate(batches):
                batch = ahead.result()
                if i + 1 < len(batches):
                    ahead = pool.submit(self._get, filled[i + 1])
                _add(source, batch, len(part))
                for index, files in zip(part, self._encode(batch), strict=False):
                    shard.add(index, files)
            shard.source = source.hexdigest()

    def _get(self, indices: list[int]) -> Batch | list[str]:
        if isinstance(self.source, Sequence):
            return [self.source[i] for i in indices]
        return self.source.get(indices)

    @torch.no_grad()
    def _encode(self, batch: Batch | list[str]) -> list[dict[str, bytes]]:
        """The files of each sample."""
        captions = batch.captions if isinstance(batch, Batch) else batch
        if isinstance(self.spec, TextSpec):
            texts = split(self.spec.text(captions))
            files = [
                {"txt": caption.encode(), "text.safetensors": self._bytes(row)}
                for caption, row in zip(captions, texts, strict=True)
            ]
        else:
            assert isinstance(batch, Batch) and batch.cond.class_ids is not None
            files = [{"cls": str(int(i)).encode()} for i in batch.cond.class_ids]
        if isinstance(batch, Batch):
            for row, x0 in zip(files, self.spec.encode(batch.images.to(self.device)), strict=True):
                row["x0.safetensors"] = self._bytes({"x0": x0})
        return files

    def _bytes(self, tensors: dict[str, Tensor]) -> bytes:
        stored = {name: value.to("cpu", self.dtype).contiguous() for name, value in tensors.items()}
        for name, value in stored.items():
            if not bool(value.isfinite().all()):
                raise UserError(f"--dtype: a value of {name} is too large for {self.facts['dtype']}: choose bfloat16")
        return save(stored)


def _add(digest: Any, batch: Batch | list[str], count: int) -> None:
    """Put the first ``count`` samples of a batch, as their source gives them, into a digest."""
    captions = batch.captions if isinstance(batch, Batch) else batch
    for i in range(count):
        if isinstance(batch, Batch):
            digest.update(batch.images[i].numpy().tobytes())
            digest.update(str(None if batch.cond.class_ids is None else int(batch.cond.class_ids[i])).encode())
        digest.update(json.dumps(captions[i] if captions else None).encode())


def run(writer: Writer, state: PartialState) -> None:
    """Write everything, each process its share; the spec's networks are on the CPU again afterwards."""
    writer.spec.to(writer.device)
    if state.is_main_process:
        writer.prepare()
    state.wait_for_everyone()
    writer.write(state.process_index, state.num_processes)
    state.wait_for_everyone()
    writer.spec.to("cpu")


def processes() -> tuple[PartialState, torch.device]:
    """Those that share the work, and this one's device."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    device = cast(torch.device, state.device)
    return state, torch.device("cpu") if device.type == "cpu" else device


def cached(folder: Path, spec: TextSpec, prompts: Sequence[str], teacher: str, tokens: int | None) -> Texts:
    """The embeddings of ``prompts``, each of them once, from a folder in ``folder`` that is made if it is not there."""
    unique = list(dict.fromkeys(prompts))
    name = hashlib.sha256(json.dumps([teacher, tokens, unique]).encode()).hexdigest()[:16]
    facts = {"teacher": teacher, "dtype": "float32", "count": len(unique), "per_shard": 1000, "batch": 16}
    state, device = processes()
    run(Writer(folder / name, spec, unique, facts, device), state)
    return Texts(unique, Stored(folder / name).texts)


# --------------------------------------------------------------------------------------------------------- reading


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "stored.json").read_text())
        return {name: facts[name] for name in facts}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds nothing that `python -m distill.precompute` made: no stored.json") from error


def _read_reference(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "reference.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/reference.safetensors is damaged: delete {folder} and make it again") from error


class Stored:
    """Reads such a folder, in any order. As :class:`~distill.data.Pictures` its batches are encoded already."""

    def __init__(self, folder: Path):
        self.folder, self.facts, self.reference = folder, _read_facts(folder), _read_reference(folder)
        self.shards = Shards(folder, self.facts["count"], self.facts["per_shard"], AGAIN)
        self.shape: tuple[int, int, int] = tuple(self.facts["picture"])
        """Of the pictures that x0 was made of."""
        self.class_names: list[str] = self.facts["class_names"]
        part = lambda prefix: {n: self.reference.get(prefix + n) for n in ("text", "text_mask", "pooled")}
        self._like, self._null = Condition(**part("")), {f"null_{n}": v for n, v in part("null_").items()}

    def __len__(self) -> int:
        return self.facts["count"]

    @property
    def pictures(self) -> bool:
        """Whether there is x0, or prompts alone."""
        return self.facts["pictures"]

    @property
    def groups(self) -> Tensor:
        """(N,): the shard that each sample is in."""
        return torch.arange(len(self)) // self.facts["per_shard"]

    @property
    def labels(self) -> Tensor:
        if self.facts["asked_for"] == "prompts":
            raise UserError("classes: these pictures have captions, not classes")
        return self._classes(range(len(self)))

    def _classes(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([int(content) for content in self.shards.read("cls", indices)])

    def texts(self, indices: Sequence[int]) -> Condition:
        """Conditions (B,) of the prompts of these samples, in float32."""
        rows = [load(content) for content in self.shards.read("text.safetensors", indices)]
        return Condition(**{**vars(join(rows, self._like)), **self._null})

    def get(self, indices: list[int]) -> Batch:
        x0 = torch.stack([load(content)["x0"].float() for content in self.shards.read("x0.safetensors", indices)])
        text = self.facts["asked_for"] == "prompts"
        cond = self.texts(indices) if text else Condition(class_ids=self._classes(indices))
        return Batch(x0, cond, encoded=True)

    def check(self, spec: ClassSpec | TextSpec, path: str) -> None:
        """UserError if they were not made by the teacher ``spec``, from ``path``."""
        asked = "prompts" if isinstance(spec, TextSpec) else "classes"
        made = {"asked_for": asked, "picture": list(spec.picture), "x0": list(spec.shape)}
        for name, value in made.items():
            if self.facts[name] != value:
                raise UserError(
                    f"data.path: {self.folder} was made by another teacher ({self.facts['teacher']}): {name} "
                    f"{self.facts[name]}, but that of {path} is {value}"
                )
        if not same(self.reference, reference(spec, torch.device("cpu"), self.pictures)):
            raise UserError(
                f"data.path: {self.folder} was made by another teacher ({self.facts['teacher']}): {path} encodes "
                "pictures or prompts in another way; run `python -m distill.precompute` for it"
            )
