"""What tokens tell about the labels of texts, and whether their code lengths follow that."""

import numpy as np
from comparison import Task
from scipy.stats import rankdata
from scipy.stats import t as student

LEAST_COUNT = 5
"""Tokens seen less often say too little about labels."""


def label_information(task: Task, num_tokens: int) -> np.ndarray:
    """Mutual information in nats of a text's label and whether the token is in it, (V,)."""
    labels = np.asarray(task.splits["train"]["labels"])
    texts = np.bincount(labels, minlength=len(task.labels)).astype(float)
    present = np.zeros((num_tokens, len(texts)))
    for ids, label in zip(task.splits["train"]["input_ids"], labels, strict=True):
        present[list(set(ids)), label] += 1
    information = np.zeros(num_tokens)
    for joint in (present, texts - present):
        share = joint / texts.sum()
        independent = share.sum(1, keepdims=True) * texts / texts.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            information += np.where(share > 0, share * np.log(share / independent), 0).sum(1)
    return information


def ordinary_tokens(task: Task, counts: np.ndarray) -> np.ndarray:
    """Which tokens are words that are seen often enough to say anything of, (V,)."""
    return (counts >= LEAST_COUNT) & ~np.isin(np.arange(len(counts)), task.tokenizer.all_special_ids)


def correlation_at_equal_count(lengths: np.ndarray, information: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Partial Spearman correlation of length and information, log count (to its third power) held fixed."""
    log_count = np.log(counts)
    log_count = (log_count - log_count.mean()) / log_count.std()
    control = np.stack([log_count**power for power in range(4)], axis=1)

    def remainder(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(values)
        return ranks - control @ np.linalg.lstsq(control, ranks, rcond=None)[0]

    correlation = np.corrcoef(remainder(lengths), remainder(information))[0, 1]
    freedom = len(lengths) - control.shape[1] - 1
    statistic = correlation * np.sqrt(freedom / (1 - correlation**2))
    return {
        "correlation": float(correlation),
        "p": float(2 * student.sf(abs(statistic), freedom)),
        "tokens": len(lengths),
    }
