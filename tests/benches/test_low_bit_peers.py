"""The bench of low_bit beside its peers: its figures, and a replay of ours alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import low_bit_peers


def test_deviation_is_a_share_of_what_the_reference_moved():
    reference = [np.float32([3, 0]), np.float32([4])]
    run = [np.float32([3, 1]), np.float32([4])]
    assert low_bit_peers.deviation([run], reference) == pytest.approx(0.2)
    assert low_bit_peers.deviation([run, reference], reference) == pytest.approx(0.1)
    largest, path = low_bit_peers.worst([run], reference, ["a", "b"])
    assert (largest, path) == (pytest.approx(1 / 3), "a")


def test_bias_is_what_no_number_of_runs_averages_away():
    rng = np.random.default_rng(0)
    reference = [np.ones(10_000)]
    noisy = [[1 + 0.1 + 0.3 * rng.normal(size=10_000)] for _ in range(4)]
    assert low_bit_peers.bias(noisy, reference) == pytest.approx(0.1, rel=0.05)
    assert low_bit_peers.deviation(noisy, reference) == pytest.approx(0.316, rel=0.05)
    assert low_bit_peers.bias(noisy[:1], reference) == low_bit_peers.deviation(noisy[:1], reference)


def test_replay_of_ours_alone():
    params = {"small": jnp.zeros(8), "large": jnp.zeros((128, 64))}
    keys = (jax.random.fold_in(jax.random.key(0), i) for i in itertools.count())
    grads = ({name: jax.random.normal(key, p.shape) for name, p in params.items()} for key in keys)
    figures = low_bit_peers.replay(low_bit_peers.Stream(params, grads), 1e-3, (2, 8))
    eight, four = figures[low_bit_peers.OURS_8], figures[low_bit_peers.OURS_4]
    assert figures["Adam, float32"]["step 8"] == 0
    assert 0 < eight["step 8"] < 0.03 < four["step 8"]
    assert eight["without noise"] < eight["step 8"]
    assert eight["path"] == "large"
    assert four["bytes"] < eight["bytes"] < 2.1
    text = str(low_bit_peers.table([figures, figures], 8))
    assert low_bit_peers.OURS_8 in text and "which leaf" in text
