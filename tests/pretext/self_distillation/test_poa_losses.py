"""The terms of POA's heads against a dense implementation with a loop over each pair, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.self_distillation.poa_losses import (
    Crops,
    PatchTerms,
    TeacherHead,
    TermWeights,
    head_loss,
    koleo,
    prototypes_of,
)
from unlabeled.pretext.self_distillation.self_distillation import HeadConfig, create_head, directions, scores

IMAGES, CHANNELS, PROTOTYPES, ROWS = 5, 6, 9, 13
SHARP, SOFT = 0.04, 0.1
WEIGHTS = TermWeights(0.7, 0.3, 0.2, 0.6, 0.5)
LOCALS = (0, 1, 3)
CHUNKS = (None, 1, 6, 100)
TRAINED = ("crops.intact", "crops.elastic", "patches.intact", "patches.elastic", "prototypes")


class Inputs:
    """Drawn directions of a teacher and two students, with gradients where they are trained."""

    def __init__(self, small: int) -> None:
        generator = torch.Generator().manual_seed(7)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, CHANNELS, generator=generator, dtype=torch.float64)

        def units(*shape: int) -> Tensor:
            return F.normalize(drawn(*shape), dim=-1)

        def offsets() -> Tensor:
            return drawn(PROTOTYPES)[:, 0]

        views = 2 + small
        weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        weights[-4:] = 0  # rows without a patch
        self.crops = Crops(units(2, IMAGES), [units(views, IMAGES), units(views, IMAGES)], offsets())
        self.patches = PatchTerms(units(ROWS), [units(ROWS), units(ROWS)], weights, offsets())
        self.teacher = TeacherHead(drawn(PROTOTYPES), SHARP)
        self.prototypes = drawn(PROTOTYPES)
        students = (*self.crops.students, *self.patches.students)
        self.trained = [*students, self.prototypes]
        for tensor in self.trained:
            tensor.requires_grad_()

    def loss(self, **options) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"weights": WEIGHTS, "temperature": SOFT, **options}
        return head_loss(self.crops, self.patches, self.teacher, self.prototypes, **options)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Rows (..., K) of probabilities and of logits → their mean cross-entropy."""
    return -(target * torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))).sum(-1).mean()


def dense(inputs: Inputs) -> dict[str, Tensor]:
    """Each term, written down crop by crop: section 3 of the paper in the weights of the released code."""
    crops, patches, teacher = inputs.crops, inputs.patches, inputs.teacher

    def assigned(units: Tensor, offsets: Tensor) -> Tensor:
        return torch.softmax(units @ teacher.prototypes.t() / teacher.temperature - offsets, -1)

    def logits(units: Tensor) -> Tensor:
        return units @ inputs.prototypes.t() / SOFT

    targets = [assigned(crops.teacher[view], crops.offsets) for view in (0, 1)]
    small = range(2, len(crops.students[0]))

    def crossed(student: Tensor) -> Tensor:
        swapped = torch.cat([targets[1], targets[0]])
        both = cross_entropy(swapped, logits(torch.cat([student[0], student[1]])))
        others = sum(cross_entropy(target, logits(student[view])) for view in small for target in targets)
        return (2 * both + others) / (2 + 2 * len(small))

    def same() -> Tensor:
        parts = [slice(0, 2)] + [slice(2, None)] * bool(small)
        pairs = [
            (logits(crops.students[0][part]).softmax(-1).detach(), logits(crops.students[1][part])) for part in parts
        ]
        return sum(cross_entropy(target, found) for target, found in pairs)

    def masked(student: Tensor) -> Tensor:
        target, total = assigned(patches.teacher, patches.offsets), torch.zeros(())
        for row in range(ROWS):
            total = total + patches.weights[row] * cross_entropy(target[row], logits(student[row]))
        return total / (2 * IMAGES)

    found = (
        crossed(crops.students[0]),
        crossed(crops.students[1]),
        same(),
        masked(patches.students[0]),
        masked(patches.students[1]),
    )
    return dict(zip(TermWeights._fields, found, strict=True))


@pytest.mark.parametrize("small", LOCALS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_terms_and_gradients_are_those_of_the_dense_form(small, chunk):
    inputs = Inputs(small)
    total, terms = inputs.loss(chunk=chunk)
    expected = dense(inputs)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, rtol=1e-12), name
        assert not terms[name].requires_grad
    weighted = sum(getattr(WEIGHTS, name) * value for name, value in expected.items())
    assert torch.allclose(total, weighted, rtol=1e-12)
    gradients = torch.autograd.grad(total, inputs.trained)
    for name, found, right in zip(TRAINED, gradients, torch.autograd.grad(weighted, inputs.trained), strict=True):
        assert right.abs().max() > 1e-3
        assert torch.allclose(found, right, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("small", [0, 8])
@pytest.mark.parametrize("chunk", [None, 7])
def test_even_predictions_cost_the_logarithm_of_the_prototypes(small, chunk):
    """Equal prototypes make all logits of a student equal: each cross-entropy is log K, and weights add up as printed
    in the code: X 1 each of 2 + 2 n pairs, S twice (once without small crops), M by the images that have any."""
    inputs = Inputs(small)
    inputs.prototypes = torch.ones_like(inputs.prototypes)
    total, terms = inputs.loss(chunk=chunk, weights=TermWeights())
    most, masked = math.log(PROTOTYPES), float(inputs.patches.weights.sum()) / (2 * IMAGES)
    same = 2 if small else 1
    for name, factor in zip(TermWeights._fields, (1, 1, same, masked, masked), strict=True):
        assert terms[name].item() == pytest.approx(factor * most), name
    assert total.item() == pytest.approx((1 + 0.2 * same + masked) * most)


def test_published_weights_follow_from_lambda():
    assert TermWeights.balanced(0.8) == pytest.approx(TermWeights())
    assert TermWeights.balanced(0.6) == pytest.approx((0.6, 0.4, 0.4, 0.6, 0.4))


@pytest.mark.parametrize("chunk", [None, 6])
def test_the_intact_student_learns_nothing_from_the_elastic_one(chunk):
    inputs = Inputs(3)
    total, _ = inputs.loss(chunk=chunk, weights=TermWeights(0, 0, 1, 0, 0))
    intact, elastic, *_ = torch.autograd.grad(total, inputs.trained)
    assert torch.equal(intact, torch.zeros_like(intact))
    assert elastic.abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [None, 6])
def test_nothing_of_the_teacher_gets_a_gradient(chunk):
    inputs = Inputs(3)
    for tensor in (inputs.crops.teacher, inputs.patches.teacher, inputs.teacher.prototypes):
        tensor.requires_grad_()
    inputs.loss(chunk=chunk)[0].backward()
    for tensor in (inputs.crops.teacher, inputs.patches.teacher, inputs.teacher.prototypes):
        assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("chunk", [None, 1])
def test_large_crops_are_compared_with_the_other_large_crop(chunk):
    """Students that give each image's two crops what the teacher gave to its crops swapped have a loss of nearly
    none at a sharp temperature; those that give the same crop the same have a large one."""
    corners = torch.eye(PROTOTYPES, dtype=torch.float64)
    units = corners[torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 0]])]  # (2, B, C): every crop its own prototype
    teacher = TeacherHead(corners, 0.01)

    def cross(students: Tensor) -> float:
        crops = Crops(units, [students, students], torch.zeros(PROTOTYPES, dtype=torch.float64))
        terms = head_loss(crops, None, teacher, corners, weights=TermWeights(), temperature=0.01, chunk=chunk)[1]
        assert set(terms) == set(TermWeights._fields[:3])
        return terms["cross_intact"].item()

    assert cross(units.flip(0)) < 1e-6
    assert cross(units) == pytest.approx(100, rel=1e-3)


def test_the_temperature_may_be_a_tensor():
    inputs = Inputs(1)
    expected = inputs.loss(chunk=4)[0]
    inputs.teacher = inputs.teacher._replace(temperature=torch.tensor(SHARP, dtype=torch.float64))
    assert torch.equal(inputs.loss(chunk=4)[0], expected)


@pytest.mark.parametrize("unit", [True, False])
def test_prototypes_give_the_scores_of_their_head(unit):
    torch.manual_seed(0)
    head = create_head(4, HeadConfig(prototypes=7, hidden=5, bottleneck=3, unit_prototypes=unit)).double()
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.rand(7, 1) + 0.5)
    units = directions(head, torch.randn(6, 4, dtype=torch.float64))
    layer = head.last_layer
    trained = [layer.weight_v] if unit else [layer.weight_v, layer.weight_g]
    factors = torch.randn(6, 7, dtype=torch.float64)
    found, expected = units @ prototypes_of(head).t(), scores(head, units)
    assert torch.allclose(found, expected, atol=1e-12)
    assert prototypes_of(head).norm(dim=1).std() > 0.1
    first, second = (torch.autograd.grad((one * factors).sum(), trained) for one in (found, expected))
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def regular(features: Tensor) -> Tensor:
    """KoLeo of one crop (B, D) with a search over each pair."""
    units = F.normalize(features, dim=1)
    nearest = [min((units[i] - units[j]).norm() for j in range(len(units)) if j != i) for i in range(len(units))]
    return -torch.stack([torch.log(distance + 1e-8) for distance in nearest]).mean()


def test_koleo_is_its_formula_for_each_crop():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    expected = (regular(features[0]) + regular(features[1])) / 2
    found = koleo(features)
    assert torch.allclose(found, expected, rtol=1e-6)
    first, second = (torch.autograd.grad(one, features)[0] for one in (found, expected))
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)


def test_koleo_of_a_regular_simplex_is_that_of_its_edge():
    corners = torch.eye(4) - 0.25  # (4, 4): four directions as far from each other as they get
    assert koleo(3 * corners[None]).item() == pytest.approx(-math.log(math.sqrt(8 / 3)), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo(corners.bfloat16()[None])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-math.log(math.sqrt(8 / 3)), rel=1e-6)


def test_koleo_of_a_image_twice_has_a_finite_gradient():
    features = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    features[0, 1] = features[0, 0]
    features[0, 2] = 0
    features.requires_grad_()
    koleo(features).backward()
    assert features.grad.isfinite().all()
    assert features.grad[0, 0].any()
