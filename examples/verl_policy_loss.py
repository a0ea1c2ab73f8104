"""The drift gate as a policy loss for verl 0.9.1. Put this file and gating.py on PYTHONPATH, load it, and select it:

    export PYTHONPATH=.:examples VERL_USE_EXTERNAL_MODULES=verl_policy_loss
    python -m verl.trainer.main_ppo actor_rollout_ref.actor.policy_loss.loss_mode=opd_drift_gate \
        actor_rollout_ref.actor.ppo_epochs=2 ...

It is verl's vanilla loss, weighted with the gates. For the paper's OPD, loss_agg_mode must be token-mean, the default, and the
advantages log q(y) - log pi_old(y), with q the teacher; verl has no such estimator, so register your own
(register_adv_est). Without ppo_epochs > 1 or several minibatches nothing drifts.

- If an update is one micro-batch on one rank, its gradient is that of train.py (measured difference: 6e-7).
- Otherwise it is an approximation, because the gates have mean 1 in each micro-batch, not over the update: with four
  micro-batches off by .4 % at a mean drift of .08 nats, by 4 % at .55. The loss sees one micro-batch at a time, and cannot
  correct for this.
- verl's own distillation (distillation.enabled=True) accepts no policy loss but vanilla. Its k1 advantage is not the paper's
  either: log q(y) - log pi(y), with the current policy in the place of the old one.
- Leave algorithm.rollout_correction.bypass_mode off: it takes the sampler's log-probs for the old ones, and the gate would
  take the difference between sampler and trainer for drift.

Tested on a CPU through verl's ppo_loss (tests/test_examples.py), not in a whole run.
"""

from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss

from gating import gate_weights


@register_policy_loss("opd_drift_gate")
def opd_drift_gate(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """All tensors are [B, T], a micro-batch of B responses. Returns (loss, metrics)."""
    weights = gate_weights(log_prob, old_log_prob, response_mask, "block", block=64, tau=1.0)
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights
    return compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights
    )
