"""Every difference between the jax versions we support, in one place (tests/test_compat.py)."""
