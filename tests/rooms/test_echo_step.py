"""Echoing on the device: one scan, keys by (ordinal, copy), donation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import _jaxpr, echo


def step(carry, batch):
    loss = jnp.mean((batch - carry) ** 2)
    return carry - 0.1 * jax.grad(lambda w: jnp.mean((batch - w) ** 2))(carry), loss


def noisy(key, batch):
    return batch + jax.random.normal(key, batch.shape)


def test_it_is_the_loop_over_the_copies():
    key, batch = jax.random.key(3), jnp.arange(6.0)
    for augment in (None, noisy):
        carry, losses = echo.echo_step(step, 4, augment=augment)(jnp.zeros(()), batch, 7, key)
        want, expected = jnp.zeros(()), []
        for copy in range(4):
            k = jax.random.fold_in(jax.random.fold_in(key, 7), copy)
            want, loss = step(want, batch if augment is None else augment(k, batch))
            expected.append(loss)
        np.testing.assert_allclose(carry, want, rtol=1e-6)
        np.testing.assert_allclose(losses, np.stack(expected), rtol=1e-6)


def test_copies_differ_and_repeat_themselves():
    seen = lambda carry, batch: (carry, batch)
    four = echo.echo_step(seen, 4, augment=noisy)
    key = jax.random.key(0)
    views = [four(0, jnp.zeros(8), n, key)[1] for n in (0, 1)]
    flat = np.concatenate(views).reshape(8, -1)
    assert len(np.unique(flat, axis=0)) == 8
    np.testing.assert_array_equal(four(0, jnp.zeros(8), jnp.uint32(1), key)[1], views[1])
    # the keys of tagged elements are the same
    for copy in range(4):
        [k] = echo.augmentation_keys(key, jnp.array([1]), jnp.array([copy]))
        np.testing.assert_array_equal(noisy(k, jnp.zeros(8)), views[1][copy])


def test_it_is_one_program_for_all_batches():
    traces = 0

    def counted(carry, batch):
        nonlocal traces
        traces += 1
        return step(carry, batch)

    three = echo.echo_step(counted, 3, augment=noisy)
    carry = jnp.zeros(())
    for n in range(5):
        carry, _ = three(carry, jnp.ones(4), n, jax.random.key(0))
    assert traces == 1
    jaxpr = jax.make_jaxpr(three)(carry, jnp.ones(4), 0, jax.random.key(0))
    scans = [e for e in _jaxpr.walk(jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [3]


def test_donation_is_of_the_carry_only_and_mistakes_are_named():
    key = jax.random.key(0)
    two = echo.echo_step(step, 2, donate=True)
    carry, batch = jnp.zeros(16), jnp.ones(16)
    after, _ = two(carry, batch, 0, key)
    assert carry.is_deleted() and not batch.is_deleted()
    with pytest.raises(ValueError, match=r"carry.*donated"):
        two(carry, batch, 1, key)
    batch.delete()
    with pytest.raises(ValueError, match=r"batch.*donated"):
        two(after, batch, 1, key)
    kept = jnp.zeros(16)
    echo.echo_step(step, 2)(kept, jnp.ones(16), 0, key)
    assert not kept.is_deleted()


@pytest.mark.devices
def test_it_runs_inside_the_users_own_jit_and_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(jnp.arange(16.0), sharding)
    three = echo.echo_step(step, 3, augment=noisy)
    key = jax.random.key(1)
    want, _ = three(jnp.zeros(()), jnp.arange(16.0), 2, key)
    for run in (three, jax.jit(three)):
        got, losses = run(jnp.zeros(()), batch, 2, key)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert losses.shape == (3,)


def test_keys_have_the_shape_of_their_numbers():
    key = jax.random.key(0)
    ks = echo.augmentation_keys(key, np.arange(6).reshape(2, 3), 1)
    assert (
        ks.shape == (2, 3) and len(np.unique(jax.random.key_data(ks).reshape(6, -1), axis=0)) == 6
    )
    assert echo.augmentation_keys(key, 4, 2) == jax.random.fold_in(jax.random.fold_in(key, 4), 2)


def test_a_factor_that_is_no_whole_number_is_refused():
    for factor in (0, -1, 1.5, True, "auto"):
        with pytest.raises(Exception, match="factor"):
            echo.echo_step(step, factor)
