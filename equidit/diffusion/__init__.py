"""Gaussian diffusion as pure functions over tables, one example at a time.

`t` indexes a [`equidit.diffusion.Schedule`][] (0 is the least noisy step); what the network is told
is `schedule.time[t]`, so respacing is nothing but another schedule. References: DDPM is
[Ho et al. 2020](https://arxiv.org/abs/2006.11239), learned variances are
[Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672), DDIM is
[Song et al. 2021](https://arxiv.org/abs/2010.02502).
"""

from .gaussian import (
    Variance as Variance,
    posterior as posterior,
    predict_eps as predict_eps,
    predict_v as predict_v,
    predict_x0 as predict_x0,
    q_sample as q_sample,
    x0_and_eps as x0_and_eps,
)
from .likelihood import BitsPerDim as BitsPerDim, bits_per_dim as bits_per_dim
from .losses import (
    Weight as Weight,
    hybrid_loss as hybrid_loss,
    min_snr_weight as min_snr_weight,
    rescaled_hybrid_loss as rescaled_hybrid_loss,
    simple_loss as simple_loss,
    vlb_loss as vlb_loss,
)
from .predictions import (
    NoiseLevel as NoiseLevel,
    Prediction as Prediction,
    PredictionLike as PredictionLike,
    PredictionName as PredictionName,
    split_output as split_output,
)
from .sampling import sample as sample
from .schedules import (
    Schedule as Schedule,
    Spacing as Spacing,
    cosine_betas as cosine_betas,
    linear_betas as linear_betas,
    space_timesteps as space_timesteps,
)
from .steps import (
    ddim_inversion_step as ddim_inversion_step,
    ddim_step as ddim_step,
    ddpm_step as ddpm_step,
)
from .terms import (
    Likelihood as Likelihood,
    hybrid_terms as hybrid_terms,
    vb_term as vb_term,
)
from .timesteps import (
    LossSecondMoment as LossSecondMoment,
    stratified_timesteps as stratified_timesteps,
)
