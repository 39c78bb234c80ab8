"""The proofs that a user can run: golden cases and layouts."""
