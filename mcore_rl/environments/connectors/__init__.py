"""Tasks and environments of other packages, each of which is an extra of this one."""
