"""Each rule of the contract kit: a task that keeps them all passes, and each way to break one is told as such."""

from __future__ import annotations

import functools
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.testing import (
    CHECKS,
    TINY_BACKBONES,
    ContractError,
    TaskCase,
    check_task,
    compare_with_one,
    parity,
    run_check,
    run_two_processes,
)

sys.path.insert(0, str(Path(__file__).parent))  # for `broken_tasks`, in spawned processes too

import broken_tasks as tasks

RULES = {check.__name__: check for check in CHECKS}

BROKEN = [
    ("task_and_settings_are_documented", tasks.NoDocstring, "NoDocstring has no docstring; its first line is what"),
    ("task_and_settings_are_documented", tasks.BareSetting, "no docstring under strongest; say what it is"),
    ("unknown_settings_are_refused", tasks.LooseSettings, "an unknown setting is accepted silently"),
    ("views_pickle_and_have_fixed_shapes", tasks.LambdaViews, r"the views do not pickle \(.*make them an instance of"),
    (
        "views_pickle_and_have_fixed_shapes",
        tasks.with_views(tasks.AsTheyCome),
        r"views\['image'\] depends on the image",
    ),
    (
        "views_pickle_and_have_fixed_shapes",
        tasks.with_views(tasks.WithOwnGenerator),
        r"views\['angle'\] differs under the same seed",
    ),
    ("views_pickle_and_have_fixed_shapes", tasks.with_views(tasks.Darkening), "write into the image; work on a copy"),
    ("views_pickle_and_have_fixed_shapes", tasks.with_views(tasks.Floats), "no view is uint8; give images as uint8"),
    ("views_pickle_and_have_fixed_shapes", tasks.with_views(tasks.Numbered), "give an 'index'; choose another name"),
    ("views_pickle_and_have_fixed_shapes", tasks.with_views(tasks.ByteLabels), r"a uint8 view has shape \(2,\); give"),
    ("loss_is_a_finite_float32_scalar", tasks.Raises, "AttributeError: 'StepOutput' object has no attribute"),
    ("loss_is_a_finite_float32_scalar", tasks.Pair, r"forward returned tuple; return StepOutput\(loss, logs\)"),
    ("loss_is_a_finite_float32_scalar", tasks.PerImage, r"the loss has shape \(4,\); return its mean over"),
    ("loss_is_a_finite_float32_scalar", tasks.Double, r"the loss is torch.float64; compute it from .float\(\) tensors"),
    ("loss_is_a_finite_float32_scalar", tasks.NotANumber, "the loss is nan; look for a logarithm"),
    ("loss_is_a_finite_float32_scalar", tasks.NoGraph, r"the loss has no graph; compute it outside torch.no_grad"),
    ("logs_and_features_are_detached", tasks.FloatLog, r"logs\['mean'\] is a float; give a tensor"),
    ("logs_and_features_are_detached", tasks.GraphLog, r"logs\['mean'\] still has its graph; call .detach\(\)"),
    ("logs_and_features_are_detached", tasks.VectorLog, r"logs\['mean'\] has shape \(2,\); give a scalar tensor"),
    ("logs_and_features_are_detached", tasks.LossLog, "logs has a 'loss'; leave it out"),
    ("logs_and_features_are_detached", tasks.FlatFeatures, r"features have shape \(4,\); give \(N, D\)"),
    ("logs_and_features_are_detached", tasks.GraphFeatures, r"features still have their graph; call .detach\(\)"),
    (
        "every_trainable_parameter_gets_a_gradient",
        tasks.Spare,
        r"no gradient for spare.weight, spare.bias; freeze what",
    ),
    ("every_trainable_parameter_gets_a_gradient", tasks.Zeroed, "the gradient of shift stays zero; use it in the loss"),
    ("parameter_groups_are_complete", tasks.Forgetful, r"head.bias is in no group; yield every parameter"),
    ("parameter_groups_are_complete", tasks.Twice, "head.bias is in several groups; yield each parameter once"),
    ("parameter_groups_are_complete", tasks.TooDeep, r" in 99, .* more; layers go from 0 \(stem\) to 3 \(heads\)"),
    ("randomness_comes_from_draw", tasks.DrawsInForward, "forward draws something that draw does not return; take it"),
    (
        "randomness_comes_from_draw",
        tasks.PythonsRandom,
        "the same seed gives a different loss; draw from torch's global",
    ),
    ("randomness_comes_from_draw", tasks.DrawsItsOwn, r"forward alone and .* differ; when a keyword is None"),
    ("randomness_comes_from_draw", tasks.OneForAll, r"draw\['factor'\] does not have one row per image; draw \(B, "),
    ("randomness_comes_from_draw", tasks.AlwaysTheSame, r"draw\['factor'\] is the same for eight seeds; draw from tor"),
    ("halves_of_a_batch_add_up", tasks.Compares, r"the mean loss of the halves is .*or set per_image = False"),
    ("bfloat16_stays_close", tasks.Coarse, r"the loss is .* under autocast, .* without; compute targets"),
    ("bfloat16_stays_close", tasks.LowLoss, "the loss is torch.bfloat16 under autocast; compute targets"),
    (
        "state_dict_is_complete",
        tasks.OutsideOfState,
        "a task with the same state dict gives a different loss; what differs",
    ),
    ("state_dict_is_complete", tasks.OtherNames, r"the state dict does not load \(.*register the same names"),
    ("state_moves_in_after_step_only", tasks.CountsInForward, r"forward changes count; a step may have several"),
    ("state_moves_in_after_step_only", tasks.CountsInEvaluation, "a pass in eval mode changes count; change state in"),
    ("state_moves_in_after_step_only", tasks.StashesInEvaluation, r"eval mode before after_step changes count; keep"),
    ("state_moves_in_after_step_only", tasks.MovesNothing, "after_step changes nothing in the state dict; remove it"),
    (
        "a_resumed_run_is_the_same_run",
        tasks.CountsOutside,
        r"after step 3, teacher.weight, teacher.bias differs",
    ),
    ("a_resumed_run_is_the_same_run", tasks.OutsideOfState, r"the loss of step 3 is .*, after a resume .*register_buf"),
    ("encoder_loads_into_timm", tasks.BareEncoder, r"encoder\(\) gives VisionTransformer; return the Backbone"),
    ("encoder_loads_into_timm", tasks.ChangedBackbone, "does not load it .*extra.weight.* put new layers outside"),
    ("encoder_loads_into_timm", tasks.OtherFeatures, "gives other features; put new layers outside self.backbone"),
    ("visualize_gives_images", tasks.ShowsNothing, "visualize gives nothing; show what the loss compares"),
    ("visualize_gives_images", tasks.ShowsFloats, r"visualize\['first'\] is torch.float32 \(3, 32, 32\); give uint8"),
    ("visualize_gives_images", tasks.StaysInEval, "visualize leaves modules in a different mode; use .*modes_kept"),
    ("visualize_gives_images", tasks.MovesWhileShowing, "visualize changes count; call"),
    ("foreign_checkpoints_are_refused", tasks.TakesAnything, "load_reference accepts a foreign file; raise Che"),
]


@functools.cache
def backbone():
    name, arguments = TINY_BACKBONES[0]
    torch.manual_seed(0)
    return create_backbone(name, **arguments)


@pytest.mark.parametrize(("rule", "task", "message"), BROKEN, ids=[f"{rule}-{cls.__name__}" for rule, cls, _ in BROKEN])
def test_a_broken_rule_is_named_with_what_was_found_and_the_remedy(rule, task, message):
    case = TaskCase.of(task, backbone=backbone())
    with pytest.raises(ContractError, match=message) as caught:
        run_check(RULES[rule], case)
    assert str(caught.value).startswith(f"{task.__name__} breaks '{rule.replace('_', ' ')}': ")
    assert "\n" not in str(caught.value)


def test_every_rule_can_be_broken():
    assert {rule for rule, _, _ in BROKEN} == RULES.keys()


@pytest.mark.parametrize("number", range(2))
def test_a_task_that_keeps_every_rule_passes(number):
    name, arguments = TINY_BACKBONES[number]
    check_task(tasks.Brightness, backbone=create_backbone(name, **arguments), settings={"strongest": 1.5})


def test_check_task_takes_a_name_and_finds_a_backbone(monkeypatch):
    cases = []
    monkeypatch.setattr("unlabeled.testing.check.CHECKS", (cases.append,))
    monkeypatch.setattr("unlabeled.testing.check.run_check", lambda check, case: check(case))
    check_task("rotation", settings={"angles": 2})
    check_task("spark")
    check_task("convmae")
    assert [case.backbone.name for case in cases] == [name for name, _ in TINY_BACKBONES]
    assert cases[0].config.angles == 2


def test_the_first_broken_rule_ends_the_check():
    with pytest.raises(AssertionError, match="NoDocstring breaks 'task and settings are documented'"):
        check_task(tasks.NoDocstring, backbone=backbone())


def test_what_cannot_be_checked_is_said():
    with pytest.raises(ContractError, match=r"Impossible: no tiny backbone has sparse_convs, token_dropping; give one"):
        check_task(tasks.Impossible)
    with pytest.raises(ContractError, match=r"Brightness: settings: strength: there is no such setting"):
        check_task(tasks.Brightness, settings={"strength": 1})
    with pytest.raises(ConfigError, match="'rotatoin' is not a pretext task; did you mean 'rotation'"):
        check_task("rotatoin")


def test_a_network_of_ones_own_need_not_be_timms():
    own = create_backbone("test_resnet", size=32)
    own.name = "custom"
    run_check(RULES["encoder_loads_into_timm"], TaskCase.of(tasks.Brightness, backbone=own))


def test_dropout_and_batch_norm_of_the_backbone_are_no_fault_of_the_task():
    dropping = create_backbone("test_vit", size=32, drop_rate=0.5, drop_path_rate=0.5)
    run_check(RULES["randomness_comes_from_draw"], TaskCase.of(tasks.Brightness, backbone=dropping))
    normed = TaskCase.of(tasks.Brightness, backbone=create_backbone("test_resnet", size=32))
    for rule in ("halves_of_a_batch_add_up", "state_moves_in_after_step_only", "a_resumed_run_is_the_same_run"):
        run_check(RULES[rule], normed)


def test_random_state_is_as_before():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    run_check(RULES["views_pickle_and_have_fixed_shapes"], TaskCase.of(tasks.Brightness, backbone=backbone()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.slow
def test_two_processes_tell_what_spans_the_ranks(monkeypatch):
    # forks of a process that has imported torch; the contract tests of the tasks spawn theirs, as users do
    monkeypatch.setattr(parity, "spawn", functools.partial(start_processes, start_method="forkserver"))
    names = (tasks.Brightness, tasks.Centered, tasks.AlwaysTheSame)
    good, centered, fixed = (TaskCase.of(task, backbone=backbone()) for task in names)
    found = run_two_processes([good, centered, fixed])
    compare_with_one(good, found[0])
    with pytest.raises(
        ContractError, match=r"the loss is .* in one process, .* in two; what is compared .*gather_across_ranks"
    ):
        compare_with_one(centered, found[1])
    with pytest.raises(ContractError, match=r"draw\['factor'\] is the same on both ranks; draw from torch's global"):
        compare_with_one(fixed, found[2])


def test_the_page_names_every_rule_and_shows_the_example_as_it_is():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "how-to" / "own-task.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")}
    assert {rule.replace("_", " ") for rule in RULES} <= rows
    source = (root / "examples/unlabeled-jigsaw/unlabeled_jigsaw/task.py").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page.split("## The example")[1].split("## State")[0], flags=re.DOTALL)
    assert len(shown) == 5
    assert all(bare(block) in bare(source) for block in shown)
    assert len(source.splitlines()) < 110


def bare(code):
    """Its lines without indentation and blank ones, which formatting changes."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())
