from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAPER_BLOCKS, images, made, tiny, tree_allclose
from jaxtyping import TypeCheckError

import equidit as edt

T, LABEL, KEY = jnp.asarray(500), jnp.asarray(3), jax.random.key(0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 10), (4, 12, 6), (2, 2, 2)])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_any_size_and_channels(shape, learn_sigma):
    network = tiny(in_channels=shape[0], learn_sigma=learn_sigma)
    out = network(images(1, shape)[0], T, LABEL)
    assert out.shape == (shape[0] * (1 + learn_sigma), *shape[1:])
    assert isinstance(network, edt.Network)


every_paper_block = pytest.mark.parametrize("block", PAPER_BLOCKS)


def paper_network(block, **sizes):
    config = edt.Config(2, 32, 2, 4, in_channels=1, num_classes=10, block=block, **sizes)
    return made(edt.build, config)


@every_paper_block
def test_every_design_reads_time_and_label(block):
    network, x = paper_network(block), images(1)[0]
    out = network(x, T, LABEL)
    assert out.shape == (2, 8, 8)
    assert not tree_allclose(out, network(x, T, jnp.asarray(4)), 1e-4)
    assert not tree_allclose(out, network(x, jnp.asarray(900), LABEL), 1e-4)
    zero = edt.build(edt.Config(2, 32, 2, 4, 1, 10, block=block), key=jax.random.key(0))
    assert (zero(x, T, LABEL) == 0).all()


@every_paper_block
def test_hidden_states_of_a_loop_over_the_blocks(block):
    network, x = paper_network(block), images(1)[0]
    tokens, conditioning = network.embed(x, T, LABEL)
    appended = 2 if block == "in-context" else 0
    assert tokens.shape == (16 + appended, 32)
    hidden = []
    for layer in network.blocks.unstack():
        tokens = layer(tokens, conditioning)
        hidden.append(tokens)
    patches = network.final(hidden[-1][:16], conditioning)
    assert tree_allclose(edt.unpatchify(patches, 2, (4, 4)), network(x, T, LABEL), 1e-5)


def test_in_context_appends_time_and_label_at_position_0():
    network, x = paper_network("in-context"), images(1)[0]
    tokens, conditioning = network.embed(x, T, LABEL)
    cond = network.conditioner(T, LABEL)
    assert tree_allclose(tokens[16:], cond.tokens)
    assert (conditioning.positions[16:] == 0).all()
    assert conditioning.tokens is None
    assert conditioning.positions[15].tolist() == [3, 3]
    none = eqx.tree_at(lambda n: n.conditioner, network, lambda t, c: edt.Conditioning(cond.vector))
    with pytest.raises(ValueError, match="conditioner gave none"):
        none(x, T, LABEL)


def test_vmap_equals_loop_and_jit_equals_eager():
    network, x = tiny(), images(4)
    t, label = jnp.asarray([0.0, 3, 500, 999]), jnp.asarray([0, 5, 9, 10])
    batched = jax.jit(lambda n, *args: jax.vmap(n)(*args))(network, x, t, label)
    loop = jnp.stack([network(*args) for args in zip(x, t, label, strict=True)])
    assert tree_allclose(batched, loop, 1e-5)


WRAPPED = {
    "network": lambda: tiny(),
    "guided": lambda: edt.guide(tiny(), 2.0, 10),
    "unconditional": lambda: tiny(num_classes=None),
    "low precision": lambda: edt.cast(tiny(), jnp.bfloat16),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_how_a_network_goes_through_jit(name):
    network, x = WRAPPED[name](), images(2)
    label = None if name == "unconditional" else LABEL
    expected = network(x[0], T, label)
    tolerance = 0.05 if name == "low precision" else 1e-5
    same = partial(tree_allclose, expected, tolerance=tolerance)
    assert same(eqx.filter_jit(network)(x[0], T, label))
    assert same(jax.jit(lambda n, *args: n(*args))(network, x[0], T, label))
    assert same(jax.jit(lambda n, x: jax.vmap(n, (0, None, None))(x, T, label))(network, x)[0])
    assert same(jax.vmap(network, (0, None, None))(x, T, label)[0])
    assert same(eqx.filter_vmap(network, in_axes=(0, None, None))(x, T, label)[0])
    assert same(eqx.filter_checkpoint(network)(x[0], T, label))
    assert jax.eval_shape(network, x[0], T, label).shape == expected.shape
    for wrap in (jax.jit, jax.checkpoint):
        with pytest.raises(TypeError, match=r"holds arrays .* write eqx\.filter_jit\(module\)"):
            wrap(network)(x[0], T, label)


def test_every_module_says_how_it_goes_through_jit():
    network = tiny()
    modules = {
        "DiT": network,
        "BoundMethod": network.embed,
        "Stack": network.blocks,
        "AdaLNZeroBlock": network.blocks[0],
        "LabelConditioner": network.conditioner,
        "FinalLayer": network.final,
        "Autoencoder": edt.Autoencoder(1, 1, 2, (4,), 1, 2, key=KEY),
    }
    for name, module in modules.items():
        words = "DiT" if name == "BoundMethod" else name
        with pytest.raises(TypeError, match=f"{words} holds arrays and so has no hash"):
            hash(module)
    # Shapes have a hash, and so have networks of them.
    shapes = [eqx.filter_eval_shape(edt.DiT, 1, 2, 8, 1, 2, 3, key=KEY) for _ in range(2)]
    assert hash(shapes[0]) == hash(shapes[1])


def test_profiles_and_programs_name_every_part():
    network = eqx.filter_eval_shape(lambda: tiny(block=edt.TextCrossAttentionBlock))
    lowered = jax.jit(lambda n, *args: n(*args)).lower(network, images(1)[0], T, LABEL)
    text = lowered.as_text(debug_info=True)
    for path in (
        "DiT/patch_embed/Linear/",
        "DiT/conditioner/LabelConditioner/TimestepEmbedder/Linear/",
        "DiT/Stack/",
        "TextCrossAttentionBlock/modulation/Linear/",
        "TextCrossAttentionBlock/self_attention/Attention/Linear/",
        "TextCrossAttentionBlock/cross_attention/Attention/attend/",
        "TextCrossAttentionBlock/MLP/Linear/",
        "DiT/final/FinalLayer/modulation/Linear/",
    ):
        assert path in text


def test_number_of_classes():
    assert tiny().num_classes == 10
    assert tiny(num_classes=1).num_classes == 1
    assert tiny(num_classes=None).num_classes is None
    text = edt.TextConditioner(8, 32, key=KEY)
    assert tiny(num_classes=None, conditioner=text).num_classes is None
    assert tiny(num_classes=None, conditioner=narrow).num_classes is None


def test_zero_at_initialisation():
    network = edt.DiT(1, 2, 32, 2, 4, 10, key=jax.random.key(0))
    assert (network(images(1)[0], T, LABEL) == 0).all()


@every_paper_block
def test_every_leaf_is_a_float_array_and_learns(block):
    network, x = paper_network(block), images(11)
    t, label = jnp.linspace(0, 999, 11), jnp.arange(11)
    loss = lambda n: jnp.square(jax.vmap(n)(x, t, label)).mean()  # noqa: E731
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(network)):
        assert eqx.is_inexact_array(grad)
        assert (np.abs(grad).reshape(len(grad), -1).max(axis=1) > 0).all(), path


def test_low_precision_inside_and_the_input_dtype_outside():
    network = edt.cast(tiny(), jnp.bfloat16)
    x = images(1)[0]
    out = network(x, T, LABEL)
    assert out.dtype == jnp.float32
    assert tree_allclose(tiny()(x, T, LABEL), out, 0.05)
    assert network(x.astype(jnp.bfloat16), T, LABEL).dtype == jnp.bfloat16
    # 997 and 999 are the same number in bfloat16.
    assert not tree_allclose(
        network(x, jnp.asarray(997), LABEL), network(x, jnp.asarray(999), LABEL)
    )


def test_unconditional():
    network = tiny(num_classes=None)
    x = images(1)[0]
    assert network(x, T, None).shape == (2, 8, 8)
    with pytest.raises(TypeCheckError, match="cond"):
        network(x, T, LABEL)


def test_your_own_conditioner_and_block():
    class Two(eqx.Module):
        weight: jax.Array

        def __call__(self, t, cond):
            return edt.Conditioning(self.weight @ jnp.stack([t, *cond]))

    seen = []

    class Mine(eqx.Module):
        inner: edt.AdaLNZeroBlock

        def __init__(self, dim, num_heads, mlp_ratio, *, key):
            self.inner = edt.AdaLNZeroBlock(dim, num_heads, mlp_ratio, key=key)

        def __call__(self, tokens, cond):
            seen.append(cond.positions)
            return self.inner(tokens, cond)

    weight = images(1, (32, 3))[0]
    network = tiny(num_classes=None, conditioner=Two(weight), block=Mine)
    out = network(images(1, (1, 4, 6))[0], jnp.asarray(3.0), (jnp.asarray(1.0), jnp.asarray(2.0)))
    assert out.shape == (2, 4, 6)
    np.testing.assert_array_equal(seen[0], [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])


def narrow(t, cond):
    return edt.Conditioning(jnp.ones(16))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny()(images(1, (1, 9, 8))[0], T, LABEL), ["height=9", "patch_size=2"]),
        (lambda: tiny()(images(1, (4, 8, 8))[0], T, LABEL), ["4 channels", "in_channels=1"]),
        *(
            (partial(call, images(1, (6, 8, 3))[0]), ["x has 6 channels", "x, (2, 0, 1)"])
            for call in (
                lambda x: tiny(in_channels=3)(x, T, LABEL),
                lambda x: tiny(in_channels=3).embed(x, T, LABEL),
                lambda x: jax.jit(lambda x: tiny(in_channels=3)(x, T, LABEL))(x),
                lambda x: jax.vmap(tiny(in_channels=3), (0, None, None))(x[None], T, LABEL),
                lambda x: edt.guide(tiny(in_channels=3), 2.0, 10)(x, T, LABEL),
                lambda x: edt.Autoencoder(3, 3, 4, (4,), 1, 2, key=KEY).encode(x),
            )
        ),
        (lambda: tiny(in_channels=3)(images(1, (4, 9, 7))[0], T, LABEL), ["x has 4 channels"]),
        (lambda: tiny()(images(1)[0], T, jnp.asarray(99)), ["label=99", "10 classes", "0 to 9"]),
        (lambda: edt.guide(tiny(), 2.0, 11)(images(1)[0], T, LABEL), ["label=11"]),
        (lambda: tiny(num_heads=5), ["dim=32", "num_heads=5"]),
        (lambda: tiny(hidden_size=30, num_heads=5), ["hidden_size=30", "multiple of 4"]),
        (lambda: tiny(depth=0), ["depth=0"]),
        (lambda: tiny(conditioner=narrow, num_classes=None)(images(1)[0], T, LABEL), ["16", "32"]),
        (lambda: tiny(num_classes=0), ["num_classes=0"]),
        (lambda: tiny(conditioner=abs), ["num_classes=10", "num_classes=None"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert all(word in str(error.value) for word in words), error.value
