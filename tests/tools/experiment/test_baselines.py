"""What every baseline promises, and what makes each of them the method that it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
from torch.nn import functional  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from fleetune.edge.protocol.errors import ConfigError  # noqa: E402
from fleetune.tools.experiment.base import Algorithm, Client, Federation, Hyper, Samples  # noqa: E402
from fleetune.tools.experiment.baselines import BASELINES  # noqa: E402
from fleetune.tools.experiment.baselines.base import as_pictures, initial  # noqa: E402
from fleetune.tools.experiment.baselines.ditto import Ditto, DittoSettings  # noqa: E402
from fleetune.tools.experiment.baselines.fd import FD, FDSettings  # noqa: E402
from fleetune.tools.experiment.baselines.fedavg import FedAvg  # noqa: E402
from fleetune.tools.experiment.baselines.fedkd import FedKD, FedKDSettings  # noqa: E402
from fleetune.tools.experiment.baselines.fedper import FedPer  # noqa: E402
from fleetune.tools.experiment.baselines.fedproto import FedProto, FedProtoSettings  # noqa: E402
from fleetune.tools.experiment.baselines.fml import FML, FMLSettings  # noqa: E402
from fleetune.tools.experiment.baselines.lg_fedavg import LGFedAvg  # noqa: E402
from fleetune.tools.experiment.baselines.standalone import Standalone  # noqa: E402
from fleetune.tools.experiment.flops import forward_flops, header_flops, training_flops  # noqa: E402
from fleetune.tools.pack.extractors import CNNS, Cnn  # noqa: E402

CLASSES, WIDTH = 3, 16
LARGE, SMALL = Cnn((4, 6), 24, WIDTH), Cnn((3, 4), 20, WIDTH)
HEADER_SIZE = 16 * 3 + 3
LARGE_SIZE = (4 * 75 + 4) + (6 * 100 + 6) + (150 * 24 + 24) + (24 * 16 + 16) + HEADER_SIZE
SMALL_SIZE = (3 * 75 + 3) + (4 * 75 + 4) + (100 * 20 + 20) + (20 * 16 + 16) + HEADER_SIZE
SETTINGS: dict[str, Any] = {"fml": FMLSettings(small=SMALL), "fedkd": FedKDSettings(small=SMALL)}
EQUAL = ("fedavg", "fedper", "ditto")
HYPER = Hyper(epochs=1, batch=6, learning_rate=0.1, seed=1)
WHOLE = replace(HYPER, batch=100)
"""One step a round."""
EVERYBODY = (0, 1, 2, 3)


def samples(labels: Sequence[int], seed: int) -> Samples:
    """Noise of one of three colours, which is the class."""
    random, shown = np.random.default_rng(seed), np.array(labels, np.int64)
    images = random.integers(98, 158, (len(shown), 3, 32, 32), dtype=np.uint8)
    images[np.arange(len(shown)), shown] += 90
    images[np.arange(len(shown)), (shown + 1) % CLASSES] -= 90
    return Samples(images, shown)


def client(name: str, labels: Sequence[int], number: int) -> Client:
    train = samples([labels[i % len(labels)] for i in range(number)], len(name) + number)
    return Client(name, train, samples(list(labels) * 4, number))


FEDERATION = Federation(
    "colours",
    "by hand",
    CLASSES,
    (client("a", (0, 1, 2), 15), client("b", (0, 1), 10), client("c", (1, 2), 12), client("d", (0, 1, 2), 6)),
)
TRAINED = [len(client.train.labels) for client in FEDERATION.clients]
HAS = [3, 2, 2, 3]
"""How many classes each client has."""


def build(name: str, hyper: Hyper = HYPER) -> Any:
    models = [LARGE] * 4 if name in EQUAL else [LARGE, SMALL, LARGE, SMALL]
    method: Any = BASELINES[name]
    return method(FEDERATION, models, hyper, SETTINGS[name]) if name in SETTINGS else method(FEDERATION, models, hyper)


def values(module: Any) -> np.ndarray[Any, Any]:
    """All of a module's values, one after the other."""
    state = module if isinstance(module, dict) else module.state_dict()
    return np.concatenate([tensor.numpy().ravel() for tensor in state.values()])


def pictures_of(place: int) -> tuple[Any, Any]:
    train = FEDERATION.clients[place].train
    return as_pictures(train.images), torch.from_numpy(train.labels)


def gradients_of(loss: Any, *models: Any) -> np.ndarray[Any, Any]:
    parameters = [parameter for model in models for parameter in model.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return np.concatenate([gradient.numpy().ravel() for gradient in found])


def stepped(model: Any, place: int) -> np.ndarray[Any, Any]:
    """A model's values after one step of plain SGD on all samples of a client."""
    pictures, labels = pictures_of(place)
    loss = functional.cross_entropy(model(pictures), labels)
    return values(model) - WHOLE.learning_rate * gradients_of(loss, model)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Networks this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what all of them promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
class TestContract:
    def test_learns(self, name: str) -> None:
        method: Algorithm = build(name, replace(HYPER, epochs=3))
        for _ in range(10):
            method.play(EVERYBODY)
        chance = np.mean([1 / number for number in HAS])  # 42 %
        assert np.mean(method.accuracies()) > chance + 0.3

    def test_says_what_share_of_each_clients_test_samples_is_right(self, name: str) -> None:
        method = build(name)
        method.play(EVERYBODY)
        found = method.accuracies()
        assert len(found) == len(FEDERATION.clients)
        for share, one in zip(found, FEDERATION.clients, strict=True):
            right = share * len(one.test.labels)
            assert 0 <= right <= len(one.test.labels)
            assert right == pytest.approx(round(right))

    def test_follows_from_the_seed(self, name: str) -> None:
        methods = [build(name), build(name), build(name, replace(HYPER, seed=2))]
        assert not np.array_equal(*(values(method.models[1]) for method in methods[1:]))
        for number, method in enumerate(methods):
            torch.manual_seed(number)  # what else draws random numbers does not matter
            method.play((0, 2, 3))
            method.play(EVERYBODY)
        one, same, other = ([values(model) for model in method.models] for method in methods)
        assert methods[0].accuracies() == methods[1].accuracies()
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    def test_leaves_the_random_numbers_of_others_alone(self, name: str) -> None:
        torch.manual_seed(7)
        wanted = torch.rand(1)
        torch.manual_seed(7)
        build(name).play((0, 1))
        assert torch.rand(1) == wanted

    def test_begins_with_the_private_models_that_all_begin_with(self, name: str) -> None:
        method, reference = build(name), build("ditto" if name in EQUAL else "standalone")
        for place, (own, wanted) in enumerate(zip(method.models, reference.models, strict=True)):
            assert np.array_equal(values(own), values(wanted))
            assert np.array_equal(values(own), values(initial(own.cnn, CLASSES, HYPER.seed, place)))
        assert not np.array_equal(values(method.models[0]), values(method.models[2]))

    def test_leaves_a_client_that_is_not_sampled_as_it_was(self, name: str) -> None:
        method = build(name)
        method.play(EVERYBODY)
        before, accuracies = [values(model) for model in method.models], method.accuracies()
        for _ in range(3):
            method.play((0, 3))
        for place, model in enumerate(method.models):
            assert np.array_equal(values(model), before[place]) == (place in (1, 2))
        assert [method.accuracies()[place] for place in (1, 2)] == [accuracies[place] for place in (1, 2)]

    def test_counts_the_operations_of_those_who_play(self, name: str) -> None:
        large, small = (forward_flops(cnn) + header_flops(cnn, CLASSES) for cnn in (LARGE, SMALL))
        sizes = [large] * 4 if name in EQUAL else [large, small, large, small]
        bodies = [forward_flops(cnn) for cnn in (LARGE, SMALL, LARGE, SMALL)]
        for sampled in (EVERYBODY, (1, 2)):
            wanted = 2 * sum(3 * sizes[place] * TRAINED[place] for place in sampled)  # two epochs
            if name in ("fml", "fedkd"):
                wanted += 2 * sum(3 * small * TRAINED[place] for place in sampled)
            if name == "ditto":
                wanted *= 2
            if name in ("fedproto", "fedgh"):
                wanted += sum(bodies[place] * TRAINED[place] for place in sampled)
            assert build(name, replace(HYPER, epochs=2)).play(sampled).flops == wanted

    def test_counts_what_is_sent_up_and_down(self, name: str) -> None:
        method = build(name)
        for sampled in (EVERYBODY, (1, 2)):
            classes, clients = sum(HAS[place] for place in sampled), len(sampled)
            wanted = {
                "standalone": 0,
                "lg-fedavg": 2 * clients * HEADER_SIZE,
                "fml": 2 * clients * SMALL_SIZE,
                "fedkd": 2 * clients * SMALL_SIZE,
                "fedproto": 2 * classes * WIDTH,
                "fedgh": clients * HEADER_SIZE + classes * WIDTH,
                # Up: what it has. Down: all that somebody else has; of 0 and 2 only one of these two clients each.
                "fd": CLASSES * (classes + (4 * 3 if sampled == EVERYBODY else 2 + 2)),
                "fedavg": 2 * clients * LARGE_SIZE,
                "fedper": 2 * clients * (LARGE_SIZE - HEADER_SIZE),
                "ditto": 2 * clients * LARGE_SIZE,
            }
            assert method.play(sampled).sent == wanted[name]

    def test_says_where_it_diverged(self, name: str) -> None:
        method = build(name, replace(HYPER, learning_rate=1e12))
        with pytest.raises(ConfigError, match=r"diverged in round 1: the loss of client a is (nan|inf).*1e\+12"):
            method.play(EVERYBODY)

    def test_wants_a_model_for_each_client(self, name: str) -> None:
        with pytest.raises(ConfigError, match="3 models for 4 clients"):
            BASELINES[name](FEDERATION, [Cnn((2, 2), 4)] * 3, HYPER)

    def test_wants_samples_of_each_client(self, name: str) -> None:
        empty = replace(FEDERATION.clients[1], test=samples([], 0))
        federation = replace(FEDERATION, clients=(FEDERATION.clients[0], empty))
        with pytest.raises(ConfigError, match="client b has 10 samples to train and 0 to test with"):
            BASELINES[name](federation, [Cnn((2, 2), 4)] * 2, HYPER)


def test_a_clients_batches_do_not_depend_on_who_else_plays() -> None:
    alone, together = build("standalone"), build("standalone")
    alone.play((2,))
    together.play(EVERYBODY)
    assert np.array_equal(values(alone.models[2]), values(together.models[2]))


def test_each_round_has_its_own_order_of_samples() -> None:
    first, second = build("standalone"), build("standalone")
    first.play((1,))
    second.models[1].load_state_dict(first.models[1].state_dict())
    first.play((1,))  # its second round
    second.play((1,))  # from the same values, but its first
    assert np.abs(values(first.models[1]) - values(second.models[1])).max() > 1e-6


@pytest.mark.parametrize("name", EQUAL)
def test_averaging_bodies_needs_equal_models(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs equal models; client a has .*hidden=24.*client c has .*hidden=20"):
        BASELINES[name](FEDERATION, [LARGE, LARGE, SMALL, LARGE], HYPER)


@pytest.mark.parametrize("name", ["lg-fedavg", "fedkd", "fedproto", "fedgh"])
def test_sharing_representations_needs_equal_widths(name: str) -> None:
    with pytest.raises(ConfigError, match="their widths differ: 16, 500"):
        BASELINES[name](FEDERATION, [LARGE, LARGE, LARGE, Cnn((2, 2), 4, 500)], HYPER)


# --- operations ---------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_layers() -> None:
    by_hand = 28 * 28 * 4 * (3 * 25) + 10 * 10 * 6 * (4 * 25) + 150 * 24 + 24 * 16
    assert forward_flops(LARGE) == 2 * by_hand
    assert forward_flops(CNNS["cnn-5"]) == 2 * (940_800 + 1_280_000 + 400_000 + 250_000)
    assert header_flops(LARGE, CLASSES) == 2 * 16 * 3
    assert training_flops(10, 7) == 210


@pytest.mark.parametrize("name", CNNS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    model = initial(CNNS[name], 10, 0, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    assert counter.get_total_flops() == 2 * model.flops


# --- standalone ---------------------------------------------------------------------------------------------------


def test_standalone_takes_plain_steps() -> None:
    method = Standalone(FEDERATION, [SMALL] * 4, WHOLE)
    for _ in range(3):
        wanted = stepped(method.models[1], 1)
        method.play((1,))
        np.testing.assert_allclose(values(method.models[1]), wanted, atol=1e-6)


def test_accuracy_is_that_on_test_samples() -> None:
    images, labels = FEDERATION.clients[0].train
    misled = replace(FEDERATION.clients[0], test=Samples(images, (labels + 1) % CLASSES))
    method = Standalone(replace(FEDERATION, clients=(misled,)), [LARGE], replace(HYPER, epochs=20))
    method.play((0,))
    right = method.models[0](as_pictures(images)).argmax(1).numpy() == labels
    assert right.mean() > 0.6
    assert method.accuracies()[0] <= 1 - right.mean()


def test_pictures_are_from_minus_one_to_one() -> None:
    found = as_pictures(np.array([[[[0, 255]]]], np.uint8))
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [-1, 1]


# --- averaging ----------------------------------------------------------------------------------------------------


def test_fedavg_is_the_mean_by_samples() -> None:
    trained = {}
    for place in (1, 3):
        alone = FedAvg(FEDERATION, [SMALL] * 4, HYPER)
        alone.play((place,))
        trained[place] = values(alone.models[place])
    both = FedAvg(FEDERATION, [SMALL] * 4, HYPER)
    both.play((1, 3))
    wanted = (10 * trained[1] + 6 * trained[3]) / 16
    for model in (both.models[1], both.models[3], both.shared):
        np.testing.assert_allclose(values(model), wanted, atol=1e-6)
    assert np.abs(trained[1] - trained[3]).max() > 1e-3


def test_a_client_that_was_away_begins_from_the_newest() -> None:
    method = FedAvg(FEDERATION, [SMALL] * 4, WHOLE)
    method.play((0, 1, 2))
    method.play((0, 1))
    wanted = stepped(method.models[0], 2)
    method.play((2,))
    np.testing.assert_allclose(values(method.models[2]), wanted, atol=1e-6)


def test_fedper_shares_bodies_alone() -> None:
    method = FedPer(FEDERATION, [SMALL] * 4, HYPER)
    method.play(EVERYBODY)
    assert all(np.array_equal(values(model.body), values(method.shared)) for model in method.models)
    assert len({values(model.header).tobytes() for model in method.models}) == 4


def test_lg_fedavg_shares_headers_alone() -> None:
    method = LGFedAvg(FEDERATION, [SMALL] * 4, HYPER)
    method.play(EVERYBODY)
    assert all(np.array_equal(values(model.header), values(method.shared)) for model in method.models)
    assert len({values(model.body).tobytes() for model in method.models}) == 4


def test_ditto_without_a_pull_is_training_alone_beside_fedavg() -> None:
    method = Ditto(FEDERATION, [SMALL] * 4, HYPER, DittoSettings(pull=0.0))
    alone, together = (one(FEDERATION, [SMALL] * 4, HYPER) for one in (Standalone, FedAvg))
    for sampled in (EVERYBODY, (0, 2)):
        for one in (method, alone, together):
            one.play(sampled)
    for own, wanted in zip(method.models, alone.models, strict=True):
        np.testing.assert_allclose(values(own), values(wanted), atol=1e-6)
    np.testing.assert_allclose(values(method.shared), values(together.shared), atol=1e-6)


def test_ditto_pulls_towards_what_was_shared_as_the_round_began() -> None:
    method = Ditto(FEDERATION, [SMALL] * 4, WHOLE, DittoSettings(pull=2.0))
    before, begun = values(method.models[1]), values(method.shared)
    alone = Standalone(FEDERATION, [SMALL] * 4, WHOLE)
    method.play((1,))
    alone.play((1,))
    wanted = values(alone.models[1]) - WHOLE.learning_rate * 2.0 * (before - begun)
    np.testing.assert_allclose(values(method.models[1]), wanted, atol=1e-6)


def test_ditto_stays_near_with_a_strong_pull() -> None:
    apart = []
    for pull in (0.1, 4.0):
        method = Ditto(FEDERATION, [SMALL] * 4, HYPER, DittoSettings(pull))
        for _ in range(5):
            method.play(EVERYBODY)
        apart.append(np.mean([np.linalg.norm(values(own) - values(method.shared)) for own in method.models]))
    assert apart[1] < apart[0] / 5


# --- mutual learning ----------------------------------------------------------------------------------------------


def kl(teacher: Any, student: Any) -> Any:
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def pair_and_batch() -> tuple[Any, Any, Any, Any]:
    return initial(LARGE, CLASSES, 0, 0), initial(SMALL, CLASSES, 0, 1), *pictures_of(0)


def test_fml_trains_each_model_by_labels_and_by_the_other() -> None:
    own, copy, pictures, labels = pair_and_batch()
    method = FML(FEDERATION, [LARGE] * 4, HYPER, FMLSettings(alpha=0.3, beta=0.8, small=SMALL))
    mine, shared = own(pictures), copy(pictures)
    of_own = 0.3 * functional.cross_entropy(mine, labels) + 0.7 * kl(shared.detach(), mine)
    of_shared = 0.8 * functional.cross_entropy(shared, labels) + 0.2 * kl(mine.detach(), shared)
    found = method.loss(own, copy, pictures, labels)
    assert found.item() == pytest.approx((of_own + of_shared).item(), rel=1e-5)
    wanted = np.concatenate([gradients_of(of_own, own), gradients_of(of_shared, copy)])
    np.testing.assert_allclose(gradients_of(found, own, copy), wanted, atol=1e-6)


def test_fml_reaches_a_private_model_through_answers_alone() -> None:
    alone = Standalone(FEDERATION, [LARGE] * 4, HYPER)
    deaf, hearing = (FML(FEDERATION, [LARGE] * 4, HYPER, FMLSettings(alpha=alpha, small=SMALL)) for alpha in (1.0, 0.5))
    for method in (alone, deaf, hearing):
        method.play(EVERYBODY)
        method.play(EVERYBODY)
    for place, model in enumerate(alone.models):
        np.testing.assert_allclose(values(deaf.models[place]), values(model), atol=1e-6)
        assert np.abs(values(hearing.models[place]) - values(model)).max() > 1e-4


def test_what_fml_and_fedkd_share_is_the_mean_by_samples() -> None:
    for one in (FML, FedKD):
        settings: Any = SETTINGS[one.__name__.lower()]
        copies = {}
        for place in (0, 1):
            alone = one(FEDERATION, [LARGE] * 4, HYPER, settings)
            alone.play((place,))
            copies[place] = values(alone.shared)
        both = one(FEDERATION, [LARGE] * 4, HYPER, settings)
        both.play((0, 1))
        np.testing.assert_allclose(values(both.shared), (15 * copies[0] + 10 * copies[1]) / 25, atol=1e-6)
        assert np.abs(copies[0] - copies[1]).max() > 1e-3


def test_fedkd_distils_answers_and_hidden_states_by_how_right_both_are() -> None:
    own, copy, pictures, labels = pair_and_batch()
    method = FedKD(FEDERATION, [LARGE] * 4, HYPER, FedKDSettings(small=SMALL))
    hidden, shared_hidden = own.body(pictures), copy.body(pictures)
    mine, shared = own.header(hidden), copy.header(shared_hidden)
    losses = functional.cross_entropy(mine, labels), functional.cross_entropy(shared, labels)
    intensity = 1 / (losses[0] + losses[1]).item()
    of_own = losses[0] + intensity * (kl(shared.detach(), mine) + ((hidden - shared_hidden.detach()) ** 2).mean())
    of_shared = losses[1] + intensity * (kl(mine.detach(), shared) + ((hidden.detach() - shared_hidden) ** 2).mean())
    found = method.loss(own, copy, pictures, labels)
    assert found.item() == pytest.approx((of_own + of_shared).item(), rel=1e-5)
    wanted = np.concatenate([gradients_of(of_own, own), gradients_of(of_shared, copy)])
    np.testing.assert_allclose(gradients_of(found, own, copy), wanted, atol=1e-6)


def test_fedkd_survives_two_models_without_a_loss() -> None:
    own, copy, pictures, labels = pair_and_batch()
    with torch.no_grad():
        for model in (own, copy):
            model.header.bias.copy_(torch.tensor([200.0, 0.0, 0.0]))
    sure = FedKD(FEDERATION, [LARGE] * 4, HYPER, FedKDSettings(small=SMALL)).loss(
        own, copy, pictures, torch.zeros_like(labels)
    )
    assert math.isfinite(sure.item())
    assert np.isfinite(gradients_of(sure, own, copy)).all()


# --- prototypes ---------------------------------------------------------------------------------------------------


def test_fedprotos_prototypes_are_means_by_samples() -> None:
    method = build("fedproto")
    method.play((0, 1))
    hidden, labels = [], []
    for place in (0, 1):
        pictures, shown = pictures_of(place)
        hidden.append(method.models[place].body(pictures).detach())
        labels.append(shown)
    for label in range(CLASSES):  # class 2 is the first client's alone
        wanted = torch.cat(hidden)[torch.cat(labels) == label].mean(0)
        np.testing.assert_allclose(method.prototypes[label].numpy(), wanted.numpy(), atol=1e-6)


def test_a_prototype_stays_while_nobody_has_its_class() -> None:
    method = build("fedproto")
    method.play((0, 2))
    before = method.prototypes.clone()
    method.play((1,))
    changed = (method.prototypes != before).any(1)
    assert changed.tolist() == [True, True, False]


def test_fedproto_answers_by_the_nearest_prototype_of_its_own_classes() -> None:
    method = build("fedproto")
    method.play(EVERYBODY)
    for place, (own, one) in enumerate(zip(method.models, FEDERATION.clients, strict=True)):
        with torch.no_grad():
            hidden = own.body(as_pictures(one.test.images)).numpy()
        held = np.unique(one.train.labels)
        apart = [((hidden - method.prototypes[label].numpy()) ** 2).sum(1) for label in held]
        wanted = np.mean(held[np.argmin(apart, 0)] == one.test.labels)
        assert method.accuracies()[place] == pytest.approx(wanted)
        with torch.no_grad():  # its classifier has no say any more
            own.header.bias.fill_(0)
            own.header.weight.fill_(0)
        assert method.accuracies()[place] == pytest.approx(wanted)


def test_fedproto_never_answers_with_a_class_that_a_client_does_not_have() -> None:
    strange = replace(FEDERATION.clients[1], test=samples([2] * 8, 0))
    clients = (FEDERATION.clients[0], strange, *FEDERATION.clients[2:])
    method = FedProto(replace(FEDERATION, clients=clients), [LARGE] * 4, replace(HYPER, learning_rate=1e-6))
    skilled = FedAvg(FEDERATION, [LARGE] * 4, replace(HYPER, epochs=3))
    for _ in range(8):
        skilled.play(EVERYBODY)
    for model in method.models:
        model.load_state_dict(skilled.shared)
    method.play(EVERYBODY)
    with torch.no_grad():
        hidden = method.models[1].body(as_pictures(strange.test.images))
    assert (torch.cdist(hidden, method.prototypes).argmin(1) == 2).any()  # it would, if it could
    assert method.accuracies()[1] == 0


def test_fedproto_draws_representations_to_prototypes() -> None:
    methods = [FedProto(FEDERATION, [LARGE] * 4, WHOLE, FedProtoSettings(weight)) for weight in (0.0, 3.0)]
    alone = Standalone(FEDERATION, [LARGE] * 4, WHOLE)
    for method in (*methods, alone):
        method.play(EVERYBODY)  # nobody has a prototype before this is over
    for method in methods:
        np.testing.assert_allclose(values(method.models[1]), values(alone.models[1]), atol=1e-6)
    own, (pictures, labels) = methods[0].models[1], pictures_of(1)
    hidden = own.body(pictures)
    loss = functional.cross_entropy(own.header(hidden), labels)
    loss = loss + 3.0 * ((hidden - methods[0].prototypes[labels]) ** 2).mean()
    wanted = values(own) - WHOLE.learning_rate * gradients_of(loss, own)
    for method in (*methods, alone):
        method.play((1,))
    np.testing.assert_allclose(values(methods[0].models[1]), values(alone.models[1]), atol=1e-6)
    np.testing.assert_allclose(values(methods[1].models[1]), wanted, atol=1e-6)
    assert np.abs(wanted - values(alone.models[1])).max() > 1e-4


def test_fedghs_server_takes_a_step_for_each_mean_representation() -> None:
    method = build("fedgh")
    weight, bias = (tensor.detach().numpy().copy() for tensor in (method.header.weight, method.header.bias))
    method.play((1, 2))
    for place in (1, 2):
        pictures, labels = pictures_of(place)
        hidden = method.models[place].body(pictures).detach()
        for label in sorted(set(labels.tolist())):
            mean = hidden[labels == label].mean(0).numpy()
            scores = np.exp(weight @ mean + bias)
            slope = scores / scores.sum() - np.eye(CLASSES)[label]
            weight, bias = weight - HYPER.learning_rate * np.outer(slope, mean), bias - HYPER.learning_rate * slope
    np.testing.assert_allclose(method.header.weight.detach().numpy(), weight, atol=1e-6)
    np.testing.assert_allclose(method.header.bias.detach().numpy(), bias, atol=1e-6)


def test_fedghs_clients_begin_with_the_newest_header_and_keep_what_they_train() -> None:
    method = build("fedgh", WHOLE)
    method.play((0, 1))
    for place in (1, 2):  # one that has trained a header of its own, and one that was never there
        begun = deepcopy(method.models[place])
        assert np.abs(values(begun.header) - values(method.header)).max() > 1e-3
        begun.header.load_state_dict(method.header.state_dict())
        wanted = stepped(begun, place)
        method.play((place,))
        np.testing.assert_allclose(values(method.models[place]), wanted, atol=1e-6)


# --- answers ------------------------------------------------------------------------------------------------------


def mean_answers(place: int, model: Any) -> dict[int, Any]:
    pictures, labels = pictures_of(place)
    answers = model(pictures).softmax(1).detach()
    return {label: answers[labels == label].mean(0) for label in sorted(set(labels.tolist()))}


def test_fds_teacher_is_the_mean_of_what_the_others_answer() -> None:
    method = build("fd", WHOLE)  # all answers of the round come before its only step
    answers = [mean_answers(place, model) for place, model in enumerate(method.models)]
    assert not method.teacher(0)[1].any()
    method.play((0, 1, 2))
    taught, known = method.teacher(0)
    assert known.tolist() == [True, True, True]
    wanted = torch.stack([answers[1][0], (answers[1][1] + answers[2][1]) / 2, answers[2][2]])
    np.testing.assert_allclose(taught.numpy(), wanted.numpy(), atol=1e-6)
    assert method.teacher(1)[1].tolist() == [True, True, True]
    answers[3] = mean_answers(3, method.models[3])
    method.play((3,))
    np.testing.assert_allclose(method.teacher(0)[0].numpy(), torch.stack(list(answers[3].values())).numpy(), atol=1e-6)
    assert not method.teacher(3)[1].any()


def test_fd_learns_from_the_others_as_soon_as_they_have_answered() -> None:
    method = FD(FEDERATION, [LARGE] * 4, WHOLE, FDSettings(weight=0.5))
    alone = Standalone(FEDERATION, [LARGE] * 4, WHOLE)
    for one in (method, alone):
        one.play(EVERYBODY)
    np.testing.assert_allclose(values(method.models[1]), values(alone.models[1]), atol=1e-6)
    own, (pictures, labels), (taught, _) = method.models[1], pictures_of(1), method.teacher(1)
    logits = own(pictures)
    loss = functional.cross_entropy(logits, labels) + 0.5 * functional.cross_entropy(logits, taught[labels])
    wanted = values(own) - WHOLE.learning_rate * gradients_of(loss, own)
    method.play(EVERYBODY)
    np.testing.assert_allclose(values(method.models[1]), wanted, atol=1e-6)


def test_fd_learns_from_labels_alone_where_nobody_else_has_a_class() -> None:
    lonely = Federation("colours", "by hand", CLASSES, (client("a", (0,), 6), client("b", (1, 2), 8)))
    method, alone = FD(lonely, [LARGE] * 2, HYPER), Standalone(lonely, [LARGE] * 2, HYPER)
    for one in (method, alone):
        for _ in range(3):
            one.play((0, 1))
    for own, wanted in zip(method.models, alone.models, strict=True):
        np.testing.assert_allclose(values(own), values(wanted), atol=1e-6)
