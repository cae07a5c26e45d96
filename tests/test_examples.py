"""The examples of user code, run as their reader would run them, and held to the library's laws."""

import importlib.util
import math
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import images, made, randomize, tree_allclose

import equidit as edt
from equidit import diffusion as dfn

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# The sizes of the examples, so that they share their compiled programs with the laws.
DIM, DEPTH, HEADS = 64, 4, 4
TOKENS, VECTOR = images(1, (6, DIM))[0], images(1, (DIM,), seed=2)[0]
COND = edt.Conditioning(VECTOR)
X, T = images(1)[0], jnp.asarray(500)
KEY = jax.random.key(0)


@cache
def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@jax.jit
def run(network, x, t, cond):
    return network(x, t, cond)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_is_short_and_listed(path):
    # Captions is an experiment with a data set of its own.
    assert path.stem == "captions" or len(path.read_text().splitlines()) <= 60
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("name", ["block", "conditioner", "attention"])
def test_main(name, capsys):
    example(name).main()
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    # Twenty steps on one batch: it falls to about a third.
    assert name != "block" or losses[1] < 0.9 * losses[0]
    assert "(2, 8, 8)" in printed


# ------------------------------------------------------------------------- inpainting


def test_inpainting_fills_in_what_fits():
    """With the ideal network of two pictures, half of one is completed to that one."""
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 100))
    one = images(1, (1, 4, 4))[0]
    pictures = jnp.stack([one, -one])

    def network(x, t, cond):
        a = jnp.interp(t, schedule.time, schedule.alphas_cumprod)
        squares = jnp.square(x[None] - jnp.sqrt(a) * pictures).sum((1, 2, 3))
        share = jax.nn.softmax(-squares / (2 * (1 - a)))
        x0 = (share[:, None, None, None] * pictures).sum(0)
        return jnp.concatenate([x0, jnp.zeros_like(x0)])

    mask = jnp.broadcast_to(jnp.arange(4) < 2, (1, 4, 4))
    inner = partial(dfn.ddpm_step, network, schedule, prediction="x0")
    noise = images(1, (1, 4, 4), seed=5)[0]

    @jax.jit
    def fill(known):
        inpaint = example("inpainting").inpainting_step(inner, schedule, known, mask)
        return dfn.sample(inpaint, schedule, noise, None, key=KEY)

    for known in pictures:
        filled = fill(known)
        assert tree_allclose(known, filled, 1e-3)
        assert (filled == known)[mask].all()
    example("inpainting").main()


# ------------------------------------------------------------------------------ block


@eqx.filter_jit
def call(block, tokens):
    return block(tokens, COND)


@eqx.filter_jit
def laws(stack):
    """What a stack gives: scanned, in bfloat16, and its gradient."""
    low = partial(edt.cast, dtype=jnp.bfloat16)
    gradient = jax.grad(lambda stack: jnp.square(stack(TOKENS, COND)).mean())(stack)
    return stack(TOKENS, COND), low(stack)(low(TOKENS), low(COND)), gradient


def test_block_obeys_the_laws():
    make = partial(example("block").ParallelBlock, DIM, HEADS)
    new = edt.Stack(make, DEPTH, key=KEY)
    assert isinstance(new.unstack()[0], edt.Block)
    assert all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(new))
    assert tree_allclose(laws(new)[0], TOKENS)  # the identity, by its gate

    stack = randomize(new)
    out, low, gradient = laws(stack)
    assert not tree_allclose(out, TOKENS, 0.1)
    loop = TOKENS
    for block in stack.unstack():
        loop = call(block, loop)
    assert tree_allclose(out, loop, 1e-5)
    assert low.dtype == jnp.bfloat16
    # bfloat16 has 8 bits; four blocks of about ten roundings each.
    assert tree_allclose(out, low.astype(jnp.float32), 0.05)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert (np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0).all(), path


def test_block_adds_attention_and_mlp_of_the_same_tokens():
    stack = edt.Stack(partial(example("block").ParallelBlock, DIM, HEADS), DEPTH, key=KEY)
    block = randomize(stack).unstack()[0]

    def without(part):
        zeros = jax.tree.map(jnp.zeros_like, getattr(block, part))
        return call(eqx.tree_at(lambda b: getattr(b, part), block, zeros), TOKENS)

    whole = call(block, TOKENS)
    assert tree_allclose(whole, without("mlp") + without("attention") - TOKENS, 1e-5)


# ------------------------------------------------------------------------------ conditioner


ATTRIBUTES = jnp.asarray([0.5, jnp.nan])


def attribute_network(**design):
    conditioner = made(example("conditioner").AttributeConditioner, 2, DIM)
    return made(edt.DiT, 1, 2, DIM, DEPTH, HEADS, None, conditioner=conditioner, **design)


@pytest.mark.parametrize(
    "design",
    [
        {"block": edt.AdaLNZeroBlock},
        {"block": edt.AdaLNBlock},
        {"block": edt.CrossAttentionBlock, "final": edt.PlainFinalLayer},
        {"block": edt.InContextBlock, "final": edt.PlainFinalLayer, "append_cond": True},
        {"block": edt.TextCrossAttentionBlock},
    ],
    ids=lambda design: design["block"].__name__,
)
def test_conditioner_in_every_block(design):
    network = attribute_network(**design)
    conditions = [ATTRIBUTES, ATTRIBUTES.at[0].set(2.0), network.conditioner.null]
    outs = [run(network, X, T, condition) for condition in conditions]
    assert np.isfinite(outs).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # Far beyond rounding; through cross-attention alone the condition is heard faintly.
        assert not tree_allclose(outs[i], outs[j], 1e-4)


def test_unknown_is_not_zero_and_null_is_all_unknown():
    conditioner = attribute_network().conditioner
    unknown, zero = (
        eqx.filter_jit(conditioner)(T, attributes).vector
        for attributes in (ATTRIBUTES, jnp.nan_to_num(ATTRIBUTES))
    )
    assert not tree_allclose(unknown, zero, 1e-2)
    np.testing.assert_array_equal(conditioner.null, [np.nan, np.nan])
    dropped = edt.drop_label(ATTRIBUTES, conditioner.null, 1.0, key=KEY)
    np.testing.assert_array_equal(dropped, conditioner.null)
    low = jax.eval_shape(edt.cast(conditioner, jnp.bfloat16), T, ATTRIBUTES)
    assert low.vector.dtype == low.tokens.dtype == jnp.bfloat16


def test_gradient_reaches_the_whole_conditioner_and_is_no_nan():
    def loss(conditioner):
        cond = conditioner(T, ATTRIBUTES)
        return jnp.square(cond.vector).mean() + jnp.square(cond.tokens).mean()

    gradient = jax.jit(jax.grad(loss))(attribute_network().conditioner)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_guidance_by_the_conditioner_s_null():
    network = attribute_network()
    null = network.conditioner.null
    cond, without = run(network, X, T, ATTRIBUTES), run(network, X, T, null)
    guided = run(edt.guide(network, 3.0, null), X, T, ATTRIBUTES)
    assert tree_allclose(guided[:1], (cond + 2 * (cond - without))[:1], 1e-5)


# ------------------------------------------------------------------------------ attention


def full(q, k, v, mask=None):
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize(("queries", "masked"), [(1, False), (16, True), (40, True)])
def test_chunked_attention_is_attention(queries, masked):
    chunked = partial(example("attention").chunked_attention, chunk=16)
    q = images(1, (queries, 2, 8), seed=2)[0]
    k, v = images(2, (9, 2, 8), seed=3)
    mask = (jnp.arange(9) % 3 > 0)[None, None] if masked else None

    def both(attend):
        loss = lambda q, k, v: jnp.square(attend(q, k, v, mask=mask)).sum()  # noqa: E731
        return jax.jit(lambda *qkv: (attend(*qkv, mask=mask), jax.grad(loss, (0, 1, 2))(*qkv)))

    assert tree_allclose(both(full)(q, k, v), both(chunked)(q, k, v), 1e-5)


def test_chunked_attention_in_bfloat16():
    q, k, v = edt.cast(images(3, (20, 2, 8)), jnp.bfloat16)
    out = jax.jit(partial(example("attention").chunked_attention, chunk=16))(q, k, v)
    assert out.dtype == jnp.bfloat16
    # One rounding of the weights and one of the result, 2**-9 each, and as much in the reference.
    reference = jax.jit(full)(q, k, v)
    assert tree_allclose(reference.astype(jnp.float32), out.astype(jnp.float32), 0.01)


def test_chunked_attention_in_a_network():
    attend = partial(example("attention").chunked_attention, chunk=6)
    block = partial(edt.AdaLNZeroBlock, make_attention=partial(edt.Attention, attend=attend))
    usual, chunked = (attribute_network(block=b) for b in (edt.AdaLNZeroBlock, block))
    assert tree_allclose(run(usual, X, T, ATTRIBUTES), run(chunked, X, T, ATTRIBUTES), 1e-5)


def test_chunked_attention_saves_memory():
    tokens, heads, chunk = 1024, 2, 64
    qkv = images(3, (tokens, heads, 8))

    def memory(attend):
        gradient = jax.jit(jax.grad(lambda qkv: jnp.square(attend(*qkv)).sum()))
        analysis: Any = gradient.lower(qkv).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    weights = 4 * heads * tokens**2
    assert memory(full) > weights
    # A sixteenth of the weights at a time, a few such arrays, and what has the size of the input.
    assert memory(partial(example("attention").chunked_attention, chunk=chunk)) < weights / 2


def test_chunked_attention_refuses_a_mask_that_it_would_not_cut():
    q, k, v = images(3, (4, 2, 8))
    with pytest.raises(ValueError, match="same for every query"):
        example("attention").chunked_attention(q, k, v, mask=jnp.ones((1, 4, 4), bool))


# ------------------------------------------------------------------------------ fine-tuning


def losses(printed):
    found = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]
    assert np.isfinite(found).all()
    return found


def named(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def latent_network(**sizes):
    return made(edt.DiT, 4, 2, DIM, DEPTH, HEADS, 10, **sizes)


def test_other_classes():
    network = latent_network()
    other = example("finetune_classes").with_classes(network, 3, key=KEY)
    assert (network.conditioner.null, other.conditioner.null) == (10, 3)
    table = np.asarray(other.conditioner.label.table)
    assert np.array_equal(table[3], network.conditioner.label.table[10])
    # New rows lie near the null one, apart from one another.
    assert 0 < np.abs(table[:3] - table[3]).max() < 0.1
    assert (table[0] != table[1]).all()
    before, after = named(network), named(other)
    assert before.keys() == after.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == [".conditioner.label.table"]
    x = images(1, (4, 8, 8))[0]
    assert tree_allclose(run(network, x, T, jnp.asarray(10)), run(other, x, T, jnp.asarray(3)))
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        example("finetune_classes").with_classes(network, 0, key=KEY)


def test_other_classes_main(capsys):
    pytest.importorskip("safetensors", reason="needs equidit[pretrained]")
    example("finetune_classes").main()
    printed = capsys.readouterr().out
    assert "1000 classes" in printed
    assert len(losses(printed)) == 5


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (8, 12), (4, 2)])
def test_positions_at_another_resolution(grid):
    positions = example("finetune_resolution").positions
    usual = np.asarray(edt.sincos_2d(DIM, (4, 4))).reshape(4, 4, DIM)
    table = np.asarray(positions(DIM, grid, 4)).reshape(*grid, DIM)
    # At the places of the old grid are the old positions.
    rows, columns = (np.arange(count) * 4 / count for count in grid)
    old_rows, old_columns = (np.flatnonzero(axis % 1 == 0) for axis in (rows, columns))
    expected = usual[np.ix_(rows[old_rows].astype(int), columns[old_columns].astype(int))]
    np.testing.assert_allclose(table[np.ix_(old_rows, old_columns)], expected, atol=1e-5)
    if grid == (8, 8):
        # And half-way between them, the sines half-way.
        np.testing.assert_allclose(table[0, 1, 0], math.sin(0.5), atol=1e-6)


def test_resized_networks():
    network = latent_network()
    resized = example("finetune_resolution").Resized(network, 4)
    label = jnp.asarray(1)
    loss = example("finetune_resolution").loss
    wider, x = images(1, (4, 16, 12))[0], images(1, (4, 8, 8))[0]

    @jax.jit
    def both(network, resized):
        outs = [[n(x, T, label) for n in (network, resized)] for x in (x, wider)]
        gradients = [jax.grad(loss)(n, (wider, label), KEY) for n in (network, resized)]
        low = edt.cast(resized, jnp.bfloat16)(wider, T, label)
        return [*outs, low, gradients]

    usual, outs, low, gradients = both(network, resized)
    assert tree_allclose(usual[0], usual[1], 1e-5)
    assert outs[0].shape == outs[1].shape == (8, 16, 12)
    assert not tree_allclose(outs[0], outs[1], 1e-3)
    assert low.dtype == jnp.float32
    # Both can be trained.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    with pytest.raises(ValueError, match="height=15"):
        resized(wider[:, :15], T, label)


def test_resized_networks_main(capsys):
    pytest.importorskip("safetensors", reason="needs equidit[pretrained]")
    example("finetune_resolution").main()
    assert len(losses(capsys.readouterr().out)) == 5


def test_frozen_leaves_stay():
    import optax

    freeze = example("freeze")
    network = latent_network()
    before = named(jax.tree.map(jnp.copy, network))
    # Weight decay would change frozen leaves, if it reached them.
    optimizer = freeze.train_only(optax.adamw(1e-2, weight_decay=0.1), freeze.PARTS)
    state = edt.init_state(network, optimizer)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    step = edt.make_train_step(freeze.loss, optimizer, ema_decay=0.5)
    batch = (images(4, (4, 8, 8)), jnp.arange(4))
    for _ in range(2):
        state = step(state, batch, KEY)[0]
    after, ema = named(state.network), named(state.ema)
    trained = {n for n in before if "modulation" in n or "conditioner.label" in n}
    assert len(trained) == 5
    assert moments == 2 * sum(before[name].size for name in trained)
    for name, leaf in before.items():
        assert np.array_equal(leaf, after[name]) == (name not in trained), name
        assert np.array_equal(leaf, ema[name]) == (name not in trained), name


def test_freezing_all_by_a_wrong_name_is_refused():
    import optax

    optimizer = example("freeze").train_only(optax.adam(1e-3), ("modulate",))
    with pytest.raises(ValueError, match=r"parts=\('modulate',\): no leaf of the network"):
        edt.init_state(latent_network(), optimizer)


def test_freeze_main(capsys):
    pytest.importorskip("safetensors", reason="needs equidit[pretrained]")
    example("freeze").main()
    printed = capsys.readouterr().out
    assert len(losses(printed)) == 5
    assert len(re.findall("^trained", printed, re.M)) == 5
    assert len(re.findall("^frozen", printed, re.M)) == 16


# ------------------------------------------------------------------------------ prompts

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "cube", "ball", "large"]
PROMPTS = ["a red cube", "a large blue ball"]
TEXT_DIM = 16


@pytest.fixture(scope="module", params=["t5", "clip"])
def encoder(request, tmp_path_factory):
    """A folder with a tiny random encoder and its tokenizer, and the encoder itself."""
    missing = "needs PyTorch and equidit[text], see docs/examples/prompts.py"
    torch = pytest.importorskip("torch", reason=missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers", reason=missing)
        import tokenizers

        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
        folder = tmp_path_factory.mktemp(request.param)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
        torch.manual_seed(0)
        # As on the hub: T5 together with its decoder, CLIP with its tower for pictures.
        if request.param == "t5":
            config = transformers.T5Config(
                vocab_size=len(WORDS), d_model=TEXT_DIM, d_kv=4, d_ff=32, num_layers=1, num_heads=4
            )
            model = transformers.T5Model(config)
            tower = model.encoder
        else:
            tiny = {
                "hidden_size": TEXT_DIM,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
            }
            config = transformers.CLIPConfig(
                text_config={**tiny, "vocab_size": len(WORDS), "eos_token_id": 3},
                vision_config={**tiny, "image_size": 8, "patch_size": 4},
            )
            model = transformers.CLIPModel(config)
            tower = model.text_model
        model.save_pretrained(folder)
        yield folder, tower.eval()


def test_encode(encoder):
    prompts, (folder, tower) = example("prompts"), encoder
    tokenizer, loaded = prompts.load(folder)
    embeddings, mask = prompts.encode(PROMPTS, tokenizer, loaded, length=8)
    assert (embeddings.shape, embeddings.dtype) == ((2, 8, TEXT_DIM), np.float32)
    # Words, and the marks of the start and the end.
    np.testing.assert_array_equal(mask, np.arange(8) < np.array([[5], [6]]))
    assert mask.dtype == bool
    ids = tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    expected = tower(input_ids=ids).last_hidden_state.detach().numpy()[0]
    assert tree_allclose(expected, embeddings[0, :5], 1e-5)
    assert prompts.encode(PROMPTS, tokenizer, loaded, length=4)[1].all()
    assert prompts.encode(PROMPTS, tokenizer, loaded)[0].shape == (2, 77, TEXT_DIM)


def test_prompts_in_a_network(encoder):
    prompts = example("prompts")
    loaded = prompts.load(encoder[0])
    config = edt.Config(
        2,
        DIM,
        DEPTH,
        HEADS,
        1,
        None,
        block="text-cross-attention",
        text_dim=TEXT_DIM,
        text_length=16,
    )
    network = randomize(edt.build(config, key=KEY))

    def outputs(length):
        encoded = prompts.encode(PROMPTS, *loaded, length=length)
        return jax.jit(jax.vmap(lambda n, p: n(X, T, p), (None, 0)))(network, encoded)

    out = outputs(8)
    assert tree_allclose(out, outputs(12), 1e-5)
    assert not tree_allclose(out[0], out[1], 1e-2)


def test_prompts_main(encoder, capsys):
    example("prompts").main(encoder[0], *PROMPTS)
    assert "(2, 3, 16, 16)" in capsys.readouterr().out
