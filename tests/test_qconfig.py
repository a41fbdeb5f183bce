"""QConfigMapping: torch.ao's precedence, and rules that match nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ptq4vit_fx as ptq

A, B, C, D = (ptq.QConfig(activation=ptq.Uniform(bits)) for bits in (8, 7, 6, 5))


def test_later_kinds_refine_earlier_ones_whatever_the_order_of_calls():
    mapping = (
        ptq.QConfigMapping()
        .set_module_name("blocks.1.mlp", D)
        .set_module_name_regex(r"blocks\.\d+\.mlp", C)
        .set_object_type(nn.Linear, B)
        .set_global(A)
    )
    expected = {
        ("blocks.1.mlp.fc1", "linear"): D,
        ("blocks.10.mlp.fc1", "linear"): C,
        ("blocks.1.attn.proj", "linear"): B,
        ("patch_embed.proj", "conv2d"): A,
    }
    for (name, kind), qconfig in expected.items():
        assert mapping.resolve(name, kind)[0] is qconfig


def test_the_longest_name_wins_and_none_leaves_a_product_float(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit().set_module_name("blocks.0", None).set_module_name("blocks.0.mlp", A)
    said = (
        r"^4 products stay float, listed in plan.float_ops: blocks.0.attn.qkv, blocks.0.attn.matmul_qk, "
        r"blocks.0.attn.matmul_av and 1 more \(left float by module name 'blocks.0'\)$"
    )
    with pytest.warns(ptq.PTQWarning, match=said) as warned:
        plan = ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan
    assert len(warned) == 1
    names = [op.name for op in plan.ops]
    assert "blocks.0.mlp.fc1" in names
    assert not [name for name in names if name.startswith("blocks.0.attn")]
    assert {op.name for op in plan.float_ops} == {
        f"blocks.0.attn.{name}" for name in ("qkv", "matmul_qk", "matmul_av", "proj")
    }


@pytest.mark.parametrize(
    ("rule", "key", "near"),
    [
        ("set_module_name", "blocks.0.attn.qvk", "blocks.0.attn.qkv"),
        ("set_module_name_regex", "block.*qvk", "near names"),
    ],
)
def test_a_rule_that_matches_nothing_lists_near_names(small_vit, small_images, rule, key, near):
    mapping = getattr(ptq.recipes.ptq4vit(), rule)(key, None)
    with pytest.raises(ptq.PTQError, match=f"QConfigMapping.{rule}.*{near}"):
        ptq.prepare_fx(small_vit, mapping, small_images[:1])


@pytest.mark.parametrize("recipe", [ptq.recipes.base_ptq, ptq.recipes.ptq4vit])
@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_recipes_refuse_bits_out_of_range(recipe, bits):
    with pytest.raises(ptq.PTQError, match="expected an integer from 2 to 8"):
        recipe(bits, 8)
    with pytest.raises(ptq.PTQError, match="expected an integer from 2 to 8"):
        recipe(8, bits)


def test_unknown_object_types_and_broken_patterns_are_refused():
    with pytest.raises(ptq.PTQError, match=r"expected one of nn\.Linear, nn\.Conv2d, torch\.matmul"):
        ptq.QConfigMapping().set_object_type(torch.add, A)
    with pytest.raises(ptq.PTQError, match="expected a regular expression"):
        ptq.QConfigMapping().set_module_name_regex("(", A)


def test_a_recipe_without_twins_has_none_and_the_same_products(small_vit, small_images):
    plans = [
        ptq.prepare_fx(small_vit, ptq.recipes.ptq4vit(twins=twins), small_images[:1]).plan
        for twins in ("exact", "uniform")
    ]
    exact, uniform = plans
    twins = {site for site, quantizer in exact.quantizers.items() if isinstance(quantizer, ptq.TwinUniform)}
    assert len(twins) == 4
    assert exact.ops == uniform.ops
    for site, quantizer in uniform.quantizers.items():
        assert isinstance(quantizer, ptq.Uniform)
        assert site in twins or quantizer == exact.quantizers[site]
