"""Images beside annotations: each in a file of its own, or in one tar a group.

::

    images/00000/000000000.jpg    files: named by the sample's key alone
    00000_images.jsonl            files: of each of the group's images uid, name, bytes, sha256
    00000.tar                     shards: as the WebDataset export writes it

The list of a group's images is in the manifest, as every other file, and says what they are. It is taken away before
the first of them changes and written after the last one: images without a list are of nobody knows whom.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pairmill.export import jsonl, tar
from pairmill.export.folder import TEMPORARY, Folder, Sink, Written
from pairmill.export.selection import ENDINGS
from pairmill.export.tar import Damaged

IMAGES = "images"
"""The folder of image files; in it is one for each group."""

_LIST = re.compile(r"(\d{5,12})_images\.jsonl")
_GROUP = re.compile(r"\d{5,12}")
_NAME = re.compile(rf"[0-9a-z_-]{{1,64}}\.(?:{'|'.join(ENDINGS.values())})")


def list_name(number: int) -> str:
    """The name of the list of a group's images."""
    return f"{number:05d}_images.jsonl"


def folder_name(number: int) -> str:
    """The name of the folder of a group's images."""
    return f"{IMAGES}/{number:05d}"


def is_list(name: str) -> bool:
    """Whether a file lists images."""
    return _LIST.fullmatch(name) is not None


@dataclass(frozen=True)
class Image:
    """An image file of a group."""

    uid: str
    name: str
    bytes: int
    sha256: str


class Images:
    """The images of a group while they are written.

    Args:
        ending: Of all image files; null: that of the image's format.
    """

    def __init__(self, ending: str | None = None) -> None:
        self._ending = ending
        self.written: list[Written] = []
        """Files that stand beside the main one; known when all images are there."""

    def add(self, row: dict[str, Any], image: pa.Buffer | None) -> str:  # noqa: ARG002 (nowhere to put it)
        """Write the image of a metadata row; what annotations call it."""
        return self._name(row)

    def _name(self, row: dict[str, Any]) -> str:
        """The name of a metadata row's image: key and ending."""
        return f"{row['key']}.{self._ending or ENDINGS[row['format']]}"


@contextlib.contextmanager
def writing(folder: Folder, number: int, where: str | None, ending: str | None = None) -> Iterator[Images]:
    """Write the images of a group as files (``files``), as a tar (``shards``) or not at all; `ending` is that of all
    image files, where it is not that of the image's format."""
    if where == "files":
        with _as_files(folder, number, ending) as images:
            yield images
    elif where == "shards":
        with _as_tar(folder, number) as images:
            yield images
    else:
        yield Images(ending)


@contextlib.contextmanager
def _as_files(folder: Folder, number: int, ending: str | None) -> Iterator[Images]:
    clear(folder, number)
    inside = folder_name(number)
    folder.make(inside)
    images = _Files(folder, inside, ending)
    yield images
    folder.settle_files(f"{inside}/{image.name}" for image in images.there)
    folder.settle(inside)
    folder.settle(IMAGES)
    images.written = [write_list(folder, number, images.there)]


class _Files(Images):
    def __init__(self, folder: Folder, inside: str, ending: str | None) -> None:
        super().__init__(ending)
        self._folder = folder
        self._inside = inside
        self.there: list[Image] = []

    def add(self, row: dict[str, Any], image: pa.Buffer | None) -> str:
        name = self._name(row)
        assert image is not None and _NAME.fullmatch(name), name
        with self._folder.create(f"{self._inside}/{name}", settled=False) as sink:
            sink.write(image)
        done = sink.written(name)
        self.there.append(Image(row["uid"], name, done.bytes, done.sha256))
        return f"{self._inside}/{name}"


@contextlib.contextmanager
def _as_tar(folder: Folder, number: int) -> Iterator[Images]:
    name = f"{number:05d}.tar"
    with folder.create(name) as archive:
        images = _Tar(archive)
        yield images
        tar.end(archive)
    images.written = [archive.written(name)]


class _Tar(Images):
    def __init__(self, archive: Sink) -> None:
        super().__init__()
        self._archive = archive

    def add(self, row: dict[str, Any], image: pa.Buffer | None) -> str:
        assert image is not None
        tar.add_sample(self._archive, {name: row[name] for name in row if name != "conversations"}, image)
        return self._name(row)


def write_list(folder: Folder, number: int, images: Collection[Image]) -> Written:
    """Write the list of a group's images."""
    with folder.create(list_name(number)) as sink:
        for image in images:
            jsonl.write(sink, image.uid, {"name": image.name, "bytes": image.bytes, "sha256": image.sha256})
    return sink.written(list_name(number))


def read_list(folder: Folder, number: int) -> list[Image]:
    """The list of a group's images.

    Raises:
        Damaged: it is no such list.
        FileNotFoundError: it is not there.
    """
    found = []
    with folder.open(list_name(number)) as file:
        for uid, record in jsonl.records(file):
            try:
                image = Image(uid, **record)
            except TypeError as error:
                raise Damaged(f"it is no list of images: {error}") from error
            if not isinstance(image.name, str) or not _NAME.fullmatch(image.name):
                raise Damaged(f"it names an image {image.name!r}")
            found.append(image)
    return found


def whole(folder: Folder, number: int, *, read: bool) -> bool:
    """Whether a group's list and all that it lists are there: by their sizes or, if images are to be `read`, bytes."""
    try:
        listed = read_list(folder, number)
    except (Damaged, FileNotFoundError):
        return False
    inside = folder_name(number)
    sizes = folder.sizes(inside)
    if any(sizes.get(image.name) != image.bytes for image in listed):
        return False
    return not read or all(folder.look(f"{inside}/{image.name}").sha256 == image.sha256 for image in listed)


def groups(folder: Folder) -> list[int]:
    """The numbers of groups that have a folder of images."""
    return sorted(int(name) for name in folder.sizes(IMAGES) if _is_group(name))


def names(folder: Folder, number: int) -> list[str]:
    """Names of a group's image files, of unfinished ones too."""
    return [n for n in folder.sizes(folder_name(number)) if _NAME.fullmatch(n.removesuffix(TEMPORARY))]


def _is_group(name: str) -> bool:
    return _GROUP.fullmatch(name) is not None and folder_name(int(name)) == f"{IMAGES}/{name}"


def clear(folder: Folder, number: int) -> None:
    """Remove a group's images, its list first."""
    folder.remove(list_name(number))
    folder.settle()  # so that not even a power cut brings it back beside other images
    inside = folder_name(number)
    for name in names(folder, number):
        folder.remove(f"{inside}/{name}")
    folder.remove_folder(inside)
    folder.remove_folder(IMAGES)


def remove_unlisted(folder: Folder, number: int) -> None:
    """Remove those of a group's images that its list does not know; all of them, if there is no whole list."""
    try:
        listed = {image.name for image in read_list(folder, number)}
    except (Damaged, FileNotFoundError):
        clear(folder, number)
        return
    for name in names(folder, number):
        if name not in listed:
            folder.remove(f"{folder_name(number)}/{name}")


def sweep(folder: Folder, listed: Collection[int]) -> None:
    """Remove the images of all groups but those whose images are `listed`."""
    for number in groups(folder):
        if number not in listed:
            clear(folder, number)


def foreign(folder: Folder) -> list[str]:
    """Whatever stands among images and is none, by its path."""
    found = []
    for name in folder.sizes(IMAGES):
        if not _is_group(name):
            found.append(f"{IMAGES}/{name}")
            continue
        ours = {*names(folder, int(name))}
        found += [f"{IMAGES}/{name}/{other}" for other in folder.sizes(f"{IMAGES}/{name}") if other not in ours]
    return found
