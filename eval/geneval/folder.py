"""Pictures in GenEval's folder layout: painted, judged one by one, and summed up; each part goes on where it stopped.

``NNNNN/metadata.jsonl`` holds a prompt's metadata in one line, ``NNNNN/samples/NNNNN.png`` its pictures. Verdicts are
appended to ``results-RANK.jsonl`` as they are made. What painted is kept in ``paint.json``, what judged in
``protocol.json``: pictures or verdicts of another are never added.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval.geneval.judge import Detection, Options, judge, summarize
from eval.pictures import read_picture
from models.errors import UserError
from models.folders import replace_text
from models.json_text import read_json
from models.scene.captions import Metadata

Paints = Callable[[Sequence[str], Sequence[int]], Tensor]


class Judge(Protocol):
    """A detector that names colours: what GenEval asks of one."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Options: ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    def __call__(self, images: Tensor) -> Sequence[Sequence[Detection]]:
        """Objects in uint8 pictures (B, 3, H, W)."""
        ...

    def colour_of(self, image: Tensor) -> Callable[[Detection], str]:
        """Names the colours of objects in one picture (3, H, W) uint8."""
        ...


@dataclass(frozen=True)
class Picture:
    """``name`` is its path in the folder, ``metadata`` those of its prompt."""

    name: str
    path: Path
    metadata: Metadata


# ------------------------------------------------------------------------------------------------------- painting


def paint(
    paints: Paints,
    asked: Sequence[Metadata],
    folder: Path,
    each: int = 4,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    *,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``each`` pictures of every prompt that process ``rank`` of ``world`` has to paint, those that are missing.

    Picture k of prompt p has the noise of seed ``seed + each * p + k``. ``identity`` says whose pictures they are:
    UserError for a folder that holds another's. Returns what paint.json holds.
    """
    stamp = folder / "paint.json"
    if not stamp.is_file() and next(folder.glob("*/samples/*.png"), None) is not None:
        raise UserError(f"{folder} holds pictures, and no paint.json says whose: give another folder")
    whose = {**identity, "each": each, "seed": seed}
    require_same(stamp, whose, "pictures of another painter")
    for index in tqdm(range(rank, len(asked), world), desc="paint", unit="prompt", disable=rank > 0):
        metadata = asked[index]
        own = folder / f"{index:05d}"
        line = own / "metadata.jsonl"
        (own / "samples").mkdir(parents=True, exist_ok=True)
        if line.is_file() and json.loads(line.read_text()) != metadata:
            raise UserError(f"{line}: another prompt than the one to paint there: give another folder")
        replace_text(line, json.dumps(metadata) + "\n")
        missing = [k for k in range(each) if not (own / "samples" / f"{k:05d}.png").is_file()]
        if not missing:
            continue
        made = paints([metadata["prompt"]] * len(missing), [seed + each * index + k for k in missing])
        for k, image in zip(missing, made, strict=True):
            target = own / "samples" / f"{k:05d}.png"
            temporary = target.with_suffix(".partial")
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
            temporary.replace(target)
    return whose


def pictures(folder: Path, rank: int = 0, world: int = 1) -> list[Picture]:
    """Pictures of the prompts rank, rank + world, ... of a folder in GenEval's layout, in order.

    UserError if there are none or a prompt is unreadable.
    """
    found: list[Picture] = []
    every = sorted(path for path in folder.glob("*") if re.fullmatch(r"\d+", path.name))
    for own in (path for path in every if int(path.name) % world == rank):
        try:
            metadata = read_json((own / "metadata.jsonl").read_text(encoding="utf-8-sig"))
            _ = metadata["tag"], metadata["prompt"], metadata["include"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{own / 'metadata.jsonl'} is no line of GenEval's metadata: {error}") from error
        samples = [path for path in (own / "samples").glob("*.png") if re.fullmatch(r"\d+", path.stem)]
        found += [Picture(f"{own.name}/{p.name}", p, metadata) for p in sorted(samples, key=lambda p: int(p.stem))]
    if not found:
        raise UserError(f"{folder} has no pictures in GenEval's layout: NNNNN/metadata.jsonl and NNNNN/samples/*.png")
    return found


# -------------------------------------------------------------------------------------------------------- judging


def verdict(image: Tensor, found: Sequence[Detection], wanted: Mapping[str, Any], by: Judge) -> dict[str, Any]:
    """A record of one picture: is it right, why not, and what was seen."""
    name_colour = by.colour_of(image)
    correct, reason = judge(found, wanted, by.options, name_colour)
    known = [d for d in found if d.score > by.options.threshold]
    seen = [{"class": d.label, "box": [round(v, 1) for v in d.box], "score": round(d.score, 4)} for d in known]
    return {"tag": wanted["tag"], "prompt": wanted["prompt"], "correct": correct, "reason": reason, "found": seen}


def require_same(path: Path, mine: Mapping[str, Any], other: str) -> None:
    """Write ``mine`` to ``path``, or see that it is there; UserError that names what differs."""
    mine = json.loads(json.dumps(mine))
    if path.is_file():
        theirs = json.loads(path.read_text())
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            pairs = ", ".join(f"{key} ({theirs.get(key)} / {mine.get(key)})" for key in differing)
            raise UserError(f"{path.parent} holds {other}: {pairs}; give another folder")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(mine, indent=2) + "\n")


def read_records(output: Path) -> dict[str, dict[str, Any]]:
    """Verdicts so far, by picture; a line that a crash cut off is left out."""
    records: dict[str, dict[str, Any]] = {}
    for file in sorted(output.glob("results-*.jsonl")):
        for line in file.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                records[record["picture"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return records


def judge_folder(
    folder: Path, by: Judge, output: Path, rank: int = 0, world: int = 1, count: int | None = None
) -> tuple[dict[str, dict[str, Any]], int]:
    """Verdicts by picture, those that are there and those that process ``rank`` of ``world`` makes now, and how many
    pictures there are to judge.

    With ``count``, as many pictures are being painted by all processes, and each judges those that it painted.
    """
    mine = pictures(folder) if count is None else pictures(folder, rank, world)
    whole = len(mine) if count is None else count
    stated = by.protocol | {"options": asdict(by.options), "pictures": whole}
    require_same(output / "protocol.json", stated, "verdicts of another protocol")
    done = read_records(output)
    mine = [picture for picture in (mine[rank::world] if count is None else mine) if picture.name not in done]
    with (output / f"results-{rank:05d}.jsonl").open("a+b") as file:
        if file.tell() and not _ends_a_line(file):
            file.write(b"\n")
        for picture in tqdm(mine, desc=by.name, unit="picture", disable=rank > 0):
            image = read_picture(picture.path)
            record = {"picture": picture.name} | verdict(image, by(image[None])[0], picture.metadata, by)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
    return read_records(output), whole


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


# -------------------------------------------------------------------------------------------------------- scoring


def standard_error(correct: Sequence[bool]) -> float:
    """Of a share, by the Wilson interval's half width at one sigma: not 0 when all are right.

    Pictures count as independent. For a fixed set of prompts that is on the safe side: only the noise varies.
    """
    n, share = len(correct), sum(correct) / len(correct)
    return (share * (1 - share) / n + 1 / (4 * n * n)) ** 0.5 / (1 + 1 / n)


def scores(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """GenEval's summary with a standard error for each task and for their mean, ``error``."""
    records = list(records)
    summary = summarize(records)
    errors = {t: standard_error([r["correct"] for r in records if r["tag"] == t]) for t in summary["tasks"]}
    total = sum(error * error for error in errors.values()) ** 0.5 / len(errors)
    return summary | {"errors": errors, "error": total}
