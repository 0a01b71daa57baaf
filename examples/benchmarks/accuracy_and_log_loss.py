"""Accuracy and log-loss of predicted probabilities, as a script for `evaluate` that needs no network.

    metric = evaluate.load("examples/benchmarks/accuracy_and_log_loss.py")
    metric.compute(predictions=[[0.9, 0.1], [0.4, 0.6]], references=[0, 0])
    {'accuracy': 0.5, 'log_loss': 0.51...}

`evaluate.load("accuracy")` would fetch its code from the Hub.
"""

import datasets
import evaluate
import numpy as np


class AccuracyAndLogLoss(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),  # one probability a class
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description="Share of labels with the highest probability; mean of -log(their probability).",
            citation="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        probabilities, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        of_truth = probabilities[np.arange(len(labels)), labels].clip(min=1e-12)
        return {
            "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
            "log_loss": float(-np.log(of_truth).mean()),
        }
