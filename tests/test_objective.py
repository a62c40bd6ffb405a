import math

import pytest
import torch

from fastvae.objective import (
    KLController,
    KLSchedule,
    free_bits_kl,
    gaussian_kl,
    reconstruction_nats,
)


def test_schedule_without_arguments_is_one_from_the_first_step():
    assert [KLSchedule()(step) for step in (0, 1, 10**6)] == [1.0, 1.0, 1.0]


def test_schedule_rises_linearly_from_the_floor():
    schedule = KLSchedule(floor=0.001, start=1000, end=8000)
    assert [schedule(step) for step in (0, 999, 1000, 8000, 10**6)] == [0.001] * 3 + [1.0] * 2
    assert schedule(2750) == pytest.approx(0.001 + 0.999 / 4)


def test_schedule_may_jump():
    assert [KLSchedule(start=5, end=5)(step) for step in (4, 5)] == [0.0, 1.0]


def test_schedule_of_an_autoencoder():
    assert [KLSchedule(target=0.0)(step) for step in (0, 500)] == [0.0, 0.0]


def test_schedule_falls_to_a_target_below_the_floor():
    assert KLSchedule(floor=0.8, end=4, target=0.4)(1) == pytest.approx(0.7)


def test_cyclical_schedule():
    schedule = KLSchedule(start=10, end=50, cycles=4, rise=0.5)
    expected = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [schedule(10 + n) for n in range(40)] == pytest.approx(expected * 4)
    assert (schedule(9), schedule(50), schedule(51)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": 3, "end": 40},
        {"start": 3, "end": 40, "rise": 0.5},
        {"start": 3, "end": 40, "rise": 0.3, "cycles": 3},
        {"end": 40, "floor": 0.7, "target": 0.7},
        {"end": 40, "floor": 0.7, "target": 0.2, "cycles": 2},
        {},
    ],
)
def test_the_weight_settles_at_its_target(arguments):
    """After the fewest steps from which on it is the target; the first step's weight is of none."""
    schedule = KLSchedule(**arguments)
    weights = [schedule(step) for step in range(60)]
    least = min(n for n in range(60) if all(w == schedule.target for w in weights[n:]))
    assert least - 1 < schedule.settled <= least or least == 0 == schedule.settled


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"floor": -0.1}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"target": math.inf}, "target"),
        ({"start": 5, "end": 4}, "start 5 and end 4"),
        ({"start": -1}, "start"),
        ({"cycles": 0}, "cycles"),
        ({"rise": 0.0}, "rise"),
        ({"rise": 1.5}, "rise"),
    ],
)
def test_schedule_rejects(arguments, word):
    with pytest.raises(ValueError, match=word):
        KLSchedule(**arguments)


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)


@pytest.mark.parametrize("unknown", [-100, -1, 5])
def test_no_unknown_id_costs_nothing(unknown):
    tokens = torch.tensor([[1], [unknown]])
    with pytest.raises(IndexError, match=f"Target {unknown} is out of bounds"):
        reconstruction_nats(torch.randn(2, 1, 5), tokens)
    if unknown < 0:  # such as an ignored one
        nats = reconstruction_nats(torch.zeros(2, 1, 5), tokens, ignored=unknown)
        torch.testing.assert_close(nats, torch.tensor([math.log(5)]))


def test_gaussian_kl_by_hand():
    kl = gaussian_kl(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, math.log(4)]]))
    torch.testing.assert_close(kl, torch.tensor([[0.0, 2.0, 1.5 - math.log(2)]]))


def test_gaussian_kl_keeps_its_digits_near_the_prior():
    # In float32 exp(logvar) − 1 − logvar is here a multiple of 6e-8; the series begins logvar² / 4.
    kl = gaussian_kl(torch.tensor([[0.0]]), torch.tensor([[1e-4]]))
    assert kl.item() == pytest.approx(2.5e-9, rel=0.01)


def test_free_bits():
    kl = torch.tensor([0.1, 0.5, 2.0], requires_grad=True)
    loss = free_bits_kl(kl, 0.3)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.3 + 0.5 + 2.0))
    assert kl.grad.tolist() == [0, 1, 1]
    torch.testing.assert_close(free_bits_kl(kl, 0.0), kl.sum())
    small = torch.tensor([1e-5, 2e-3])
    torch.testing.assert_close(free_bits_kl(small, 1e-3), torch.tensor(3e-3))


def test_reconstruction_by_hand():
    odds = torch.tensor([[[1.0, 1, 2], [8, 1, 1]], [[1, 3, 0.5], [1, 1, 1]]])  # [T, B, V]
    tokens = torch.tensor([[2, 0], [1, 2]])
    nats = reconstruction_nats(odds.log(), tokens)
    expected = [math.log(4 / 2) + math.log(4.5 / 3), math.log(10 / 8) + math.log(3)]
    torch.testing.assert_close(nats, torch.tensor(expected))
    masked = reconstruction_nats(odds.log(), tokens, ignored=2)
    torch.testing.assert_close(masked, torch.tensor([math.log(4.5 / 3), math.log(10 / 8)]))


def test_the_controller_by_hand():
    controller, integral = KLController(10.0), math.log(0.1)
    assert controller.weight.item() == pytest.approx(0.1)
    for kl in (20.0, 1e9, 5.0, 10.0):
        error = max(-1.0, min(1.0, math.log(kl / 10)))
        integral += 0.03 * error
        before = controller.weight.item()
        controller.update(torch.tensor(kl))
        assert controller.weight.item() == pytest.approx(math.exp(integral + 2 * error), rel=1e-5)
        assert controller.state[2].item() == before


@pytest.mark.parametrize("target", [0.5, 10.0, 200.0])
def test_the_controller_holds_what_follows_the_weight_late(target):
    """A KL that falls with its weight, by a lag: one setting for targets of all sizes."""
    controller, kl = KLController(target), 0.0
    for _ in range(6000):
        kl += (target * controller.weight.item() ** -0.7 - kl) / 200
        controller.update(torch.tensor(kl))
    assert kl == pytest.approx(target, rel=0.01) and controller.weight.item() == pytest.approx(
        1, rel=0.02
    )


@pytest.mark.parametrize(("kl", "end"), [(0.0, 1e-4), (1e9, 10.0)])
def test_the_controller_stays_within_its_limits(kl, end):
    """And leaves them as soon as the error turns."""
    controller = KLController(1.0)
    for _ in range(3000):
        controller.update(torch.tensor(kl))
    assert controller.weight.item() == pytest.approx(end)
    controller.update(torch.tensor(1.0))
    inner = sorted((controller.weight.item(), end))
    assert inner[0] >= 1e-4 * (1 - 1e-6) and inner[1] <= 10 * (1 + 1e-6)
    controller.update(torch.tensor(0.5 if kl else 2.0))
    left = math.exp(2.03 * math.log(0.5 if kl else 2.0))  # what a first error does at the limit
    assert controller.weight.item() == pytest.approx(end * left, rel=1e-4)
