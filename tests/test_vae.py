"""The autoencoder by itself, and against diffusers'."""

import functools
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_fields, difference, images, tree_allclose

import equidit as edt
from equidit import pretrained
from equidit.vae import check_range

# Rewrites of a float32 network in another framework.
TOLERANCE = 1e-4
WEIGHTS = "diffusion_pytorch_model"
SIZES = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
VARIANTS = {
    "plain": {},
    "wide-latents": {"latent_channels": 6, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "statistics": {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "scaling_factor": 0.5,
    },
    "without-extras": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "other-channels": {"in_channels": 1, "out_channels": 2, "layers_per_block": 2},
    "one-resolution": {"block_out_channels": (16,)},
}


def autoencoder(**overrides):
    """A small one with random weights, drawn by NumPy: hundreds of shapes would be compiled."""
    make = functools.partial(edt.Autoencoder, **(SIZES | overrides))
    skeleton = eqx.filter_eval_shape(make, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, skeleton)


@jax.jit
def encode(vae, x):
    return vae.encode(x)


@jax.jit
def decode(vae, z):
    return vae.decode(z)


def test_shapes():
    vae = autoencoder()
    check_fields(vae.encoder.conv_in)
    check_fields(vae.encoder.norm_out)
    assert vae.downsampling == 4
    posterior = encode(vae, images(1, (3, 8, 12))[0])
    assert posterior.mean.shape == posterior.log_variance.shape == (4, 2, 3)
    assert decode(vae, posterior.mode()).shape == (3, 8, 12)


def test_a_new_one_keeps_variances():
    vae = jax.jit(lambda key: edt.Autoencoder(**SIZES, key=key))(jax.random.key(0))
    posterior = encode(vae, images(1, (3, 16, 16))[0])
    assert 0.03 < float(posterior.mean.std() / vae.scaling_factor) < 3
    assert 0.1 < float(decode(vae, posterior.mean).std()) < 3


def test_leaves_are_float_arrays():
    for leaf in jax.tree.leaves(autoencoder()):
        assert jnp.issubdtype(leaf.dtype, jnp.floating)


def test_vmap_equals_loop():
    vae = autoencoder()
    x = images(3, (3, 8, 8))
    there_and_back = lambda x: vae.decode(vae.encode(x).mode())  # noqa: E731
    single = jnp.stack([jax.jit(there_and_back)(one) for one in x])
    assert tree_allclose(jax.jit(jax.vmap(there_and_back))(x), single, 1e-5)


def test_bfloat16():
    """A bfloat16 network takes and gives float32, near what the float32 one gives."""
    vae = autoencoder()
    low = edt.cast(vae, jnp.bfloat16)
    x = images(1, (3, 8, 8))[0]
    posterior = encode(low, x)
    assert posterior.mean.dtype == posterior.log_variance.dtype == jnp.float32
    assert encode(low, x.astype(jnp.bfloat16)).sample(jax.random.key(0)).dtype == jnp.bfloat16
    z = encode(vae, x).mean
    assert decode(low, z).dtype == jnp.float32
    # bfloat16 has 8 bits; two dozen layers lose some of them.
    assert tree_allclose(decode(vae, z), decode(low, z), 0.1)


def test_group_norm_is_safe_in_bfloat16():
    """In bfloat16 a mean of 100 would swallow a deviation of 1/10."""
    norm = edt.cast(autoencoder().encoder.norm_out, jnp.bfloat16)
    x = 100 + 8 * images(1, (4, 4, 32))[0]
    x = x.astype(jnp.bfloat16)
    unscaled = edt.cast(jax.tree.map(jnp.ones_like, norm), jnp.bfloat16)(x) - 1
    groups = np.asarray(unscaled, np.float64).reshape(16, 8, 4)
    np.testing.assert_allclose(groups.mean(axis=(0, 2)), 0, atol=0.01)
    np.testing.assert_allclose(groups.std(axis=(0, 2)), 1, atol=0.01)


def test_posterior_is_clipped_and_scaled():
    vae = autoencoder(use_quant_conv=False, scaling_factor=0.5, shift_factor=2.0)
    bias = jnp.array([1.0, 2.0, 3.0, 4.0, -100.0, 100.0, 0.0, 7.0])
    vae = jax.tree.map(jnp.zeros_like, vae)
    vae = eqx.tree_at(lambda v: v.encoder.conv_out.bias, vae, bias)
    posterior = encode(vae, jnp.zeros((3, 4, 4)))
    np.testing.assert_allclose(posterior.mean[:, 0, 0], [-0.5, 0, 0.5, 1])
    shift = 2 * math.log(0.5)
    np.testing.assert_allclose(
        posterior.log_variance[:, 0, 0] - shift, [-30, 20, 0, 7], rtol=0, atol=1e-5
    )


UNITS = {
    "one factor": {"scaling_factor": 0.18215},
    "shifted": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "statistics": VARIANTS["statistics"],
    "standardised": {
        "latents_mean": np.arange(4, dtype=np.float32),
        "latents_std": (1, 2.5, np.float32(0.5), 4),
        "scaling_factor": 1,
    },
    "of six channels": {"latents_mean": [7] * 6, "latents_std": range(1, 7), "latent_channels": 6},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", UNITS)
def test_units_are_undone_and_the_formula_s(name, dtype, monkeypatch):
    """Without its networks, the autoencoder is its change of units."""
    options = UNITS[name]
    channels = options.get("latent_channels", 4)
    options = options | {k: list(v) for k, v in options.items() if isinstance(v, range)}
    raw = np.random.default_rng(3).normal(3.0, 5.0, (2 * channels, 2, 3)).astype(np.float32)
    last = jnp.asarray(np.moveaxis(raw, 0, -1))
    monkeypatch.setattr(
        "equidit.vae._Coder.__call__",
        lambda coder, z: z.repeat(4, 0).repeat(4, 1) if coder.up else last,
    )
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, **options)
    shift = np.reshape(options.get("latents_mean", options.get("shift_factor", 0.0)), (-1, 1, 1))
    scale = vae.scaling_factor / np.reshape(options.get("latents_std", 1.0), (-1, 1, 1))
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-6
    posterior = vae.encode(jnp.zeros((3, 8, 12), dtype))
    assert posterior.mean.dtype == posterior.log_variance.dtype == dtype
    mean, log_variance = raw[:channels].astype(np.float64), raw[channels:].astype(np.float64)
    assert tree_allclose((mean - shift) * scale, posterior.mean, tolerance)
    expected = np.clip(log_variance, -30, 20) + 2 * np.log(scale)
    assert tree_allclose(expected, posterior.log_variance, tolerance)
    assert tree_allclose(mean, vae.decode(posterior.mean)[:, ::4, ::4], tolerance)


def test_sample_has_the_posteriors_moments():
    mean, log_variance = jnp.full((1, 100, 100), 3.0), jnp.full((1, 100, 100), math.log(4.0))
    sample = edt.vae.Gaussian(mean, log_variance).sample(jax.random.key(5))
    # Of 10000 values: standard errors 0.02 and 0.014.
    assert abs(float(sample.mean()) - 3) < 0.08
    assert abs(float(sample.std()) - 2) < 0.06


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.encode(jnp.zeros((3, 8, 10))), "width=10 is not divisible by 4"),
        (lambda v: v.encode(jnp.zeros((3, 9, 8))), "height=9 is not divisible by 4"),
        (lambda v: v.encode(jnp.zeros((1, 8, 8))), "x has 1 channels, .* takes 3"),
        (lambda v: v.decode(jnp.zeros((3, 2, 2))), "z has 3 channels, .* takes 4"),
        (lambda v: autoencoder(norm_num_groups=5), "has 16, which is no positive multiple"),
        (lambda v: autoencoder(block_out_channels=()), "resolutions=0"),
        (lambda v: autoencoder(layers_per_block=0), "layers_per_block=0"),
        (lambda v: autoencoder(latents_std=[1.0] * 4), "latents_std is given alone"),
        (
            lambda v: autoencoder(latents_mean=[0.0] * 4, latents_std=[0.0] * 4),
            "latents_std=.* must be 4 finite numbers, one a channel, all positive",
        ),
        (
            lambda v: autoencoder(
                latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=np.float32(2)
            ),
            "shift_factor=2.0 must be 0",
        ),
    ],
)
def test_wrong_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call(autoencoder())


def test_range():
    check_range(np.array([-1.0, 0.3, 1.0]))
    for wrong in ([0.0, 255.0], [-1.1, 0.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match=r"takes \[-1, 1\]: for bytes, x / 127.5 - 1"):
            check_range(np.array(wrong))


# Against diffusers.


@pytest.fixture
def torch():
    diffusers = pytest.importorskip("diffusers", reason="needs PyTorch and diffusers")
    pytest.importorskip("safetensors", reason="needs safetensors")
    diffusers.utils.logging.set_verbosity_error()
    return pytest.importorskip("torch", reason="needs PyTorch and diffusers")


def theirs(torch, sizes):
    diffusers = pytest.importorskip("diffusers")
    widths = sizes["block_out_channels"]
    model = diffusers.AutoencoderKL(
        **sizes,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(
                0, 0.5 if value.ndim == 1 else value[0].numel() ** -0.5, generator=generator
            )
    return model.eval()


def errors(torch, model, vae, side=16):
    """Of mean, log-variance and image, relative to the range of diffusers'."""
    config = model.config
    shift, scale = config.shift_factor or 0.0, config.scaling_factor
    if config.latents_mean is not None:
        shift, std = (np.reshape(v, (-1, 1, 1)) for v in (config.latents_mean, config.latents_std))
        scale = scale / std
    x = np.random.default_rng(0).uniform(-1, 1, (2, config.in_channels, side, side + 8))
    x = x.astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.tensor(x)).latent_dist
        image = model.decode(posterior.mean).sample.numpy()
    z = (posterior.mean.numpy() - shift) * scale
    ours = jax.jit(jax.vmap(vae.encode))(jnp.asarray(x))
    return [
        difference(z, ours.mean),
        difference(posterior.logvar.numpy(), np.asarray(ours.log_variance) - 2 * np.log(scale)),
        difference(image, jax.jit(jax.vmap(vae.decode))(jnp.asarray(z, np.float32))),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_directions(torch, tmp_path, variant):
    model = theirs(torch, SIZES | VARIANTS[variant])
    model.save_pretrained(tmp_path / "theirs")
    vae = pretrained.load_vae(tmp_path / "theirs")
    found = errors(torch, model, vae)
    assert max(found) < TOLERANCE, found
    pretrained.save_vae(vae, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", *SIZES):
        value = again.config[name]
        assert value == model.config[name] or tuple(value) == tuple(model.config[name])
    reloaded = pretrained.load_vae(tmp_path / "ours")
    assert tree_allclose(reloaded, vae)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_old_attention_names(torch, tmp_path, safe, kernels):
    model = theirs(torch, SIZES)
    model.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / f"{WEIGHTS}.bin"
    old = {}
    for name, value in torch.load(path, weights_only=True).items():
        for new, older in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
            name = name.replace(f"attentions.0.to_{new}.", f"attentions.0.{older}.")
        if kernels and ".attentions." in name and value.ndim == 2:
            value = value[:, :, None, None]
        old[name] = value.contiguous()
    assert sum(".proj_attn." in name for name in old) == 4
    path.unlink()
    if safe:
        from safetensors.torch import save_file

        save_file(old, tmp_path / f"{WEIGHTS}.safetensors")
    else:
        torch.save(old, path)
    found = errors(torch, model, pretrained.load_vae(tmp_path))
    assert max(found) < TOLERANCE, found


def test_pipeline_folders_and_twice_named_keys(torch, tmp_path):
    from safetensors.torch import load_file, save_file

    model = theirs(torch, SIZES)
    folder = tmp_path / "vae"
    model.save_pretrained(folder)
    (tmp_path / "model_index.json").write_text("{}")
    assert tree_allclose(pretrained.load_vae(tmp_path), pretrained.load_vae(folder))
    path = folder / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    query = {"encoder.mid_block.attentions.0.query.bias": torch.ones(32)}
    save_file(state | query, path)
    with pytest.raises(ValueError, match=r"to_q.bias twice, under an older and a newer name"):
        pretrained.load_vae(folder)
    del state["encoder.conv_in.bias"]
    save_file(state | {"encoder.conv_in.beta": torch.ones(16)}, path)
    with pytest.raises(ValueError, match=r"(?s)missing.*conv_in.bias\n.*unexpected.*conv_in.beta"):
        pretrained.load_vae(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types="),
        ({"latents_mean": [0.0] * 4}, "latents_mean is given alone"),
        ({"latents_std": [1.0] * 4}, "latents_std is given alone"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "must be 4 finite numbers"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.5},
            "shift_factor=0.5 must be 0 beside latents_mean",
        ),
        ({"latent_channels": 8}, "latent_channels=8, but the weights in .* have 4"),
        ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny, not of diffusers'"),
    ],
)
def test_other_configs_are_refused(torch, tmp_path, change, message):
    theirs(torch, SIZES).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        pretrained.load_vae(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Written here, so that no PyTorch is needed."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    folder = tmp_path_factory.mktemp("hostile")
    pretrained.save_vae(autoencoder(), folder)
    return folder, (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("in_channels", "sizes"),
        ("out_channels", "sizes"),
        ("latent_channels", "sizes"),
        ("layers_per_block", "sizes"),
        ("block_out_channels", "sizes"),
        ("block_out_channels", [[16] * 10**6, [16, 32, 10**30], [16, 32, 32.5], "abc", []]),
        ("norm_num_groups", "sizes"),
        ("scaling_factor", [0, -1.0, 1e400, math.nan, True, None, "1", [1], 10**400]),
        ("shift_factor", [1e400, math.nan, True, "1", [1], 10**400]),
        ("latents_mean", [0, {}, "abcd", [1.0] * 3, [None] * 4, [math.nan] * 4, [10**400] * 4]),
        ("latents_mean", [[True] * 4, [[1.0]] * 4, [1.0] * 10**6, [-1e31] * 4]),
        (
            "latents_std",
            [[0.0, 1.0, 1.0, 1.0], [-1.0] * 4, [1e-320] * 4, ["1"] * 4, [math.inf] * 4],
        ),
        ("use_quant_conv", [False, None, 1, "yes"]),
        ("use_post_quant_conv", [False, None, 1, "yes"]),
        ("mid_block_add_attention", [False, None, 1, "yes"]),
    ],
)
def test_hostile_configs(folder, name, values):
    """They are refused before a network of such a size is thought of."""
    folder, text = folder
    sizes = [10**30, 10**9, 0, -1, 2.0, 1e400, True, None, "3", [3], {}]
    for value in sizes if values == "sizes" else values:
        (folder / "config.json").write_text(json.dumps(json.loads(text) | {name: value}))
        with pytest.raises(ValueError, match=name) as error:
            pretrained.load_vae(folder)
        assert len(str(error.value)) < 1000
    (folder / "config.json").write_text(text)


@pytest.mark.slow
def test_full_size(torch, tmp_path):
    """The network of Stable Diffusion 1, with random weights, on a small image."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    model = theirs(torch, sizes)
    model.save_pretrained(tmp_path)
    vae = pretrained.load_vae(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(vae)) == 83_653_863
    found = errors(torch, model, vae, side=32)
    assert max(found) < TOLERANCE, found
