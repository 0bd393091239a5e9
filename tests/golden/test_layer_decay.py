"""Layers, rate multipliers and weight decay of MAE's and SimMIM's fine-tuning, parameter by parameter."""

from __future__ import annotations

import pytest

from unlabeled.ssl.backbones.layer_index import block_layers, count_blocks, decay_applies, layer_scale


@pytest.mark.parametrize("model", ["mae_vit", "simmim_vit", "simmim_swin"])
def test_official_names_give_official_numbers(golden, model):
    pair = golden("layer_decay")
    settings, parameters = pair.config[model], pair.meta["parameters"][model]
    rule = "swin" if "swin" in model else "finetune"
    names = [parameter["name"] for parameter in parameters]

    depth = count_blocks(names)
    layers = block_layers(names)
    scales = [layer_scale(layer, depth, settings["layer_decay"]) for layer in layers]
    decays = [settings["weight_decay"] * decay_applies(p["name"], p["shape"], rule) for p in parameters]

    assert depth == settings.get("encoder_depth", sum(settings.get("stage_depths", [])))
    for parameter, layer, scale, decay in zip(parameters, layers, scales, decays, strict=True):
        assert layer == parameter["layer"], parameter["name"]
        assert scale == pytest.approx(parameter["lr_scale"], rel=1e-12), parameter["name"]
        assert decay == pytest.approx(parameter["weight_decay"], rel=1e-12), parameter["name"]
    assert layers == pair[f"expect/{model}_layer"].tolist()
    assert scales == pytest.approx(pair[f"expect/{model}_lr_scale"].tolist(), rel=1e-6)
    assert decays == pytest.approx(pair[f"expect/{model}_weight_decay"].tolist(), rel=1e-6)
    assert len(set(zip(layers, decays, strict=True))) == pair[f"expect/{model}_group_count"].item()
