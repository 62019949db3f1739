"""The implementations: each prepares a step of a problem.

``IMPLEMENTATIONS[name](problem)`` hooks the model, imports what it needs, and returns a step: a complete
one (Gramian, given weights, weighted gradient), or the Gramian alone where its name or the problem says so.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.implementations import (
    compiled,
    dattri,
    floor,
    ours,
    per_sample,
    recipe,
    rows,
    tangents,
    torchjd,
)
from benchmarks.problem import Problem, Step

OURS: dict[str, Callable[[Problem], Step]] = {
    "functional": ours.functional,
    "engine": ours.engine,
    "engine-backward": ours.engine_backward,
    "functional-gramian": ours.functional_gramian,
    "engine-gramian": ours.engine_gramian,
    "functional-frugal": ours.functional_frugal,
    "engine-frugal": ours.engine_frugal,
}
PEERS: dict[str, Callable[[Problem], Step]] = {
    "recipe-kept": recipe.rows_kept,
    "recipe-dropped": recipe.rows_dropped,
    "torchjd-autogram": torchjd.autogram,
    "torchjd-autojac": torchjd.autojac,
    "vmap-grad": per_sample.vmap_grad,
    "layer-vjp": per_sample.layer_vjp,
    "opacus": rows.opacus,
    "backpack": rows.backpack,
    "dattri-llm": dattri.dattri_llm,
    "neural-tangents": tangents.neural_tangents,
}
COMPILED: dict[str, Callable[[Problem], Step]] = {
    "functional-compiled": compiled.functional,
    "sgd-compiled": compiled.sgd,
}
USUAL = {
    **OURS,
    **PEERS,
    "floor": floor.activation_backward,
}  # the others on demand: they compile for minutes
IMPLEMENTATIONS = {**USUAL, **COMPILED}
TITLES = {
    "functional": "gramjd functional",
    "engine": "gramjd Engine, `losses.backward(w)`",
    "engine-backward": "gramjd Engine, `J.backward(w)`",
    "functional-gramian": "gramjd functional, Gramian alone",
    "engine-gramian": "gramjd `compute_gramian` alone",
    "functional-frugal": "gramjd functional, smallest `memory_budget`",
    "engine-frugal": "gramjd Engine, smallest `memory_budget`",
    "recipe-kept": "recipe: `vmap(grad)`, rows kept",
    "recipe-dropped": "recipe: `vmap(grad)`, rows dropped, a second backward",
    "torchjd-autogram": "TorchJD autogram",
    "torchjd-autojac": "TorchJD autojac",
    "vmap-grad": "naive `vmap(grad)`",
    "layer-vjp": "`vmap(vjp)` per layer",
    "opacus": "Opacus rows",
    "backpack": "BackPACK rows",
    "dattri-llm": "dattri-llm inner products",
    "neural-tangents": "neural-tangents, its best (JAX)",
    "functional-compiled": "gramjd functional, compiled",
    "sgd-compiled": "SGD step, compiled",
    "floor": "floor: forward, backward of activations",
}
