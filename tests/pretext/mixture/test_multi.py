"""Mixtures of tasks: the loss and its gradients are those of the single tasks, whatever these do to the backbone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unlabeled.pretext import registry
from unlabeled.pretext.common.positions import sincos_2d
from unlabeled.pretext.common.teacher import frozen_copy
from unlabeled.pretext.mixture.balance import Ramp, balanced, gradient_norms, split_images, weight_at
from unlabeled.pretext.mixture.mixture import MultiConfig
from unlabeled.pretext.mixture.multi import Multi
from unlabeled.pretext.registry import create_task, task_class, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core import registry as core_registry
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm2d
from unlabeled.ssl.task import PretextTask, StepOutput, TaskConfig
from unlabeled.workflows.pretrain import pretrain_config

VIT = {"name": "vit_tiny_patch16_224", "size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
RESNET = {"name": "resnet18", "size": 32, "channels": [8, 8, 16, 16], "output_stride": 8}
CONVNEXT = {"name": "convnextv2_atto", "size": 32, "patch_size": 1, "dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
MAE = {"name": "mae", "decoder": {"dim": 16, "depth": 1, "heads": 2}}
SPARK = {"name": "spark", "decoder": {"width": 16}}
FCMAE = {"name": "fcmae", "decoder": {"dim": 16}}
ROTATION = {"name": "rotation"}
SIMMIM = {"name": "simmim"}
DINO = {"name": "dino", "locals": 1, "local_size": 32, "head": {"prototypes": 16, "hidden": 16, "bottleneck": 8}}
BYOL = {"name": "byol", "hidden": 16, "dim": 8}
PAIRS = [
    pytest.param(VIT, [MAE, ROTATION], id="mae-rotation"),
    pytest.param(VIT, [ROTATION, MAE], id="rotation-mae"),
    pytest.param(RESNET, [SPARK, ROTATION], id="spark-rotation"),
    pytest.param(RESNET, [ROTATION, SPARK], id="rotation-spark"),
    pytest.param(VIT, [SIMMIM, ROTATION], id="simmim-rotation"),
    pytest.param(CONVNEXT, [FCMAE, ROTATION], id="fcmae-rotation"),
    pytest.param(VIT, [DINO, MAE], id="dino-mae"),
    pytest.param(RESNET, [ROTATION, BYOL], id="rotation-byol"),
    pytest.param(VIT, [MAE, SIMMIM, {"name": "mae", "mask_ratio": 0.5}], id="mae-simmim-mae"),
]


def backbone(arguments: dict[str, Any] = VIT, **changes: Any) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(**{**arguments, **changes})


def mixture(network: Backbone | dict[str, Any], tasks: list[Any], **settings: Any) -> Multi:
    network = network if isinstance(network, Backbone) else backbone(network)
    task = create_task({"name": "multi", "tasks": tasks, **settings}, network)
    assert isinstance(task, Multi)
    return task


def random_images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, 36, 40), generator=generator, dtype=torch.uint8) for _ in range(count)]


def batch_of(task: PretextTask, count: int = 4) -> dict[str, Tensor]:
    views = type(task).views(task.config, task.backbone)
    torch.manual_seed(2)
    rows = [views(drawn) for drawn in random_images(count)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def single(task: Multi, position: int) -> PretextTask:
    """The task at `position` as it stands alone, around a backbone of its own with the same weights."""
    label = task.config.labels()[position]
    part = task.config.tasks[position]
    alone = task_class(part.name)(part.settings, task.backbone.twin())
    state = task.state_dict()
    own = {name.removeprefix(f"tasks.{label}."): value for name, value in state.items() if f".{label}." in name}
    alone.load_state_dict({name: value for name, value in state.items() if name.startswith("backbone.")} | own)
    return alone.to(task.weights.dtype).train()


def of(label: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition("/")[2]: value for key, value in given.items() if key.partition("/")[0] == label}


# --- loss and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "tasks"), PAIRS)
def test_loss_and_gradients_are_the_weighted_sums_of_the_single_tasks(network, tasks):
    weights = [1.0, 0.25, 2.0][: len(tasks)]
    task = mixture(network, [{**one, "weight": weight} for one, weight in zip(tasks, weights, strict=True)]).double()
    batch = batch_of(task)
    draw = task.draw(batch)
    output = task(batch, **draw)
    output.loss.backward()
    expected: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for position, (label, weight) in enumerate(zip(task.config.labels(), weights, strict=True)):
        alone = single(task, position)
        found = alone(of(label, batch), **of(label, draw))
        found.loss.backward()
        total += weight * found.loss.detach()
        assert (output.logs[f"{label}/loss"] - found.loss).abs() < 1e-12
        assert all(torch.equal(output.logs[f"{label}/{key}"], value) for key, value in found.logs.items())
        for name, parameter in alone.named_parameters():
            if parameter.grad is not None:
                name = name if name.startswith("backbone.") else f"tasks.{label}.{name}"
                expected[name] = expected.get(name, torch.zeros(())) + weight * parameter.grad
    assert (output.loss - total).abs() < 1e-12
    trained = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    prescribed = {f"backbone.{name}" for one in task.tasks.values() for name in one.fixed()}
    assert trained.keys() == expected.keys() - prescribed
    for name, gradient in trained.items():
        assert (gradient - expected[name]).abs().max() <= 1e-12 * max(1.0, float(expected[name].abs().max())), name


def test_a_task_alone_and_in_a_mixture_sees_the_same_backbone_and_the_mixture_has_it_once():
    task = mixture(VIT, [MAE, ROTATION, MAE])
    assert list(task.tasks) == ["mae", "rotation", "mae_2"]
    assert all(one.backbone is task.backbone for one in task.tasks.values())
    names = list(task.state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "tasks", "weights"}
    assert not [name for name in names if name.startswith("tasks.") and "backbone" in name]
    assert len([id(module) for module in task.modules()]) == len({id(module) for module in task.modules()})
    other = copy.deepcopy(task)
    assert all(one.backbone is other.backbone for one in other.tasks.values())
    assert other.backbone is not task.backbone


# --- what the tasks do to the backbone -------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [[MAE, ROTATION], [ROTATION, MAE]])
def test_positions_that_mae_prescribes_stay_fixed_next_to_a_task_that_trains_them(tasks):
    task = mixture(VIT, tasks)
    table = task.backbone.model.pos_embed
    assert torch.equal(table, sincos_2d(16, (4, 4), 1))
    assert not table.requires_grad
    trained = mixture(VIT, [{**one, "positions": "backbone"} if one is MAE else one for one in tasks])
    assert trained.backbone.model.pos_embed.requires_grad


def test_what_any_task_trains_is_trained():
    """MAE alone leaves the attention that pools out; rotation reads it."""
    network = backbone(VIT, global_pool="map", class_token=False)
    alone = create_task(MAE, copy.deepcopy(network))
    assert not any(p.requires_grad for name, p in alone.named_parameters() if "attn_pool" in name)
    for tasks in ([MAE, ROTATION], [ROTATION, MAE]):
        task = mixture(copy.deepcopy(network), tasks)
        task(batch_of(task)).loss.backward()
        pooling = [p for name, p in task.named_parameters() if "attn_pool" in name]
        assert pooling
        assert all(p.requires_grad and p.grad is not None for p in pooling)
        assert all((p.grad is not None) == p.requires_grad for p in task.parameters())


def test_what_was_frozen_before_and_what_no_task_reaches_stays_frozen():
    network = backbone(RESNET)
    network.model.spare = torch.nn.Linear(2, 2)
    network.model.bn1.weight.requires_grad_(False)
    task = mixture(network, [SPARK, ROTATION])
    frozen = {name for name, parameter in task.backbone.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"bn1.weight", "spare.weight", "spare.bias"}


class Follower(PretextTask):
    """Compares features with those of a momentum teacher: what joint-embedding tasks do, as small as it gets."""

    synced_statistics = True
    per_image = False
    collapse_remedy = "raise the temperature"

    def __init__(self, config: TaskConfig, network: Backbone) -> None:
        super().__init__(config, network)
        self.train_only(network.reached_by_pooled())
        self.teacher = frozen_copy(network)
        self.seen: list[Any] = []

    @classmethod
    def views(cls, config: Any, network: Backbone) -> Any:
        return task_class("rotation").views(task_config({"name": "rotation"}), network)

    def forward(self, batch: Any) -> StepOutput:
        images = self.backbone.normalize(batch["image"])
        z = self.backbone.pooled(images)
        self.seen += [batch["index"].tolist()] if "index" in batch else []
        loss = (z - self.teacher.pooled(images) + 1).square().mean()
        logs = {"teacher_information": z.new_tensor(0.5), "channel_deviation": z.detach().std(0).mean()}
        return StepOutput(loss, logs, z.detach())

    def before_step(self, progress: float) -> None:
        self.seen.append(("before", progress))

    def after_step(self, progress: float) -> None:
        self.seen.append(("after", progress))


@pytest.fixture
def follower(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setitem(registry.TASKS, "follower", f"{__name__}:Follower")
    monkeypatch.setattr(core_registry.importlib, "import_module", _import)
    return {"name": "follower"}


def _import(name: str) -> Any:
    import importlib
    import sys

    return sys.modules[__name__] if name == __name__ else importlib.__import__(name, fromlist=["_"])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_teacher_is_a_copy_of_the_weights_that_training_starts_from(follower, order):
    """MAE reinitializes the backbone, also after a teacher was copied from it."""
    task = mixture(VIT, [[follower, MAE][position] for position in order])
    teacher = task.tasks["follower"].teacher
    assert all(map(torch.equal, teacher.parameters(), task.backbone.parameters()))
    task(batch_of(task)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())


def test_what_a_task_says_of_itself_is_combined(follower):
    task = mixture(VIT, [MAE, follower, follower])
    assert (task.synced_statistics, task.per_image, task.masked_statistics) == (True, False, False)
    assert task.collapse_remedy == "raise the temperature"
    assert task.requires == {"token_dropping"}
    output = task({**batch_of(task), "index": torch.arange(4)})
    assert output.features.shape == (4, 16)
    assert output.logs["teacher_information"] == output.logs["follower_2/teacher_information"] == 0.5
    deviations = [output.logs[f"{label}/channel_deviation"] for label in ("follower", "follower_2")]
    assert output.logs["channel_deviation"] == min(deviations) != max(deviations)
    task.before_step(0.25)
    task.after_step(0.5)
    called = [[0, 1, 2, 3], ("before", 0.25), ("after", 0.5)]
    assert task.tasks["follower"].seen == task.tasks["follower_2"].seen == called
    plain = mixture(VIT, [MAE, ROTATION])
    assert (plain.synced_statistics, plain.per_image) == (False, True)
    assert plain.collapse_remedy == PretextTask.collapse_remedy
    assert plain(batch_of(plain)).features is None


def test_images_that_a_curriculum_made_smaller_are_normalized_as_each_task_takes_them():
    """Rotation takes 0..1 values, SimMIM normalized ones."""
    task = mixture(RESNET, [ROTATION, {**SIMMIM, "mask_unit": 8}]).eval()
    assert task.float_images == "unit"
    assert task.size_step() == (8, 8)
    batch = batch_of(task)
    draw = task.draw(batch)
    floats = {name: value / 255 for name, value in batch.items()}
    exact, found = task(batch, **draw), task(floats, **draw)
    torch.testing.assert_close(found.loss, exact.loss)
    task.require_size((16, 16))
    with pytest.raises(ConfigError, match=r"task.tasks\[1\].mask_ratio: 0.6 leaves 0 of 1x1 cells visible"):
        task.require_size((8, 8))


def test_masked_statistics_are_found_in_the_settings():
    assert mixture(RESNET, [ROTATION, SPARK]).masked_statistics
    with_spark = task_config({"name": "multi", "tasks": [ROTATION, SPARK]})
    assert Multi.masks_statistics(with_spark)
    assert not Multi.masks_statistics(MultiConfig())
    assert task_class("spark").masks_statistics(with_spark.tasks[1].settings)


def test_the_defaults_need_what_the_class_says_and_are_those_of_the_recipe():
    parts = MultiConfig().tasks
    assert [(part.name, part.weight) for part in parts] == [("rotation", 1), ("simmim", 1)]
    assert Multi.requires == frozenset().union(*(task_class(part.name).requires for part in parts))
    assert task_config(pretrain_config(["task=multi"]).task) == MultiConfig()


# --- groups, views, images -----------------------------------------------------------------------------------------


def test_parameters_keep_the_labels_of_their_tasks_and_the_backbone_those_of_the_first():
    for first, second in ((MAE, ROTATION), (ROTATION, MAE)):
        task = mixture(VIT, [first, second])
        found = {named.name: (named.decay, named.layer) for named in task.parameter_groups()}
        labels = {}
        for position in (1, 0):
            label = task.config.labels()[position]
            for named in single(task, position).parameter_groups():
                prefix = "" if named.name.startswith("backbone.") else f"tasks.{label}."
                labels[prefix + named.name] = (named.decay, named.layer)
        labels.pop("backbone.model.pos_embed")  # rotation alone trains it
        assert found == labels
        assert found["backbone.model.norm.weight"][0] == (first is ROTATION)
        assert found["tasks.rotation.head.bias"] == (True, 3)


def test_views_are_those_of_each_task_of_the_same_image():
    network = backbone(VIT)
    config = task_config({"name": "multi", "tasks": [{**MAE, "crop_scale": [1, 1]}, {**ROTATION, "flip": 0}, MAE]})
    views = pickle.loads(pickle.dumps(Multi.views(config, network)))
    drawn = torch.zeros(3, 32, 32, dtype=torch.uint8)
    drawn[0] = 200
    seen = views(drawn)
    assert list(seen) == ["mae/image", "rotation/image", "mae_2/image"]
    assert {image.shape for image in seen.values()} == {(3, 32, 32)}
    assert all(image[0].max() == 200 and image[1:].max() == 0 for image in seen.values())


def test_draws_carry_the_name_of_their_task():
    task = mixture(VIT, [MAE, ROTATION, {"name": "mae", "mask_ratio": 0.5}])
    batch = batch_of(task)
    draw = task.draw(batch)
    assert {name: tuple(value.shape) for name, value in draw.items()} == {"mae/noise": (4, 16), "mae_2/noise": (4, 16)}
    changed = {**draw, "mae_2/noise": draw["mae_2/noise"].flip(1)}
    first, second = task(batch, **draw).logs, task(batch, **changed).logs
    assert torch.equal(first["mae/loss"], second["mae/loss"])
    assert not torch.equal(first["mae_2/loss"], second["mae_2/loss"])


def test_images_of_all_tasks_and_nothing_else_changes():
    task = mixture(RESNET, [SPARK, ROTATION])
    state = {name: value.clone() for name, value in task.state_dict().items()}
    task.backbone.model.layer1.eval()
    modes = [module.training for module in task.modules()]
    names = [name for name, _ in task.named_parameters()]
    found = task.visualize(batch_of(task))
    assert list(found) == ["spark/reconstruction", "rotation/rotations"]
    assert [module.training for module in task.modules()] == modes
    assert [name for name, _ in task.named_parameters()] == names
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


def test_the_log_reports_once_that_each_task_has_a_forward_pass_of_its_own(caplog):
    with caplog.at_level("INFO", logger="unlabeled.pretext.mixture.multi"):
        mixture(VIT, [MAE, ROTATION])
        assert [record.getMessage() for record in caplog.records] == [
            "multi: mae, rotation, each with its own views and so its own forward pass through "
            "vit_tiny_patch16_224, over all images"
        ]
        mixture(VIT, [{**MAE, "portion": 2}, ROTATION])
    assert "portion has no effect while each task sees all images; set task.batch=split" in caplog.text


# --- settings that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("mae", r"task.tasks: 'mae' is no list; write task.tasks=\[{name: mae, weight: 1}"),
        ([MAE], r"task.tasks: 1 of them make no mixture; give at least two"),
        ([MAE, 3], r"task.tasks\[1\]: 3 does not name a task; write {name: rotation, weight: 1}"),
        ([MAE, {"weight": 1}], r"task.tasks\[1\]: {'weight': 1} does not name a task"),
        ([MAE, "rotatoin"], r"^task.tasks\[1\]: 'rotatoin' is not a pretext task; did you mean 'rotation'\?$"),
        ([MAE, "multi"], r"task.tasks\[1\].name: a mixture cannot hold a mixture"),
        ([ROTATION, {"name": "mae", "mask_ratio": 2}], r"^task.tasks\[1\].mask_ratio: 2 is not possible; give less"),
        (
            [ROTATION, {"name": "mae", "mask_rato": 0.5}],
            r"^task.tasks\[1\].mask_rato: there is no such setting in task.tasks\[1\]; did you mean 'mask_ratio' or",
        ),
        (
            [{"name": "mae", "decoder": {"dmi": 8}}, ROTATION],
            r"^task.tasks\[0\].decoder.dmi: there is no such setting in task.tasks\[0\].decoder; did you mean 'dim'\?$",
        ),
        ([{"name": "mae", "weight": 0}, ROTATION], r"^task.tasks\[0\].weight: 0 is not possible; give greater than 0"),
        ([{"name": "mae", "weight": {"start": 0}}, ROTATION], r"^task.tasks\[0\].weight.end: not given; set"),
        (
            [{"name": "mae", "weight": {"start": 0, "end": 1, "edn": 1}}, ROTATION],
            r"^task.tasks\[0\].weight.edn: there is no such setting in task.tasks\[0\].weight; did you mean 'end'",
        ),
        ([{"name": "mae", "weight": {"start": 0, "end": 0}}, ROTATION], r"start and end are both 0; give one"),
        (
            [{"name": "mae", "weight": {"start": 0, "end": 1, "over": [0.5, 0.5]}}, ROTATION],
            r"over \[0.5, 0.5\] does not go forward; give \[begin, end\]",
        ),
    ],
)
def test_a_fault_is_one_line_that_names_the_place(tasks, message):
    with pytest.raises(ConfigError, match=message) as caught:
        task_config({"name": "multi", "tasks": tasks})
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_backbone_names_the_entry_too():
    with pytest.raises(ConfigError, match=r"^task.tasks\[1\].mask_unit: 12 does not fit"):
        mixture(VIT, [ROTATION, {**SIMMIM, "mask_unit": 12}])
    with pytest.raises(ConfigError, match=r"^task.tasks\[0\].angles: 4 rotations .* set task.tasks\[0\].angles=2 or"):
        mixture(backbone(RESNET, size=(32, 64)), [ROTATION, SIMMIM])
    with pytest.raises(CapabilityError, match=r"backbone: vit_tiny_patch16_224 cannot do SparK: it lacks sparse_convs"):
        mixture(VIT, [ROTATION, SPARK])
    with pytest.raises(CapabilityError, match=r"set task.tasks\[1\].level="):
        mixture(backbone(RESNET, output_stride=32), [ROTATION, {"name": "pixpro"}])


def test_reference_checkpoints_and_compiling_a_measurement_are_refused():
    task = mixture(VIT, [MAE, ROTATION], balance="gradient_norm")
    with pytest.raises(CheckpointError, match=r"a mixture \(mae, rotation\) has no reference .* backbone.ch"):
        task.load_reference({"cls_token": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"task.balance: .* set engine.compile=false or task.balance=fixed"):
        task.compile()


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_ramp_moves_between_its_points():
    linear = Ramp(start=1.0, end=3.0, over=(0.2, 0.6))
    assert [weight_at(linear, at) for at in (0, 0.2, 0.3, 0.4, 0.6, 1)] == pytest.approx([1, 1, 1.5, 2, 3, 3])
    cosine = Ramp(start=2.0, end=0.0, schedule="cosine")
    assert [weight_at(cosine, at) for at in (0, 1 / 3, 0.5, 1)] == pytest.approx([2, 1.5, 1, 0])
    assert weight_at(0.5, 0.3) == 0.5


def test_weights_follow_the_run_and_are_logged_where_they_move():
    task = mixture(VIT, [{**MAE, "weight": {"start": 0, "end": 1}}, {**ROTATION, "weight": 0.5}])
    batch = batch_of(task)
    first = task(batch)
    assert first.loss == first.logs["rotation/loss"] * 0.5
    assert first.logs["mae/weight"] == 0
    assert "rotation/weight" not in first.logs
    task.after_step(0.25)
    later = task(batch)
    torch.testing.assert_close(later.loss.detach(), later.logs["mae/loss"] * 0.25 + later.logs["rotation/loss"] * 0.5)
    again = mixture(VIT, [{**MAE, "weight": {"start": 0, "end": 1}}, {**ROTATION, "weight": 0.5}])
    again.load_state_dict(task.state_dict())
    assert again.weights.tolist() == [0.25, 0.5]


def test_balanced_weights_make_gradients_as_strong_as_the_weights_say():
    weights, norms = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([8.0, 0.5, 2.0])
    found = balanced(weights, norms)
    torch.testing.assert_close(found * norms / (found * norms)[0], weights / weights[0])
    torch.testing.assert_close(found.sum(), weights.sum())
    torch.testing.assert_close(balanced(weights, torch.full((3,), 7.0)), weights)
    flat = balanced(torch.ones(2), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(flat, torch.tensor([1.0, 1e4]) * 2 / (1 + 1e4))
    assert balanced(torch.zeros(2), torch.ones(2)).tolist() == [0, 0]
    assert balanced(torch.ones(2), torch.zeros(2)).tolist() == [1, 1]


def test_norms_are_those_of_the_gradients_of_each_loss():
    a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    losses = [a.square().sum() / 2, (a * b).sum(), b.sum()]
    found = gradient_norms(losses, [a, b])
    expected = [5.0, (2 * 2.0**2 + 7.0**2) ** 0.5, 1.0]  # d/da and d/db together
    torch.testing.assert_close(found, torch.tensor(expected))
    assert a.grad is None
    assert b.grad is None
    sum(losses).backward()  # the graph is still there


def _norms_by_hand(task: Multi, batch: dict[str, Tensor], draw: dict[str, Tensor]) -> list[float]:
    """Of the parameters that both tasks alone train, from each task alone; positions are prescribed."""
    alone = [single(task, position) for position in range(len(task.tasks))]
    for one, label in zip(alone, task.tasks, strict=True):
        one(of(label, batch), **of(label, draw)).loss.backward()
    gradients = [{name: p.grad for name, p in one.backbone.named_parameters() if p.grad is not None} for one in alone]
    common = set.intersection(*(set(one) for one in gradients))
    return [sum(float(one[name].square().sum()) for name in common) ** 0.5 for one in gradients]


def test_balanced_weights_against_a_computation_by_hand():
    tasks = [{**MAE, "weight": 1.0}, {**ROTATION, "weight": 0.25}]
    task = mixture(VIT, tasks, balance="gradient_norm", balance_every=2, balance_momentum=0.75).double().train()
    batch = batch_of(task)
    assert task.weights.tolist() == [1, 0.25]
    seen = []
    for step in range(4):
        draw = task.draw(batch)
        if step % 2 == 0:
            seen.append(torch.tensor(_norms_by_hand(task, batch, draw), dtype=torch.float64))
        output = task(batch, **draw)
        torch.testing.assert_close(output.logs["mae/weight"], task.weights[0])
        task(batch)  # another micro-step, which does not measure
        with torch.no_grad():  # a step of training
            for parameter in task.parameters():
                parameter.mul_(1.1 if parameter.requires_grad else 1)
        task.after_step((step + 1) / 4)
        norms = seen[0] if step < 2 else 0.75 * seen[0] + 0.25 * seen[1]
        torch.testing.assert_close(task.norms, norms)
        one, two = task.weights.tolist()
        assert one + two == pytest.approx(1.25)
        assert two * norms[1] / (one * norms[0]) == pytest.approx(0.25)
    assert (seen[0] - seen[1]).abs().min() > 1e-3
    assert task(batch).logs["rotation/grad_norm"] == task.norms[1]


def test_measurements_happen_in_training_only_and_a_broken_one_is_left_out():
    task = mixture(VIT, [MAE, ROTATION], balance="gradient_norm", balance_every=1)
    batch = batch_of(task)
    task.eval()
    task(batch)
    assert task._measured is None
    task.train()
    with torch.no_grad():
        task(batch)
    assert task._measured is None
    task(batch)
    task.after_step(0.1)
    good = task.norms.clone()
    assert (good > 0).all()
    task._measured = torch.tensor([float("nan"), 1.0])
    task.after_step(0.2)
    assert torch.equal(task.norms, good)


def test_a_resumed_mixture_measures_at_the_same_steps():
    settings = {"balance": "gradient_norm", "balance_every": 3}
    task, other = (mixture(VIT, [MAE, ROTATION], **settings) for _ in range(2))
    batch = batch_of(task)

    def measured(one: Multi, steps: int) -> list[bool]:
        found = []
        for _ in range(steps):
            one(batch)
            found.append(one._measured is not None)
            one.after_step(0.5)
        return found

    assert measured(task, 4) == [True, False, False, True]
    other.load_state_dict(task.state_dict())
    assert measured(other, 3) == measured(task, 3) == [False, False, True]


def test_half_precision_measures_about_the_same():
    task = mixture(VIT, [MAE, ROTATION], balance="gradient_norm")
    batch = batch_of(task)
    draw = task.draw(batch)
    task(batch, **draw)
    exact, task._measured = task._measured, None
    with torch.autocast("cpu", torch.bfloat16):
        task(batch, **draw)
    assert task._measured.dtype == torch.float32
    torch.testing.assert_close(task._measured, exact, rtol=0.05, atol=0)


# --- who sees which images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[1, 1], [1, 0.5], [3, 1, 1], [0.2, 1]])
def test_rows_are_dealt_out_in_proportion_and_in_halves_alike(shares):
    period = {2: 6, 3: 5}[len(shares)]
    dealt = split_images(shares, 2 * period)
    assert sorted(row for rows in dealt for row in rows) == list(range(2 * period))
    assert all(abs(len(rows) - 2 * period * one / sum(shares)) < 1 for rows, one in zip(dealt, shares, strict=True))
    if all((period * one / sum(shares)) % 1 < 1e-9 for one in shares):
        half = split_images(shares, period)
        assert [[row % period for row in rows] for rows in dealt] == [rows + rows for rows in half]


def test_each_task_sees_its_own_part_of_a_split_batch():
    task = mixture(VIT, [{**MAE, "portion": 3}, ROTATION], batch="split").double()
    batch = batch_of(task, 8)
    draw = task.draw(batch)
    rows = split_images([3, 1], 8)
    assert [len(one) for one in rows] == [6, 2]
    output = task(batch, **draw)
    for position, label in enumerate(task.tasks):
        own = {key: value[rows[position]] for key, value in of(label, batch).items()}
        drawn = {key: value[rows[position]] for key, value in of(label, draw).items()}
        assert (output.logs[f"{label}/loss"] - single(task, position)(own, **drawn).loss).abs() < 1e-12
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())
    with pytest.raises(ConfigError, match=r"task.batch: 2 images of a process cannot be split over 2 tasks in these"):
        task({key: value[:2] for key, value in batch.items()})


# --- two processes ---------------------------------------------------------------------------------------------------

PARALLEL = {"shared": (VIT, [MAE, ROTATION]), "split": (RESNET, [SPARK, SIMMIM])}
BALANCED = {"balance": "gradient_norm", "balance_every": 1}


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {}
    for split, (network, tasks) in PARALLEL.items():
        task = mixture(network, tasks, batch=split, **BALANCED).double().train()
        found[split] = _step(DistributedDataParallel(task), task, slice(4 * rank, 4 * rank + 4))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _step(model: torch.nn.Module, task: Multi, rows: slice) -> dict[str, Any]:
    """One step on `rows` of eight images, with the plain statistics of batch norms in place of those of the batch."""
    for module in task.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            assert isinstance(module, (torch.nn.BatchNorm2d, SyncedBatchNorm2d))
    batch = batch_of(task, 8)
    draw = task.draw(batch)
    output = model({k: v[rows] for k, v in batch.items()}, **{k: v[rows] for k, v in draw.items()})
    output.loss.backward()
    task.after_step(0.5)
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return {"norms": task.norms, "weights": task.weights, "loss": output.loss.detach(), "gradients": gradients}


@pytest.mark.slow
def test_two_processes_balance_and_split_as_one_does(tmp_path: Path) -> None:
    mp.start_processes(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for split, (network, tasks) in PARALLEL.items():
        task = mixture(network, tasks, batch=split, **BALANCED).double().train()
        whole = _step(task, task, slice(0, 8))
        one, two = first[split], second[split]
        assert torch.equal(one["weights"], two["weights"])
        torch.testing.assert_close(one["norms"], whole["norms"])
        torch.testing.assert_close(one["weights"], whole["weights"])
        torch.testing.assert_close((one["loss"] + two["loss"]) / 2, whole["loss"])
        torch.testing.assert_close(one["gradients"], whole["gradients"])
