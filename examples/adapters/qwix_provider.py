"""qwix: a provider that gives a model's products with weights to FP8 kernels.

    model = qwix.quantize_model(model, Fp8Provider([qwix.QuantizationRule(module_path="mlp.*")]))

Rules choose modules and ops (`module_path`, `op_names`); their quantized types and tile sizes are
not looked at: the recipe is always 1x128 and 128x128. What FP8 does not take stays as it is.
"""

import functools

import jax
import jax.numpy as jnp
import qwix

import jax_fp8gemm as fp8


def floats(*arrays) -> bool:
    return all(x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) for x in arrays)


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **kw):
    """lax.dot_general, in FP8 where it is [..., k] · [k, n] of floats."""
    (last, first), (batch, _) = dimension_numbers
    dense = not batch and rhs.ndim == 2 and (*last, *first) == (lhs.ndim - 1, 0)
    dtype = preferred_element_type
    if dense and floats(lhs, rhs) and kw.get("out_sharding") is None:
        return fp8.fp8_matmul(lhs, rhs, preferred_element_type=dtype)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, dtype, **kw)


def ragged_dot(lhs, rhs, group_sizes, precision=None, preferred_element_type=None, **kw):
    dtype = preferred_element_type
    if floats(lhs, rhs) and kw.get("group_offset") is None:
        return fp8.fp8_ragged_dot(lhs, rhs, group_sizes, preferred_element_type=dtype)
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision, dtype, **kw)


class Fp8Provider(qwix.QuantizationProvider):
    """Replaces dot_general, einsum and ragged_dot in modules that a rule matches."""

    def get_intercept_map(self):
        # NOTE: einsum is one of them since jax caches its inside: what was traced outside of a
        # rule would be used again inside of it.
        return super().get_intercept_map() | {
            "jax.lax.dot_general": self._of_rule("dot_general", jax.lax.dot_general, dot_general),
            "jax.lax.ragged_dot": self._of_rule("ragged_dot", jax.lax.ragged_dot, ragged_dot),
            "jax.numpy.einsum": self._of_rule(
                "einsum", jnp.einsum, functools.partial(jnp.einsum, _dot_general=dot_general)
            ),
        }

    def _of_rule(self, name, plain, in_fp8):
        def op(*args, **kw):
            rule, _ = self._get_current_rule_and_op_id(name)
            return (plain if rule is None else in_fp8)(*args, **kw)

        return op
