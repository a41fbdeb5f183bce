"""QConfigMapping: torch.ao's precedence, and rules that match nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.quantizers import of_bits

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
    with warnings.catch_warnings():
        warnings.simplefilter("error", ptq.PTQWarning)
        plan = ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan
    assert {(op.reason, op.asked) for op in plan.float_ops} == {("left float by module name 'blocks.0'", True)}
    names = [op.name for op in plan.ops]
    assert "blocks.0.mlp.fc1" in names
    assert not [name for name in names if name.startswith("blocks.0.attn")]
    assert {op.name for op in plan.float_ops} == {
        f"blocks.0.attn.{name}" for name in ("qkv", "matmul_qk", "matmul_av", "proj")
    }


def test_what_no_rule_speaks_of_is_one_warning(small_vit, small_images):
    mapping = ptq.QConfigMapping().set_object_type(nn.Linear, A).set_module_name("head", None)
    said = (
        r"^5 products stay float, listed in plan.float_ops: patch_embed.proj, blocks.0.attn.matmul_qk, "
        r"blocks.0.attn.matmul_av and 2 more \(no rule of the QConfigMapping matches it\)$"
    )
    with pytest.warns(ptq.PTQWarning, match=said) as warned:
        plan = ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan
    assert len(warned) == 1
    assert [op.name for op in plan.float_ops if op.asked] == ["head"]


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


def bits_of(plan):
    """Return product -> bits of its two operands."""
    return {op.name: tuple(plan.quantizers[f"{op.name}:{side}"].bits for side in ("lhs", "rhs")) for op in plan.ops}


def test_other_bits_keep_the_method(small_vit, small_images):
    """Twins, granularities, rounding and transforms are those of the recipe: that of all 8 bits, read back to 4."""
    recipe = ptq.recipes.best(4, 4)
    mixed = recipe.with_bits("blocks.0.mlp", w=8, a=8).with_bits(["blocks.*.attn.matmul_av"], a=6)
    plans = [ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan for mapping in (recipe, mixed)]
    before, after = map(bits_of, plans)
    changed = {
        "blocks.0.mlp.fc1": (8, 8),
        "blocks.0.mlp.fc2": (8, 8),
        "blocks.0.attn.matmul_av": (6, 6),
        "blocks.1.attn.matmul_av": (6, 6),
    }
    assert after == before | changed
    assert before["patch_embed.proj"] == after["patch_embed.proj"] == (8, 4)  # the image keeps its bits
    for site, quantizer in plans[0].quantizers.items():
        assert of_bits(plans[1].quantizers[site], quantizer.bits) == quantizer
    assert plans[0].searches == plans[1].searches
    assert plans[0].transforms == plans[1].transforms == recipe.transforms
    assert recipe.changes == ()


def test_bits_of_the_image_are_its_data(small_vit, small_images):
    mapping = ptq.recipes.ptq4vit().with_bits("*", w=4, a=4)
    bits = bits_of(ptq.prepare_fx(small_vit, mapping, small_images[:1]).plan)
    assert bits.pop("patch_embed.proj") == (8, 4)
    assert set(bits.values()) == {(4, 4)}


def test_the_last_change_of_a_product_wins():
    mapping = (
        ptq.QConfigMapping().set_global(A).with_bits("blocks.*", w=4).with_bits("blocks.0", a=6).skipping("*.attn")
    )
    for name, expected in {
        "blocks.0.mlp.fc1": (4, 6),
        "blocks.10.mlp.fc1": (4, 8),
        "head": (8, 8),
        "blocks.0.attn.qkv": None,
    }.items():
        qconfig = mapping.resolve(name, "linear")[0]
        assert (qconfig and (qconfig.weight.bits, qconfig.activation.bits)) == expected
    again = mapping.with_bits("blocks.0.attn.qkv", w=5)
    assert again.resolve("blocks.0.attn.qkv", "linear")[0].weight.bits == 5
    assert again.resolve("blocks.0.attn.proj", "linear") == (None, "skip '*.attn'")


def test_copies_of_a_mapping_have_rules_of_their_own():
    first = ptq.QConfigMapping().set_global(A)
    for second in (first.with_bits("x", w=4), first.skipping("x"), first.with_transforms(rotation=0)):
        second.set_module_name("y", None)
    assert first.module_names == {}
    assert first.changes == ()


def test_skip_takes_patterns_and_is_no_warning(small_vit, small_images):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ptq.PTQWarning)
        plan = ptq.quantize(
            small_vit, torch.cat([small_images, small_images + 1]), skip=("blocks.?.attn", "head"), progress=False
        ).plan
    assert [op.name for op in plan.ops] == [
        "patch_embed.proj",
        *(f"blocks.{b}.mlp.fc{f}" for b in (0, 1) for f in (1, 2)),
    ]
    assert {op.reason for op in plan.float_ops} == {"left float by skip 'blocks.?.attn'", "left float by skip 'head'"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m.with_bits("blocks.*.mlp.fc3", w=8),
            r"^set bits: 'blocks\.\*\.mlp\.fc3': .*near names: blocks\.\d\.mlp",
        ),
        (lambda m: m.skipping("block.0"), r"^skip: 'block\.0': .*near names: blocks\.0"),
        (
            lambda m: m.skipping("head").set_module_name("blocks.0", None).with_bits("blocks.0", a=8),
            "which stays float",
        ),
    ],
)
def test_changes_of_nothing_are_refused(small_vit, small_images, change, said):
    with pytest.raises(ptq.PTQError, match=said):
        ptq.prepare_fx(small_vit, change(ptq.recipes.ptq4vit()), small_images[:1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.with_bits("head"), "expected w, a or both, got neither"),
        (lambda m: m.with_bits("head", w=9), "expected an integer from 2 to 8, got 9"),
        (lambda m: m.with_bits("head", a=True), "expected an integer from 2 to 8, got True"),
        (lambda m: m.with_bits([""], a=8), "expected names of products or modules"),
        (lambda m: m.skipping([1]), "expected names of products or modules"),
    ],
)
def test_changes_that_say_nothing_are_refused(call, said):
    with pytest.raises(ptq.PTQError, match=said):
        call(ptq.QConfigMapping())


@pytest.mark.parametrize("change", [{"attention": None}, {"norms": "half"}, {"gates": 2}, {"rotation": "0"}])
def test_transforms_refuse_what_is_no_exponent_or_seed(change):
    with pytest.raises(ptq.PTQError, match=rf"^Transforms: {next(iter(change))}: expected .* change that value"):
        ptq.QConfigMapping().with_transforms(**change)
