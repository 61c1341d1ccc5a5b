"""Exact match on held-out conversations, by kind of question.

One forward pass measures it: greedy decoding reproduces the true answer if and only if each of its tokens is the most
likely one given the true tokens before it.
"""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from mllm_jax.data.pipeline.loader import Info
from mllm_jax.train.evaluators.base import Evaluator, shares
from mllm_jax.train.step.train_step import make_eval_step


class AnswerEvaluator(Evaluator):
    """Computes {"loss": mean per token, "conversations": number, "exact_match": {kind: fraction, "all": fraction}}.

    A conversation matches if all its targets do, each given the true tokens before it. With experts also
    {"expert_load": choices per layer, modality (MODALITIES) and expert, nested lists [Lm][3][E]}.
    """

    def make_step(self) -> Callable:
        return make_eval_step(self.run.model, self.mesh, loss_chunk=self.run.train.loss_chunk)

    def no_records(self) -> dict[str, Any]:
        return {"loss": 0.0, "weight": 0.0, "load": 0, "right": collections.Counter(), "asked": collections.Counter()}

    def add(self, totals: dict[str, Any], found: dict[str, Any], batch: Any, info: Info) -> None:
        totals["loss"] += float(found["loss_sum"])
        totals["weight"] += float(found["weight"])
        totals["load"] = totals["load"] + found.get("load", 0)
        for row, kinds in enumerate(info.kinds):
            for column, kind in enumerate(kinds):
                totals["asked"][kind] += 1
                totals["right"][kind] += int(found["wrong"][row, column] == 0)

    def results(self, totals: dict[str, Any]) -> dict[str, Any]:
        asked, load = totals["asked"], totals["load"]
        results = {"loss": totals["loss"] / max(totals["weight"], 1e-9), "conversations": asked.total()}
        results |= {"exact_match": shares(totals["right"], asked)}
        return results | ({"expert_load": load.tolist()} if np.ndim(load) else {})
