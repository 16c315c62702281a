"""Training is one computation in both forms: the same weights, batches and masks lead, step by step, to the same weights.

Float64. Losses agree to 1e-9 of their value, parameters to 1e-9 of the tensor's largest value, after 25 steps that move every
tensor. One kind of parameter cannot: where the gradient is zero by an invariance (attention's key biases, which a softmax does
not see, and the last bias of a shift-invariant loss), a form's gradient is its own rounding noise, and Adam divides noise by
noise. Its eps keeps that small: a step is at most rate * |gradient| / eps, so such an entry ends within
steps * rate * max |gradient| / eps of where it began, whatever the noise. That is what is asserted of it, in each form, together
with that the gradient is noise: at most 1e-10 of the sum of the absolute terms that cancel.
"""

import numpy as np
import pytest
import torch
from torch import nn

import accelerated.alignment
import accelerated.losses
import accelerated.mgda
import accelerated.optim
import reference
import reference.alignment
import reference.losses
from accelerated.dpt import DPT
from accelerated.recipe import Recipe
from accelerated.tasks import Depth, Segment
from reference import optim
from reference.train import depth_objective, depth_step, dropout_masks, segmentation_step
from tests.equality import LOGIC, MODEL, assert_same
from tests.models import model_parameters, small

STEPS, BACKBONE, DECODER, EPS = 25, 2e-3, 5e-3, 1e-8
BEGIN, UNTRIMMED = 0.12, 0.4  # three steps of correlation, three of blending, ten untrimmed in all
CLASSES = 5


def start(task, seed, bias=None):
    """Random weights in both forms, with `bias` for the depth head's last one."""
    config = small("dpt_tiny", task)
    params = model_parameters(config, seed)
    if bias is not None:
        params["head.conv3.bias"][:] = bias
    model = DPT(config).double().train()
    model.load_state_dict({key: torch.tensor(value) for key, value in params.items()})
    return config, params, model


def draw(rng, size=(32, 48)):
    """A batch in which depth and class have to do with the image: image, depth (0 where unknown), labels (255: ignored)."""
    image = rng.standard_normal((2, 3, *(side // 4 for side in size))).repeat(4, 2).repeat(4, 3)
    image += 0.3 * rng.standard_normal(image.shape)
    depth = np.exp(image[:, 0] + 0.2 * rng.standard_normal(image[:, 0].shape))
    labels = np.digitize(image[:, 1], [-1, -0.3, 0.3, 1])
    unknown = rng.random(depth.shape) < 0.2
    return image, np.where(unknown, 0, depth), np.where(unknown, 255, labels)


def assert_same_parameters(params, model, excepted=()):
    """Compare every tensor but those `excepted`, and the query and value part of the attention's biases among them."""
    for key, tensor in model.state_dict().items():
        if key not in excepted:
            assert_same(params[key], tensor.numpy(), MODEL, what=key)


# ---- which pixels each form chooses --------------------------------------------------------------------------------------------


def chosen(form, wrap, prediction, inverse, known, kept):
    """The pixels whose value is the median, which alignment makes 0, and those that trimming keeps, which have a gradient."""
    aligned = form.alignment.align_median(wrap(prediction), wrap(known))
    target = form.alignment.align_median(wrap(inverse), wrap(known))
    if form is reference:
        aligned, target = aligned[0], target[0]
        _, vjp = form.losses.trimmed_absolute(aligned - target, known, kept)
        return (aligned == 0) & known, vjp(np.ones(len(known))) != 0
    residual = (aligned - target).requires_grad_()
    (gradient,) = torch.autograd.grad(form.losses.trimmed_absolute(residual, wrap(known), kept).sum(), residual)
    return (aligned == 0).numpy() & known, gradient.numpy() != 0


# ---- depth ---------------------------------------------------------------------------------------------------------------------


class Noise:
    """Watches the gradients that are zero by an invariance: in both forms, and against the absolute terms that cancel."""

    def __init__(self, model):
        self.model, self.width, self.terms, self.largest = model, model.config["embed_dim"], {}, {}
        for i, block in enumerate(model.backbone.blocks):
            block.attn.qkv.register_full_backward_hook(
                lambda module, dx, dy, key=f"backbone.blocks.{i}.attn.qkv.bias": self.terms.update({key: dy[0].abs().sum((0, 1))})
            )

    @property
    def keys(self):
        return [*(f"backbone.blocks.{i}.attn.qkv.bias" for i in range(len(self.model.backbone.blocks))), "head.conv3.bias"]

    def part(self, key, array):
        """The entries of `key` without a gradient: the keys' third of the biases of queries, keys and values."""
        return array[self.width : 2 * self.width] if key.endswith("qkv.bias") else array

    def check(self, form, gradients, doutput):
        for key in self.keys:
            terms = np.abs(doutput).sum()[None] if key == "head.conv3.bias" else self.part(key, self.terms[key].numpy())
            gradient = np.abs(self.part(key, gradients[key]))
            assert (gradient <= LOGIC * terms.max()).all(), f"{form}, {key}: a gradient of {gradient.max()} from {terms.max()}"
            self.largest[form, key] = max(self.largest.get((form, key), 0.0), gradient.max())


def test_depth_training_in_both_forms(monkeypatch):
    rng = np.random.default_rng(0)
    config, params, model = start("depth", 0, bias=10.0)  # keeps every pixel's last ReLU open, throughout
    first, state = params, optim.adam_state(params)
    optimizer, task = (
        accelerated.optim.adam(model, BACKBONE, DECODER),
        Depth(Recipe(correlation=BEGIN, untrimmed=UNTRIMMED, anchor=0)),
    )
    rates, noise, seen, kept_shares = optim.group_rates(params, BACKBONE, DECODER), Noise(model), {}, []
    step_of_adam = optim.adam

    def watched(params, grads, *rest):
        seen.update(grads)
        return step_of_adam(params, grads, *rest)

    monkeypatch.setattr(optim, "adam", watched)
    for step in range(STEPS):
        image, depth, _ = draw(rng)
        progress, known = step / STEPS, depth > 0
        inverse, kept = np.where(known, 1 / np.where(known, depth, 1), 0), 1.0 if step < 10 else 0.8
        prediction, _ = reference.apply(params, image, config)
        params, state, loss, score = depth_step(
            params, state, image, depth, config, rates, progress, begin=BEGIN, untrimmed=UNTRIMMED
        )

        output = model(torch.tensor(image))
        expected = task.loss(output, torch.tensor(depth), progress)
        optimizer.zero_grad()
        (doutput,) = torch.autograd.grad(expected, output, retain_graph=True)
        expected.backward()

        assert_same(loss, expected.item(), MODEL, what=f"the loss at step {step}")
        r = [np.corrcoef(p[m], t[m])[0, 1] for p, t, m in zip(prediction, inverse, known, strict=True)]
        assert_same(score, np.mean(r), scale=1.0)
        assert (prediction > 0).all(), "only where every pixel is open has the last bias no gradient"
        medians, keeps = chosen(reference, np.asarray, prediction, inverse, known, kept)
        other_medians, other_keeps = chosen(accelerated, torch.tensor, output.detach().numpy(), inverse, known, kept)
        assert (medians == other_medians).all() and medians.any((1, 2)).all(), f"step {step}"
        assert (keeps == other_keeps).all(), f"step {step}"
        kept_shares.append(keeps.sum() / known.sum())
        noise.check("reference", seen, doutput.numpy())
        noise.check("accelerated", {key: p.grad.numpy() for key, p in model.named_parameters()}, doutput.numpy())
        optimizer.step()

    assert all(share > 0.99 for share in kept_shares[:10])
    assert all(0.79 < share <= 0.8 for share in kept_shares[10:])
    assert_same_parameters(params, model, noise.keys)
    ends = {"reference": params, "accelerated": {key: value.numpy() for key, value in model.state_dict().items()}}
    for key in noise.keys:
        for form, end in ends.items():
            allowed = STEPS * rates[key] * noise.largest[form, key] / EPS
            drift = np.abs(noise.part(key, end[key]) - noise.part(key, first[key]))
            # A first value of 0.5 is itself rounded at each step.
            assert (drift <= allowed + STEPS * np.finfo(float).eps * np.abs(first[key]).max()).all(), f"{form}, {key}"
        if key.endswith("qkv.bias"):
            rest = np.r_[: noise.width, 2 * noise.width : 3 * noise.width]
            assert_same(params[key][rest], ends["accelerated"][key][rest], MODEL, what=key)
    for key, value in params.items():
        moved = np.abs(value - first[key]).max()
        assert moved > rates[key] or key == "head.conv3.bias", f"{key} moved by {moved}, less than one step"


@pytest.mark.parametrize("progress", [0.0, 0.11, 0.12, 0.15, 0.2, 0.24, 0.3, 0.4, 0.41, 0.96, 1.0])
def test_the_objective_of_depth_is_the_recipes(progress):
    rng = np.random.default_rng(3)
    _, depth, _ = draw(rng)
    prediction = rng.random(depth.shape) + 0.1
    loss, vjp = depth_objective(prediction, depth, progress, begin=BEGIN, untrimmed=UNTRIMMED)
    leaf = torch.tensor(prediction, requires_grad=True)
    expected = Depth(Recipe(correlation=BEGIN, untrimmed=UNTRIMMED, anchor=0)).loss(leaf, torch.tensor(depth), progress)
    expected.backward()
    assert_same(loss, expected.item())
    assert_same(vjp(1.0), leaf.grad.numpy())
    by_default, _ = depth_objective(prediction, depth, progress)
    assert_same(
        by_default, Depth(Recipe(correlation=0.3, untrimmed=0.8, anchor=0)).loss(leaf, torch.tensor(depth), progress).item()
    )


# ---- segmentation --------------------------------------------------------------------------------------------------------------


class GivenMask(nn.Module):
    """Dropout whose mask is handed to it."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.mask = rate, None

    def forward(self, x):
        return x * self.mask / (1 - self.rate)


def test_segmentation_training_in_both_forms():
    rng = np.random.default_rng(1)
    config, params, model = start("segmentation", 1)
    config["dropout"] = 0.3  # more than the paper's 0.1, so that it matters
    model.head.dropout, model.auxiliary.dropout = GivenMask(0.3), GivenMask(0.3)
    first, state = params, optim.sgd_state(params)
    optimizer, task = accelerated.optim.sgd(model, 0.05, 0.1), Segment(Recipe(task="segmentation"))
    decay, rates = accelerated.optim.polynomial_decay(optimizer, STEPS), optim.group_rates(params, 0.05, 0.1)
    losses = []
    for step in range(STEPS):
        image, _, labels = draw(rng, (48, 64))
        masks = dropout_masks(image, config, rng)
        for name, mask in masks.items():
            getattr(model, name).dropout.mask = torch.tensor(mask)
        now = optim.scaled(rates, optim.polynomial_factor(step, STEPS))
        params, state, loss, score = segmentation_step(params, state, image, labels, config, now, masks)

        output = model(torch.tensor(image))
        expected = task.loss(output, torch.tensor(labels), step / STEPS)
        upsampled = nn.functional.interpolate(output.logits, (48, 64), mode="bilinear", align_corners=True)
        assert score == (upsampled.argmax(1).numpy() == labels)[labels != 255].mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        decay.step()
        assert_same(loss, expected.item(), MODEL, what=f"the loss at step {step}")
        losses.append(loss)
    assert_same_parameters(params, model)
    # The key biases have no gradient to move them; without Adam, noise stays noise.
    width = config["embed_dim"]
    for key, value in params.items():
        moved = np.abs(value - first[key])
        if key.endswith("qkv.bias"):
            assert moved[width : 2 * width].max() < LOGIC
        assert moved.max() > 1e3 * MODEL * np.abs(value).max(), f"{key} moved by {moved.max()}: too little to compare"
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_dropout_masks_keep_the_share_that_they_should():
    config = small("dpt_tiny", "segmentation", dropout=0.3, fusion_width=64)
    masks = dropout_masks(np.zeros((2, 3, 64, 96)), config, np.random.default_rng(0))
    assert {name: mask.shape for name, mask in masks.items()} == {"head": (2, 64, 32, 48), "auxiliary": (2, 64, 16, 24)}
    for mask in masks.values():
        # Six deviations of the mean of as many draws.
        assert abs(mask.mean() - 0.7) < 6 * np.sqrt(0.21 / mask.size)


# ---- several objectives --------------------------------------------------------------------------------------------------------


def test_a_step_for_three_tasks_at_once_in_both_forms():
    rng = np.random.default_rng(2)
    config, params, model = start("depth", 2)
    gradients, losses = [], []
    for sign in (1, -1, 1):  # the second task wants the opposite of the others
        image, depth, _ = draw(rng)
        known = depth > 0
        inverse = np.where(known, np.where(known, depth, 1) ** (-1.0 * sign), 0)
        prediction, vjp = reference.apply(params, image, config)
        _, loss_vjp = reference.losses.depth_loss(prediction, inverse, known)
        gradients.append(vjp(loss_vjp(1.0))[1])
        output = model(torch.tensor(image))
        losses.append(accelerated.losses.depth_loss(output, torch.tensor(inverse), torch.tensor(known)))
    combined, weights = optim.mgda(gradients)
    rates = optim.group_rates(params, 0.05, 0.1)
    updated, _ = optim.sgd(params, combined, optim.sgd_state(params), rates)
    optimizer = accelerated.optim.sgd(model, 0.05, 0.1)
    other_weights = accelerated.mgda.mgda_backward(losses, model.parameters())
    optimizer.step()
    assert (weights > 0.05).all(), f"{weights}: a task without a weight would not test much"
    assert_same(other_weights.numpy(), weights, MODEL)
    assert_same_parameters(updated, model)
    products = [sum(float((combined[key] * grads[key]).sum()) for key in combined) for grads in gradients]
    assert_same(np.array(products), np.full(3, np.mean(products)), MODEL)  # all tasks gain alike, and
    assert min(products) > 0  # all do gain
