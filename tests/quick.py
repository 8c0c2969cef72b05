"""`jax.jit` for programs that run once: half of XLA's time goes into optimising what a test never repeats."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
