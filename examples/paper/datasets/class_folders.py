"""A folder of the user's in which every class has a folder of pictures."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .photographs import ImageList
from .pictures import SUFFIXES, copy_small

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there
_SHOWN = 3
_Labeled = dict[Path, str]  # pictures and their classes


@dataclass(frozen=True)
class ClassFolders:
    """What was found in a folder.

    Args:
        classes: names, in alphabetical order; the first is class 0.
        train: pictures for training, those for validation among them.
        test: pictures for the test.
        left_out: what was not used, a sentence for each kind or file.
    """

    classes: tuple[str, ...]
    train: ImageList
    test: ImageList
    left_out: tuple[str, ...]


def read_class_folders(
    root: Path,
    copies: Path,
    *,
    side: int,
    least: int = 3,
    test_share: float = 0.2,
    workers: int = 2,
    show_progress: bool = True,
) -> ClassFolders:
    """Reads ``root/CLASS/**/picture``, or ``root/train/CLASS/**`` beside ``root/test/CLASS/**``.

    A picture is decoded once; its small copy is what is read from then on. What cannot be used is
    left out, and named: files that cannot be read, pictures that are there twice or in several
    classes, classes of too few. Names that begin with a dot are passed over.

    Args:
        root: the folder.
        copies: where copies go.
        side: the shorter side of a copy in pixels.
        least: how many pictures for training make a class.
        test_share: the part of each class that is for the test, where no folder says it. Which
            pictures these are depends on their names alone.
        workers: how many threads decode.
        show_progress: whether there is a progress bar.

    Raises:
        FileNotFoundError: if there is no such folder, or no two classes in it.
    """
    train, test, left_out = _find(root)
    targets = {
        picture: copies / str(side) / f"{picture.relative_to(root)}.png"
        for picture in [*train, *test]
    }
    bad = copy_small(targets, side, workers, show_progress=show_progress)
    left_out += bad.values()
    groups = _same({x: target for x, target in targets.items() if x not in bad})
    train, test, repeated = _once(groups, train, test)
    left_out += repeated
    if not test:
        train, test = _split(root, train, test_share)
    classes, few = _classes(train, test, least)
    left_out += few
    if len(classes) < 2:
        told = "".join(f"\n  {x}" for x in left_out)
        raise FileNotFoundError(
            f"{root}: expected two classes or more, each a folder of {least} pictures for training "
            f"and one for the test; got {len(classes)}. Left out:{told or ' nothing'}"
        )

    def part(labeled: _Labeled) -> ImageList:
        chosen = [x for x in sorted(labeled) if labeled[x] in classes]
        labels = tuple(classes.index(labeled[x]) for x in chosen)
        return ImageList(tuple(targets[x] for x in chosen), labels)

    return ClassFolders(tuple(classes), part(train), part(test), tuple(left_out))


def _find(root: Path) -> tuple[_Labeled, _Labeled, list[str]]:
    """Returns the pictures for training and for the test, and what else there is."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: expected a folder with a folder of pictures for each class; got no folder. "
            "Check the path."
        )
    names = {path.name.lower(): path for path in _folders(root)}
    train = [names[x] for x in _TRAIN if x in names]
    test = [names[x] for x in _TEST if x in names]
    others: Counter[str] = Counter()
    if not (train and test):
        found = _pictures(root, others)
        return found, {}, _told(others)
    used = (train[0], test[0])
    unused = [f"{x}: it is neither {used[0].name} nor {used[1].name}." for x in _folders(root)]
    left_out = [x for x, path in zip(unused, _folders(root), strict=True) if path not in used]
    return _pictures(train[0], others), _pictures(test[0], others), left_out + _told(others)


def _folders(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))


def _pictures(folder: Path, others: Counter[str]) -> _Labeled:
    """Returns the pictures in the folders of a folder; counts other files by their suffix."""
    found: _Labeled = {}
    for of_class in _folders(folder):
        for path in _files(of_class):
            if path.suffix.lower() in SUFFIXES:
                found[path] = of_class.name
            else:
                others[path.suffix.lower() or path.name] += 1
    for path in folder.iterdir():
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            others["in no class folder"] += 1
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        yield from (Path(place, x) for x in sorted(names) if not x.startswith("."))


def _told(others: Mapping[str, int]) -> list[str]:
    if not others:
        return []
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return [f"Files that are no pictures of a class: {kinds}."]


def _same(copies: Mapping[Path, Path]) -> list[list[Path]]:
    """Groups pictures of the same pixels; only files of one size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for picture, copy in copies.items():
        by_size[copy.stat().st_size].append(picture)
    groups: dict[object, list[Path]] = defaultdict(list)
    for size, pictures in by_size.items():
        for x in pictures:
            key = hashlib.sha256(copies[x].read_bytes()).digest() if len(pictures) > 1 else size
            groups[key].append(x)
    return list(groups.values())


def _once(
    groups: Iterable[list[Path]], train: _Labeled, test: _Labeled
) -> tuple[_Labeled, _Labeled, list[str]]:
    """Keeps one of each picture, that for the test if there is; none that has several classes."""
    labels = {**train, **test}
    kept: dict[bool, _Labeled] = {True: {}, False: {}}
    repeated: list[Path] = []
    unclear: list[Path] = []
    for group in groups:
        if len({labels[x] for x in group}) > 1:
            unclear += group
            continue
        first = next((x for x in group if x in test), group[0])
        kept[first in test][first] = labels[first]
        repeated += [x for x in group if x != first]
    told = [
        ("the same picture is there once more", repeated),
        ("it is in several classes", unclear),
    ]
    left_out = [f"{_some(paths)}: {why}." for why, paths in told if paths]
    return kept[False], kept[True], left_out


def _some(paths: list[Path]) -> str:
    shown = ", ".join(map(str, paths[:_SHOWN]))
    return shown + f" and {len(paths) - _SHOWN} others" * (len(paths) > _SHOWN)


def _split(root: Path, train: _Labeled, share: float) -> tuple[_Labeled, _Labeled]:
    """Takes a part of each class for the test: those whose names have the smallest digests."""
    by_class: dict[str, list[Path]] = defaultdict(list)
    for path, label in train.items():
        by_class[label].append(path)

    def digest(path: Path) -> bytes:
        return hashlib.sha256(
            path.relative_to(root).as_posix().encode(errors="surrogateescape")
        ).digest()

    test: _Labeled = {}
    for label, paths in by_class.items():
        count = max(1, round(share * len(paths)))
        test.update(dict.fromkeys(sorted(paths, key=digest)[:count], label))
    return {x: label for x, label in train.items() if x not in test}, test


def _classes(train: _Labeled, test: _Labeled, least: int) -> tuple[list[str], list[str]]:
    """Returns the classes that have enough pictures, and what is to be said of the others."""
    counts, tests = Counter(train.values()), Counter(test.values())
    names = sorted(counts.keys() | tests.keys())
    classes = [x for x in names if counts[x] >= least and tests[x]]
    return classes, [
        f"Class {x}: {counts[x]} pictures for training, {tests[x]} for the test."
        for x in names
        if x not in classes
    ]
