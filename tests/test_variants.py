import pytest

from janus.dola.variants import parse_variant, parse_variants, variant_name


@pytest.mark.parametrize(
    ("spec", "values", "name"),
    [
        ("baseline", {"use_dola": False}, "baseline"),
        ("baseline,cfg=3", {"use_dola": False, "cfg_weight": 3.0}, "baseline_cfg3"),
        ("apc", {"gamma": 0.0}, "apc"),
        ("apc,alpha=0.5", {"gamma": 0.0, "alpha": 0.5}, "apc_alpha0.5"),
        ("dola", {}, "dola"),
        ("layer=6", {"layer": 6}, "layer6"),
        ("dola,layer=6", {"layer": 6}, "layer6"),
        ("alpha=0.5,layer=4", {"layer": 4, "alpha": 0.5}, "layer4_alpha0.5"),
        ("layer=7, gamma=0.50", {"layer": 7, "gamma": 0.5}, "layer7_gamma0.5"),
        ("exit=2,4,6", {"candidate_layers": (2, 4, 6)}, "exit2-4-6"),
        ("exit=2,4,alpha=0.2,temperature=0.7", {"candidate_layers": (2, 4), "alpha": 0.2, "temperature": 0.7},
         "exit2-4_alpha0.2_temperature0.7"),
        ("layer=6,norm=off", {"layer": 6, "norm": False}, "layer6_normoff"),
        ("ratio=0.5,order=contrast_first", {"layer_ratio": 0.5, "cfg_order": "contrast_first"},
         "ratio0.5_ordercontrast_first"),
        ("gamma=-1e-3", {"gamma": -0.001}, "gamma-0.001"),
    ],
)  # fmt: skip
def test_a_spec_sets_the_keywords_it_names_and_has_one_name_however_it_is_spelled(spec, values, name):
    assert parse_variant(spec) == values and variant_name(values) == name


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["layer=x"], "variant 'layer=x': layer must be a whole number, got 'x'"),
        (["exit=2,4,x"], "exit must be layers as 2,4,6, got '2,4,x'"),
        (["exit="], "exit must be layers as 2,4,6, got ''"),
        (["norm=maybe"], "norm must be on or off, got 'maybe'"),
        (["order=last"], "order must be guide_first or contrast_first"),
        (["lyaer=6"], "'lyaer' is none of baseline, apc, dola, layer,"),
        (["layer=6,7"], "'7' is none of"),
        (["layer=6,baseline"], "'baseline' is none of"),
        ([""], "'' is none of"),
        (["layer=6,layer=7"], "'layer' is given twice"),
        (["layer=6,exit=2"], "give one of layer, ratio, exit"),
        (["baseline,alpha=0.2"], "the baseline has no alpha"),
        (["apc,gamma=1"], "apc is gamma=0"),
        (["layer=6", "dola,layer=6"], "variant 'dola,layer=6' is given twice"),
    ],
)
def test_a_bad_spec_is_named_with_what_was_expected(specs, message):
    with pytest.raises(ValueError) as error:
        parse_variants(specs)
    assert message in str(error.value) and "\n" not in str(error.value)
