"""Labelled images classified in pieces, by a file and by the float model beside it: here, or on workers."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ptq4vit_fx.calibrating.dispatch import answers
from ptq4vit_fx.calibrating.worker_state import worker_name, write_state
from ptq4vit_fx.data.pictures import check_float_shape
from ptq4vit_fx.data.preprocessing import transform_of
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.data.sources import open_images
from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.export.metadata import provenance
from ptq4vit_fx.export.proof.against_float import KINDS
from ptq4vit_fx.export.proof.outputs import fixed_batch
from ptq4vit_fx.export.proof.runtime import open_session
from ptq4vit_fx.files import scratch
from ptq4vit_fx.tools.class_labels import check_classes
from ptq4vit_fx.tools.classifiers import Array, embedding_in, file_outputs, float_outputs, logits_of
from ptq4vit_fx.tools.file_images import AS_RECORDED, image_channels, preprocessing_of_file
from ptq4vit_fx.tools.image_options import ImageOptions
from ptq4vit_fx.tools.named.kinds import absolute
from ptq4vit_fx.tools.named.model import Asked
from ptq4vit_fx.tools.neighbours import vectors_of
from ptq4vit_fx.tools.scores import ranks

#: So many batches are classified as a piece, which is what a worker is given at a time.
BATCHES = 16


@dataclass(frozen=True)
class Question:
    """What `eval` is asked of which files; others on other machines read them under the same paths.

    model: whose preprocessing to use instead of the one that the file records, by a name as for `quantize`. against:
    the float model, which sees the same images. kind: what the output is, None for what the file says; of embeddings
    each image is looked for among the others. options: what of the preprocessing is to be another.
    """

    file: Path
    data: Path
    model: str | None = None
    batch_size: int = 16
    against: Asked | None = None
    kind: str | None = None
    options: ImageOptions = AS_RECORDED

    def absolute(self) -> Question:
        """Return the same question with the paths in it absolute: a worker runs in another folder."""
        against = self.against
        if against is not None:
            weights = None if against.weights is None else against.weights.absolute()
            against = replace(against, name=absolute(against.name), weights=weights)
        model = None if self.model is None else absolute(self.model)
        return replace(self, file=self.file.absolute(), data=self.data.absolute(), model=model, against=against)


@dataclass(frozen=True)
class Shard:
    """What both give of some images: their numbers, ranks and first classes, or embeddings (images, ...)."""

    numbers: list[int]
    mine: list[Array]
    theirs: list[Array]
    skipped: list[str]
    classes: int


class Opened:
    """The files of a question, opened: images are numbered as the folder lists them."""

    def __init__(self, question: Question, threads: int = 0) -> None:
        """Open them; threads: of the runtime, 0 lets it choose.

        Raises PTQError if no preprocessing is known, or if the file takes something else than images.
        """
        self.question = question
        self.reference = None if question.against is None else float_outputs(question.against, question.file)
        session = open_session(question.file, threads=threads)
        self.channels = image_channels(session, question.file, "eval")
        self.runs = file_outputs(session, question.file)
        self.embedding = embedding_in(_shapes(session), _kind(session, question.file, question.kind))
        self.folder = open_images(question.data, labelled=True)
        config = preprocessing_of_file(session, question.file, question.model, options=question.options)
        check_float_shape(self.folder, tuple(config["input_size"]), question.data)
        self.transform = transform_of(config)
        self.batch = fixed_batch("eval", str(question.file), session) or question.batch_size

    @property
    def pieces(self) -> list[range]:
        """The numbers of the images, cut into pieces of whole batches."""
        count, length = len(self.folder.items), BATCHES * self.batch
        return [range(start, min(start + length, count)) for start in range(0, count, length)]

    def shard(self, piece: range, show: Callable[[int], None] = lambda images: None) -> Shard:
        """Classify some of the images; show: is told how many of them are done.

        Raises PTQError if the number of sub-folders is not the number of classes (unless these are named by class
        number), and on outputs that are not the float model's.
        """
        labels, skipped = np.asarray(self.folder.labels), list[str]()
        found = Shard([], [], [], skipped, 0)
        pictures = [self.folder.items[number] for number in piece]
        for places, pixels in _batches(read_images(pictures, self.transform, skipped, self.channels), self.batch):
            numbers = [piece[place] for place in places]
            own, beside = self.runs(pixels), None if self.reference is None else self.reference(pixels)
            if self.embedding is not None:
                mine, theirs = _vectors(self.embedding, own, beside)
            else:
                logits, others = self._logits(own, beside)
                mine = _in_short(logits, labels[numbers])
                theirs = None if others is None else _in_short(others, labels[numbers])
                found = replace(found, classes=logits.shape[1])
            found.numbers.extend(numbers)
            found.mine.append(mine)
            if theirs is not None:
                found.theirs.append(theirs)
            show(places[-1] + 1)
        return found

    def _logits(self, own: Mapping[str, Array], beside: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        logits = logits_of(own, str(self.question.file))
        check_classes(self.folder, logits.shape[1], self.question.data)
        others = None if beside is None else logits_of(beside, "--against")
        if others is not None and others.shape != logits.shape:
            expected, do = f"logits of the shape {logits.shape}, as the file's", "pass the model of the file"
            raise failure("eval", "--against", expected=expected, got=str(others.shape), do=do)
        return logits, others


@dataclass(frozen=True)
class SharedQuestion:
    """What every worker has; call: of no other call, since the files may be others behind the same paths."""

    question: Question
    call: str

    @cached_property
    def opened(self) -> Opened:
        """The files, opened once on each worker, with as many threads as it has for torch."""
        return Opened(self.question, torch.get_num_threads())


@dataclass(frozen=True)
class ShardTask:
    """Classify one piece of `total` images."""

    piece: range
    total: int

    def __str__(self) -> str:
        return f"images {self.piece.start} to {self.piece.stop - 1}"

    def __call__(self, shared: SharedQuestion) -> tuple[int, Shard]:
        """Run on a worker; return the number of the first image, and what came out."""
        there = len(shared.opened.folder.items)
        if there != self.total:
            expected, do = f"{self.total} images, as the client", "give all machines the same files under one path"
            subject = f"{shared.question.data} on worker {worker_name()}"
            raise failure("eval", subject, expected=expected, got=str(there), do=do)
        return self.piece.start, shared.opened.shard(self.piece)


def shards_elsewhere(
    question: Question, pieces: Sequence[range], total: int, executor: Executor
) -> Iterator[tuple[int, Shard]]:
    """Yield the number of the first image of each piece, and what comes out there, as workers finish.

    Raises PTQError as `answers`, and on a worker whose path has another number of images than `total`.
    """
    with scratch("eval", 0) as folder:
        file = write_state(SharedQuestion(question.absolute(), uuid.uuid4().hex), folder / "state.pt", "eval")
        for answer in answers(executor, file, [ShardTask(piece, total) for piece in pieces], "eval"):
            yield answer.value


def _kind(session: onnxruntime.InferenceSession, file: Path, kind: str | None) -> str | None:
    """Return what the output is, as the user says it, else as the file records it; raises PTQError on no kind."""
    if kind is not None and kind not in KINDS:
        raise unknown_name("eval", "--output-kind", kind, KINDS)
    said = provenance(session.get_modelmeta().custom_metadata_map, "eval", str(file)).get("output")
    return kind or (said if said in KINDS else None)


def _shapes(session: onnxruntime.InferenceSession) -> dict[str, Array]:
    """Return name -> an empty array of as many dimensions, of each output."""
    return {entry.name: np.empty([0] * len(entry.shape)) for entry in session.get_outputs()}


def _vectors(name: str, own: Mapping[str, Array], beside: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
    """Return the embeddings of a file and of the model beside it; raises PTQError if they have other sizes."""
    mine = vectors_of(own[name])
    if beside is None:
        return mine, None
    other = embedding_in(beside, "embeddings") if name not in beside else name
    theirs = vectors_of(beside[other]) if other is not None else np.empty(0)
    if theirs.shape != mine.shape:
        expected, do = f"embeddings of the shape {mine.shape}", "pass the model that it was made from"
        raise failure("eval", "--against", expected=expected, got=str(theirs.shape), do=do)
    return mine, theirs


def _in_short(logits: Array, labels: Array) -> Array:
    """Return the rank of the right class and the first class of each image, (images, 2)."""
    return np.stack([ranks(logits, labels), logits.argmax(1)], axis=1)


def _batches(items: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[list[int], Array]]:
    while batch := list(itertools.islice(items, size)):
        numbers, tensors = zip(*batch, strict=True)
        yield list(numbers), np.stack([tensor.numpy() for tensor in tensors])
