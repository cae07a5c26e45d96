"""The golden arrays of the original network and diffusion, and how far the library is from them.

Every function returns the errors by name, relative to the golden's largest entry, so that
`test_mutations.py` can show that a wrong implementation is seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import golden, official

import equidit as edt
from equidit import diffusion as dfn

# A right float32 implementation is within 1e-6; the mildest wrong one, exact GELU, 3.5e-6 off.
NETWORK_TOLERANCE = 2e-6
# PyTorch's float32 exp is one unit in the last place off at 2 of the 128 frequencies, ours at none.
# Times t = 999 that is 2.9e-5 in the features and shows in what is made of them alone.
FROM_FREQUENCIES = {"timestep_features": 3e-5, "timestep_embedding": 3e-6, "conditioning": 3e-6}
# Rounding to float32 is 6e-8; the DDIM step's direction is a difference that loses a digit.
DIFFUSION_TOLERANCE = 1e-6
NUM_HEADS = {"dit_tiny": 2, "dit_tiny_unit": 4}
INPUTS = {"x", "t", "label", "cfg_x", "cfg_t", "cfg_label"}


def _error(value: Any, target: np.ndarray) -> float:
    assert value.shape == target.shape
    return float(np.abs(np.asarray(value, np.float64) - target).max() / np.abs(target).max())


def network(name: str, num_heads: int | None = None) -> edt.DiT:
    heads = NUM_HEADS[name] if num_heads is None else num_heads
    return edt.pretrained.from_state_dict(official(golden(name)), num_heads=heads)


def network_errors(name: str, n: edt.DiT | None = None) -> dict[str, float]:
    arrays = golden(name)
    n = network(name) if n is None else n
    x, t, label = (jnp.asarray(arrays[key]) for key in ("x", "t", "label"))
    t, label = t.astype(jnp.int32), label.astype(jnp.int32)

    def values(n: edt.DiT, x: Any, t: Any, label: Any) -> dict[str, Any]:
        first, second = n.blocks.unstack()
        patches = n.patch_embed(edt.patchify(x, 2))
        tokens = patches + edt.sincos_2d(patches.shape[1], (4, 4))
        cond = n.conditioner(t, label)
        block0 = first(tokens, cond)
        block1 = second(block0, cond)
        return {
            "patch_embedding": patches,
            "timestep_features": edt.timestep_features(t),
            "timestep_embedding": n.conditioner.timestep(t),
            "label_embedding": n.conditioner.label(label),
            "conditioning": cond.vector,
            "block_in": tokens,
            "attention_out": first.attention(tokens),
            "mlp_out": first.mlp(tokens),
            "block0_out": block0,
            "block1_out": block1,
            "final_layer_out": n.final(block1, cond),
            "out": n(x, t, label),
        }

    results = jax.jit(jax.vmap(values, (None, 0, 0, 0)))(n, x, t, label)
    guided = edt.guide(n, 4.0, jnp.int32(n.conditioner.null), channels=3)
    cfg_x, cfg_t, cfg_label = (jnp.asarray(arrays[key]) for key in ("cfg_x", "cfg_t", "cfg_label"))
    results["cfg3_scale4"] = jax.jit(lambda g, *args: jax.vmap(g, (0, None, 0))(*args))(
        guided, cfg_x, cfg_t.astype(jnp.int32), cfg_label.astype(jnp.int32)
    )
    results["state_dict/pos_embed"] = edt.sincos_2d(n.patch_embed.weight.shape[0], (4, 4))[None]
    targets = {
        key
        for key in arrays
        if key not in INPUTS
        and (key == "state_dict/pos_embed" or not key.startswith("state_dict/"))
    }
    assert targets == results.keys()
    return {key: _error(value, arrays[key]) for key, value in results.items()}


def network_failures(errors: dict[str, float]) -> dict[str, float]:
    """Errors that no right implementation makes."""
    return {k: e for k, e in errors.items() if e > FROM_FREQUENCIES.get(k, NETWORK_TOLERANCE)}


def diffusion_errors(spec: str) -> dict[str, float]:
    arrays = golden("diffusion")
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, spec))
    x0, noise, output = (jnp.asarray(arrays[key]) for key in ("x0", "noise", "model_output"))
    t = jnp.asarray(arrays[f"{spec}/t"]).astype(jnp.int32)
    key = jax.random.key(3)

    def values(x0: Any, noise: Any, output: Any, xt: Any, t: Any) -> dict[str, Any]:
        mse, vb = dfn.hybrid_terms(schedule, output, x0, xt, t, noise)
        return {
            "x_t": dfn.q_sample(schedule, x0, t, noise),
            "hybrid_mse": mse,
            "hybrid_vb": vb,
            "hybrid_loss": mse + vb,
            "p_pred_xstart": dfn.predict_x0(schedule, xt, t, output[:4]),
            "ddim_step_eta0": dfn.ddim_step(lambda *_: output, schedule, xt, t, None, key=key),
            "ddpm_step": dfn.ddpm_step(lambda *_: output, schedule, xt, t, None, key=key),
        }

    results = jax.jit(jax.vmap(values))(x0, noise, output, jnp.asarray(arrays[f"{spec}/x_t"]), t)
    # The step's own noise, known from its key, turns the golden mean and variance into a golden.
    z = np.asarray(jax.random.normal(key, x0.shape[1:]))[None]
    deviation = (
        np.exp(arrays[f"{spec}/p_log_variance"] / 2) * (np.asarray(t) > 0)[:, None, None, None]
    )
    targets = {k.removeprefix(f"{spec}/"): v for k, v in arrays.items() if k.startswith(f"{spec}/")}
    targets["ddpm_step"] = targets.pop("p_mean") + deviation * z
    for name in ("t", "p_log_variance"):
        del targets[name]
    tables = {name: getattr(schedule, name) for name, v in targets.items() if v.dtype == np.float64}
    return {name: _error(value, targets[name]) for name, value in (results | tables).items()}
