"""A file beside float on labelled images: ranks, pairs and classes on arrays whose figures are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ptq4vit_fx.export.proof.against_float import Share
from ptq4vit_fx.tools.neighbours import alone, neighbours, vectors_of
from ptq4vit_fx.tools.scores import ClassScore, Evaluation, classes_of, pair_of, ranks, retrieved, score_of


def test_ranks_of_the_right_class():
    logits = np.array([[3, 2, 1], [3, 2, 1], [1, 1, 1], [1, 1, 1], [np.nan, 2, 1], [np.inf, 2, 1]], np.float32)
    found = ranks(logits, np.array([0, 2, 0, 2, 1, 0]))
    assert found.tolist() == [0, 2, 0, 2, 3, 0]
    assert ((found == 0) == (logits.argmax(1) == [0, 2, 0, 2, 1, 0])).all()


def test_ranks_agree_with_argmax_on_random_logits():
    generator = np.random.default_rng(0)
    logits, labels = generator.integers(0, 4, (500, 7)).astype(np.float32), generator.integers(0, 7, 500)
    assert ((ranks(logits, labels) == 0) == (logits.argmax(1) == labels)).all()


def test_top5_is_of_more_classes_than_that():
    rank = np.array([0, 4, 5, 0])
    assert score_of(rank, 6).top5 == Share(3, 4)
    assert score_of(rank, 5).top5 is None
    assert score_of(rank, 6).top1 == Share(2, 4)


def test_a_pair_has_the_error_of_the_differences():
    rank, float_rank = np.array([0, 0, 1, 1, 0, 1, 2, 0]), np.array([0, 0, 0, 0, 1, 1, 0, 0])
    pair = pair_of(rank, float_rank, same=4)
    differences = [0, 0, -1, -1, 1, 0, -1, 0]
    assert (pair.gained, pair.lost, pair.same) == (1, 3, Share(4, 8))
    assert pair.difference == pytest.approx(-0.25)
    variance = sum((d + 0.25) ** 2 for d in differences) / 7
    assert pair.error == pytest.approx(math.sqrt(variance / 8))
    assert "difference -25.00 points, standard error 25.00: 3 images right in float alone, 1 in the file" in str(pair)
    assert math.isnan(pair_of(rank[:1], float_rank[:1], 1).error)


def test_classes_that_lose_most_come_first():
    rank, float_rank, labels = np.array([0, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 0]), np.array([2, 2, 0, 1, 1])
    found = classes_of(rank, float_rank, labels, ["cat", "dog"])
    assert found == (ClassScore("cat", 1, 0, 1), ClassScore("2", 2, 1, 2), ClassScore("dog", 2, 2, 1))
    score, pair = score_of(rank, 3), pair_of(rank, float_rank, 2)
    report = Evaluation(5, (), score, score_of(float_rank, 3), pair, found)
    lines = report.lines(per_class=True)
    assert lines[0] == "top-1 60.00% of 5 images, 0 skipped"
    assert lines[-3:] == (
        "2 of 3 classes lose",
        "cat: -100.0 points, 0 of 1 right, float 1",
        "2: -50.0 points, 1 of 2 right, float 2",
    )
    assert json.loads(json.dumps(report.to_dict()))["pair"]["lost"] == 2


def test_neighbours_are_those_of_a_whole_table(monkeypatch):
    monkeypatch.setattr("ptq4vit_fx.tools.neighbours.ROWS", 7)
    generator = np.random.default_rng(0)
    vectors, labels = generator.normal(size=(40, 5)), generator.integers(0, 6, 40)
    vectors[3] = vectors[11]  # the same picture twice
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = units @ units.T
    np.fill_diagonal(similar, -np.inf)
    order = np.argsort(-similar, axis=1, kind="stable")[:, :-1]
    same = labels[order] == labels[:, None]
    rank, first = neighbours(vectors, labels)
    assert first.tolist() == order[:, 0].tolist()
    assert rank.tolist() == np.where(same.any(1), same.argmax(1), 40).tolist()
    assert neighbours(vectors * generator.uniform(1, 9, (40, 1)), labels)[0].tolist() == rank.tolist()


def test_embeddings_of_images_that_are_alone_do_not_count():
    labels = np.array([0, 0, 1, 2, 2])
    mine = np.array([[1, 0.0], [1, 0.1], [0, 1], [-1, 0], [1, 0]])
    assert alone(labels).tolist() == [False, False, True, False, False]
    found = retrieved(mine, None, labels, ["a", "b", "c"], ())
    assert (found.images, found.alone) == (4, 1)
    assert found.score is not None
    assert found.score.top1 == Share(1, 4)  # an equal one of another class is the nearest of the first
    assert found.lines()[0] == "recall@1 25.00% of 4 images, 0 skipped: the nearest other is of its class"
    both = retrieved(mine, np.abs(mine), labels, ["a", "b", "c"], ())
    assert both.cosine == pytest.approx((1 + 1 + 1 - 1 + 1) / 5)
    assert json.loads(json.dumps(both.to_dict()))["kind"] == "embeddings"
    assert retrieved(mine[1:3], None, labels[1:3], ["a", "b"], ()).score is None


def test_an_embedding_is_one_vector_per_image():
    assert vectors_of(np.ones((2, 5, 3))).shape == (2, 3)
    assert vectors_of(np.ones((2, 3, 4, 4))).shape == (2, 3)
    assert vectors_of(np.ones((2, 7))).shape == (2, 7)
