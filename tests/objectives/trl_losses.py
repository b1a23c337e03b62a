"""TRL's losses of a batch of answers, as functions of the log-probabilities of their tokens.

The trainers' own methods run on a stand-in for the trainer, whose model gives these
log-probabilities.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

BEGIN = 1  # the first token of a text has no log-probability


def _trainer(**fields):
    accelerator = SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda x: x,
    )
    common = {
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "model": SimpleNamespace(training=True),
    }
    return MagicMock(**common, **fields)


def _model(*log_probs):
    """A model that returns (texts, time) log-probabilities, one argument after the other."""
    left = list(log_probs)

    def call(**inputs):
        found = left.pop(0)[:, BEGIN:]
        flat = torch.zeros(found.shape)
        return SimpleNamespace(
            log_probs=found, entropy=flat, mean_logits=flat, is_top1=flat > 0, aux_loss=None
        )

    return call


def _inputs(mask):
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def dpo(log_probs, reference, mask, beta, *, kinds, weights, smoothing=0.0):
    """Loss of (2 n, time) texts: all chosen answers, then all rejected ones."""
    chosen, rejected = (reference * mask).sum(1).chunk(2)
    inputs = _inputs(mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    trainer = _trainer(loss_types=kinds, loss_weights=weights, beta=beta, label_smoothing=smoothing)
    return DPOTrainer._compute_loss(trainer, _model(log_probs), inputs, return_outputs=False)


def means(log_probs, mask):
    return ((log_probs * mask).sum(1) / mask.sum(1)).chunk(2)


def orpo(log_probs, mask, beta):
    """The odds-ratio part: ORPOTrainer's cross-entropy covers the prompts too."""
    losses, *_ = ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), *means(log_probs, mask))
    return -losses.mean()


def simpo(log_probs, mask, beta, gamma, smoothing):
    trainer = _trainer(
        alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=smoothing
    )
    return CPOTrainer.cpo_loss(trainer, *means(log_probs, mask))[0].mean()


def kto(log_probs, reference, others, reference_others, mask, label, **settings):
    """Loss of (n, time) texts with labels, and of texts with another answer for the estimate."""
    batch = _inputs(mask) | {
        "label": label,
        "ref_logps": (reference * mask).sum(1),
        "ref_KL_logps": reference_others.sum(1),
    }
    batch |= {f"KL_{name}": batch[name] for name in _inputs(mask)}
    trainer = _trainer(loss_type="kto", calculate_KL=True, **settings)
    trainer._compute_kl_logps = lambda model, batch: others.sum(1)
    return KTOTrainer._compute_loss(trainer, _model(log_probs), batch, return_outputs=False)
