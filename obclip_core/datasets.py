"""Captions and reference pictures of the paper's two public data sets, from the layouts in which people have them."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COCO_IMAGES, COCO_CAPTIONS, COCO_30K = 40_504, 202_654, 30_000
MJHQ_PROMPTS, MJHQ_CATEGORIES = 30_000, 10
# Digests that others have published for the same files, by file name. The files without one are named by their SHA-256.
KNOWN = {
    "annotations_trainval2014.zip": "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    "captions_val2014.json": "md5:41a3e90178948b2ba004175080277e35",
}
MEMBER = "annotations/captions_val2014.json"


@dataclass(frozen=True)
class Captions:
    """Captions of a data set in a fixed order, each with its id and, where the pictures are there, its picture.

    `sha256` is that of the file they were read from, so that a result can name the copy it used.
    """

    name: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    pictures: tuple[Path, ...] = ()
    categories: tuple[str, ...] = ()
    sha256: str = ""

    def __post_init__(self) -> None:
        n = len(self.ids)
        if n == 0:
            raise ValueError(f"{self.name} has no captions: expected at least one")
        for what in ("texts", "pictures", "categories"):
            found = len(getattr(self, what))
            if found not in ((n,) if what == "texts" else (0, n)):
                raise ValueError(f"{self.name} has {n} ids but {found} {what}: expected one each")
        if len(set(self.ids)) < n:
            twice = next(i for i in self.ids if self.ids.count(i) > 1)
            raise ValueError(f"{self.name} has the id {twice!r} twice: expected each once")
        for one, text in zip(self.ids, self.texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.name} has no text for {one!r}: expected a caption")

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, n: int, seed: int = 0) -> Captions:
        """Return n captions drawn without replacement, in their old order; equally many of each category, if any."""
        if not 1 <= n <= len(self):
            raise ValueError(f"{n} captions asked of the {len(self)} of {self.name}: expected 1 to {len(self)}")
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(len(self))
        if self.categories:
            # the j-th drawn of each category goes before the (j + 1)-th of any
            turn, seen = {}, dict.fromkeys(self.categories, 0)
            for i in drawn:
                turn[i], seen[self.categories[i]] = seen[self.categories[i]], seen[self.categories[i]] + 1
            drawn = sorted(drawn, key=turn.__getitem__)
        return self._at(sorted(int(i) for i in drawn[:n]))

    def only(self, category: str) -> Captions:
        """Return the captions of one category."""
        if category not in self.categories:
            known = ", ".join(sorted(set(self.categories))) or "none"
            raise ValueError(f"{self.name} has no category {category!r}: expected one of {known}")
        return self._at([i for i, c in enumerate(self.categories) if c == category])

    def _at(self, rows: Sequence[int]) -> Captions:
        parts = {what: tuple(getattr(self, what)[i] for i in rows) for what in ("ids", "texts")}
        for what in ("pictures", "categories"):
            parts[what] = tuple(getattr(self, what)[i] for i in rows) if getattr(self, what) else ()
        return replace(self, **parts)


def coco(folder: str | Path, *, check: bool = True) -> Captions:
    """Return the captions of MS-COCO 2014 val, one a picture: the one with the lowest annotation id.

    `folder` is the archive ``annotations_trainval2014.zip`` or a folder with one of

    - ``annotations/captions_val2014.json`` or ``captions_val2014.json``, as unpacked from it;
    - ``annotations_trainval2014.zip``;
    - ``metadata.csv`` (file name, caption), the 30,000 prompts that the authors of BK-SDM published.

    Pictures are looked for in ``val2014``, ``images/val2014``, ``images`` and the folder itself, and are optional. With
    `check`, counts and the published digest must be right. ValueError for anything else, naming what was found.
    """
    folder = _there(folder, "MS-COCO 2014 val")
    if folder.is_file() and folder.suffix == ".zip":
        file, folder = folder, folder.parent
    else:
        names = (MEMBER, "captions_val2014.json", "annotations_trainval2014.zip", "metadata.csv")
        file = _first(folder, names, "MS-COCO 2014 val")
    if file.name == "metadata.csv":
        rows = _metadata(file)
        if check:
            _count(file, "captions", len(rows), COCO_30K)
    else:
        rows = _annotations(file, check)
    digest = _digest(file, check)
    places = [folder / part for part in ("val2014", "images/val2014", "images", ".")]
    pictures = _pictures([name for name, _ in rows], places)
    ids = tuple(Path(name).stem for name, _ in rows)
    return Captions("coco-2014-val", ids, tuple(text for _, text in rows), pictures, sha256=digest)


def mjhq(folder: str | Path, *, check: bool = True) -> Captions:
    """Return the prompts of MJHQ-30K with their category, in the order of ``meta_data.json``.

    Pictures are looked for as ``<category>/<id>.jpg`` and ``<id>.jpg`` in ``mjhq30k_imgs``, ``imgs``, ``images`` and
    the folder itself, and are optional. With `check`, there must be 30,000 prompts in 10 equal categories. The paper
    uses 5,000: ``mjhq(folder).sample(5000, seed)`` takes 500 a category.
    """
    folder = _there(folder, "MJHQ-30K")
    if folder.is_dir() and not (folder / "meta_data.json").is_file() and list(folder.glob("**/*.parquet")):
        raise ValueError(
            f"{folder} has MJHQ-30K's parquet files, which hold no prompts: put meta_data.json beside them"
        )
    file = folder if folder.is_file() else _first(folder, ("meta_data.json",), "MJHQ-30K")
    table = _json(file)
    if not isinstance(table, dict) or not all(
        isinstance(e, dict) and {"category", "prompt"} <= set(e) for e in table.values()
    ):
        raise ValueError(f"{file} is not MJHQ-30K's: expected {{id: {{category, prompt}}}}")
    categories = tuple(entry["category"] for entry in table.values())
    if check:
        _count(file, "prompts", len(table), MJHQ_PROMPTS)
        _count(file, "categories", len(set(categories)), MJHQ_CATEGORIES)
        each = MJHQ_PROMPTS // MJHQ_CATEGORIES
        for category in dict.fromkeys(categories):
            _count(file, f"prompts of {category}", categories.count(category), each)
    places = [file.parent / part for part in ("mjhq30k_imgs", "imgs", "images", ".")]
    names = [f"{entry['category']}/{one}.jpg" for one, entry in table.items()]
    pictures = _pictures(names, places) or _pictures([f"{one}.jpg" for one in table], places)
    texts = tuple(entry["prompt"] for entry in table.values())
    return Captions("mjhq-30k", tuple(table), texts, pictures, categories, _digest(file, check))


def pictures(captions: Captions, size: int, batch: int = 64) -> Iterator[Tensor]:
    """Yield the captions' pictures as (up to batch, 3, size, size) in [0, 1]: centre square, resized bicubically."""
    if not captions.pictures:
        raise ValueError(f"{captions.name} was read without pictures: put them beside the captions")
    for start in range(0, len(captions), batch):
        yield torch.stack([_picture(path, size) for path in captions.pictures[start : start + batch]])


def _picture(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): fetch it again") from error
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def _there(folder: str | Path, name: str) -> Path:
    if not Path(folder).exists():
        raise ValueError(f"no {name} at {folder}: download it beforehand and give its folder")
    return Path(folder)


def _first(folder: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} is not {what}: expected one of {', '.join(names)} in it")


def _json(file: Path, member: str = "") -> object:
    try:
        if member:
            with zipfile.ZipFile(file) as archive:
                return json.loads(archive.read(member))
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read ({error}): fetch it again") from error


def _annotations(file: Path, check: bool) -> list[tuple[str, str]]:
    """Return (file name, caption with the lowest annotation id) in the order of picture ids."""
    table = _json(file, MEMBER if file.suffix == ".zip" else "")
    if not isinstance(table, dict) or not {"images", "annotations"} <= set(table):
        raise ValueError(f"{file} is not a caption file of MS-COCO: expected images and annotations in it")
    names = {image["id"]: image["file_name"] for image in table["images"]}
    if check:
        _count(file, "pictures", len(names), COCO_IMAGES)
        _count(file, "captions", len(table["annotations"]), COCO_CAPTIONS)
    first: dict[int, tuple[int, str]] = {}
    for note in table["annotations"]:
        if note["image_id"] not in names:
            raise ValueError(
                f"{file} has a caption of picture {note['image_id']}, which it does not list: fetch it again"
            )
        if note["image_id"] not in first or note["id"] < first[note["image_id"]][0]:
            first[note["image_id"]] = (note["id"], " ".join(note["caption"].split()))
    return [(names[image], first[image][1]) for image in sorted(first)]


def _metadata(file: Path) -> list[tuple[str, str]]:
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))[1:]
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError(f"{file} is not a list of file name and caption: expected two columns under a heading")
    return [(row[0], row[1].strip()) for row in rows]


def _pictures(names: Sequence[str], places: Sequence[Path]) -> tuple[Path, ...]:
    """Return the picture of each name from the first place that has any; ValueError where that place lacks some."""
    for place in places:
        found = [place / name for name in names]
        lacking = [path for path in found if not path.is_file()]
        if len(lacking) < len(found):
            if lacking:
                raise ValueError(
                    f"{place} lacks {len(lacking)} of {len(found)} pictures, {lacking[0].name} first: fetch them"
                )
            return tuple(found)
    return ()


def _count(file: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{file} has {found} {what}, expected {expected}: fetch it again, or pass check=False if it is meant"
        )


def _digest(file: Path, check: bool) -> str:
    """Return the SHA-256 of a file; with check, ValueError where its published digest differs."""
    known = KNOWN.get(file.name, "") if check else ""
    kind, _, expected = known.partition(":")
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", kind or "sha256"}}
    with open(file, "rb") as data:
        while part := data.read(1 << 20):
            for digest in digests.values():
                digest.update(part)
    if expected and digests[kind].hexdigest() != expected:
        raise ValueError(
            f"{file} has {kind} {digests[kind].hexdigest()}, expected {expected}: fetch it again, or pass check=False "
            "if another copy is meant"
        )
    return digests["sha256"].hexdigest()
