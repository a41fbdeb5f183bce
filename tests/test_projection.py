"""The loss of outputs that have no classes: its squared gradient is the squared change of the output's direction."""

from __future__ import annotations

import pytest
import torch

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating.losses import get_loss, has_logits, loss_values, projection


def test_squared_gradients_are_those_of_the_direction():
    torch.manual_seed(0)
    output = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    values = loss_values(projection(0, draws=4000), output, 3)
    found = sum(torch.autograd.grad(value, output, retain_graph=True)[0] ** 2 for value in values) / len(values)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x: x / x.norm(), output.detach()[row])
        assert torch.allclose(found[row], (jacobian**2).sum(0), rtol=0.15)


def test_every_tensor_of_an_output_counts_and_a_zero_one_is_finite():
    tokens, pooled = torch.randn(2, 5, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    numbers = {"last_hidden_state": tokens, "pooler_output": pooled, "size": torch.tensor([3, 3])}
    values = loss_values(get_loss("projection", 0), numbers, 2)
    gradients = torch.autograd.grad(sum(values[1:], values[0]), [tokens, pooled])
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)
    again = loss_values(get_loss("projection", 0), numbers, 2)
    assert torch.equal(torch.stack(values), torch.stack(again))
    with pytest.raises(ptq.PTQError, match="expected floats"):
        projection()(torch.tensor([1, 2]))


def test_what_has_logits():
    assert has_logits(torch.randn(2, 3))
    assert has_logits({"logits": torch.randn(2, 3), "hidden": torch.randn(2, 3)})
    assert not has_logits({"last_hidden_state": torch.randn(2, 5, 4), "pooler_output": torch.randn(2, 4)})
    assert not has_logits(torch.randn(2, 1))
