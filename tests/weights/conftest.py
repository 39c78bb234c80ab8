"""The tiny models of tests/model."""

from tests.model.conftest import dense_dir, moe_dir

__all__ = ["dense_dir", "moe_dir"]
