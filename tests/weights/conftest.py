"""The tiny models of tests/model."""

from tests.model.conftest import dense_dir, moe_dir, pool1

__all__ = ["dense_dir", "moe_dir", "pool1"]
