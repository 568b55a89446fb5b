"""qwix: a provider that gives a model's products with weights to FP8 kernels.

    provider = Fp8Provider([qwix.QuantizationRule(module_path="mlp.*")])
    model = qwix.quantize_model(model, provider)

Rules choose modules and ops (`module_path`, `op_names`); their quantized types and tile sizes are
not looked at: the recipe is always 1x128 and 128x128. `provider.report` says, after the first run,
what became of each product with a weight. What stayed as it is is also logged, once.
"""

import logging
import warnings

import jax
import jax.numpy as jnp
import qwix
from qwix._src.utils.flax_util import find_param, get_current_module_path

import jax_fp8gemm as fp8


def floats(*arrays) -> bool:
    return all(x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) for x in arrays)


def is_weight(x) -> bool:
    with warnings.catch_warnings():  # qwix 0.1.8 uses what flax 0.12 has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return find_param(x) is not None


def dot_general(lhs, rhs, numbers, dtype=None, *, weight_is_lhs=False, out_sharding=None):
    """lax.dot_general in FP8; the weight has 128x128 scales, whichever side it is on."""
    if not weight_is_lhs:
        at = {"out_sharding": out_sharding}
        return fp8.fp8_dot_general(lhs, rhs, numbers, preferred_element_type=dtype, **at)
    (left, right), (batch, rhs_batch) = numbers
    swapped = (right, left), (rhs_batch, batch)
    y = fp8.fp8_dot_general(rhs, lhs, swapped, preferred_element_type=dtype)
    first, own = len(batch), rhs.ndim - len(right)  # y: batch, rhs's other dims, lhs's other dims
    return y.transpose(*range(first), *range(own, y.ndim), *range(first, own))


class Fp8Provider(qwix.QuantizationProvider):
    """Replaces dot_general, einsum and ragged_dot in modules that a rule matches.

    Attributes:
      report: by module and weight, "FP8" or why it stayed as it is.
    """

    def __init__(self, rules, **kw):
        super().__init__(rules, **kw)
        self.report, self._said = {}, False

    def get_intercept_map(self):
        # NOTE: einsum is one of them since jax caches its inside: what was traced outside of a
        # rule would be used again inside of it.
        ops = {"jax.lax.dot_general": self.dot_general, "jax.lax.ragged_dot": self.ragged_dot}
        return super().get_intercept_map() | ops | {"jax.numpy.einsum": self.einsum}

    def process_model_output(self, method_name, model_output):
        stayed = [f"{name}: {what}" for name, what in self.report.items() if what != "FP8"]
        if stayed and not self._said:
            logging.getLogger(__name__).warning("not in FP8:\n%s", "\n".join(stayed))
        self._said = True
        return super().process_model_output(method_name, model_output)

    def dot_general(self, lhs, rhs, dimension_numbers, *args, **kw):  # names are those of JAX
        if self._get_current_rule_and_op_id("dot_general")[0] is None:
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kw)
        weights = [x.shape for x in (lhs, rhs) if is_weight(x)]
        return self._product(weights, lhs, rhs, dimension_numbers, *args, **kw)

    def einsum(self, spec, *operands, **kw):
        if self._get_current_rule_and_op_id("einsum")[0] is None:
            return jnp.einsum(spec, *operands, **kw)
        weights = [x.shape for x in operands if is_weight(x)]

        def product(*args, **kw):
            return self._product(weights, *args, **kw)

        return jnp.einsum(spec, *operands, _dot_general=product, **kw)

    def ragged_dot(self, lhs, rhs, group_sizes, precision=None, *args, **kw):
        rule = self._get_current_rule_and_op_id("ragged_dot")[0]
        if rule is None or self._stays(rhs, "its operands are not floats", not floats(lhs, rhs)):
            return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision, *args, **kw)
        return fp8.fp8_ragged_dot(lhs, rhs, group_sizes, None, *args, **kw)

    def _product(self, weights, lhs, rhs, numbers, precision=None, dtype=None, **kw):
        dtype = kw.pop("preferred_element_type", dtype)
        found = [x.shape in weights for x in (lhs, rhs)]
        if any(found) and not all(found):
            w = lhs if found[0] else rhs
            out = kw.get("out_sharding") if found[0] else None
            if not (
                self._stays(w, "its operands are not floats", not floats(lhs, rhs))
                or self._stays(w, "nothing is summed", not numbers[0][0])
                or self._stays(w, "it is lhs, and out_sharding is given", out is not None)
            ):
                return dot_general(lhs, rhs, numbers, dtype, weight_is_lhs=found[0], **kw)
        elif not numbers[1][0]:  # with batch dims it is attention
            why = "either side may be the weight" if any(found) else "no weight is found in it"
            self._stays(rhs, why, True)
        return jax.lax.dot_general(lhs, rhs, numbers, precision, dtype, **kw)

    def _stays(self, w, why, applies) -> bool:
        """Whether a reason to leave a product as it is applies; keeps it for the report."""
        name = f"{'/'.join(map(str, get_current_module_path()))} {list(w.shape)}"
        self.report[name] = why if applies else "FP8"
        return applies
