"""Accuracy of an ONNX file on labelled images, by itself and beside the float model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from ptq4vit_fx.inputs.progress import UnderWay
from ptq4vit_fx.tools.class_labels import class_names, warn_of_empty
from ptq4vit_fx.tools.classifiers import Array
from ptq4vit_fx.tools.phases import CLASSIFY, Phases
from ptq4vit_fx.tools.scores import Evaluation, classified, retrieved
from ptq4vit_fx.tools.shards import Opened, Question, Shard, shards_elsewhere
from ptq4vit_fx.torch_state import independent_of_caller


@independent_of_caller()
def evaluate_file(question: Question, phases: Phases, executor: Executor | None = None) -> Evaluation:
    """Classify every image of a question, which are labelled, with the preprocessing that the file records.

    phases: shows how many images are done. executor: any of `concurrent.futures`, whose workers classify pieces of the
    images; what is counted of each image does not depend on which worker it was. Raises PTQError as `Opened`, its
    shards and `shards_elsewhere` do. Warns (PTQWarning) of sub-folders without images.
    """
    opened = Opened(question)
    warn_of_empty(opened.folder, question.data)
    total = len(opened.folder.items)
    found: dict[int, Shard] = {}
    answers: Iterator[tuple[int, Shard]]
    with phases(CLASSIFY):
        if executor is None:
            answers = (
                (one.start, opened.shard(one, partial(_show, phases, one.start, total))) for one in opened.pieces
            )
        else:
            answers = shards_elsewhere(question, opened.pieces, total, executor)
        for start, shard in answers:
            found[start] = shard
            _show(phases, 0, total, sum(len(one.numbers) + len(one.skipped) for one in found.values()))
    shards = [found[start] for start in sorted(found)]
    skipped = tuple(name for shard in shards for name in shard.skipped)
    images = [number for shard in shards for number in shard.numbers]
    if not images:
        return Evaluation(0, skipped)
    labels = np.asarray(opened.folder.labels)[images]
    mine, theirs = (_joined([x for shard in shards for x in getattr(shard, side)]) for side in ("mine", "theirs"))
    if opened.embedding is not None:
        return retrieved(mine, theirs, labels, list(opened.folder.classes), skipped)
    classes = max(shard.classes for shard in shards)
    return classified(mine, theirs, labels, class_names(opened.folder, classes), skipped, classes)


def _show(phases: Phases, before: int, total: int, done: int) -> None:
    phases.show(UnderWay(CLASSIFY, before + done, total))


def _joined(batches: Sequence[Array]) -> Any:
    return np.concatenate(batches) if batches else None
