"""A task that keeps every rule of the contract, and one for each way to break it."""

from __future__ import annotations

import random

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from unlabeled.pretext.common.teacher import frozen_copy
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import PretextTask, StepOutput, TaskConfig


class ResizedViews:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = list(size)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {"image": F.resize(image, self.size, antialias=True)}


class BrightnessConfig(TaskConfig):
    """Settings of the good task."""

    strongest: float = 2.0
    """Largest factor."""


class Brightness(PretextTask):
    """Tells by which factor an image was brightened; a slow copy of the head agrees."""

    Config = BrightnessConfig
    requires = frozenset({"pooled"})

    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled())
        self.head = nn.Linear(backbone.embed_dim, 1)
        self.teacher = frozen_copy(self.head)

    @classmethod
    def views(cls, config, backbone):
        return ResizedViews(backbone.input_size)

    def draw(self, batch):
        return {"factor": torch.rand(len(batch["image"])) * self.config.strongest}

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.pooled(x)
        return self.head(features).flatten().float(), self.teacher(features.detach()).flatten().float()

    def forward(self, batch, *, factor=None):
        factor = self.draw(batch)["factor"] if factor is None else factor
        found, slow = self.predict(self.backbone.normalize(batch["image"]) * factor[:, None, None, None])
        loss = (found - factor).square().mean() + (found - slow).square().mean()
        return StepOutput(loss, {"mean": found.detach().mean()}, found.detach()[:, None])

    def after_step(self, progress: float) -> None:
        ema_update(self.teacher, self.head, 0.9)

    def visualize(self, batch):
        return {"first": batch["image"][0]}


# --- documentation and settings --------------------------------------------------------------------------------------


class NoDocstring(Brightness):
    pass


class BareConfig(TaskConfig):
    """Has a setting that nobody explains."""

    strongest: float = 2.0


class BareSetting(Brightness):
    """As its base."""

    Config = BareConfig


class LooseConfig(BrightnessConfig):
    """Takes anything."""

    model_config = ConfigDict(extra="allow")


class LooseSettings(Brightness):
    Config = LooseConfig


# --- views -----------------------------------------------------------------------------------------------------------


class LambdaViews(Brightness):
    @classmethod
    def views(cls, config, backbone):
        return lambda image: {"image": image}


class AsTheyCome:
    def __call__(self, image):
        return {"image": image}


class WithOwnGenerator(ResizedViews):
    def __call__(self, image):
        angle = torch.rand(
            (), generator=torch.Generator().manual_seed(id(object()) + random.SystemRandom().getrandbits(9))
        )
        return {**super().__call__(image), "angle": angle}


class Darkening(ResizedViews):
    def __call__(self, image):
        return super().__call__(image.div_(2, rounding_mode="floor"))


class Floats(ResizedViews):
    def __call__(self, image):
        return {"image": super().__call__(image)["image"] / 255}


class Numbered(ResizedViews):
    def __call__(self, image):
        return {**super().__call__(image), "index": torch.tensor(0)}


class ByteLabels(ResizedViews):
    def __call__(self, image):
        return {**super().__call__(image), "label": torch.tensor([1, 2], dtype=torch.uint8)}


def with_views(kind):
    """A task whose views are a `kind`."""

    def views(cls, config, backbone):
        return kind() if kind is AsTheyCome else kind(backbone.input_size)

    return type(f"With{kind.__name__}", (Brightness,), {"views": classmethod(views)})


# --- loss and logs ---------------------------------------------------------------------------------------------------


def with_output(name, change):
    """A task whose output is `change(output)`."""

    def forward(self, batch, **draw):
        return change(Brightness.forward(self, batch, **draw))

    return type(name, (Brightness,), {"forward": forward})


Raises = with_output("Raises", lambda output: output.no_such_field)
Pair = with_output("Pair", lambda output: (output.loss, output.logs))
PerImage = with_output("PerPicture", lambda output: output._replace(loss=output.loss.expand(4)))
Double = with_output("Double", lambda output: output._replace(loss=output.loss.double()))
NotANumber = with_output("NotANumber", lambda output: output._replace(loss=output.loss * float("nan")))
NoGraph = with_output("NoGraph", lambda output: output._replace(loss=output.loss.detach()))
FloatLog = with_output("FloatLog", lambda output: output._replace(logs={"mean": 0.5}))
GraphLog = with_output("GraphLog", lambda output: output._replace(logs={"mean": output.loss}))
VectorLog = with_output("VectorLog", lambda output: output._replace(logs={"mean": torch.zeros(2)}))
LossLog = with_output("LossLog", lambda output: output._replace(logs={"loss": output.loss.detach()}))
FlatFeatures = with_output("FlatFeatures", lambda output: output._replace(features=torch.zeros(4)))
GraphFeatures = with_output("GraphFeatures", lambda output: output._replace(features=output.loss.expand(4, 2)))


class Coarse(Brightness):
    """Adds a number beside which bfloat16 has no room for the prediction."""

    def predict(self, x):
        features = self.backbone.pooled(x)
        return (self.head(features).flatten() + 300).float() - 300, self.teacher(features.detach()).flatten().float()


class LowLoss(Brightness):
    def forward(self, batch, *, factor=None):
        output = super().forward(batch, factor=factor)
        low = self.head(torch.ones(1, self.head.in_features)).sum()
        return output._replace(loss=output.loss.to(low.dtype))


# --- parameters ------------------------------------------------------------------------------------------------------


class Spare(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.spare = nn.Linear(2, 2)


class Zeroed(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.shift = nn.Parameter(torch.zeros(1))

    def predict(self, x):
        found, slow = super().predict(x)
        return found + 0 * self.shift, slow


class Forgetful(Brightness):
    def parameter_groups(self):
        return (group for group in super().parameter_groups() if group.name != "head.bias")


class Twice(Brightness):
    def parameter_groups(self):
        yield from super().parameter_groups()
        yield list(super().parameter_groups())[-1]


class TooDeep(Brightness):
    def parameter_groups(self):
        return (group._replace(layer=99) for group in super().parameter_groups())


# --- randomness and the batch ----------------------------------------------------------------------------------------


class DrawsInForward(Brightness):
    def predict(self, x):
        return super().predict(x + torch.randn_like(x))


class PythonsRandom(Brightness):
    def predict(self, x):
        return super().predict(x * (1 + random.SystemRandom().random()))


class DrawsItsOwn(Brightness):
    def forward(self, batch, *, factor=None):
        if factor is None:
            factor = torch.rand(len(batch["image"])) * 0.5
        return super().forward(batch, factor=factor)


class OneForAll(Brightness):
    def draw(self, batch):
        return {"factor": torch.rand(1)}


class AlwaysTheSame(Brightness):
    def draw(self, batch):
        return {"factor": torch.rand(4, generator=torch.Generator().manual_seed(0))}


class Compares(Brightness):
    def predict(self, x):
        found, slow = super().predict(x)
        return found - found.mean() ** 2, slow


# --- state -----------------------------------------------------------------------------------------------------------


class OutsideOfState(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.shift = torch.rand(())

    def predict(self, x):
        found, slow = super().predict(x)
        return found + self.shift, slow


class OtherNames(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer(f"table{random.SystemRandom().getrandbits(30)}", torch.zeros(1))


class Counting(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[int] = []

    def after_step(self, progress):
        super().after_step(progress)
        self.count += sum(self.seen)
        self.seen.clear()


class CountsInForward(Counting):
    def forward(self, batch, *, factor=None):
        self.count += 1
        return super().forward(batch, factor=factor)


class CountsInEvaluation(Counting):
    def forward(self, batch, *, factor=None):
        if not self.training:
            self.count += 1
        return super().forward(batch, factor=factor)


class StashesInEvaluation(Counting):
    def forward(self, batch, *, factor=None):
        self.seen.append(len(batch["image"]))
        return super().forward(batch, factor=factor)


class MovesNothing(Brightness):
    def after_step(self, progress):
        self.progress = progress


class CountsOutside(Brightness):
    steps = 0

    def after_step(self, progress):
        self.steps += 1
        ema_update(self.teacher, self.head, 1 - 1 / (1 + self.steps))


# --- what others see -------------------------------------------------------------------------------------------------


class BareEncoder(Brightness):
    def encoder(self):
        return self.backbone.model


class ChangedBackbone(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        backbone.model.extra = nn.Linear(2, 2)


class OtherFeatures(Brightness):
    def __init__(self, config, backbone) -> None:
        super().__init__(config, backbone)
        backbone.model.norm = nn.LayerNorm(backbone.embed_dim, eps=0.1)
        backbone.model.fc_norm = nn.LayerNorm(backbone.embed_dim, elementwise_affine=False)


class ShowsNothing(Brightness):
    def visualize(self, batch):
        return {}


class ShowsFloats(Brightness):
    def visualize(self, batch):
        return {"first": batch["image"][0] / 255}


class StaysInEval(Brightness):
    def visualize(self, batch):
        self.eval()
        return super().visualize(batch)


class MovesWhileShowing(Counting):
    def visualize(self, batch):
        self.count += 1
        return super().visualize(batch)


class TakesAnything(Brightness):
    def load_reference(self, state):
        return [], list(state)


class Impossible(Brightness):
    requires = frozenset({"token_dropping", "sparse_convs"})


class Centered(Brightness):
    """Compares the images of one rank only."""

    per_image = False

    def predict(self, x):
        found, slow = super().predict(x)
        return found - found.mean(), slow
