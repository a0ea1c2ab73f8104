"""The drift gate as a policy loss of verl (0.9.1). Needs verl; put this file and gating.py on PYTHONPATH. Two settings:

    export VERL_USE_EXTERNAL_MODULES=verl_policy_loss                        # loads it, in every worker
    actor_rollout_ref.actor.policy_loss.loss_mode=opd_drift_gate             # selects it

It is verl's vanilla loss (clipping as in losses.opd_loss) with the gates as weights. The advantages are yours: for the
paper's OPD, log q(y) - log pi_old(y). Rollouts must serve several updates, or nothing drifts: ppo_epochs (1 by default)
above 1, or a ppo_mini_batch_size below the train_batch_size. loss_agg_mode must be token-mean, the default.

- With one micro-batch in an update, the gradient is the paper's Eq. 1 (measured: to 1e-7). With several it is not, because
  the gates have mean 1 in each of them: in micro-batches of two responses it was off by .7 % at a mean drift of .04 nats,
  and by 21 % at .7. A loss cannot mend that, since it sees one micro-batch at a time.
- verl's own distillation (distillation.enabled) refuses every policy loss but vanilla, and so this one. Its k1 advantage
  also differs from the paper's: it is log q(y) - log pi(y), of the current policy.
- In bypass mode (algorithm.rollout_correction.bypass_mode) the old log-probs are the sampler's, and how the sampler differs
  from the trainer would read as drift.
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
