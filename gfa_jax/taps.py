"""Features and feature gradients of any model, without editing it.

Below is a protocol of no framework: a model is ``apply_fn(taps, inputs) -> (logits, features)``,
where ``taps`` is ``{}`` or holds for each feature an array of its shape that the model adds to it.
With zeros, the gradient with respect to a tap is the gradient with respect to the feature, and
differentiating once more gives the second-order terms of the training loss.

On top is the adapter for Flax linen (the only flax import of the library's core). It intercepts
calls of any unmodified module whose path matches a pattern, through ``sow`` and ``perturb`` in
collections of its own, and so works under jit, remat and double differentiation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gfa_jax import _validate, losses
from gfa_jax.types import ApplyFn, Array, Features, LossFn, ModelFn, ModelState, Params, Taps

INPUT = "input"
"""The tap name of the model's own input."""

_FEATURES = "gfa_features"
_TAPS = "gfa_taps"
_SITES = {"output": "gfa_output", "input": "gfa_input"}
_INPUT_SUFFIX = "@input"


# The protocol


def zero_taps(apply_fn: ApplyFn, inputs: Array) -> Taps:
    """Returns additive zeros for every feature at the batch size of ``inputs``.

    Inside jit they cost neither memory nor time. Never store taps: zeros of another batch size
    would broadcast, and the "gradient" of a batch-1 tap is silently the sum over the batch.

    Args:
      apply_fn: ``(taps, inputs) -> (logits, features)``.
      inputs: ``[B, ...]``; only shape and dtype matter.

    Raises:
      ValueError: where a feature does not have the batch as its leading axis.
    """
    features = jax.eval_shape(lambda x: apply_fn({}, x)[1], inputs)
    for name, feature in features.items():
        if feature.shape[:1] != inputs.shape[:1]:
            raise ValueError(
                f"feature {name!r} has shape {feature.shape}, but its leading axis must be the "
                f"batch of {inputs.shape[0]} examples: alignment is defined per example. Tap "
                "another layer."
            )
    return {name: jnp.zeros(feature.shape, feature.dtype) for name, feature in features.items()}


def feature_gradients(
    apply_fn: Callable[[Taps, Array], Any],
    inputs: Array,
    labels: Array,
    *,
    target: str | LossFn = losses.log_odds,
    has_aux: bool = False,
) -> Any:
    """Returns logits, features, and the gradients of a target with respect to the features.

    This takes one forward and one backward pass, and is differentiable with respect to anything
    that ``apply_fn`` closes over.

    Args:
      apply_fn: ``(taps, inputs) -> (logits, features)``, as ``tap_linen`` gives; with ``has_aux``
        it returns ``((logits, features), aux)``.
      inputs: ``[B, ...]``.
      labels: int ``[B]``.
      target: per-example target ``(logits, labels) -> [B]``, by name (``losses.LOSSES``) or as a
        function. Its *sum* over the batch is differentiated, so each example's gradient is its own.
      has_aux: as in ``jax.grad``.

    Returns:
      ``(logits [B, C], features, grads)``; the last two are dicts of ``[B, ...]`` by tap name, with
      equal shapes. With ``has_aux``, ``aux`` is a fourth entry.

    Raises:
      ValueError: for an unknown target, or features without a batch axis.
    """
    target_fn = losses.get(target)

    def summed_target(taps: Taps) -> tuple[Array, tuple[Array, Features, Any]]:
        out, aux = apply_fn(taps, inputs) if has_aux else (apply_fn(taps, inputs), None)
        logits, features = out
        return jnp.sum(target_fn(logits, labels)), (logits, features, aux)

    taps = zero_taps((lambda taps, x: apply_fn(taps, x)[0]) if has_aux else apply_fn, inputs)
    grads, (logits, features, aux) = jax.grad(summed_target, has_aux=True)(taps)
    return (logits, features, grads, aux) if has_aux else (logits, features, grads)


def with_input_tap(apply_fn: ApplyFn) -> ApplyFn:
    """Returns ``apply_fn`` with the model's own input as one more feature, named ``input``."""

    def tapped(taps: Taps, inputs: Array) -> tuple[Array, Features]:
        inner = {name: tap for name, tap in taps.items() if name != INPUT}
        shifted = inputs + taps[INPUT] if INPUT in taps else inputs
        logits, features = apply_fn(inner, shifted)
        return logits, {INPUT: shifted, **features}

    return tapped


# The linen adapter


def tap_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    layers: str | Sequence[str] = (),
    **apply_kwargs: Any,
) -> ApplyFn:
    """Makes ``(taps, inputs) -> (logits, features)`` of an unmodified linen module.

    A pattern is a regular expression that must match a submodule's whole path (``block_0/conv``);
    the tap of its output has that path as its name. With the suffix ``@input`` it taps what goes
    into the submodule (its first argument), which is how to reach values that no module returns,
    such as an activation function's output; the name then ends in ``@input``. The pattern ``input``
    taps the model's own input.

    Args:
      module: any linen module whose ``__call__`` takes the inputs first and returns logits
        ``[B, C]``. Layers inside ``nn.scan`` or ``nn.vmap`` can be tapped only where the module
        itself lifts the collections ``gfa_features`` and ``gfa_taps``.
      variables: its variables, ``{"params": ..., ...}``.
      layers: patterns; none by default.
      **apply_kwargs: passed to ``__call__`` (such as ``train=False``).

    Raises:
      ValueError: at once for a pattern that is not a regular expression; at the first call, before
        compilation, for a pattern that matches nothing (listing what exists), a tapped layer that
        is called twice, or one that does not return one array.
    """
    apply = _linen_apply(module, layers)

    def apply_fn(taps: Taps, inputs: Array) -> tuple[Array, Features]:
        return apply(variables, taps, inputs, (), **apply_kwargs)[0]

    return apply_fn


def linen_model(
    module: nn.Module,
    model_state: ModelState = None,
    *,
    layers: str | Sequence[str] = (),
    mutable: Sequence[str] = ("batch_stats",),
    rngs: Mapping[str, Array] | None = None,
) -> ModelFn:
    """Makes the ``ModelFn`` that objectives take of an unmodified linen module.

    Args:
      module: its ``__call__`` is ``(inputs, train=...) -> logits [B, C]``.
      model_state: the variables other than ``params``, such as ``{"batch_stats": ...}``.
      layers: patterns, as for ``tap_linen``.
      mutable: the collections that a forward pass in training mode updates; those absent from
        ``model_state`` are ignored.
      rngs: keys for stochastic layers.

    Returns:
      ``(params, taps, inputs, *, train) -> ((logits, features), model_state)``; in evaluation mode
      the state comes back unchanged.
    """
    state: dict[str, Any] = dict(model_state or {})
    apply = _linen_apply(module, layers)

    def model(
        params: Params, taps: Taps, inputs: Array, *, train: bool
    ) -> tuple[tuple[Array, Features], ModelState]:
        updated = [name for name in mutable if name in state] if train else []
        variables = {"params": params, **state}
        out, changes = apply(
            variables, taps, inputs, updated, train=train, **({"rngs": rngs} if rngs else {})
        )
        return out, {**state, **changes}

    return model


def _linen_apply(module: nn.Module, layers: str | Sequence[str]) -> Callable[..., Any]:
    """Returns ``(variables, taps, inputs, mutable, **kwargs) -> ((logits, features), updates)``."""
    patterns = _Patterns(layers)

    def apply(
        variables: Mapping[str, Any],
        taps: Taps,
        inputs: Array,
        mutable: Sequence[str],
        **kwargs: Any,
    ) -> tuple[tuple[Array, Features], dict[str, Any]]:
        call = patterns.start_call()

        def inner(taps: Taps, inputs: Array) -> tuple[Array, Features]:
            probes = {_TAPS: _as_collection(taps)} if taps else {}
            with nn.intercept_methods(call.intercept):
                logits, changed = module.apply(
                    {**variables, **probes}, inputs, mutable=[_FEATURES, *mutable], **kwargs
                )
            call.check_matched(module)
            updates.update(changed)
            return logits, _as_features(updates.pop(_FEATURES, {}))

        updates: dict[str, Any] = {}
        apply_fn = with_input_tap(inner) if patterns.input else inner
        return apply_fn(taps, inputs), updates

    return apply


class _Patterns:
    """The compiled layer patterns of one adapter."""

    def __init__(self, layers: str | Sequence[str]) -> None:
        texts = [layers] if isinstance(layers, str) else list(layers)
        self.input = INPUT in texts
        self.sites: list[tuple[str, str, re.Pattern[str]]] = []
        for text in texts:
            if text == INPUT:
                continue
            site = "input" if text.endswith(_INPUT_SUFFIX) else "output"
            try:
                self.sites.append((text, site, re.compile(text.removesuffix(_INPUT_SUFFIX))))
            except re.error as error:
                raise ValueError(
                    f"layers={text!r} is not a valid regular expression: {error}."
                ) from error

    def start_call(self) -> "_TappedCall":
        return _TappedCall(self)


class _TappedCall:
    """The interceptor of one forward trace; it remembers what it saw for error messages."""

    def __init__(self, patterns: _Patterns) -> None:
        self._patterns = patterns
        self._seen: dict[str, None] = {}
        self._matched: set[str] = set()

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name != "__call__" or not context.module.path:
            return next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        self._seen[path] = None
        sites = set()
        for text, site, pattern in self._patterns.sites:
            if pattern.fullmatch(path):
                sites.add(site)
                self._matched.add(text)
        if "input" in sites and args:
            args = (self._tap(context.module, path, "input", args[0]), *args[1:])
        elif "input" in sites and not kwargs:
            raise ValueError(f"layer {path!r} is called without arguments: it has no input to tap.")
        elif "input" in sites:
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: self._tap(context.module, path, "input", kwargs[first])}
        out = next_fun(*args, **kwargs)
        return self._tap(context.module, path, "output", out) if "output" in sites else out

    def _tap(self, module: nn.Module, path: str, site: str, value: Any) -> Array:
        name = path + (_INPUT_SUFFIX if site == "input" else "")
        if not isinstance(value, jax.Array):
            raise ValueError(
                f"layer {name!r} gives {type(value).__name__}, not one array: tap a layer inside "
                "it."
            )
        variable = _SITES[site]
        if module.has_variable(_TAPS, variable):
            shape = jnp.shape(module.get_variable(_TAPS, variable))
            if shape != value.shape:
                raise ValueError(
                    f"the tap of {name!r} has shape {shape}, the feature {value.shape}: make taps "
                    "for this batch with zero_taps. (A tap of batch size 1 would broadcast, and "
                    "its gradient would be the sum over the batch.)"
                )
        value = module.perturb(variable, value, collection=_TAPS)
        if not module.sow(_FEATURES, variable, value):
            raise ValueError(
                f"layer {name!r} cannot be tapped: it lies inside a lifted transform (nn.scan, "
                f"nn.vmap) that hides the collections {_FEATURES!r} and {_TAPS!r}. Add them to "
                "its variable_axes, or tap a layer outside."
            )
        return value

    def check_matched(self, module: nn.Module) -> None:
        for text, _, _ in self._patterns.sites:
            if text not in self._matched:
                paths = sorted(path for path in self._seen if path)
                hint = _validate.suggestion(text.removesuffix(_INPUT_SUFFIX), paths)
                raise ValueError(
                    f"layers={text!r} matches no layer of {type(module).__name__}.{hint} "
                    f"Its layers are: {', '.join(paths)}. A pattern must match the whole path; "
                    "the suffix '@input' taps what goes in."
                )


def _as_collection(taps: Taps) -> dict[str, Any]:
    """Nests taps by module path, as linen stores variables."""
    flat = {}
    for name, tap in taps.items():
        site = "input" if name.endswith(_INPUT_SUFFIX) else "output"
        path = name.removesuffix(_INPUT_SUFFIX)
        flat[(*(path.split("/") if path else ()), _SITES[site])] = tap
    return traverse_util.unflatten_dict(flat)


def _as_features(sown: Mapping[str, Any]) -> Features:
    """Flattens the sown values, in the order of their paths."""
    features = {}
    for (*path, variable), values in traverse_util.flatten_dict(dict(sown)).items():
        name = "/".join(path) + (_INPUT_SUFFIX if variable == _SITES["input"] else "")
        if len(values) != 1:
            raise ValueError(
                f"layer {name!r} is called {len(values)} times in one forward pass; its calls "
                "would share one tap and their gradients would add up. Tap a layer that is called "
                "once."
            )
        features[name] = values[0]
    return features
