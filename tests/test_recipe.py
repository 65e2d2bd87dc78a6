"""Recipes: what is accepted, and that every complaint names the key, the line and the nearest name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool import recipe
from qtool.errors import RecipeError


@pytest.mark.parametrize("name", sorted(recipe.available()))
def test_ready_recipes_load(name: str) -> None:
    assert recipe.load(name).steps


def test_presets_are_ready_recipes() -> None:
    assert recipe.preset("gptq").method == "asymmetric+gptq+refine"
    assert recipe.preset("gptq-fast").method == "gptq+refine"
    assert recipe.preset("rtn").method == "rtn"


@pytest.mark.parametrize("text, words", [
    ("bitss: 4", ["unknown key 'bitss'"]),
    ("scheme: {bit: 4}", ["scheme.bit", "did you mean 'bits'"]),
    ("name: x\nscheme:\n  bits: 9\n", ["scheme.bits", "line 3", "9"]),
    ("scheme: {bits: 1}", ["scheme.bits", "1"]),
    ("scheme: {group_size: 100}", ["group_size", "multiple of 8"]),
    ("name: x\nrules:\n- {match: '*', group_size: 0}", ["rules.0.group_size", "line 3", "multiple of 8"]),
    ("budget: {bits: 4, schemes: [{group_size: 7}]}", ["budget.schemes.0.group_size", "multiple of 8"]),
    ("steps: gptq", ["steps"]),
    ("steps: []", ["steps"]),
    ("steps: [{gptq: {}, refine: {}}]", ["one name"]),
    ("- a\n- b", ["mapping"]),
    ("scheme: {outlier_threshold: 5.0}", ["activations: outliers", "leave it out"]),
    ("scheme: {activations: outliers, outlier_threshold: -1}", ["scheme.outlier_threshold", "-1"]),
    ("scheme: {activations: outliers, outlier_threshold: .inf}", ["scheme.outlier_threshold", "inf"]),
    ("a: &x [1]\nb: *x", ["aliases"]),
    ("name: a\nname: b", ["twice", "line 2"]),
    ("!!python/object/apply:os.system ['true']", ["YAML"]),
    ("rules: [{match: '*', bitz: 4}]", ["bitz", "did you mean 'bits'"]),
    ("calibration: {samples: 0}", ["calibration.samples"]),
    ("budget: {bits: 3, size: 4GB}", ["budget", "one of the two"]),
    ("budget: {size: lots}", ["budget.size", "4.2GB"]),
    ("budget: {bits: 3, schemes: [{bit: 4}]}", ["bit"]),
    ("name: [", ["YAML"]),
])
def test_wrong_recipes_say_why(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, "r.yaml")
    for word in ["r.yaml", *words]:
        assert word in str(caught.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        recipe.preset("gtpq")
    with pytest.raises(RecipeError, match="did you mean 'gptq-int4'"):
        recipe.load("gptq-int")
    with pytest.raises(RecipeError, match="does not exist"):
        recipe.load("nowhere.yaml")


def test_overrides() -> None:
    base = recipe.preset("gptq")
    changed = recipe.override(base, {"scheme.bits": 3, "steps.gptq.damping": 0.05})
    assert changed.scheme.bits == 3
    assert changed.steps[1]["gptq"]["damping"] == 0.05
    assert base.scheme.bits == 4
    with pytest.raises(RecipeError, match="no step 'awq'"):
        recipe.override(base, {"steps.awq.x": 1})
    with pytest.raises(RecipeError, match="key=value"):
        recipe.parse_setting("scheme.bits")


def test_rules_first_match_wins() -> None:
    made = recipe.parse("rules: [{match: '*.down_proj', bits: 8}, {match: '*.mlp.*', skip: true}]", "r")
    assert made.scheme_for("model.layers.0.mlp.down_proj")[0].bits == 8
    assert made.scheme_for("model.layers.0.mlp.up_proj") == (None, 1)
    assert made.scheme_for("model.layers.0.self_attn.q_proj")[0].bits == 4


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    try:
        recipe.parse(text, "fuzz")
    except RecipeError as error:
        assert "fuzz" in str(error)


def test_a_rule_without_outliers_needs_no_threshold() -> None:
    made = recipe.parse("scheme: {activations: outliers, outlier_threshold: 4.5}\n"
                        "rules: [{match: '*.down_proj', activations: token}]", "r.yaml")
    assert made.scheme_for("a.up_proj")[0] == made.scheme and made.scheme.outlier_threshold == 4.5
    scheme, rule = made.scheme_for("a.down_proj")
    assert rule == 0 and scheme is not None and scheme.activations == "token"


@pytest.mark.parametrize(("given", "bits", "size"), [
    ("3.5", 3.5, None), ("{bits: 4}", 4.0, None), ("4.2GB", None, 4_200_000_000), ("{size: 1.5 MiB}", None, 3 << 19),
    ("{size: 1000}", None, 1000), ("'3.25'", 3.25, None), ("250 kB", None, 250_000),
])
def test_budgets_are_bits_or_bytes(given: str, bits: float | None, size: int | None) -> None:
    budget = recipe.parse(f"budget: {given}", "x.yaml").budget
    assert budget is not None and (budget.bits, budget.size) == (bits, size)


@pytest.mark.parametrize(("text", "words"), [
    ("seed: 0x" + "f" * 5000, "seed"), ("seed: " + "9" * 30, "seed"), ("memory_budget_gb: .inf", "finite"),
    ("shard_gb: .nan", "finite"), ("budget: .inf", "finite"), ("scheme: {outlier_threshold: .nan}", "finite"),
])
def test_numbers_that_are_none(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        recipe.parse(text, "r.yaml")
    assert len(str(caught.value)) < 1000
