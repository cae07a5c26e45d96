import jax
import jax.numpy as jnp
import pytest
from helpers import images, tiny
from jax.sharding import AxisType, PartitionSpec

import equidit as edt
from equidit.nn.counting import macs_by_scope

A, B = images(2, (6, 6))


def repeat(a):
    """A product in a loop in a loop: 12 in all."""

    def inner(x, _):
        return jax.lax.scan(lambda x, _: (x @ B, None), x, None, length=3)

    return jax.lax.scan(inner, a, None, length=4)[0]


def grouped(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", feature_group_count=3)


@pytest.mark.parametrize(
    ("function", "args", "count"),
    [
        (jnp.matmul, (A[:2], B), 2 * 6 * 6),
        (lambda a, b: jnp.einsum("ij,kj->ik", a, b) + 1, (A, B[:3]), 6 * 3 * 6),
        (jax.vmap(lambda a: a @ B), (jnp.stack([A] * 5),), 5 * 6**3),
        (lambda a: jnp.tanh(a).sum(), (A,), 0),
        (
            lambda x, k: jax.lax.conv(x, k, (4, 4), "VALID"),
            (A[None, None], A[None, None, :4, :4]),
            16,
        ),
        (grouped, (jnp.ones((1, 3, 8, 12)), jnp.ones((6, 1, 3, 3))), 6 * 96 * 9),
        (repeat, (A,), 12 * 6**3),
        (lambda a: jax.lax.fori_loop(0, 5, lambda _, x: x @ B, a), (A,), 5 * 6**3),
        (
            lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ B @ B, lambda x: x @ B, a),
            (A,),
            2 * 6**3,
        ),
        (
            lambda a: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x - 1, a) @ B,
            (A,),
            6**3,
        ),
    ],
)
def test_count(function, args, count):
    assert edt.count_macs(function, *args) == count
    assert edt.count_macs(jax.jit(function), *args) == count


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"unknown number of times: use lax\.scan"):
        edt.count_macs(lambda a: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ B, a), A)


def test_every_device_counts():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("data"), PartitionSpec())
    shared = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=specs[0])
    assert edt.count_macs(shared, A, B) == edt.count_macs(jnp.matmul, A, B)
    with pytest.raises(ValueError, match="inside a ragged_dot"):
        edt.count_macs(lambda a: jax.lax.ragged_dot(a, B[None], jnp.asarray([6])), A)


def test_gradients_and_recomputation():
    network, x = tiny(), images(1)[0]
    args = (x, jnp.asarray(3), jnp.asarray(3))
    forward = edt.count_macs(network, *args)

    def backward(n, *args):
        return jax.grad(lambda n: jnp.square(n(*args)).sum())(n)

    # Three times the forward pass, but for the gradients that stop at x and the time's features.
    once = edt.count_macs(backward, network, *args)
    assert 2.9 * forward < once < 3 * forward
    again = edt.count_macs(backward, tiny(remat="full"), *args)
    assert once < again < 4 * forward


def test_guidance_costs_two():
    network, args = tiny(), (images(1)[0], jnp.asarray(3), jnp.asarray(3))
    guided = edt.guide(network, 2.0, 10)
    assert edt.count_macs(guided, *args) == 2 * edt.count_macs(network, *args)


def test_products_are_counted_by_scope():
    def body(x, _):
        with jax.named_scope("inner"):
            return jax.nn.relu(x @ B), None

    def f(a):
        with jax.named_scope("outer"):
            a = jax.lax.scan(body, a, None, length=5)[0]
            return a @ jax.jit(jnp.matmul)(a, B)

    assert macs_by_scope(f, A) == {"outer/inner": 5 * 6**3, "outer": 2 * 6**3}
    counts = macs_by_scope(jax.grad(lambda a: f(a).sum()), A)
    inner = sum(count for path, count in counts.items() if "inner" in path)
    assert (inner, counts.total()) == (10 * 6**3, 15 * 6**3)
