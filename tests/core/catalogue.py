"""Every transformation Optax ships, and how it fares with `rigl_optax.rigl`.

One list, two readers: the tests run each row, and the documentation prints `rows()`. A call is
text, so that the page shows exactly what was tested. `test_catalogue.py` fails when Optax grows a
name that is in neither `INSIDE`, `AROUND` nor `NOT_TRANSFORMATIONS`.
"""

import functools
import inspect
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax import contrib

WORKS = "works"
NOT_RESET = "works, not reset per weight"
CANNOT = "cannot work"


@dataclass(frozen=True)
class Inside:
    """A transformation used as `rigl(inner, ...)`."""

    name: str
    call: str
    verdict: str = WORKS
    reason: str = ""
    extra: tuple[str, ...] = ()  # extra arguments its update wants

    def make(self) -> optax.GradientTransformation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # deprecated names count, too
            return eval(self.call, {"optax": optax, "contrib": contrib, "jax": jax, "jnp": jnp})


@dataclass(frozen=True)
class Around:
    """A wrapper used as `wrapper(rigl(...))`."""

    name: str
    call: str  # `tx` is the wrapped method
    allowed: bool
    reason: str = ""

    def make(self, tx, **names) -> optax.GradientTransformation:
        return eval(self.call, {"optax": optax, "contrib": contrib, "tx": tx, "jnp": jnp, **names})


def alias(name, arguments, verdict=WORKS, reason="", extra=()):
    return Inside(name, f"{name}({arguments})", verdict, reason, extra)


def before_sgd(name, arguments, verdict=WORKS, reason="", extra=()):
    call = f"optax.chain({name}({arguments}), optax.sgd(1e-2))"
    return Inside(name, call, verdict, reason, extra)


def scaled(name, arguments, verdict=WORKS, reason="", extra=()):
    call = f"optax.chain({name}({arguments}), optax.scale(-1e-2))"
    return Inside(name, call, verdict, reason, extra)


FACTORED = "its statistics are per row and column (or per layer), not per weight"
PER_LAYER = "its second moment is one number per layer"
HISTORY = "its memory is a stack of past weights and gradients, one axis more than a weight has"

ALIASES = (
    alias("optax.adabelief", "1e-2"),
    alias("optax.adadelta", "1.0, weight_decay=1e-2"),
    alias("optax.adafactor", "1e-2, min_dim_size_to_factor=4", NOT_RESET, FACTORED),
    alias("optax.adafactor", "1e-2, momentum=0.9, weight_decay_rate=1e-3", NOT_RESET, FACTORED),
    alias("optax.adagrad", "1e-2"),
    alias("optax.adam", "1e-2"),
    alias("optax.adam", "1e-2, nesterov=True, mu_dtype=jnp.bfloat16"),
    alias("optax.adamax", "1e-2"),
    alias("optax.adamaxw", "1e-2, weight_decay=1e-2"),
    alias("optax.adamw", "1e-2, weight_decay=1e-2"),
    alias("optax.adan", "1e-2, weight_decay=1e-2"),
    alias("optax.amsgrad", "1e-2"),
    alias("optax.fromage", "1e-2"),
    alias("optax.lamb", "1e-2, weight_decay=1e-2"),
    alias("optax.lars", "1e-1, weight_decay=1e-2"),
    alias("optax.lbfgs", "1e-2, linesearch=None", NOT_RESET, HISTORY),
    alias("optax.lion", "1e-2, weight_decay=1e-2"),
    alias("optax.nadam", "1e-2"),
    alias("optax.nadamw", "1e-2, weight_decay=1e-2"),
    alias("optax.noisy_sgd", "1e-2, key=0"),
    alias("optax.novograd", "1e-2, weight_decay=1e-2", NOT_RESET, PER_LAYER),
    alias("optax.optimistic_adam_v2", "1e-2"),
    alias("optax.optimistic_gradient_descent", "1e-2"),
    alias("optax.polyak_sgd", "", extra=("value",)),
    alias("optax.radam", "1e-2"),
    alias("optax.rmsprop", "1e-2, momentum=0.9, centered=True"),
    alias("optax.rprop", "1e-2"),
    alias("optax.sgd", "1e-1"),
    alias("optax.sgd", "1e-1, momentum=0.9, nesterov=True"),
    alias("optax.sign_sgd", "1e-2"),
    alias("optax.signum", "1e-2"),
    alias("optax.sm3", "1e-2", NOT_RESET, "its accumulators belong to rows and columns"),
    alias("optax.yogi", "1e-2"),
    alias(
        "contrib.acprop",
        "1e-2",
        CANNOT,
        "divides by the previous second moment, which the reset just made zero",
    ),
    alias("contrib.ademamix", "1e-2, weight_decay=1e-2"),
    alias("contrib.adopt", "1e-2"),
    alias("contrib.cocob", "weight_decay=1e-2"),
    alias("contrib.dadapt_adamw", "weight_decay=1e-2"),
    alias("contrib.dog", "weight_decay=1e-2"),
    alias("contrib.dowg", "weight_decay=1e-2"),
    alias(
        "contrib.galore",
        "1e-2, rank=2, weight_decay=1e-2",
        NOT_RESET,
        "its moments live in a projected space",
    ),
    alias("contrib.madgrad", "1e-2, weight_decay=1e-2"),
    alias("contrib.momo", "weight_decay=1e-2", extra=("value",)),
    alias("contrib.momo_adam", "weight_decay=1e-2", extra=("value",)),
    alias("contrib.muon", "1e-2, weight_decay=1e-2, adam_weight_decay=1e-2"),
    alias("contrib.prodigy", "weight_decay=1e-2"),
    alias("contrib.schedule_free_adamw", "1e-2, weight_decay=1e-2"),
    alias("contrib.schedule_free_sgd", "1e-2, weight_decay=1e-2"),
    alias("contrib.simplified_ademamix", "1e-2, weight_decay=1e-2"),
    alias("contrib.sophia", "1e-2", extra=("obj_fn",)),
)

PIECES = (
    before_sgd("optax.adaptive_grad_clip", "0.1"),
    before_sgd("optax.add_decayed_weights", "1e-2"),
    before_sgd("optax.add_noise", "0.1, 0.5, key=0"),
    before_sgd("optax.apply_every", "2"),
    before_sgd("optax.centralize", ""),
    before_sgd("optax.clip", "0.1"),
    before_sgd("optax.clip_by_block_rms", "0.1"),
    before_sgd("optax.clip_by_global_norm", "0.1"),
    before_sgd("optax.ema", "0.9"),
    before_sgd("optax.freeze", "{'dense': {'kernel': False, 'bias': True}, 'conv': False}"),
    before_sgd("optax.identity", ""),
    Inside(
        "optax.keep_params_nonnegative",
        "optax.chain(optax.sgd(1e-2), optax.keep_params_nonnegative())",
    ),
    before_sgd("optax.normalize_by_update_norm", ""),
    before_sgd("optax.set_to_zero", ""),
    Inside(
        "optax.snapshot",
        "optax.chain(optax.sgd(1e-2), optax.snapshot('norm', optax.tree.norm))",
    ),
    before_sgd("optax.stateless", "lambda updates, params: updates"),
    before_sgd("optax.stateless_with_tree_map", "lambda g, p: g + 0.01 * p"),
    before_sgd("optax.trace", "0.9"),
    before_sgd("optax.zero_nans", ""),
    scaled("optax.scale", "2.0"),
    scaled("optax.scale_by_adadelta", ""),
    scaled("optax.scale_by_adam", ""),
    scaled("optax.scale_by_adamax", ""),
    scaled("optax.scale_by_adan", ""),
    scaled("optax.scale_by_amsgrad", ""),
    scaled("optax.scale_by_belief", ""),
    scaled(
        "optax.scale_by_distance_over_gradients",
        "",
        NOT_RESET,
        "it measures the distance each layer has moved, not each weight",
    ),
    scaled("optax.scale_by_factored_rms", "min_dim_size_to_factor=4", NOT_RESET, FACTORED),
    scaled("optax.scale_by_lbfgs", "", NOT_RESET, HISTORY),
    Inside("optax.scale_by_learning_rate", "optax.scale_by_learning_rate(1e-2)"),
    scaled("optax.scale_by_lion", ""),
    scaled("optax.scale_by_novograd", "", NOT_RESET, PER_LAYER),
    scaled("optax.scale_by_optimistic_gradient", ""),
    scaled("optax.scale_by_param_block_norm", ""),
    scaled("optax.scale_by_param_block_rms", ""),
    scaled("optax.scale_by_polyak", "", extra=("value",)),
    scaled("optax.scale_by_radam", ""),
    scaled("optax.scale_by_rms", ""),
    scaled("optax.scale_by_rprop", "1e-2"),
    scaled("optax.scale_by_rss", ""),
    Inside("optax.scale_by_schedule", "optax.scale_by_schedule(lambda t: -0.1 / (1 + t))"),
    scaled("optax.scale_by_sign", ""),
    scaled("optax.scale_by_sm3", "", NOT_RESET, "its accumulators belong to rows and columns"),
    scaled("optax.scale_by_stddev", ""),
    scaled("optax.scale_by_trust_ratio", ""),
    scaled("optax.scale_by_yogi", ""),
    scaled("optax.scale_by_backtracking_linesearch", "3", extra=("value", "grad", "value_fn")),
    Inside(
        "optax.scale_by_zoom_linesearch",
        "optax.lbfgs()",
        CANNOT,
        "a line search stores the value and gradient of the next point, which are those of a "
        "masked update: `value_and_grad_from_state` then reads stale, masked gradients, and a "
        "rewiring has nothing to grow by",
        ("value", "grad", "value_fn"),
    ),
    scaled(
        "contrib.scale_by_acprop",
        "",
        CANNOT,
        "divides by the previous second moment, which the reset just made zero",
    ),
    scaled("contrib.scale_by_ademamix", ""),
    scaled("contrib.scale_by_adopt", ""),
    scaled("contrib.scale_by_cocob", ""),
    scaled("contrib.scale_by_galore", "rank=2", NOT_RESET, "its moments live in a projected space"),
    scaled("contrib.scale_by_madgrad", "1e-2"),
    scaled("contrib.scale_by_simplified_ademamix", ""),
    before_sgd("contrib.normalize", ""),
    before_sgd("contrib.reduce_on_plateau", "", extra=("value",)),
)

WRAPPERS = (
    Inside("optax.apply_if_finite", "optax.apply_if_finite(optax.adamw(1e-2), 3)"),
    Inside("optax.chain", "optax.chain(optax.clip(1.0), optax.adamw(1e-2))"),
    Inside(
        "optax.named_chain", "optax.named_chain(('a', optax.clip(1.0)), ('b', optax.adamw(1e-2)))"
    ),
    Inside(
        "optax.conditionally_mask",
        "optax.conditionally_mask(optax.adamw(1e-2), lambda step: step % 2 == 0)",
    ),
    Inside(
        "optax.conditionally_transform",
        "optax.conditionally_transform(optax.adamw(1e-2), lambda step: step % 2 == 0)",
    ),
    Inside(
        "optax.flatten",
        "optax.flatten(optax.adam(1e-2))",
        NOT_RESET,
        "all weights become one vector, in which no number belongs to a weight by name",
    ),
    Inside("optax.inject_hyperparams", "optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)"),
    Inside(
        "optax.inject_stateful_hyperparams",
        "optax.inject_stateful_hyperparams(optax.adamw)(learning_rate=1e-2)",
    ),
    Inside(
        "optax.masked",
        "optax.masked(optax.adamw(1e-2), {'dense': {'kernel': True, 'bias': False}, 'conv': True})",
    ),
    Inside("optax.MultiSteps", "optax.MultiSteps(optax.adamw(1e-2), 3).gradient_transformation()"),
    Inside(
        "optax.multi_transform",
        "optax.multi_transform({0: optax.adamw(1e-2), 1: optax.sgd(1e-1)}, "
        "{'dense': {'kernel': 0, 'bias': 1}, 'conv': 1})",
    ),
    Inside(
        "optax.partition",
        "optax.partition({0: optax.adamw(1e-2), 1: optax.sgd(1e-1, momentum=0.9)}, "
        "{'dense': {'kernel': 0, 'bias': 1}, 'conv': 1})",
    ),
    Inside(
        "optax.selective_transform",
        "optax.selective_transform(optax.adamw(1e-2), "
        "freeze_mask={'dense': {'kernel': False, 'bias': True}, 'conv': False})",
    ),
    Inside("optax.with_extra_args_support", "optax.with_extra_args_support(optax.adamw(1e-2))"),
    Inside(
        "contrib.sam",
        "contrib.sam(optax.sgd(1e-2), optax.sgd(0.1), sync_period=2, opaque_mode=True)",
        extra=("grad_fn",),
    ),
    Inside("contrib.mechanize", "contrib.mechanize(optax.adamw(1e-2))"),
    Inside("contrib.schedule_free", "contrib.schedule_free(optax.adamw(1e-2), 1e-2)"),
    Inside(
        "contrib.split_real_and_imaginary", "contrib.split_real_and_imaginary(optax.adamw(1e-2))"
    ),
)

REFUSED = (
    Inside(
        "optax.lookahead",
        "optax.lookahead(optax.sgd(1e-2), 3, 0.5)",
        CANNOT,
        "fast and slow weights would have masks of their own: `init` refuses `LookaheadParams`",
    ),
    Inside(
        "contrib.sam",
        "contrib.sam(optax.sgd(1e-2), optax.sgd(0.1), sync_period=2)",
        CANNOT,
        "takes turns between adversarial steps and real ones, and rewirings replace some of "
        "either (all real ones at `every=2`): `init` refuses it; with `opaque_mode=True` it works",
    ),
    Inside(
        "optax.partition",
        "optax.partition({0: optax.adamw(1e-2), 1: optax.set_to_zero()}, "
        "{'dense': {'kernel': 0, 'bias': 0}, 'conv': 1})",
        CANNOT,
        "rewirings would go on in a sparse layer that never learns: `init` refuses it",
    ),
    Inside(
        "optax.selective_transform",
        "optax.selective_transform(optax.adamw(1e-2), "
        "freeze_mask={'dense': {'kernel': False, 'bias': True}, 'conv': True})",
        CANNOT,
        "rewirings would go on in a sparse layer that never learns: `init` refuses it",
    ),
    Inside(
        "optax.freeze",
        "optax.chain(optax.sgd(1e-2, momentum=0.9), "
        "optax.freeze({'dense': {'kernel': False, 'bias': True}, 'conv': True}))",
        CANNOT,
        "rewirings would go on in a sparse layer that never learns: `init` refuses it",
    ),
)

INSIDE = ALIASES + PIECES + WRAPPERS + REFUSED

AROUND = (
    Around("optax.chain", "optax.chain(optax.clip_by_global_norm(0.1), tx)", True),
    Around("optax.named_chain", "optax.named_chain(('clip', optax.clip(0.1)), ('rigl', tx))", True),
    Around("optax.apply_if_finite", "optax.apply_if_finite(tx, 3)", True),
    Around("optax.MultiSteps", "optax.MultiSteps(tx, 2).gradient_transformation()", True),
    Around("optax.with_extra_args_support", "optax.with_extra_args_support(tx)", True),
    Around(
        "optax.masked",
        "optax.masked(tx, {'dense': {'kernel': True, 'bias': False}, 'conv': True})",
        True,
    ),
    Around(
        "optax.partition",
        "optax.partition({0: tx, 1: other}, {'dense': {'kernel': 0, 'bias': 1}, 'conv': 1})",
        True,
    ),
    Around(
        "optax.inject_hyperparams", "optax.inject_hyperparams(factory)(learning_rate=1e-1)", True
    ),
    Around(
        "optax.scale",
        "optax.chain(tx, optax.scale(0.5))",
        False,
        "halves the `-param` that would bring an inactive weight to zero",
    ),
    Around(
        "optax.add_decayed_weights",
        "optax.chain(tx, optax.add_decayed_weights(1e-2))",
        False,
        "adds to the updates of inactive weights",
    ),
    Around(
        "optax.add_noise",
        "optax.chain(tx, optax.add_noise(0.1, 0.5, key=0))",
        False,
        "adds noise to the updates of inactive weights",
    ),
    Around(
        "optax.lookahead",
        "optax.lookahead(tx, 3, 0.5)",
        False,
        "its slow weights average networks of different topologies",
    ),
    Around(
        "contrib.schedule_free",
        "contrib.schedule_free(tx, 1e-1)",
        False,
        "interpolates between weights and their average, of different topologies",
    ),
    Around(
        "contrib.mechanize",
        "contrib.mechanize(tx)",
        False,
        "rescales the accumulated updates, with them the `-param` of a dropped weight",
    ),
    Around(
        "contrib.sam",
        "contrib.sam(tx, optax.chain(contrib.normalize(), optax.sgd(0.1)), sync_period=2)",
        False,
        "it casts the whole state, masks included, to integers; and its adversarial step moves "
        "inactive weights",
    ),
)

NOT_TRANSFORMATIONS = {
    "optax.monitor": "observes; its state gains leaves at the first update, which no loop carries",
    "optax.measure_with_ema": "observes, inside monitor",
    "contrib.scale_by_muon": "a part of muon, which picks the leaves it can take",
    "optax.GradientTransformation": "a type",
    "optax.GradientTransformationExtraArgs": "a type",
    "optax.WrappedSchedule": "a schedule",
    "optax.optimistic_adam": "deprecated; use optimistic_adam_v2",
    "contrib.differentially_private_aggregate": "takes per-example gradients, one axis too many",
    "contrib.dpsgd": "takes per-example gradients, one axis too many",
    "contrib.hutchinson_estimator_diag_hessian": "a part of sophia; returns no updates",
}


def public_transformations() -> set[str]:
    """Names in Optax that make a gradient transformation, by annotation or by what they are."""
    names = set()
    for module, prefix in ((optax, "optax"), (contrib, "contrib")):
        for name in dir(module):
            thing = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(thing):
                continue
            if inspect.isclass(thing):
                if hasattr(thing, "init") and hasattr(thing, "update"):
                    names.add(f"{prefix}.{name}")
            elif isinstance(thing, functools.partial):
                if "GradientTransformation" in str(inspect.signature(thing).return_annotation):
                    names.add(f"{prefix}.{name}")
            elif inspect.isfunction(thing):
                returns = inspect.signature(thing).return_annotation
                source = inspect.getsource(thing)
                unannotated = returns is inspect.Signature.empty and (
                    "GradientTransformation" in source or "chain(" in source
                )
                if "GradientTransformation" in str(returns) or unannotated:
                    names.add(f"{prefix}.{name}")
    return names


def rows() -> list[dict[str, str]]:
    """The matrix, for the documentation."""
    inside = [
        {"where": "inside", "name": e.name, "call": e.call, "verdict": e.verdict, "why": e.reason}
        for e in INSIDE
    ]
    around = [
        {
            "where": "around",
            "name": e.name,
            "call": e.call.replace("tx", "rigl(...)").replace("other", "rigl(...)"),
            "verdict": WORKS if e.allowed else CANNOT,
            "why": e.reason,
        }
        for e in AROUND
    ]
    return inside + around
